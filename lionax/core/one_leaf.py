"""A rule on one leaf: functions of that leaf's arrays, under ``jax.jit`` with a static rule.

So a trace holds one function for all leaves of a shape, and outside of ``jit`` a shape compiles
once.
"""

import functools
from typing import Any

import jax
import numpy as np

from lionax.core import norms, storage
from lionax.core.programs import Kept
from lionax.core.quantized import shapes_of
from lionax.core.rule import Rule, Step
from lionax.core.settings import StaticRule
from lionax.core.tree import Leaves
from lionax.core.varying import Split, varying_axes

__all__ = ["apply", "check", "norms_for", "prepare"]


def check(rule: Rule, leaves: Leaves, leaf: int, update: Any, param: Any, slots: Any) -> None:
    """Refuses a leaf to which a rule cannot be applied."""
    path = leaves.paths[leaf]
    if param is None and rule.needs_params:
        raise ValueError(f"{rule.name}: needs the parameters (here {path!r}); call "
                         "update(grads, state, params)")
    if update is not None:
        rule.check_leaf(update, f"the gradient of {path!r}")
    if param is not None:
        rule.check_leaf(param, f"the parameter {path!r}")
    if rule.scope == "leaf":
        leaves.check_sum(rule.name, [leaf])
        if rule.norm_axes and leaves.splits[leaf] is None and varying_axes(leaves.values[leaf]):
            raise ValueError(f"{rule.name}: batch_axes inside of shard_map: the type of {path!r} "
                             "does not say which of its axes is split; say it: "
                             "lionax.sharded(tx, specs)")
    like: Any = param if update is None else update
    shapes = shapes_of(slots)
    if any(shape != like.shape for shape in shapes) and (
            shapes != shapes_of(jax.eval_shape(rule.init, like))):
        raise ValueError(f"{rule.name}: the gradient of {path!r} has shape {like.shape}, its "
                         f"state {shapes}; they do not fit")


def norms_for(rule: Rule, update: Any, param: Any, tree_norms: tuple[jax.Array, ...],
              split: Split | None) -> tuple[jax.Array, ...]:
    """The norms that a rule needs at one leaf: that leaf's, or those of the tree."""
    if rule.scope != "leaf":
        return tree_norms
    arrays = {"update": update, "param": param}
    return norms.norm_of_each([arrays[name] for name in rule.norms_of], rule.norm_axes, split)


@functools.partial(Kept, static=1)
def prepare(static: StaticRule, operands: dict[str, jax.Array], count: jax.Array) -> Any:
    """What all leaves of a dtype share."""
    return static.with_values(operands).prepare(count, static.dtype)


@functools.partial(Kept, static=2)
def apply(static: StaticRule, split: Split | None, operands: dict[str, jax.Array], update: Any,
           slots: Any, param: Any, count: jax.Array, tree_norms: tuple[jax.Array, ...],
           shared: Any, number: np.uint32) -> tuple[Any, Any]:
    """A rule, applied to one leaf: the new update and slots, rounded by the leaf's number."""
    rule = static.with_values(operands)
    measured = norms_for(rule, update, param, tree_norms, split)
    update, param = storage.aligned(update, slots, param)
    update, old, param, measured = storage.loaded(
        (update, slots, param, measured), static.dtype, split)
    with storage.promotion_for(update, param):
        update, new = rule.apply(update, old, param, Step(count, measured, shared))
    return update, storage.stored(new, slots, rule.storage_of, split, rule.nonnegative, number,
                                  count)
