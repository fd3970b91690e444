"""Clipping: by value, by the norm of a leaf, by the norm of the tree."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lionax.hyperparameters import Scalar, scalar
from lionax.rule import Rule, Step
from lionax.transformation import Transformation, constructor

__all__ = ["Clip", "ClipByGlobalNorm", "ClipByNorm", "clip", "clip_by_global_norm", "clip_by_norm"]


@dataclasses.dataclass(frozen=True)
class Clip(Rule):
    """The rule of `clip`."""

    max_delta: Scalar = scalar(low=0)

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> tuple[jax.Array, Any]:
        return jnp.clip(update, -self.max_delta, self.max_delta), slots


@constructor
def clip(max_delta: Scalar) -> Transformation:
    """Limits every element: ``u ← min(max(u, -max_delta), max_delta)``. NaN stays NaN.

    Args:
      max_delta: at least 0.

    Raises:
      ValueError: for a negative value.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.clip(1.0)
    >>> tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.5, -1.0]
    """
    return Transformation.of(Clip(max_delta))


@dataclasses.dataclass(frozen=True)
class ClipByNorm(Rule):
    """The rule of `clip_by_norm`."""

    scope: ClassVar = "leaf"

    max_norm: Scalar = scalar(low=0)

    def measure(self, update: jax.Array, param: Any) -> tuple[jax.Array, ...]:
        return (update,)

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> tuple[jax.Array, Any]:
        (norm,) = step.norms
        # A NaN norm fails the comparison and so reaches every element: silence would hide it.
        return jnp.where(norm <= self.max_norm, update, (update / norm) * self.max_norm), slots


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(ClipByNorm):
    """The rule of `clip_by_global_norm`."""

    scope: ClassVar = "tree"


@constructor
def clip_by_norm(max_norm: Scalar) -> Transformation:
    """Limits the Euclidean norm of each leaf: ``u ← u·max_norm / ‖u‖`` where ``‖u‖ > max_norm``.

    Keras calls it ``clipnorm``. Norms as in `clip_by_global_norm`.

    Args:
      max_norm: at least 0.

    Raises:
      ValueError: for a negative value.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.clip_by_norm(1.0)
    >>> tx.update(jnp.array([0.0, 8.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [0.0, 1.0]
    """
    return Transformation.of(ClipByNorm(max_norm))


@constructor
def clip_by_global_norm(max_norm: Scalar) -> Transformation:
    """Limits the Euclidean norm of all leaves together: ``u ← u·max_norm / ‖u‖`` where ``‖u‖ > max_norm``.

    The norm is summed in float32 (float64 for float64 leaves), pairwise over leaves, without overflow or underflow. It is
    that of the whole tree on a mesh too: inside ``shard_map`` the sum runs over the mesh axes on which a leaf varies (which
    JAX knows unless ``check_vma=False``).
    A gradient with NaN or an infinite element has a norm of NaN or infinity, and its update is NaN or 0; leave such steps out.

    Args:
      max_norm: at least 0.

    Raises:
      ValueError: for a negative value.

    >>> import jax.numpy as jnp, lionax
    >>> tx, grads = lionax.clip_by_global_norm(1.0), {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> [round(float(u[0]), 4) for u in tx.update(grads, tx.init(grads))[0].values()]
    [0.6, 0.8]

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013, arXiv:1211.5063.
    """
    return Transformation.of(ClipByGlobalNorm(max_norm))
