"""The optimizers: each body is one chain.

In the equations ``p`` is a parameter, ``g`` its gradient, ``m`` and ``v`` its moments, ``t`` the step beginning at 1, ``lr`` the
learning rate of the step and ``wd`` the weight decay. A hyperparameter is a number, a schedule or ``inject(value)``.

What the aliases share:

- ``weight_decay`` and ``mask`` are those of `add_decayed_weights`: decay is ``lr·wd·p``, as in Optax and PyTorch.
  With ``base_learning_rate=α`` it is ``(lr/α)·wd·p``: multiplied by the schedule alone, as Loshchilov and Hutter (2019) have it.
- Arithmetic is in float32 (float64 for float64 leaves), whatever the dtype of the leaf.
"""

from lionax.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.combining import chain, identity
from lionax.decay import add_decayed_weights
from lionax.hyperparameters import Scalar
from lionax.masks import Mask
from lionax.momentum import trace
from lionax.scaling import scale_by_learning_rate
from lionax.sign_momentum import scale_by_lion
from lionax.storage import Storage
from lionax.transformation import Transformation, constructor

__all__ = ["lamb", "lion", "sgd"]


@constructor
def lion(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: Storage = None, weight_decay: Scalar = 1e-3,
         mask: Mask = None, *, base_learning_rate: float | None = None) -> Transformation:
    """Lion: steps of equal size along the sign of an interpolated momentum.

        p ← p - lr·(sign(b1·m + (1 - b1)·g) + wd·p)
        m ← b2·m + (1 - b2)·g

    Every element moves by ``lr``, so the learning rate is usually 3 to 10 times smaller, and the weight decay as much
    larger, than AdamW's.

    Args:
      learning_rate: as `scale_by_learning_rate`.
      b1: as `scale_by_lion`.
      b2: as `scale_by_lion`.
      mu_dtype: as `scale_by_lion`.
      weight_decay: as `add_decayed_weights`.
      mask: the leaves to decay, as `add_decayed_weights`.
      base_learning_rate: as `add_decayed_weights`; lion-pytorch calls this ``decoupled_weight_decay``.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lion(0.1, weight_decay=0.5)
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([-3.0]))
    >>> params.tolist(), round(float(state.rules[0].mu[0]), 4)
    ([2.0], -0.03)

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv:2302.06675, algorithm 2.
    """
    return chain(scale_by_lion(b1, b2, mu_dtype),
                 add_decayed_weights(weight_decay, mask, base_learning_rate=base_learning_rate),
                 scale_by_learning_rate(learning_rate))


@constructor
def lamb(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-6, eps_root: Scalar = 0.0,
         weight_decay: Scalar = 0.0, mask: Mask = None, *, trust_mask: Mask = None, mu_dtype: Storage = None,
         nu_dtype: Storage = None, base_learning_rate: float | None = None) -> Transformation:
    """LAMB: Adam's direction, scaled in each layer to the norm of its parameter.

        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps) + wd·p
        p ← p - lr·(‖p‖ / ‖u‖)·u          (ratio 1 where either norm is 0)

    The decay stands inside the ratio, as in the paper; with ``base_learning_rate`` it is outside.

    Args:
      learning_rate: as `scale_by_learning_rate`.
      b1: as `scale_by_adam`.
      b2: as `scale_by_adam`.
      eps: as `scale_by_adam`.
      eps_root: as `scale_by_adam`.
      weight_decay: as `add_decayed_weights`.
      mask: the leaves to decay, as `add_decayed_weights`.
      trust_mask: the leaves to adapt, as ``mask`` in `scale_by_trust_ratio`; reference implementations leave biases and the
        scales of norms out of both: ``not_matching("bias", "scale")``.
      mu_dtype: as `scale_by_adam`.
      nu_dtype: as `scale_by_adam`.
      base_learning_rate: as `add_decayed_weights`.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lamb(0.5)
    >>> params, _ = tx.step(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), jnp.array([9.0, 9.0]))
    >>> [round(p, 4) for p in params.tolist()]
    [1.2322, 2.2322]

    References:
      You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020, arXiv:1904.00962.
    """
    decay = add_decayed_weights(weight_decay, mask, base_learning_rate=base_learning_rate)
    before, after = (decay, identity()) if base_learning_rate is None else (identity(), decay)
    return chain(scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype),
                 before,
                 scale_by_trust_ratio(mask=trust_mask),
                 after,
                 scale_by_learning_rate(learning_rate))


@constructor
def sgd(learning_rate: Scalar, momentum: Scalar | None = None, nesterov: bool = False, accumulator_dtype: Storage = None, *,
        dampening: Scalar = 0.0, weight_decay: Scalar = 0.0, mask: Mask = None,
        base_learning_rate: float | None = None) -> Transformation:
    """Stochastic gradient descent, with momentum if asked for.

        g ← g + wd·p
        t ← momentum·t + (1 - dampening)·g
        p ← p - lr·t          (with Nesterov's look-ahead p - lr·(g + momentum·t))

    The decay is added to the gradient, before the momentum, as PyTorch does; with ``base_learning_rate`` it is decoupled:
    added after the momentum (SGDW).

    Args:
      learning_rate: as `scale_by_learning_rate`.
      momentum: decay of `trace`; None for plain descent without state.
      nesterov: as `trace`.
      accumulator_dtype: as `trace`.
      dampening: as `trace`; without momentum it has no effect.
      weight_decay: as `add_decayed_weights`.
      mask: the leaves to decay, as `add_decayed_weights`.
      base_learning_rate: as `add_decayed_weights`.

    Raises:
      ValueError: for a value out of range, or for ``nesterov`` without momentum or with dampening.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.sgd(0.5, momentum=0.5)
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([1.0]))
    >>> params, state = tx.step(params, state, jnp.array([1.0]))
    >>> params.tolist()
    [0.75]

    References:
      Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, 2013.
    """
    if nesterov and momentum is None:
        raise ValueError("sgd: nesterov=True looks ahead along the momentum, which is None; give momentum=0.9, for example")
    decay = add_decayed_weights(weight_decay, mask, base_learning_rate=base_learning_rate)
    before, after = (decay, identity()) if base_learning_rate is None else (identity(), decay)
    return chain(before,
                 identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype, dampening=dampening),
                 after,
                 scale_by_learning_rate(learning_rate))
