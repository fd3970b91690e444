"""The state of a transformation, and the slots of each leaf in it."""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core.definition import is_stateless
from lionax.core.hyperparameters import Hyperparameters, register_with_flax
from lionax.core.inspection import contents_table, described, kind_of
from lionax.core.layout import Layout, Stage, StateError
from lionax.core.placement import check_whole
from lionax.core.quantized import encode, is_quantized
from lionax.core.rule import Definition, Rule, at_path, check_paths
from lionax.core.settings import Settings
from lionax.core.storage import load
from lionax.core.table import shown
from lionax.core.tree import Leaves, placeholder
from lionax.core.varying import Split

__all__ = ["State", "explained", "init_state", "needs_no_state",
           "slots_of_leaves", "state_of_step", "trees_of_slots"]


class State(NamedTuple):
    """The state of a transformation.

    ``rules`` has the shape of the definition: a rule's NamedTuple, whose fields are trees like the
    parameters; a tuple of these for a chain; a dict for a named chain or a partition. A rule
    without slots has ``optax.EmptyState()``, a leaf on which a rule does not act
    ``optax.MaskedNode()``.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 []: steps made
    hyperparameters: Hyperparameters  # learning rates, and what was injected
    rules: Any  # the slots

    def __repr__(self) -> str:
        return described(self)

    def _repr_html_(self) -> str:
        return contents_table(self).html()

    def __reduce__(self) -> Any:
        check_whole(self)
        return State, tuple(self)

    def __copy__(self) -> "State":  # `copy` would ask `__reduce__`
        return State._make(self)

    def __deepcopy__(self, memo: Any) -> "State":
        return State._make(copy.deepcopy(tuple(self), memo))


def init_state(definition: Definition, params: Any) -> Any:
    """The state of a definition for a parameter tree; ``optax.EmptyState()`` if it needs none."""
    leaves = Leaves.of(params, params)
    layout = Layout.of(definition, leaves)
    count = jnp.zeros((), jnp.int32)
    slots = [_init_stage(stage, leaves) for stage in layout.stages]
    if is_stateless(definition):
        return optax.EmptyState()
    register_with_flax()
    return State(count, Settings(layout.stages, count, None).record(), layout.pack(iter(slots)))


def needs_no_state(definition: Definition, state: Any) -> bool:
    """Whether a step keeps nothing; after a traced `init` a rate is the caller's to hold."""
    is_empty = isinstance(state, optax.EmptyState)
    return is_stateless(definition) or (is_empty and is_stateless(definition, but_for_rates=True))


def state_of_step(state: Any, layout: Layout) -> State:
    """The state; an empty one for a definition that needs none."""
    if needs_no_state(layout.definition, state):
        rules = layout.pack(iter([optax.EmptyState()] * len(layout.stages)))
        return State(jnp.zeros((), jnp.int32), Hyperparameters({}, {}, ()), rules)
    if isinstance(state, State):
        if kind_of(state.count) != ("whole numbers", "shape ()"):
            raise StateError(f"the state counts {shown(state.count)} steps; give a whole number "
                             "of 32 bits, of shape ()")
        return state
    keys = f", and has the keys {list(state)[:9]}" if isinstance(state, dict) else ""
    raise TypeError(f"{', '.join(stage.rule.name for stage in layout.stages)}: the state is a "
                    f"{type(state).__name__}, not a lionax State{keys}; make it with "
                    "tx.init(params), restore a checkpoint into tx.init(params), and call "
                    "step(params, state, grads) or update(grads, state, params). What was restored "
                    "without its structure, lionax.cast_state(state, tx.init(params)) takes; a run "
                    "of Optax, lionax.compat.from_optax")


@contextlib.contextmanager
def explained(definition: Definition, state: Any, tree: Any) -> Iterator[None]:
    """Tells where the state differs from the definition's, if a step on such a tree fails."""
    try:
        yield
    except Exception as error:
        is_mixed = isinstance(error, jax.dtypes.TypePromotionError)
        difference = _first_difference(state, definition, tree, is_mixed) if (
            isinstance(state, State)) else ""
        if not difference and not isinstance(error, StateError | OverflowError):
            raise
        kind = TypeError if isinstance(error, TypeError) else StateError
        what = next(iter(str(error).splitlines()), "")
        if not isinstance(error, StateError):
            what = f"{type(error).__name__}: {what}"
        difference = difference or "The first difference: it has other containers or numbers"
        raise kind(f"{what}. {difference}. lionax.cast_state(state, tx.init(params)) moves what "
                   "both have") from error


