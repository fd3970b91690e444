"""DTensor: the experimental optimizers of TensorFlow 2.12."""

from typing import Any

from lionax.compat.keras2 import momentum_sgd
from lionax.compat.keras_parts import check_rate
from lionax.core.hyperparameters import Scalar
from lionax.core.transformation import Transformation, constructor

__all__ = ["SGD"]


@constructor
def SGD(learning_rate: Scalar = 0.01, momentum: float = 0.0, nesterov: bool = False,
        amsgrad: bool = False, gradients_clip_option: Any = None, ema_option: Any = None,
        jit_compile: bool = False, name: str = "SGD", mesh: Any = None) -> Transformation:
    """``tf.keras.dtensor.experimental.optimizers.SGD`` of TensorFlow 2.12; 2.13's is
    `lionax.compat.keras2.SGD`.

    The state is laid out as its parameters are: initialise it from parameters on the mesh.

    Args:
      learning_rate: as `lionax.compat.keras2.Lion`.
      momentum: as `lionax.compat.keras2.SGD`.
      nesterov: as `lionax.compat.keras2.SGD`.
      amsgrad: without effect, as in the reference.
      gradients_clip_option: without effect, as in the reference, which takes and forgets it. To
        clip, write ``lionax.chain(lionax.clip_by_norm(…), dtensor.SGD(…))``.
      ema_option: without effect, as in the reference. For an average, chain with
        `lionax.params_ema`.
      jit_compile: without effect; jit the step.
      name: without effect.
      mesh: without effect.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import dtensor
    >>> dtensor.SGD(0.1, momentum=0.9)
    SGD(learning_rate=0.1, momentum=0.9)
    """
    return momentum_sgd(check_rate(learning_rate, "compat.dtensor.SGD"), momentum, nesterov, None,
                        None)
