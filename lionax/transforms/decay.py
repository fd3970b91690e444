"""Weight decay."""

import dataclasses
from typing import Any, ClassVar

import jax

from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.masks import Mask
from lionax.core.rule import Applied, Rule, Step
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.combining import restrict

__all__ = ["AddDecayedWeights", "add_decayed_weights"]


@dataclasses.dataclass(frozen=True)
class AddDecayedWeights(Rule):
    """The rule of `add_decayed_weights`."""

    is_memoryless: ClassVar = True

    weight_decay: Scalar = scalar(0.0)
    base_learning_rate: float | None = scalar(None, low=0)
    learning_rate: Scalar | None = scalar(None, low=0, recorded=True)

    def __post_init__(self):
        super().__post_init__()
        base = self.base_learning_rate
        if base is not None and (not isinstance(base, float) or base == 0):
            raise ValueError(f"add_decayed_weights: base_learning_rate={base!r} is not accepted; "
                             "give the greatest value of the learning rate, a number above 0")

    @property
    def needs_params(self) -> bool:
        return self.weight_decay != 0.0 if isinstance(self.weight_decay, float) else True

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        if not self.needs_params:
            return update, slots
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        coefficient = self.weight_decay / (self.base_learning_rate or 1.0) * rate
        return update + coefficient * param, slots


@constructor
def add_decayed_weights(weight_decay: Scalar = 0.0, mask: Mask = None, *,
                        base_learning_rate: float | None = None,
                        learning_rate: Scalar | None = None) -> Transformation:
    """Adds a fraction of the parameter to its update.

        u ← u + weight_decay·p

    Before `scale_by_learning_rate` this is the decay ``lr·weight_decay·p`` of Optax and PyTorch. In
    Loshchilov and Hutter's paper it is multiplied by the schedule alone: ``(lr/α)·weight_decay·p``,
    where the schedule scales ``α``. For that give ``α`` as ``base_learning_rate``.

    Args:
      weight_decay: a finite number; below 0 parameters grow. With the constant 0 ``update`` needs
        no parameters.
      mask: the leaves to decay, as `masked`; None for all. The others keep their update.
      base_learning_rate: None, or a number above 0 by which the decay is divided.
      learning_rate: None, or a rate that multiplies the decay, where the update has its rate
        already. `set_hyperparams` assigns it together with that one.

    Raises:
      ValueError: for a value out of range, or an update without the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx, params = lionax.add_decayed_weights(0.5), jnp.array([2.0, 4.0])
    >>> tx.update(jnp.zeros(2), tx.init(params), params)[0].tolist()
    [1.0, 2.0]

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv:1711.05101.
    """
    return restrict(AddDecayedWeights(weight_decay, base_learning_rate, learning_rate), mask,
                    "add_decayed_weights")
