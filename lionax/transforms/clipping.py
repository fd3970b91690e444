"""Clipping: by value, by the norm of a leaf, by the norm of the tree."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.norms import factors
from lionax.core.rule import Applied, Rule, Step
from lionax.core.transformation import Transformation, constructor

__all__ = ["Clip", "ClipByGlobalNorm", "ClipByNorm", "clip", "clip_by_global_norm", "clip_by_norm"]


@dataclasses.dataclass(frozen=True)
class Clip(Rule):
    """The rule of `clip`."""

    dtypes: ClassVar = (jnp.floating, jnp.integer)
    is_memoryless: ClassVar = True

    max_delta: Scalar = scalar(low=0, high=math.inf)

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        return jnp.clip(update, -self.max_delta, self.max_delta), slots


@constructor
def clip(max_delta: Scalar) -> Transformation:
    """Limits every element: ``u ← min(max(u, -max_delta), max_delta)``. NaN stays NaN.

    Args:
      max_delta: at least 0, else a ValueError.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.clip(1.0)
    >>> tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.5, -1.0]
    """
    return Transformation.of(Clip(max_delta))


@dataclasses.dataclass(frozen=True)
class ClipByNorm(Rule):
    """The rule of `clip_by_norm`."""

    is_memoryless: ClassVar = True

    scope: ClassVar = "leaf"
    norms_of: ClassVar = ("update",)

    max_norm: Scalar = scalar(low=0, high=math.inf)

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        (norm,) = step.norms
        # One division a leaf: of a choice XLA would make one for each element. It is 1 up to the
        # limit, NaN for a norm of NaN, and has a derivative at a norm of 0.
        numbers = jnp.finfo(norm.dtype)
        limit = jnp.minimum(jnp.asarray(self.max_norm, norm.dtype), numbers.max)
        first, second = factors(limit, jnp.maximum(norm, jnp.maximum(limit, numbers.tiny)))
        return update * first * second, slots


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(ClipByNorm):
    """The rule of `clip_by_global_norm`."""

    scope: ClassVar = "tree"


@constructor
def clip_by_norm(max_norm: Scalar) -> Transformation:
    """Limits the norm of each leaf: ``u ← u·max_norm / max(‖u‖, max_norm)``.

    Keras calls it ``clipnorm``. Norms are those of `clip_by_global_norm`.

    Args:
      max_norm: at least 0, else a ValueError.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.clip_by_norm(1.0)
    >>> tx.update(jnp.array([0.0, 8.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.0, 1.0]
    """
    return Transformation.of(ClipByNorm(max_norm))


@constructor
def clip_by_global_norm(max_norm: Scalar) -> Transformation:
    """Limits the norm of all leaves together: ``u ← u·max_norm / max(‖u‖, max_norm)``.

    The Euclidean norm is summed in float32, for float64 leaves in float64, without overflow or
    underflow. On a mesh it is that of the whole tree: inside ``shard_map`` the sum runs over the
    axes on which a leaf varies, which JAX knows unless ``check_vma=False``. With a NaN all updates
    are NaN; with an inf it becomes NaN and the others 0. `skip_nonfinite` leaves such steps out.
    A norm above the largest float is that float.

    Args:
      max_norm: at least 0, else a ValueError.

    >>> import jax.numpy as jnp, lionax
    >>> tx, grads = lionax.clip_by_global_norm(1.0), {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> [round(float(u[0]), 4) for u in tx.update(grads, tx.init(grads))[0].values()]
    [0.6, 0.8]

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Networks, 2013, arXiv:1211.5063.
    """
    return Transformation.of(ClipByGlobalNorm(max_norm))
