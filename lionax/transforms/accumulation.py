"""Gradient accumulation: one step for several micro-batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core.counting import next_count
from lionax.core.definition import Conditional
from lionax.core.hyperparameters import Interval, check_count, check_scalar, value_at
from lionax.core.internals import Tracer
from lionax.core.programs import Kept
from lionax.core.rule import Definition
from lionax.core.state import State, init_state
from lionax.core.storage import (
    accumulator_dtype,
    compute_dtype,
    on_device,
    sharded_as,
    store,
    zero_slot,
)
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import is_placeholder
from lionax.transforms.combining import definition_of
from lionax.transforms.conditional import DynamicLossScale, SkipIf, is_bool, refuse_inside

__all__ = ["Accumulate", "AccumulateState", "accumulate", "live_sum"]


class AccumulateState(NamedTuple):
    """The state of `Accumulate`."""

    calls: jax.Array  # int32 []: how many micro-batches the window holds
    windows: jax.Array  # int32 []: how many windows were made
    weight: jax.Array  # float32 []: the sum of the weights of the window's micro-batches
    live: Any  # int32 []: for each leaf 1, or 0 after its sum was used
    gradients: Any  # weighted sum of gradients; the parameter's shape; at least float32
    dropped: jax.Array  # int32 []: how many windows were dropped because they were not finite
    inner: State  # of the transformation that runs once in a window


@dataclasses.dataclass(frozen=True)
class Accumulate(Conditional):
    """The definition of `accumulate`."""

    arguments: ClassVar = ("weight", "flush")
    inner_gradients: ClassVar = "accumulated_"

    inner: Definition
    every: int | Callable[[Any], Any]

    def __post_init__(self):
        if not callable(self.every):
            check_count(self.every, "accumulate", "every", "micro-batches, at least 1, or a "
                        "function of the number of windows made")
        refuse_inside(self.inner, "accumulate", DynamicLossScale, SkipIf)

    def init(self, params: Any) -> AccumulateState:
        live = jax.tree.map(lambda p: jnp.zeros((), jnp.int32), params)
        sums = jax.tree.map(lambda p: zero_slot(p, accumulator_dtype(p)), params)
        calls, windows, dropped = (jnp.zeros((), jnp.int32) for _ in range(3))
        return AccumulateState(calls, windows, jnp.zeros((), jnp.float32), live, sums, dropped,
                               init_state(self.inner, params))

    def open(self, updates: Any, state: AccumulateState, params: Any,
             extra: Mapping[str, Any]) -> tuple[Any, AccumulateState, jax.Array]:
        every = value_at(self.every, state.windows, "accumulate")
        flush = extra.get("flush", False)
        if not is_bool(flush):
            raise TypeError(f"accumulate: flush={flush!r} is not accepted; give one bool")
        due = jnp.asarray(next_count(state.calls) >= every) | flush
        weight = _checked_weight(extra.get("weight", 1.0))
        total = state.weight + weight
        divisor = jnp.where(due & (total != 0), total, 1.0)
        sums = jax.tree.map(
            lambda grad, old, live: old if is_placeholder(old) else _added(
                grad, old, live, weight, divisor),
            updates, state.gradients, state.live, is_leaf=is_placeholder)
        return params, state._replace(weight=total, gradients=sums), due

    def inner_updates(self, updates: Any, state: AccumulateState) -> Any:
        return jax.tree.map(lambda grad, mean: grad if is_placeholder(grad) else mean,
                            updates, state.gradients, is_leaf=is_placeholder)

    def accepts(self, updates: Any, state: AccumulateState, params: Any,
                extra: Mapping[str, Any]) -> jax.Array:
        mean = self.inner_updates(updates, state)
        return (state.weight != 0) & super().accepts(mean, state, params, extra)

    def close(self, updates: Any, state: AccumulateState, due: Any,
              accepted: jax.Array) -> AccumulateState:
        is_live = 1 - due.astype(jnp.int32)  # each leaf's is an array of its own: for donation
        live = jax.tree.map(lambda grad, x: x if is_placeholder(grad) else jnp.zeros_like(x) +
                            is_live, updates, state.live, is_leaf=is_placeholder)
        return state._replace(
            calls=jnp.where(due, 0, next_count(state.calls)),
            windows=next_count(state.windows, due), weight=jnp.where(due, 0.0, state.weight),
            live=live,
            dropped=next_count(state.dropped, due & ~accepted & (state.weight != 0)))


def _checked_weight(weight: Any) -> jax.Array:
    """A micro-batch's weight; NaN, which drops the window, for a traced one below 0."""
    if not isinstance(weight, Tracer) or weight.shape != ():
        weight = check_scalar(weight, Interval(0.0), "accumulate", "weight", dynamic=False)
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.where(weight < 0, jnp.nan, weight)


def live_sum(total: Any, live: Any) -> Any:
    """A sum of gradients; 0 after it was used."""
    return jnp.where(live == 0, jnp.zeros_like(total), total)


@Kept
def _added(grad: Any, total: Any, live: Any, weight: jax.Array, divisor: jax.Array) -> Any:
    """A sum, 0 if it was used, with one gradient more; the divisor makes it the mean."""
    kept = live_sum(on_device(total), live)
    if is_placeholder(grad):
        return kept
    # The mean takes the place of the sum: as a further array it would be kept for the inner norms.
    # What has no weight is left out, also NaN.
    grad = sharded_as(grad, total).astype(total.dtype)
    term = jnp.where(weight == 0, 0.0, grad) * weight.astype(total.dtype)
    factor = 1 / divisor.astype(compute_dtype(total))
    return store((kept + term) * factor.astype(total.dtype), total)


@constructor
def accumulate(tx: optax.GradientTransformation,
               every: int | Callable[[Any], Any]) -> Transformation:
    """Adds up the gradients of several micro-batches and runs a transformation once on their mean.

        g = Σ_i w_i·g_i / Σ_i w_i

    The sums and the mean are in float32, for float64 leaves in float64. The weight ``w_i`` is 1, or
    what the call got as ``weight=``, a float32: the number of examples, for uneven micro-batches. A
    micro-batch of weight 0 is left out, whatever its gradient; a window of weight 0 takes no step.

    All calls of a window but the last return updates of zero. With ``flush=True``, also a traced
    bool, a call is the last of its window. The inner step count, and so its schedules, advance once
    in a window.

    A window whose mean has a NaN or an infinite element is dropped: parameters and inner state
    stay, ``dropped`` counts it, all devices decide alike. A gradient of None adds nothing to its
    leaf's sum; in the last call of a window it keeps the sum for the next.

    Args:
      tx: what runs once in a window; lionax's or Optax's.
      every: calls in a window, at least 1; or a function of the number of windows made.

    Raises:
      ValueError: for ``every`` below 1 or a negative weight (a traced one drops the window); for a
        `dynamic_loss_scale`, `skip_nonfinite` or `skip_if` inside, which would see means only.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.accumulate(lionax.sgd(1.0), every=2)
    >>> params = jnp.array([10.0])
    >>> params, state = tx.step(params, tx.init(params), jnp.array([1.0]))
    >>> params, state = tx.step(params, state, jnp.array([4.0]), weight=2.0)
    >>> params.tolist()
    [7.0]
    """
    return Transformation.of(Accumulate(definition_of(tx, "accumulate"), every))
