"""Gradient accumulation: one step for several micro-batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax import engine, norms, storage
from lionax.combining import definition_of
from lionax.hyperparameters import check_count
from lionax.layout import Gate, Way, present
from lionax.masks import is_placeholder
from lionax.rule import Definition
from lionax.transformation import Transformation, constructor

__all__ = ["Accumulate", "AccumulateState", "accumulate"]


class AccumulateState(NamedTuple):
    """The state of `Accumulate`."""

    calls: jax.Array  # int32 []: how many micro-batches the window holds
    weight: jax.Array  # float32 []: the sum of their weights
    gradients: Any  # weighted sum of gradients; the gradients' shapes; at least float32
    dropped: jax.Array  # int32 []: how many windows were left out because they were not finite
    inner: engine.State  # of the transformation that runs once in a window


@dataclasses.dataclass(frozen=True)
class Accumulate(Gate):
    """The definition of `accumulate`."""

    arguments = ("weight", "flush")

    part: Definition
    every: int

    def __post_init__(self):
        check_count(self.every, "accumulate", "every", of="micro-batches")

    @property
    def name(self) -> str:
        return "accumulate"

    def init(self, params: Any) -> AccumulateState:
        sums = jax.tree.map(lambda p: storage.zeros(p, storage.accumulator(p, None)), params)
        return AccumulateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), sums, jnp.zeros((), jnp.int32),
                               engine.init(self.part, params))

    def open(self, updates: Any, state: AccumulateState, extra: Mapping[str, Any]) -> tuple[jax.Array, AccumulateState, list[Way]]:
        weight, flush = jnp.asarray(extra.get("weight", 1.0), jnp.float32), jnp.asarray(extra.get("flush", False), bool)
        total = state.weight + weight

        due = jnp.logical_or(state.calls + 1 >= self.every, flush)
        # The sum becomes the mean where it lies, so that what runs on the mean finds it in memory.
        divisor = jnp.where(jnp.logical_and(due, total != 0), total, 1.0)

        def added(u, s):
            return s if is_placeholder(u) else (s + u.astype(s.dtype) * weight.astype(s.dtype)) / divisor.astype(s.dtype)

        def mean(state):
            return jax.tree.map(lambda u, s: u if is_placeholder(u) else s, updates, state.gradients, is_leaf=is_placeholder)

        new = state._replace(gradients=jax.tree.map(added, updates, state.gradients, is_leaf=is_placeholder))
        finite = jax.lax.cond(due, lambda: norms.all_finite(present(mean(new))), lambda: jnp.ones((), bool))
        new_window = {"calls": jnp.zeros_like(state.calls), "weight": jnp.zeros_like(total)}
        ways = [Way(changes={"calls": state.calls + 1, "weight": total}),
                Way(mean, runs=True, changes=new_window, emptied="gradients"),
                Way(changes={**new_window, "dropped": state.dropped + 1}, emptied="gradients")]
        return jnp.where(due, jnp.where(finite, 1, 2), 0), new, ways


@constructor
def accumulate(tx: optax.GradientTransformation, every: int) -> Transformation:
    """Adds up the gradients of several micro-batches and runs a transformation once on their mean.

    In a window of ``every`` calls, all but the last return updates of zero and only add; the last hands the mean on:

        g = Σ_i w_i·g_i / Σ_i w_i

    summed in float32 (float64 for float64 leaves), where ``w_i`` is 1 or what ``update`` or ``step`` was given as ``weight=``: the
    number of examples, for micro-batches of uneven size. With ``flush=True`` (a bool or a traced one) a call ends the
    window early: for what remains at the end of an epoch. The transformation's step count, and so its schedules, advance
    once in a window.

    A window whose mean has NaN or an infinite element is dropped: no update, the transformation's state untouched, and counted in
    ``dropped``. All devices decide alike. A leaf without a gradient (None) in the last call keeps its sum for the next window.

    Args:
      tx: what runs once in a window; lionax's or Optax's.
      every: calls in a window, at least 1.

    Raises:
      ValueError: for ``every`` below 1.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.accumulate(lionax.sgd(1.0), every=2)
    >>> params = jnp.array([10.0])
    >>> params, state = tx.step(params, tx.init(params), jnp.array([1.0]))
    >>> params, state = tx.step(params, state, jnp.array([4.0]), weight=2.0)
    >>> params.tolist()
    [7.0]
    """
    return Transformation.of(Accumulate(definition_of(tx, "accumulate"), every))
