"""TensorFlow Model Garden."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lionax.compat.keras_parts import Decayed, check_rate
from lionax.core.hyperparameters import Interval, Scalar, check_scalar
from lionax.core.rule import Applied, Step
from lionax.core.table import shown
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.transforms.clipping import ClipByNorm, clip, clip_by_global_norm, clip_by_norm
from lionax.transforms.combining import chain
from lionax.transforms.decay import add_decayed_weights
from lionax.transforms.scaling import scale_by_learning_rate

__all__ = ["LAMB", "InverseTime", "ZeroNorm"]


@dataclasses.dataclass(frozen=True)
class InverseTime:
    """A rate divided by ``1 + decay·step``."""

    rate: Any
    decay: float

    def __post_init__(self):
        decay = check_scalar(self.decay, Interval(0.0), "InverseTime", "decay", dynamic=False)
        object.__setattr__(self, "decay", decay)

    def __call__(self, step: Any) -> Any:
        rate = jnp.asarray(self.rate(step) if callable(self.rate) else self.rate, jnp.float32)
        return rate / (1.0 + self.decay * jnp.asarray(step).astype(jnp.float32))


class ZeroNorm(ClipByNorm):
    """TensorFlow's clip to a norm of 0 divides a gradient of 0 by 0."""

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        clipped, slots = super().apply(update, slots, param, step)
        return jnp.where(step.norms[0] == 0, jnp.full_like(clipped, jnp.nan), clipped), slots


@constructor
def LAMB(learning_rate: Scalar = 0.001, beta_1: float = 0.9, beta_2: float = 0.999,
         epsilon: float = 1e-6, weight_decay_rate: float = 0.0,
         exclude_from_weight_decay: Sequence[str] | None = None,
         exclude_from_layer_adaptation: Sequence[str] | None = None, name: str = "LAMB", *,
         clipnorm: float | None = None, clipvalue: float | None = None,
         global_clipnorm: float | None = None, lr: Scalar = None,
         decay: float = 0.0) -> Transformation:
    """``tfm.optimization.lamb.LAMB`` of the TensorFlow Model Garden.

    As in the reference: what is excluded from decay is excluded from layer adaptation too, unless
    that has a list of its own (an empty one is none); ``lr`` overrides ``learning_rate``; clips act
    one after the other, by value, leaf and tree; a ``clipnorm`` of 0 makes gradients 0, and those
    that are 0 NaN.

    Args:
      learning_rate: a number, a 0-d array or a schedule; a function of no arguments is refused.
      beta_1: in [0, 1).
      beta_2: in [0, 1).
      epsilon: added to the root; 0 is refused, with which the reference fails.
      weight_decay_rate: the decay inside of the layer adaptation, at least 0.
      exclude_from_weight_decay: regular expressions, searched for in the path.
      exclude_from_layer_adaptation: as ``exclude_from_weight_decay``.
      name: without effect.
      clipnorm: limit of each leaf's norm.
      clipvalue: limit of each element.
      global_clipnorm: limit of the norm of all leaves.
      lr: the learning rate, by its old name.
      decay: of the learning rate: it is divided by ``1 + decay·step``.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import tf_models
    >>> tf_models.LAMB(1e-4, exclude_from_weight_decay=["bias", "scale"])
    LAMB(learning_rate=0.0001, exclude_from_weight_decay=['bias', 'scale'])
    """
    owner = "compat.tf_models.LAMB"
    if not epsilon:
        raise ValueError(f"{owner}: epsilon={epsilon!r} is not accepted, as in the reference; give "
                         "a number above 0, such as 1e-6")
    for argument, value in (("clipnorm", clipnorm), ("clipvalue", clipvalue),
                            ("global_clipnorm", global_clipnorm), ("decay", decay), ("lr", lr)):
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{owner}: {argument}={value!r} is not accepted; give a number of at "
                             "least 0")
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(f"{owner}: clipnorm={clipnorm!r} and global_clipnorm={global_clipnorm!r} "
                         "exclude each other; give one of them")
    rate = check_rate(learning_rate if lr is None else lr, owner)
    for excluded in (exclude_from_weight_decay, exclude_from_layer_adaptation):
        if isinstance(excluded, str):
            raise TypeError(f"{owner}: {shown(excluded)} is excluded; give a list of strings")
    undecayed = tuple(exclude_from_weight_decay or ())
    unadapted = tuple(exclude_from_layer_adaptation or undecayed)
    clips = [
        make(limit) for limit, make in ((clipvalue, clip), (clipnorm, clip_by_norm),
                                        (global_clipnorm, clip_by_global_norm)) if limit is not None
    ]
    if clipnorm == 0:
        clips[-1] = Transformation.of(ZeroNorm(0.0))
    return chain(*clips,
                 scale_by_adam(beta_1, beta_2, epsilon),
                 add_decayed_weights(weight_decay_rate, Decayed(undecayed)),
                 scale_by_trust_ratio(mask=Decayed(unadapted)),
                 scale_by_learning_rate(InverseTime(rate, decay) if decay else rate))
