"""Adam's part, and LAMB's: the trust ratio."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.masks import Mask
from lionax.core.norms import factors
from lionax.core.rule import Applied, Rule, Step
from lionax.core.storage import StorageLike, is_complex, zero_slot
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.combining import restrict
from lionax.transforms.momentum import debiasing

__all__ = ["ScaleByAdam", "ScaleByAdamState", "ScaleByTrustRatio", "scale_by_adam",
           "scale_by_trust_ratio"]


class ScaleByAdamState(NamedTuple):
    """The slots of `ScaleByAdam`."""

    mu: Any  # average of gradients; the parameter's shape; mu_dtype or the parameter's
    nu: Any  # average of squared gradients; the parameter's shape; nu_dtype or the parameter's


@dataclasses.dataclass(frozen=True)
class ScaleByAdam(Rule):
    """The rule of `scale_by_adam`."""

    nonnegative: ClassVar = ("nu",)

    b1: Scalar = scalar(0.9, low=0, high=1, open_high=True)
    b2: Scalar = scalar(0.999, low=0, high=1, open_high=True)
    eps: Scalar = scalar(1e-8, low=0)
    eps_root: Scalar = scalar(0.0, low=0)
    mu_dtype: StorageLike = None
    nu_dtype: StorageLike = None
    nesterov: bool = False
    bias_correction: bool = True

    def init(self, param: jax.Array) -> ScaleByAdamState:
        return ScaleByAdamState(mu=zero_slot(param, self.mu_dtype),
                                nu=zero_slot(param, self.nu_dtype, nonnegative=True))

    def prepare(self, count: jax.Array, dtype: Any) -> Any:
        if not self.bias_correction:
            return 1.0, 1.0, 1.0
        steps = count.astype(dtype) + 1  # which no int32 may hold
        of_mu, of_nu = (debiasing(beta, steps, dtype) for beta in (self.b1, self.b2))
        return of_mu, debiasing(self.b1, steps + 1, dtype) if self.nesterov else None, of_nu

    def apply(self, update: jax.Array, slots: ScaleByAdamState, param: Any, step: Step) -> Applied:
        of_mu, of_next_mu, of_nu = step.shared
        mu = (1.0 - self.b1) * update + self.b1 * slots.mu
        square = (update * update.conj()).real if is_complex(update) else update * update
        nu = (1.0 - self.b2) * square + self.b2 * slots.nu
        mu_hat = mu * of_mu
        if self.nesterov:
            mu_hat = self.b1 * (mu * of_next_mu) + (1.0 - self.b1) * (update * of_mu)
        return mu_hat / (jnp.sqrt(nu * of_nu + self.eps_root) + self.eps), ScaleByAdamState(mu, nu)


@constructor
def scale_by_adam(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, eps_root: Scalar = 0.0,
                  mu_dtype: StorageLike = None, *, nu_dtype: StorageLike = None,
                  nesterov: bool = False, bias_correction: bool = True) -> Transformation:
    """Adam's direction: the averaged gradient over the root of the averaged square.

        m_t = b1·m_{t-1} + (1 - b1)·g_t          v_t = b2·v_{t-1} + (1 - b2)·g_t²
        u_t = (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t) + eps_root) + eps)

    For complex ``g`` the second moment is that of ``|g|²``, a real number.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added outside the root, at least 0.
      eps_root: added inside the root, at least 0; for derivatives through the step.
      mu_dtype: how the first moment is stored, as `scale_by_lion`.
      nu_dtype: how the second moment is stored, as ``mu_dtype``.
      nesterov: whether to take ``b1·m_t/(1 - b1^{t+1}) + (1 - b1)·g_t/(1 - b1^t)`` for the average.
      bias_correction: whether to divide by ``1 - b1^t`` and ``1 - b2^t``.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.scale_by_adam()
    >>> update, state = tx.update(jnp.array([2.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> [round(u, 4) for u in update.tolist()]
    [1.0, -1.0]

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980; Dozat,
      Incorporating Nesterov Momentum into Adam, 2016, without its further factor b2, as in Optax.
    """
    return Transformation.of(ScaleByAdam(b1, b2, eps, eps_root, mu_dtype, nu_dtype, bool(nesterov),
                                         bool(bias_correction)))


@dataclasses.dataclass(frozen=True)
class ScaleByTrustRatio(Rule):
    """The rule of `scale_by_trust_ratio`."""

    is_memoryless: ClassVar = True

    scope: ClassVar = "leaf"
    norms_of: ClassVar = ("update", "param")

    min_norm: Scalar = scalar(0.0, low=0)
    trust_coefficient: Scalar = scalar(1.0, low=0)
    eps: Scalar = scalar(0.0, low=0)
    max_ratio: Scalar | None = scalar(None, low=0)
    batch_axes: tuple[int, ...] = ()

    @property
    def norm_axes(self) -> tuple[int, ...]:
        return self.batch_axes

    def check_leaf(self, leaf: jax.Array, what: str) -> None:
        super().check_leaf(leaf, what)
        if any(not -leaf.ndim <= axis < leaf.ndim for axis in self.batch_axes):
            raise ValueError(f"{self.name}: {what} has shape {leaf.shape}, not all of the axes "
                             f"batch_axes={self.batch_axes}; leave it out with a mask")

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        update_norm, param_norm = (jnp.maximum(norm, self.min_norm) for norm in step.norms)
        # A norm of NaN fails the comparison, too: one bad element does not spoil its leaf.
        both_positive = jnp.minimum(param_norm, update_norm) > 0.0
        # Both are replaced, not their ratio, whose derivative would be NaN where it is not used.
        dividend = jnp.where(both_positive, self.trust_coefficient * param_norm, 1.0)
        divisor = jnp.where(both_positive, update_norm + self.eps, 1.0)
        if self.max_ratio is not None:
            is_bounded = dividend / divisor > self.max_ratio
            dividend = jnp.where(is_bounded, self.max_ratio, dividend)
            divisor = jnp.where(is_bounded, 1.0, divisor)
        first, second = factors(dividend, divisor)
        return update * first * second, slots


@constructor
def scale_by_trust_ratio(min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0,
                         *, mask: Mask = None, max_ratio: Scalar | None = None,
                         batch_axes: Sequence[int] = ()) -> Transformation:
    """Gives each leaf's update the norm of its parameter: the layer adaptation of LARS and LAMB.

        r = trust_coefficient · max(‖p‖, min_norm) / (max(‖u‖, min_norm) + eps)
        u ← min(r, max_ratio)·u

    where ``r = 1`` if either norm, after the maximum, is 0 or NaN. Norms are Euclidean, over the
    whole leaf on all devices.

    A parameter that starts at zero is not scaled at first, and then by its small norm: after a step
    of 0.01 it makes steps of 1e-4. That is the papers' rule. Where it is not wanted, leave such
    leaves out (``mask=not_matching("bias")``) or give a ``min_norm``.

    Args:
      min_norm: lower bound of both norms, at least 0.
      trust_coefficient: factor of the ratio, at least 0 (LARS takes 0.001, LAMB 1).
      eps: added to the update's norm, at least 0.
      mask: the leaves to adapt, as `masked`; None for all.
      max_ratio: upper bound of the ratio, at least 0; None for no bound.
      batch_axes: the axes along which layers are stacked, as ``scan`` and ``vmap`` of modules do:
        each index along them has a ratio of its own. Inside ``shard_map`` do not shard these axes.

    Raises:
      ValueError: for a value out of range, a leaf without such an axis, or an update without the
        parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx, params = lionax.scale_by_trust_ratio(), jnp.array([6.0, 8.0])
    >>> tx.update(jnp.array([0.0, 5.0]), tx.init(params), params)[0].tolist()
    [0.0, 10.0]

    References:
      You et al., Large Batch Training of Convolutional Networks, 2017, arXiv:1708.03888; You et
      al., Large Batch Optimization for Deep Learning, 2020, arXiv:1904.00962.
    """
    axes = tuple(batch_axes) if isinstance(batch_axes, Sequence) else (batch_axes,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"scale_by_trust_ratio: batch_axes={batch_axes!r} is not accepted; give a "
                        "tuple of axes, such as (0,)")
    rule = ScaleByTrustRatio(min_norm, trust_coefficient, eps, max_ratio, axes)
    return restrict(rule, mask, "scale_by_trust_ratio")
