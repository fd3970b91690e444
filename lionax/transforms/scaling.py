"""Multiplication by a number: a factor, a learning rate, a schedule."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.rule import Applied, Rule, Step
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.combining import identity

__all__ = ["Scale", "ScaleByLearningRate", "scale", "scale_by_learning_rate", "scale_by_schedule"]


@dataclasses.dataclass(frozen=True)
class Scale(Rule):
    """The rule of `scale`."""

    dtypes: ClassVar = (jnp.number, jnp.bool_)
    is_memoryless: ClassVar = True

    step_size: Scalar = scalar()

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        return self.step_size * update, slots


@constructor
def scale(step_size: Scalar) -> Transformation:
    """Multiplies: ``u ← step_size·u``.

    Args:
      step_size: any number, or a schedule.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.scale(-0.5)
    >>> tx.update(jnp.array([2.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, -2.0]
    """
    return Transformation.of(Scale(step_size))


@dataclasses.dataclass(frozen=True)
class ScaleByLearningRate(Rule):
    """The rule of `scale_by_learning_rate`."""

    is_memoryless: ClassVar = True

    learning_rate: Scalar = scalar(low=0, recorded=True, remedy="to ascend, give flip_sign=False")
    flip_sign: bool = True

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        return (-self.learning_rate if self.flip_sign else self.learning_rate) * update, slots


@constructor
def scale_by_learning_rate(learning_rate: Scalar, *, flip_sign: bool = True) -> Transformation:
    """Multiplies by the learning rate and turns downhill: ``u ← -learning_rate·u``.

    The state holds the rate of the last step: see `get_hyperparams` and `set_hyperparams`.

    Args:
      learning_rate: at least 0, else a ValueError; None leaves the update as it is.
      flip_sign: False to go uphill.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.scale_by_learning_rate(0.5)
    >>> tx.update(jnp.array([2.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, -2.0]
    """
    if learning_rate is None:
        return identity()
    return Transformation.of(ScaleByLearningRate(learning_rate, bool(flip_sign)))


@constructor
def scale_by_schedule(step_size_fn: Scalar) -> Transformation:
    """Multiplies by a function of the step: ``u_t ← step_size_fn(t)·u_t``, from ``t = 0`` on.

    Args:
      step_size_fn: step -> value, such as Optax's schedules; a factor of -1 is the caller's.

    Raises:
      TypeError: if it is not a function.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.scale_by_schedule(lambda step: jnp.where(step < 1, 1.0, 0.5))
    >>> _, state = tx.update(jnp.array(6.0), tx.init(jnp.array(0.0)))
    >>> float(tx.update(jnp.array(6.0), state)[0])
    3.0
    """
    if not callable(step_size_fn):
        raise TypeError(f"scale_by_schedule: step_size_fn={step_size_fn!r} is not a function of "
                        "the step; for a constant, use scale")
    return Transformation.of(Scale(step_size_fn))
