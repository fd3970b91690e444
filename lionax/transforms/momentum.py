"""Momentum as a decaying sum (`trace`) and as an average (`ema`)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Interval, Scalar, scalar
from lionax.core.internals import Tracer
from lionax.core.rule import Applied, Rule, Step
from lionax.core.storage import StorageLike, accumulator_dtype, zero_slot
from lionax.core.transformation import Transformation, constructor

__all__ = ["Ema", "EmaState", "Trace", "TraceState", "debiasing", "ema", "moved",
           "share_of", "trace"]


class TraceState(NamedTuple):
    """The slots of `Trace`."""

    trace: Any  # decaying sum of gradients; the parameter's shape; accumulator_dtype or its dtype


@dataclasses.dataclass(frozen=True)
class Trace(Rule):
    """The rule of `trace`."""

    decay: Scalar = scalar(low=0, high=1)
    nesterov: bool = False
    accumulator_dtype: StorageLike = None
    dampening: Scalar = scalar(0.0, low=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        if self.nesterov and not isinstance(self.dampening, Tracer) and self.dampening != 0:
            raise ValueError("trace: nesterov=True is not accepted with "
                             f"dampening={self.dampening!r}; give dampening=0.0")

    def init(self, param: jax.Array) -> TraceState:
        return TraceState(trace=zero_slot(param, self.accumulator_dtype))

    def apply(self, update: jax.Array, slots: TraceState, param: Any, step: Step) -> Applied:
        is_plain = isinstance(self.dampening, float) and self.dampening == 0
        factor = 1.0 if is_plain else jnp.where(step.count == 0, 1.0, 1.0 - self.dampening)
        new = factor * update + self.decay * slots.trace
        return (update + self.decay * new if self.nesterov else new), TraceState(trace=new)


@constructor
def trace(decay: Scalar, nesterov: bool = False, accumulator_dtype: StorageLike = None, *,
          dampening: Scalar = 0.0) -> Transformation:
    """Momentum: a decaying sum of gradients.

        t_n = decay·t_{n-1} + (1 - dampening)·g_n          (t_1 = g_1)
        u_n = t_n, or with Nesterov's look-ahead g_n + decay·t_n

    Args:
      decay: in [0, 1].
      nesterov: whether to look ahead.
      accumulator_dtype: how the sum is stored, as ``mu_dtype`` in `scale_by_lion`.
      dampening: in [0, 1]; what is taken off each gradient but the first, as PyTorch's SGD does.

    Raises:
      ValueError: for a value out of range, or for ``nesterov`` with dampening.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.trace(0.5)
    >>> first, state = tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)))
    >>> float(tx.update(jnp.array(1.0), state)[0])
    1.5

    References:
      Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, 2013.
    """
    return Transformation.of(Trace(decay, bool(nesterov), accumulator_dtype, dampening))


class EmaState(NamedTuple):
    """The slots of `Ema`."""

    ema: Any  # average, not corrected for its zero start; the parameter's shape; accumulator_dtype


@dataclasses.dataclass(frozen=True)
class Ema(Rule):
    """The rule of `ema`."""

    decay: Scalar = scalar(low=0, high=1)
    debias: bool = True
    accumulator_dtype: StorageLike = None

    def accepted(self, field: str) -> Interval:
        return Interval(0.0, 1.0, open_high=self.debias,
                        remedy="1 is accepted with debias=False" if self.debias else "")

    def init(self, param: jax.Array) -> EmaState:
        return EmaState(ema=zero_slot(param, accumulator_dtype(param, self.accumulator_dtype)))

    def prepare(self, count: jax.Array, dtype: Any) -> jax.Array | None:
        steps = count.astype(dtype) + 1
        return 1.0 / share_of(1.0 - self.decay, steps, dtype) if self.debias else None

    def apply(self, update: jax.Array, slots: EmaState, param: Any, step: Step) -> Applied:
        new = moved(slots.ema, update, 1.0 - self.decay)
        return (new * step.shared if self.debias else new), EmaState(ema=new)


@constructor
def ema(decay: Scalar, debias: bool = True,
        accumulator_dtype: StorageLike = None) -> Transformation:
    """An exponential moving average of the updates.

        e_t = e_{t-1} + (1 - decay)·(u_t - e_{t-1})
        u_t ← e_t / (1 - decay^t), or e_t without ``debias``

    Args:
      decay: in [0, 1], below 1 with ``debias``.
      debias: whether to correct for the start at zero.
      accumulator_dtype: how the average is stored; None for at least float32, since one in bfloat16
        stands still where a step adds less than one part in 256.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.ema(0.75, debias=False)
    >>> float(tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)))[0])
    0.25

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980, section 3.
    """
    return Transformation.of(Ema(decay, bool(debias), accumulator_dtype))


def debiasing(decay: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 / (1 - decay^count)``: the factor that corrects an average for its start at zero."""
    return 1.0 / (1.0 - jnp.asarray(decay, dtype) ** count.astype(dtype))


def moved(average: jax.Array, value: jax.Array, weight: Scalar) -> jax.Array:
    """An average moved toward a value; the value itself for a weight of 1."""
    return jnp.where(weight == 1, value, average + weight * (value - average))


def share_of(weight: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 - (1 - weight)^count``: what an average of `count` terms has of them, not of its start.

    It is exact where a decay near 1, rounded to float32, would lose most digits of the weight.
    """
    return -jnp.expm1(count.astype(dtype) * jnp.log1p(-jnp.asarray(weight, dtype)))
