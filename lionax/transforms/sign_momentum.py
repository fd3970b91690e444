"""Lion's part: the sign of an interpolated momentum."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.rule import Applied, Rule, Step
from lionax.core.storage import StorageLike, is_complex, zero_slot
from lionax.core.transformation import Transformation, constructor

__all__ = ["ScaleByLion", "ScaleByLionState", "scale_by_lion"]


class ScaleByLionState(NamedTuple):
    """The slots of `ScaleByLion`."""

    mu: Any  # average of gradients; the parameter's shape; mu_dtype or the parameter's dtype


@dataclasses.dataclass(frozen=True)
class ScaleByLion(Rule):
    """The rule of `scale_by_lion`."""

    b1: Scalar = scalar(0.9, low=0, high=1)
    b2: Scalar = scalar(0.99, low=0, high=1)
    mu_dtype: StorageLike = None
    mode: Literal["hard", "smooth", "refined"] = "hard"
    smooth_beta: Scalar = scalar(1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("hard", "smooth", "refined"):
            raise ValueError(f"scale_by_lion: mode={self.mode!r} is not accepted; give 'hard', "
                             "'smooth' or 'refined'")

    def init(self, param: jax.Array) -> ScaleByLionState:
        return ScaleByLionState(mu=zero_slot(param, self.mu_dtype))

    def apply(self, update: jax.Array, slots: ScaleByLionState, param: Any, step: Step) -> Applied:
        # In Optax's order: XLA then rounds both alike, and no sign is lost to the last bit.
        average = (1.0 - self.b1) * update + self.b1 * slots.mu
        if self.mode == "smooth":
            direction = jnp.tanh(self.smooth_beta * average)
        elif self.mode == "refined":
            direction = jnp.where(jnp.abs(average) < 1.0, average, _sign(average))
        else:
            direction = _sign(average)
        return direction, ScaleByLionState(mu=(1.0 - self.b2) * update + self.b2 * slots.mu)


def _sign(x: jax.Array) -> jax.Array:
    """``jnp.sign``, but with the derivative of ``z / |z|``, where JAX has 0."""
    if not is_complex(x):
        return jnp.sign(x)
    return x / jnp.where(x == 0, 1.0, jnp.abs(x))


@constructor
def scale_by_lion(b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: StorageLike = None, *,
                  mode: Literal["hard", "smooth", "refined"] = "hard",
                  smooth_beta: Scalar = 1.0) -> Transformation:
    """The sign of the gradient averaged with its momentum.

        u_t = sign(b1·m_{t-1} + (1 - b1)·g_t)
        m_t = b2·m_{t-1} + (1 - b2)·g_t

    where ``sign(0) = 0``, and the sign of a complex ``z`` is ``z / |z|``.

    Args:
      b1: the momentum's weight in the sign, in [0, 1].
      b2: the momentum's decay, in [0, 1].
      mu_dtype: how the momentum is stored: what `Storage` takes, such as "bfloat16" or "int8"; a
        dict of these by regular expressions over paths; None for the parameter's own dtype.
      mode: "hard" takes the sign, "smooth" ``tanh(smooth_beta·x)``, "refined" ``x`` itself where
        ``|x| < 1`` and the sign elsewhere.
      smooth_beta: the slope of "smooth" at 0.

    Raises:
      ValueError: for an unknown mode, a beta out of range or a ``mu_dtype`` that is not a
        floating-point dtype.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.scale_by_lion()
    >>> update, state = tx.update(jnp.array([3.0, 0.0, -0.1]), tx.init(jnp.zeros(3)))
    >>> update.tolist()
    [1.0, 0.0, -1.0]

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv:2302.06675.
    """
    return Transformation.of(ScaleByLion(b1, b2, mu_dtype, mode, smooth_beta))
