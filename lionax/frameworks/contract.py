"""What the helpers of all frameworks share: which transformations they take."""

import optax

from lionax.core.transformation import Transformation
from lionax.transforms.combining import chain

__all__ = ["as_lionax"]


def as_lionax(tx: optax.GradientTransformation) -> Transformation:
    """A transformation with `Transformation.step`; one of Optax's becomes a chain of one."""
    return tx if isinstance(tx, Transformation) else chain(tx)
