"""Constructors of other systems: their argument names and defaults, their numbers, lionax's rules.

Each returns an ordinary `lionax.Transformation`. Where a reference does something that its users
would not expect, the docstring here says so, and it is done likewise. `from_weights` and
`to_weights`, `from_optax` and `to_optax` carry a run over in mid-training, there and back. Names of
parameters are the paths of leaves: ``dense/kernel``.
"""

from lionax.compat import dtensor, keras2, keras3, keras_schedules, tf_models
from lionax.compat.optax_states import from_optax, to_optax
from lionax.compat.weights import from_weights, to_weights

__all__ = [
    "dtensor", "from_optax", "from_weights", "keras2", "keras3", "keras_schedules", "tf_models",
    "to_optax", "to_weights"
]
