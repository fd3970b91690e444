"""Keras 3, as it runs on its JAX backend."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lionax.accumulation import accumulate
from lionax.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.combining import chain, identity, masked
from lionax.compat.keras2 import momentum_sgd
from lionax.compat.keras_parts import Decayed, EveryWindow, check_ema, check_rate, clipping, decayed, moving_average
from lionax.decay import add_decayed_weights
from lionax.hyperparameters import Scalar
from lionax.safety import unscale
from lionax.scaling import scale_by_learning_rate
from lionax.sign_momentum import scale_by_lion
from lionax.transformation import Transformation, constructor

__all__ = ["SGD", "Lamb", "Lion", "Shrunk"]


@dataclasses.dataclass(frozen=True)
class _Base:
    """The arguments that all optimizers of Keras 3 share, checked, and what they do around the optimizer's own part."""

    owner: str
    learning_rate: Scalar
    weight_decay: float | None
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    exclude_from_weight_decay: Mapping[str, Sequence[str]] | None

    def __post_init__(self):
        steps = self.gradient_accumulation_steps
        if steps and not steps >= 2:
            raise ValueError(f"{self.owner}: gradient_accumulation_steps={steps!r} is not accepted; give a number of at least 2, or None")
        check_ema(self.use_ema, self.ema_momentum, self.ema_overwrite_frequency, self.owner)
        clips = {name: getattr(self, name) for name in ("clipnorm", "clipvalue", "global_clipnorm")}
        given = {name: value for name, value in clips.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{self.owner}: {given} exclude each other; give one of them")
        check_rate(self.learning_rate, self.owner)

    @property
    def calls(self) -> int:
        """How many calls make a step."""
        return self.gradient_accumulation_steps or 1

    @property
    def rate(self) -> Scalar:
        """The learning rate by the optimizer's steps; Keras looks schedules up by calls."""
        return EveryWindow(self.learning_rate, self.calls) if callable(self.learning_rate) and self.calls > 1 else self.learning_rate

    @property
    def mask(self) -> Decayed:
        """The leaves that decay."""
        return decayed(self.exclude_from_weight_decay, "last", self.owner)

    def around(self, own: Transformation) -> Transformation:
        """Unscaling, accumulation, clipping and the average, around the optimizer's own part."""
        step = chain(clipping(self.clipnorm, self.global_clipnorm, self.clipvalue), own)
        frequency = 1 if self.ema_overwrite_frequency == 0 else self.ema_overwrite_frequency
        return chain(identity() if self.loss_scale_factor is None else unscale(self.loss_scale_factor),
                     accumulate(step, self.calls) if self.calls > 1 else step,
                     moving_average(self.use_ema, self.ema_momentum, frequency, first_copies=True, idle_leaves=True, calls=self.calls))


@constructor
def Lion(learning_rate: Scalar = 0.001, beta_1: float = 0.9, beta_2: float = 0.99, weight_decay: float | None = None,
         clipnorm: float | None = None, clipvalue: float | None = None, global_clipnorm: float | None = None, use_ema: bool = False,
         ema_momentum: float = 0.99, ema_overwrite_frequency: int | None = None, loss_scale_factor: float | None = None,
         gradient_accumulation_steps: int | None = None, name: str | None = None, *,
         exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None) -> Transformation:
    """``keras.optimizers.Lion`` of Keras 3.

    As in the reference: the average is a copy of the parameters until the first step is complete; with accumulation the
    average moves at every call, while the step that is overwritten is counted in windows, so all calls of such a window
    overwrite; an ``ema_overwrite_frequency`` of 0 is 1; schedules are looked up by calls.

    Args:
      learning_rate: a number, a 0-d array or a schedule; a function of no arguments is refused.
      beta_1: in (0, 1].
      beta_2: in [0, 1].
      weight_decay: the decay ``lr·weight_decay·p``, or None.
      clipnorm: limit of each leaf's norm; 0 is none.
      clipvalue: limit of each element; 0 is none.
      global_clipnorm: limit of the norm of all leaves; 0 is none.
      use_ema: whether to keep an average of the parameters, see `lionax.averaged_params`.
      ema_momentum: its decay, in [0, 1].
      ema_overwrite_frequency: after how many steps the parameters are set to it, or None.
      loss_scale_factor: what gradients are divided by, or None.
      gradient_accumulation_steps: how many calls make a step, at least 2, or None.
      name: without effect.
      exclude_from_weight_decay: ``{"var_names": [regular expressions], "var_list": [paths]}``, what the method of that name
        takes; the expressions are searched for in the last part of a path: ``kernel``.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.Lion(1e-4, weight_decay=0.1)
    Lion(learning_rate=0.0001, weight_decay=0.1)
    """
    base = _Base("compat.keras3.Lion", learning_rate, weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
                 ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, exclude_from_weight_decay)
    if not 0 < beta_1 <= 1:
        raise ValueError(f"{base.owner}: beta_1={beta_1!r} is not accepted; give a number in (0, 1] (at 0 it would be SignSGD)")
    return base.around(chain(scale_by_lion(beta_1, beta_2), add_decayed_weights(weight_decay or 0.0, base.mask),
                             scale_by_learning_rate(base.rate)))


@constructor
def SGD(learning_rate: Scalar = 0.01, momentum: float = 0.0, nesterov: bool = False, weight_decay: float | None = None,
        clipnorm: float | None = None, clipvalue: float | None = None, global_clipnorm: float | None = None, use_ema: bool = False,
        ema_momentum: float = 0.99, ema_overwrite_frequency: int | None = None, loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None, name: str | None = None, *,
        exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None) -> Transformation:
    """``keras.optimizers.SGD`` of Keras 3. Its momentum has the learning rate inside, as `lionax.compat.keras2.SGD` says.

    Args:
      learning_rate: as `Lion`.
      momentum: a float in [0, 1]; an int is refused, as in the reference.
      nesterov: whether to look ahead; without effect where momentum is 0.
      weight_decay: as `Lion`.
      clipnorm: as `Lion`.
      clipvalue: as `Lion`.
      global_clipnorm: as `Lion`.
      use_ema: as `Lion`.
      ema_momentum: as `Lion`.
      ema_overwrite_frequency: as `Lion`.
      loss_scale_factor: as `Lion`.
      gradient_accumulation_steps: as `Lion`.
      name: without effect.
      exclude_from_weight_decay: as `Lion`.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.SGD(momentum=0.9)
    SGD(momentum=0.9)
    """
    base = _Base("compat.keras3.SGD", learning_rate, weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
                 ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, exclude_from_weight_decay)
    if not isinstance(momentum, float) or not 0 <= momentum <= 1:
        raise ValueError(f"{base.owner}: momentum={momentum!r} is not accepted; give a float in [0, 1]")
    if momentum == 0:
        return base.around(chain(add_decayed_weights(weight_decay or 0.0, base.mask), scale_by_learning_rate(base.rate)))
    return base.around(momentum_sgd(base.rate, momentum, nesterov, weight_decay, base.mask))


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """``1 - lr·weight_decay``: what is left of a parameter when Keras has decayed it."""

    rate: Any
    weight_decay: float

    def __call__(self, step: Any) -> Any:
        return 1.0 - jnp.asarray(self.rate(step) if callable(self.rate) else self.rate, jnp.float32) * self.weight_decay


@constructor
def Lamb(learning_rate: Scalar = 0.001, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-7,
         weight_decay: float | None = None, clipnorm: float | None = None, clipvalue: float | None = None,
         global_clipnorm: float | None = None, use_ema: bool = False, ema_momentum: float = 0.99,
         ema_overwrite_frequency: int | None = None, loss_scale_factor: float | None = None,
         gradient_accumulation_steps: int | None = None, name: str | None = None, *,
         exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None) -> Transformation:
    """``keras.optimizers.Lamb`` of Keras 3.

    As in the reference, decay is not part of the layer adaptation: the parameter is decayed first, and its norm is that of the decayed one.

    Args:
      learning_rate: as `Lion`.
      beta_1: in [0, 1).
      beta_2: in [0, 1).
      epsilon: added to the root, at least 0.
      weight_decay: as `Lion`.
      clipnorm: as `Lion`.
      clipvalue: as `Lion`.
      global_clipnorm: as `Lion`.
      use_ema: as `Lion`.
      ema_momentum: as `Lion`.
      ema_overwrite_frequency: as `Lion`.
      loss_scale_factor: as `Lion`.
      gradient_accumulation_steps: as `Lion`.
      name: without effect.
      exclude_from_weight_decay: as `Lion`.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.Lamb(epsilon=1e-6)
    Lamb(epsilon=1e-06)
    """
    base = _Base("compat.keras3.Lamb", learning_rate, weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
                 ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, exclude_from_weight_decay)
    adapt = scale_by_trust_ratio()
    if weight_decay:
        shrunk = scale_by_trust_ratio(trust_coefficient=Shrunk(base.rate, weight_decay), mask=base.mask)
        adapt = chain(shrunk, masked(adapt, base.mask.opposite()))
    return base.around(chain(scale_by_adam(beta_1, beta_2, epsilon), adapt, add_decayed_weights(weight_decay or 0.0, base.mask),
                             scale_by_learning_rate(base.rate)))
