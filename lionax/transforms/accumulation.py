"""Gradient accumulation: one step for several micro-batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core.definition import Conditional
from lionax.core.hyperparameters import check_count
from lionax.core.rule import Definition
from lionax.core.state import State, init_state
from lionax.core.storage import accumulator_dtype, zero_slot
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import is_placeholder
from lionax.transforms.combining import definition_of
from lionax.transforms.conditional import refuse_loss_scale

__all__ = ["Accumulate", "AccumulateState", "accumulate", "live_sum"]


class AccumulateState(NamedTuple):
    """The state of `Accumulate`."""

    calls: jax.Array  # int32 []: how many micro-batches the window holds
    weight: jax.Array  # float32 []: the sum of their weights
    live: Any  # int32 []: for each leaf 1, or 0 after its sum was used
    gradients: Any  # weighted sum of gradients; the parameter's shape; at least float32
    dropped: jax.Array  # int32 []: how many windows were dropped because they were not finite
    inner: State  # of the transformation that runs once in a window


@dataclasses.dataclass(frozen=True)
class Accumulate(Conditional):
    """The definition of `accumulate`."""

    arguments: ClassVar = ("weight", "flush")

    inner: Definition
    every: int

    def __post_init__(self):
        check_count(self.every, "accumulate", "every", "micro-batches, at least 1")
        refuse_loss_scale(self.inner, "accumulate")

    def init(self, params: Any) -> AccumulateState:
        live = jax.tree.map(lambda p: jnp.zeros((), jnp.int32), params)
        sums = jax.tree.map(lambda p: zero_slot(p, accumulator_dtype(p)), params)
        return AccumulateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), live, sums,
                               jnp.zeros((), jnp.int32), init_state(self.inner, params))

    def open(self, updates: Any, state: AccumulateState,
             extra: Mapping[str, Any]) -> tuple[AccumulateState, jax.Array]:
        due = (state.calls + 1 >= self.every) | jnp.asarray(extra.get("flush", False), bool)
        weight = jnp.asarray(extra.get("weight", 1.0), jnp.float32)
        total = state.weight + weight
        factor = jnp.where(due, 1 / total, 1.0)
        sums = jax.tree.map(lambda grad, old, live: _added(grad, old, live, weight, factor),
                            updates, state.gradients, state.live, is_leaf=is_placeholder)
        return state._replace(weight=total, gradients=sums), due

    def inner_updates(self, updates: Any, state: AccumulateState) -> Any:
        return jax.tree.map(
            lambda grad, mean: grad if is_placeholder(grad) else mean.astype(grad.dtype),
            updates, state.gradients, is_leaf=is_placeholder)

    def accepts(self, updates: Any, state: AccumulateState) -> jax.Array:
        return super().accepts(self.inner_updates(updates, state), state)

    def close(self, updates: Any, state: AccumulateState, due: Any,
              accepted: jax.Array) -> AccumulateState:
        is_live = 1 - due.astype(jnp.int32)  # each leaf's is an array of its own: for donation
        live = jax.tree.map(lambda grad, x: x if is_placeholder(grad) else jnp.zeros_like(x) +
                            is_live, updates, state.live, is_leaf=is_placeholder)
        return state._replace(
            calls=jnp.where(due, 0, state.calls + 1), weight=jnp.where(due, 0.0, state.weight),
            live=live, dropped=state.dropped + (due & ~accepted).astype(jnp.int32))


def live_sum(total: Any, live: Any) -> Any:
    """A sum of gradients; 0 after it was used."""
    return jnp.where(live == 0, jnp.zeros_like(total), total)


@jax.jit
def _added(grad: Any, total: Any, live: Any, weight: jax.Array, factor: jax.Array) -> Any:
    """A sum, 0 if it was used, with one gradient more; the factor makes it the mean."""
    if is_placeholder(total):
        return total
    kept = live_sum(total, live)
    if is_placeholder(grad):
        return kept
    # The mean takes the place of the sum: as a further array it would be kept for the inner norms.
    term = grad.astype(total.dtype) * weight.astype(total.dtype)
    return (kept + term) * factor.astype(total.dtype)


@constructor
def accumulate(tx: optax.GradientTransformation, every: int) -> Transformation:
    """Adds up the gradients of several micro-batches and runs a transformation once on their mean.

        g = Σ_i w_i·g_i / Σ_i w_i

    The sums are in float32, for float64 leaves in float64. The weight ``w_i`` is 1, or what the
    call got as ``weight=``: the number of examples, for uneven micro-batches. All calls of a window
    but the last return updates of zero. With ``flush=True``, also a traced bool, a call is the last
    of its window. The inner step count, and so its schedules, advance once in a window.

    A window whose mean has a NaN or an infinite element is dropped: parameters and inner state
    stay, ``dropped`` counts it, all devices decide alike. A gradient of None adds nothing to its
    leaf's sum; in the last call of a window it keeps the sum for the next.

    Args:
      tx: what runs once in a window; lionax's or Optax's.
      every: calls in a window, at least 1.

    Raises:
      ValueError: for ``every`` below 1; for a `dynamic_loss_scale` inside, which sees no overflow.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.accumulate(lionax.sgd(1.0), every=2)
    >>> params = jnp.array([10.0])
    >>> params, state = tx.step(params, tx.init(params), jnp.array([1.0]))
    >>> params, state = tx.step(params, state, jnp.array([4.0]), weight=2.0)
    >>> params.tolist()
    [7.0]
    """
    return Transformation.of(Accumulate(definition_of(tx, "accumulate"), every))
