"""The state of a transformation, and the slots of each leaf in it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Hyperparameter
from lionax.core.layout import Layout, Stage
from lionax.core.rule import Definition
from lionax.core.settings import Settings
from lionax.core.tree import Leaves, placeholder

__all__ = ["State", "init_state", "slots_of_leaves", "trees_of_slots"]


class State(NamedTuple):
    """The state of a transformation.

    ``rules`` has the shape of the definition: a rule's NamedTuple, whose fields are trees like the
    parameters; a tuple of these for a chain; a dict for a named chain or a partition. A rule
    without slots has ``optax.EmptyState()``, a leaf on which a rule does not act
    ``optax.MaskedNode()``.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 []: steps made
    hyperparameters: dict[str, Hyperparameter]  # learning rates, and what was injected
    rules: Any  # the slots


def init_state(definition: Definition, params: Any) -> State:
    """The state of a definition for a parameter tree."""
    leaves = Leaves.of(params, params)
    layout = Layout.of(definition, leaves)
    count = jnp.zeros((), jnp.int32)
    slots = [_init_stage(stage, leaves) for stage in layout.stages]
    return State(count, Settings(layout.stages, count, None).record(), layout.pack(iter(slots)))


def _init_stage(stage: Stage, leaves: Leaves) -> Any:
    if stage.is_tree_wide:
        return stage.rule.init(leaves.tree(leaves.values, stage.active))
    slots = []
    for value, path, is_active in zip(leaves.values, leaves.paths, stage.active, strict=True):
        if is_active:
            stage.rule.check_dtype(value, f"the parameter {path!r}")
        slots.append(stage.rule.init(value) if is_active else None)
    return trees_of_slots(slots, stage, leaves)


def trees_of_slots(slots: Sequence[Any], stage: Stage, leaves: Leaves) -> Any:
    """The state of a rule, whose fields are trees, from the slots of each leaf or None."""
    example = next((slot for slot in slots if slot is not None), None)
    if example is None:  # the slots of a scalar have the same fields
        example = jax.eval_shape(stage.rule.init, jax.ShapeDtypeStruct((), jnp.float32))
    columns = [[placeholder(value) if slot is None else getattr(slot, field)
                for value, slot in zip(leaves.values, slots, strict=True)]
               for field in example._fields]
    return type(example)(*map(leaves.treedef.unflatten, columns))


def slots_of_leaves(state: Any, stage: Stage, leaves: Leaves) -> list[Any]:
    """The inverse of `trees_of_slots`."""
    try:
        columns = [leaves.treedef.flatten_up_to(tree) for tree in state]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{stage.rule.name}: its state does not have the structure of the "
                         f"gradients; make it with tx.init(params) ({error})") from None
    rows = zip(*columns, strict=True) if columns else [()] * len(leaves.values)
    return [type(state)(*row) for row in rows]
