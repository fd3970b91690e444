"""Gradient accumulation: one step for several micro-batches."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax import engine, norms, storage
from lionax.combining import definition_of
from lionax.hyperparameters import check_count
from lionax.layout import TreeWide, present
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
class Accumulate(TreeWide):
    """The definition of `accumulate`."""

    part: Definition
    every: int

    def __post_init__(self):
        check_count(self.every, "accumulate", "every", of="micro-batches")

    @property
    def name(self) -> str:
        return "accumulate"

    @property
    def branch(self) -> Definition:
        return self.part

    def init(self, params: Any) -> AccumulateState:
        sums = jax.tree.map(lambda p: storage.zeros(p, storage.accumulator(p, None)), params)
        return AccumulateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), sums, jnp.zeros((), jnp.int32),
                               engine.init(self.part, params))

    def update(self, updates: Any, state: AccumulateState, params: Any = None, *, weight: Any = 1.0, flush: Any = False,
               **extra: Any) -> tuple[Any, AccumulateState]:
        weight = jnp.asarray(weight, jnp.float32)
        total = state.weight + weight

        def each(function, *trees):
            """Over the leaves that have a gradient in this call."""
            return jax.tree.map(lambda u, *rest: u if is_placeholder(u) or storage.is_float0(u) else function(u, *rest),
                                updates, *trees, is_leaf=is_placeholder)

        sums = each(lambda u, s: s + u.astype(s.dtype) * weight.astype(s.dtype), state.gradients)

        def hand_on():
            mean = each(lambda u, s: s / jnp.where(total == 0, 1.0, total).astype(s.dtype), sums)
            finite = norms.all_finite(present(mean))
            new, inner = engine.run_if(finite, self.part, mean, state.inner, params, extra)
            dropped = state.dropped + jnp.logical_not(finite).astype(jnp.int32)
            return new, keep(engine.no_update(sums), 0, 0.0, dropped, inner)

        def add_only():
            return engine.no_update(sums), keep(sums, state.calls + 1, total, state.dropped, state.inner)

        def keep(new, calls, weight, dropped, inner):
            left = jax.tree.map(lambda old, s: old if is_placeholder(s) or storage.is_float0(s) else s, state.gradients, new,
                                is_leaf=is_placeholder)
            return AccumulateState(jnp.asarray(calls, jnp.int32), jnp.asarray(weight, jnp.float32), left, dropped, inner)

        due = jnp.logical_or(state.calls + 1 >= self.every, jnp.asarray(flush, bool))
        return jax.lax.cond(due, hand_on, add_only)


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
