"""Keras 2: the optimizers of TensorFlow 2.12 and 2.13."""

from collections.abc import Mapping, Sequence
from typing import Any

from lionax.compat.keras_parts import check_ema, check_rate, clipping, decayed
from lionax.core.hyperparameters import Scalar
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.averaging import params_ema
from lionax.transforms.combining import chain, identity
from lionax.transforms.decay import add_decayed_weights
from lionax.transforms.momentum import trace
from lionax.transforms.scaling import scale, scale_by_learning_rate
from lionax.transforms.sign_momentum import scale_by_lion

__all__ = ["SGD", "Lion", "check_arguments", "keras2_average", "momentum_sgd"]

DEPRECATED = ("decay", "gradient_aggregator", "gradient_transformers")


def check_arguments(owner: str, unknown: Mapping[str, Any], clipnorm: Any, global_clipnorm: Any,
                    use_ema: bool, ema_momentum: float, ema_overwrite_frequency: Any) -> None:
    """What the constructors of Keras 2 refuse."""
    for name in unknown:
        if name in DEPRECATED:
            raise ValueError(f"{owner}: {name}={unknown[name]!r} belongs to the legacy optimizers; "
                             "for a decaying rate, give a schedule of "
                             "lionax.compat.keras_schedules as learning_rate")
        if name not in ("lr", "is_legacy_optimizer"):
            raise TypeError(f"{owner}: {name} is not an argument of the reference")
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(f"{owner}: clipnorm={clipnorm!r} and global_clipnorm={global_clipnorm!r} "
                         "exclude each other; give one of them")
    check_ema(use_ema, ema_momentum, ema_overwrite_frequency, owner)


@constructor
def Lion(learning_rate: Scalar = 0.0001, beta_1: float = 0.9, beta_2: float = 0.99,
         weight_decay: float | None = None, clipnorm: float | None = None,
         clipvalue: float | None = None, global_clipnorm: float | None = None,
         use_ema: bool = False, ema_momentum: float = 0.99,
         ema_overwrite_frequency: int | None = None, jit_compile: bool = True, name: str = "Lion",
         mesh: Any = None, *, exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None,
         **kwargs: Any) -> Transformation:
    """``tf.keras.optimizers.Lion`` of Keras 2.

    Of several clips only one acts: ``clipnorm`` before ``global_clipnorm`` before ``clipvalue``; a
    clip of 0 is none. As in the reference, ``lr`` is accepted and ignored.

    Args:
      learning_rate: a number, a 0-d array or a schedule; a function of no arguments is refused.
      beta_1: in (0, 1].
      beta_2: in [0, 1].
      weight_decay: the decay ``lr·weight_decay·p``, or None.
      clipnorm: limit of each leaf's norm.
      clipvalue: limit of each element.
      global_clipnorm: limit of the norm of all leaves.
      use_ema: whether to keep an average of the parameters, see `lionax.averaged_params`.
      ema_momentum: its decay, in [0, 1].
      ema_overwrite_frequency: after how many steps the parameters are set to it, or None.
      jit_compile: without effect; jit the step.
      name: without effect.
      mesh: None, or what the parameters are laid out on. A state is laid out as its parameters in
        any case; but as in the reference, on a mesh the average stays at the initial parameters.
      exclude_from_weight_decay: ``{"var_names": [regular expressions], "var_list": [paths]}``, what
        the method of that name takes; the expressions are searched for in ``dense/kernel:0``.
      **kwargs: refused, except what the reference ignores.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras2
    >>> keras2.Lion(1e-3, weight_decay=0.1)
    Lion(learning_rate=0.001, weight_decay=0.1)
    """
    owner = "compat.keras2.Lion"
    check_arguments(owner, kwargs, clipnorm, global_clipnorm, use_ema, ema_momentum,
                    ema_overwrite_frequency)
    if not 0 < beta_1 <= 1:
        raise ValueError(f"{owner}: beta_1={beta_1!r} is not accepted; give a number in (0, 1] (at "
                         "0 it would be SignSGD)")
    mask = decayed(exclude_from_weight_decay, "path:0", owner)
    return chain(
        clipping(clipnorm, global_clipnorm, clipvalue), scale_by_lion(beta_1, beta_2),
        add_decayed_weights(weight_decay or 0.0, mask),
        scale_by_learning_rate(check_rate(learning_rate, owner)),
        keras2_average(use_ema, ema_momentum, ema_overwrite_frequency, mesh))


def keras2_average(use_ema: bool, momentum: float, frequency: int | None,
                   mesh: Any) -> Transformation:
    """The average of Keras 2, which on a mesh stays at the initial parameters and out of use."""
    if not use_ema:
        return identity()
    return params_ema(momentum, frequency or None) if mesh is None else params_ema(1.0)


def momentum_sgd(learning_rate: Scalar, momentum: float, nesterov: bool, weight_decay: float | None,
                 mask: Any) -> Transformation:
    """Keras's momentum has the rate inside: ``m ← momentum·m - lr·g``. Decay is beside it."""
    return chain(scale_by_learning_rate(learning_rate, flip_sign=False),
                 trace(float(momentum), bool(nesterov)),
                 add_decayed_weights(weight_decay or 0.0, mask, learning_rate=learning_rate),
                 scale(-1.0))


@constructor
def SGD(learning_rate: Scalar = 0.01, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float | None = None, clipnorm: float | None = None,
        clipvalue: float | None = None, global_clipnorm: float | None = None, use_ema: bool = False,
        ema_momentum: float = 0.99, ema_overwrite_frequency: int | None = None,
        jit_compile: bool = True, name: str = "SGD", mesh: Any = None, *,
        exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any) -> Transformation:
    """``tf.keras.optimizers.SGD`` of Keras 2, and of DTensor in TensorFlow 2.13.

    Unlike PyTorch's and Optax's, its momentum has the learning rate inside, so a change of the rate
    acts on new gradients only. It keeps a momentum even where that is 0.

    Args:
      learning_rate: as `Lion`.
      momentum: in [0, 1].
      nesterov: whether to look ahead.
      weight_decay: as `Lion`.
      clipnorm: as `Lion`.
      clipvalue: as `Lion`.
      global_clipnorm: as `Lion`.
      use_ema: as `Lion`.
      ema_momentum: as `Lion`.
      ema_overwrite_frequency: as `Lion`.
      jit_compile: without effect.
      name: without effect.
      mesh: as `Lion`.
      exclude_from_weight_decay: as `Lion`.
      **kwargs: as `Lion`.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras2
    >>> keras2.SGD(momentum=0.9)
    SGD(momentum=0.9)
    """
    owner = "compat.keras2.SGD"
    check_arguments(owner, kwargs, clipnorm, global_clipnorm, use_ema, ema_momentum,
                    ema_overwrite_frequency)
    return chain(clipping(clipnorm, global_clipnorm, clipvalue),
                 momentum_sgd(check_rate(learning_rate, owner), momentum, nesterov, weight_decay,
                              decayed(exclude_from_weight_decay, "path:0", owner)),
                 keras2_average(use_ema, ema_momentum, ema_overwrite_frequency, mesh))
