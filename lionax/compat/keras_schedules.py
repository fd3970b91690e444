"""Keras's learning-rate schedules: hashable values that are functions of the step.

Thin over Optax's where these agree. Keras 2 and Keras 3 give the same numbers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lionax.core.counting import LARGEST_COUNT
from lionax.core.table import shown

__all__ = [
    "CosineDecay", "ExponentialDecay", "InverseTimeDecay", "PiecewiseConstantDecay",
    "PolynomialDecay", "Schedule"
]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What Keras's schedules share: they are called with the step, and compare by value."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > LARGEST_COUNT:
                    raise ValueError(f"{type(self).__name__}: {field.name}={shown(value)} is not "
                                     "accepted; give numbers below 2^31, or floats")
        steps = getattr(self, "decay_steps", 1)
        if not steps > 0:
            raise ValueError(f"{type(self).__name__}: decay_steps={steps!r} is not accepted; give "
                             "a number above 0")

    def __call__(self, step: Any) -> jax.Array:
        raise NotImplementedError


def _float(step: Any) -> jax.Array:
    return jnp.asarray(step).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """``initial_learning_rate · decay_rate^(step / decay_steps)``, the exponent rounded down with
    ``staircase``.

    >>> from lionax.compat import keras_schedules
    >>> float(keras_schedules.ExponentialDecay(0.5, decay_steps=10, decay_rate=0.5)(10))
    0.25
    """

    initial_learning_rate: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False
    name: str = "ExponentialDecay"

    def __call__(self, step: Any) -> jax.Array:
        exponent = _float(step) / self.decay_steps
        return self.initial_learning_rate * jnp.float32(
            self.decay_rate)**(jnp.floor(exponent) if self.staircase else exponent)


@dataclasses.dataclass(frozen=True)
class InverseTimeDecay(Schedule):
    """``initial_learning_rate / (1 + decay_rate · step / decay_steps)``, the fraction rounded down
    with ``staircase``.

    >>> from lionax.compat import keras_schedules
    >>> float(keras_schedules.InverseTimeDecay(0.5, decay_steps=1, decay_rate=1.0)(3))
    0.125
    """

    initial_learning_rate: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False
    name: str = "InverseTimeDecay"

    def __call__(self, step: Any) -> jax.Array:
        times = _float(step) / self.decay_steps
        return self.initial_learning_rate / (1.0 + self.decay_rate *
                                             (jnp.floor(times) if self.staircase else times))


@dataclasses.dataclass(frozen=True)
class PiecewiseConstantDecay(Schedule):
    """``values[i]`` up to and including step ``boundaries[i]``; the last value after all
    boundaries.

    Optax's piecewise schedules change at a boundary, Keras's one step after it.

    >>> from lionax.compat import keras_schedules
    >>> schedule = keras_schedules.PiecewiseConstantDecay([5], [1.0, 0.5])
    >>> float(schedule(5)), float(schedule(6))
    (1.0, 0.5)
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]
    name: str = "PiecewiseConstant"

    def __post_init__(self):
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "values", tuple(self.values))
        super().__post_init__()
        if len(self.boundaries) != len(self.values) - 1:
            raise ValueError(f"PiecewiseConstantDecay: {len(self.boundaries)} boundaries and "
                             f"{len(self.values)} values are not accepted; give one value more "
                             "than boundaries")

    def __call__(self, step: Any) -> jax.Array:
        passed = sum(
            (jnp.asarray(step) > boundary).astype(jnp.int32) for boundary in self.boundaries)
        return jnp.asarray(self.values, jnp.float32)[passed]


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """``(initial_learning_rate - end_learning_rate)·(1 - step / decay_steps)^power +
    end_learning_rate``.

    After ``decay_steps`` it stays, or with ``cycle`` begins anew over as many times the steps as
    have begun.

    >>> from lionax.compat import keras_schedules
    >>> float(keras_schedules.PolynomialDecay(0.5, decay_steps=2, end_learning_rate=0.0)(1))
    0.25
    """

    initial_learning_rate: float
    decay_steps: int
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str = "PolynomialDecay"

    def __call__(self, step: Any) -> jax.Array:
        if not self.cycle:
            decay = optax.polynomial_schedule(self.initial_learning_rate, self.end_learning_rate,
                                              self.power, self.decay_steps)
            return jnp.asarray(decay(_float(step)))
        whole = self.decay_steps * jnp.maximum(jnp.ceil(_float(step) / self.decay_steps), 1.0)
        fall = self.initial_learning_rate - self.end_learning_rate
        return fall * (1.0 - _float(step) / whole)**jnp.float32(self.power) + self.end_learning_rate


@dataclasses.dataclass(frozen=True)
class CosineDecay(Schedule):
    """Half a cosine from the initial rate, or from ``warmup_target`` after a linear warm-up, to
    ``alpha`` times it.

    >>> from lionax.compat import keras_schedules
    >>> float(keras_schedules.CosineDecay(0.0, 10, warmup_target=1.0, warmup_steps=4)(2))
    0.5
    """

    initial_learning_rate: float
    decay_steps: int
    alpha: float = 0.0
    name: str = "CosineDecay"
    warmup_target: float | None = None
    warmup_steps: int = 0

    def __call__(self, step: Any) -> jax.Array:
        if self.warmup_target is None:
            decay = optax.cosine_decay_schedule(self.initial_learning_rate, self.decay_steps,
                                                self.alpha)
            return jnp.asarray(decay(_float(step)))
        after = optax.cosine_decay_schedule(self.warmup_target, self.decay_steps, self.alpha)(
            jnp.maximum(_float(step) - self.warmup_steps, 0.0))
        fraction = _float(step) / max(self.warmup_steps, 1)
        rise = (self.warmup_target - self.initial_learning_rate) * fraction
        return jnp.where(_float(step) < self.warmup_steps, rise + self.initial_learning_rate, after)
