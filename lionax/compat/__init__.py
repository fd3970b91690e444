"""Constructors of other systems: their argument names and defaults, their numbers, lionax's rules.

Each returns an ordinary `lionax.Transformation`. Where a reference does something that its users would not expect, the
docstring here says so, and it is done likewise. Names of parameters are the paths of leaves: ``dense/kernel``.
"""

from lionax.compat import dtensor, keras2, keras3, keras_schedules, tf_models

__all__ = ["dtensor", "keras2", "keras3", "keras_schedules", "tf_models"]
