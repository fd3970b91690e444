"""Steps that are not taken: overflow under a loss scale, gradients that are not finite."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax import engine, norms, storage
from lionax.combining import definition_of
from lionax.hyperparameters import Interval, Scalar, check_count, check_scalar, scalar
from lionax.layout import Gate, Way, present
from lionax.rule import Definition, Rule, Step
from lionax.transformation import Transformation, constructor

__all__ = ["DynamicLossScale", "DynamicLossScaleState", "SkipNonfinite", "SkipNonfiniteState", "Unscale", "dynamic_loss_scale",
           "skip_nonfinite", "unscale"]


@dataclasses.dataclass(frozen=True)
class Unscale(Rule):
    """The rule of `unscale`."""

    factor: Scalar = scalar()

    def __post_init__(self):
        super().__post_init__()
        if self.factor == 0:
            raise ValueError("unscale: factor=0.0 is not accepted; give what the loss was multiplied by")

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> tuple[jax.Array, Any]:
        return update / self.factor, slots


@constructor
def unscale(factor: Scalar) -> Transformation:
    """Divides by a constant with which the loss was multiplied: ``u ← u / factor``. Stands first in a chain.

    Args:
      factor: the loss scale; not 0.

    Raises:
      ValueError: for 0.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.unscale(128.0)
    >>> tx.update(jnp.array([256.0]), tx.init(jnp.zeros(1)))[0].tolist()
    [2.0]
    """
    return Transformation.of(Unscale(factor))


class SkipNonfiniteState(NamedTuple):
    """The state of `SkipNonfinite`."""

    consecutive: jax.Array  # int32 []: how many steps were skipped since the last that was taken
    skipped: jax.Array  # int32 []: how many steps were skipped in all
    inner: engine.State  # of the transformation inside


@dataclasses.dataclass(frozen=True)
class SkipNonfinite(Gate):
    """The definition of `skip_nonfinite`."""

    part: Definition
    max_consecutive: int

    def __post_init__(self):
        check_count(self.max_consecutive, "skip_nonfinite", "max_consecutive")

    @property
    def name(self) -> str:
        return "skip_nonfinite"

    def init(self, params: Any) -> SkipNonfiniteState:
        return SkipNonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), engine.init(self.part, params))

    def open(self, updates: Any, state: SkipNonfiniteState, extra: Mapping[str, Any]) -> tuple[jax.Array, Any, list[Way]]:
        finite = norms.all_finite(present(updates))
        consecutive = jnp.where(finite, 0, jnp.minimum(state.consecutive + 1, self.max_consecutive))
        new = state._replace(consecutive=consecutive, skipped=state.skipped + jnp.logical_not(finite).astype(jnp.int32))

        def nothing(state):
            # Once the limit is reached, NaN as the update makes the parameters show what the gradients have been hiding.
            value = jnp.where(consecutive >= self.max_consecutive, jnp.nan, 0.0)
            return jax.tree.map(lambda u: u + value.astype(u.dtype) if jnp.issubdtype(u.dtype, jnp.floating) else u,
                                engine.no_update(updates))

        return finite.astype(jnp.int32), new, [Way(nothing), Way(lambda state: updates, runs=True)]


@constructor
def skip_nonfinite(tx: optax.GradientTransformation, max_consecutive: int) -> Transformation:
    """Takes no step where a gradient has NaN or an infinite element: updates of zero, and the state inside untouched.

    All devices decide alike. After ``max_consecutive`` such steps in a row the updates are NaN, so that a run which is lost is
    seen to be; the state inside never takes one and is still good to restart from.

    Args:
      tx: what runs otherwise; lionax's or Optax's.
      max_consecutive: how many steps in a row may be skipped, at least 1.

    Raises:
      ValueError: for a limit below 1.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.skip_nonfinite(lionax.sgd(1.0), max_consecutive=5)
    >>> params, state = tx.step(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.array([jnp.nan]))
    >>> params.tolist(), int(state.rules.skipped)
    ([1.0], 1)
    """
    return Transformation.of(SkipNonfinite(definition_of(tx, "skip_nonfinite"), max_consecutive))


class DynamicLossScaleState(NamedTuple):
    """The state of `DynamicLossScale`."""

    loss_scale: jax.Array  # float32 []: what the next loss is to be multiplied by
    good_steps: jax.Array  # int32 []: steps since the scale last changed
    skipped: jax.Array  # int32 []: steps not taken, in all
    inner: engine.State  # of the transformation inside


@dataclasses.dataclass(frozen=True)
class DynamicLossScale(Gate):
    """The definition of `dynamic_loss_scale`."""

    part: Definition
    initial: float
    growth_interval: int
    growth: float
    backoff: float
    smallest: float
    largest: float

    @property
    def name(self) -> str:
        return "dynamic_loss_scale"

    def init(self, params: Any) -> DynamicLossScaleState:
        return DynamicLossScaleState(jnp.asarray(self.initial, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
                                     engine.init(self.part, params))

    def open(self, updates: Any, state: DynamicLossScaleState, extra: Mapping[str, Any]) -> tuple[jax.Array, Any, list[Way]]:
        finite = norms.all_finite(present(updates))

        def unscaled(u):
            dtype = storage.compute_dtype(u)
            return u.astype(dtype) * (1 / state.loss_scale.astype(dtype))

        grown = state.good_steps + 1 >= self.growth_interval
        larger = jnp.minimum(jnp.where(grown, state.loss_scale * self.growth, state.loss_scale), self.largest)
        smaller = jnp.maximum(state.loss_scale * self.backoff, self.smallest)
        new = state._replace(loss_scale=jnp.where(finite, larger, smaller),
                             good_steps=jnp.where(jnp.logical_and(finite, jnp.logical_not(grown)), state.good_steps + 1, 0),
                             skipped=state.skipped + jnp.logical_not(finite).astype(jnp.int32))
        return finite.astype(jnp.int32), new, [Way(), Way(lambda state: jax.tree.map(unscaled, updates), runs=True)]


@constructor
def dynamic_loss_scale(tx: optax.GradientTransformation, initial_scale: float = 2.0**15, growth_interval: int = 2000, *,
                       growth_factor: float = 2.0, backoff_factor: float = 0.5, min_scale: float = 1.0,
                       max_scale: float = 2.0**24) -> Transformation:
    """Divides by a loss scale that grows while gradients are finite and backs off when they are not.

    Multiply the loss by ``optax.tree.get(state, "loss_scale")`` before you differentiate it; here the gradients are multiplied by its
    reciprocal, in float32. A step whose gradients overflowed is not taken: updates of zero, the state inside untouched, the scale smaller.

    Args:
      tx: what runs on the true gradients; lionax's or Optax's.
      initial_scale: the first scale, in (0, 2^126]: the reciprocal of a larger one is no normal number.
      growth_interval: how many finite steps in a row make the scale grow, at least 1.
      growth_factor: by which it grows, at least 1.
      backoff_factor: by which it shrinks, in (0, 1].
      min_scale: its lower bound, above 0.
      max_scale: its upper bound, at most 2^126.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax, optax
    >>> tx = lionax.dynamic_loss_scale(lionax.sgd(1.0), initial_scale=8.0)
    >>> params, state = tx.step(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.array([jnp.inf]))
    >>> params.tolist(), float(optax.tree.get(state, "loss_scale"))
    ([1.0], 4.0)

    References:
      Micikevicius et al., Mixed Precision Training, 2018, arXiv:1710.03740.
    """
    largest = 2.0**126
    positive, at_least_one, fraction = Interval(low=1e-30, high=largest), Interval(low=1.0), Interval(low=1e-30, high=1.0)

    def number(value, accepted, argument):
        return check_scalar(value, accepted, "dynamic_loss_scale", argument, dynamic=False)

    check_count(growth_interval, "dynamic_loss_scale", "growth_interval")
    return Transformation.of(DynamicLossScale(
        definition_of(tx, "dynamic_loss_scale"), number(initial_scale, positive, "initial_scale"), growth_interval,
        number(growth_factor, at_least_one, "growth_factor"), number(backoff_factor, fraction, "backoff_factor"),
        number(min_scale, positive, "min_scale"), number(max_scale, Interval(low=float(min_scale), high=largest), "max_scale")))