def _first_difference(state: Any, definition: Definition, tree: Any, of_dtypes: bool) -> str:
    """Where a state differs from the one that a definition has for a tree; "" if nowhere."""
    def kinds(leaf: Any) -> tuple[str, ...]:
        dtype = getattr(leaf, "dtype", None)
        return (*kind_of(leaf), f"dtype {dtype}") if of_dtypes else kind_of(leaf)

    try:
        like = jax.eval_shape(lambda tree: init_state(definition, tree), tree)
    except Exception:  # the tree is what is wrong
        return ""
    given, expected = ([(jax.tree_util.keystr(keys), *kinds(leaf)) for keys, leaf in
                        jax.tree_util.tree_flatten_with_path(tree)[0]] for tree in (state, like))
    pairs = itertools.zip_longest(given, expected, fillvalue=("nothing",))
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), ((), ()))
    return (f"The first difference: the state has {', '.join(ours)}, the transformation "
            f"{', '.join(theirs)}" if ours else "")


def _init_stage(stage: Stage, leaves: Leaves) -> Any:
    if stage.is_tree_wide:
        return stage.rule.init(leaves.tree(leaves.values, stage.active))
    check_paths(stage.rule, leaves.keys)
    slots = []
    for value, path, split, is_active in zip(
            leaves.values, leaves.paths, leaves.splits, stage.active, strict=True):
        if is_active:
            stage.rule.check_leaf(value, f"the parameter {path!r}")
        try:
            slots.append(_init_leaf(at_path(stage.rule, path), value, split) if is_active else None)
        except TypeError as error:
            raise TypeError(f"{stage.rule.name}: {path!r}: {error}") from None
    return trees_of_slots(slots, stage, leaves)


def _init_leaf(rule: Rule, param: jax.Array, split: Split | None) -> Any:
    """The slots of a leaf; of a shard in the format of the whole leaf."""
    slots = rule.init(param)
    if split is None:
        return slots
    whole = jax.eval_shape(rule.init, jax.ShapeDtypeStruct(split.whole(param.shape), param.dtype))
    return jax.tree.map(
        lambda like, slot: encode(load(slot, jnp.dtype(jnp.float32)), like.format, None, split)
        if is_quantized(like) else slot, whole, slots, is_leaf=is_quantized)


def trees_of_slots(slots: Sequence[Any], stage: Stage, leaves: Leaves) -> Any:
    """The state of a rule, whose fields are trees, from the slots of each leaf or None."""
    example = next((slot for slot in slots if slot is not None), None)
    if example is None:  # the slots of a scalar have the same fields
        example = jax.eval_shape(stage.rule.init, jax.ShapeDtypeStruct((), jnp.float32))
    columns = [[placeholder(value) if slot is None else getattr(slot, field)
                for value, slot in zip(leaves.values, slots, strict=True)]
               for field in example._fields]
    return type(example)(*map(leaves.treedef.unflatten, columns))


def _has_slots_of(rule: Rule, state: Any) -> bool:
    """Whether a state is of the class that a rule's slots have."""
    if _SLOTS.get(type(rule)) is not type(state):  # tracing takes time in an eager step
        example = jax.eval_shape(rule.init, jax.ShapeDtypeStruct((), jnp.float32))
        _SLOTS[type(rule)] = type(example)
    return _SLOTS[type(rule)] is type(state)


_SLOTS: MutableMapping[type[Rule], type] = weakref.WeakKeyDictionary()


def slots_of_leaves(state: Any, stage: Stage, leaves: Leaves) -> list[Any]:
    """The inverse of `trees_of_slots`."""
    if not _has_slots_of(stage.rule, state):
        raise StateError(f"{stage.rule.name}: its state is a {type(state).__name__}: it was made "
                         "by another transformation")
    try:
        columns = [leaves.treedef.flatten_up_to(tree) for tree in state]
    except (ValueError, TypeError) as error:
        raise StateError(f"{stage.rule.name}: its state does not have the structure of the "
                         f"gradients; make it with tx.init(params) ({error})") from None
    rows = zip(*columns, strict=True) if columns else [()] * len(leaves.values)
    return [type(state)(*row) for row in rows]
