"""The contract of a rule: the math of one array. Read this first.

Every transformation of lionax is made of **rules**: frozen dataclasses whose fields are the
hyperparameters and whose methods are the math of ONE array. A rule never sees a tree, a mask, a
mesh, a schedule, a missing leaf, or a dtype other than float32 (float64 for float64 leaves). The
engine (`lionax.core.engine`) does all that, once for all rules. Momentum is

    class MomentumState(NamedTuple):
        m: jax.Array  # decaying sum of gradients; the parameter's shape and dtype

    @dataclass(frozen=True)
    class Momentum(Rule):
        decay: Scalar = scalar(0.9, low=0, high=1)       # checked; may be a schedule or injected

        def init(self, param):
            return MomentumState(m=zero_slot(param))     # the slots of one parameter

        def apply(self, update, slots, param, step):
            m = self.decay * slots.m + update            # here self.decay is a number
            return m, MomentumState(m=m)

and SGD is ``chain(Transformation.of(Momentum(0.9)), scale_by_learning_rate(0.1))``. A rule that
needs norms says of what, and finds them in ``step.norms``, summed over leaves and devices:

    @dataclass(frozen=True)
    class ClipByGlobalNorm(Rule):
        scope = "tree"                                   # "leaf": the norm of each leaf
        norms_of = ("update",)
        max_norm: Scalar = scalar(low=0)

        def apply(self, update, slots, param, step):
            return update * jnp.minimum(1.0, self.max_norm / step.norms[0]), slots

Rules are data: two transformations built alike are equal, hash alike, pickle and compile once.
"""

import dataclasses
import re
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax.core import storage
from lionax.core.hyperparameters import check_scalar

__all__ = ["Applied", "Definition", "Observer", "Rule", "Step"]

Applied = tuple[Any, Any]
"""What `Rule.apply` returns: the new update and the new slots."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What `Rule.apply` gets of the step, besides the leaf's arrays."""

    count: jax.Array  # int32 []: how many steps were made before this one
    norms: tuple[jax.Array, ...] = ()  # compute dtype []: one for each name in ``norms_of``
    shared: Any = None  # what `Rule.prepare` returned


class Definition:
    """What a transformation is made of: a `Rule`, or a combination or wrapper of definitions."""

    @property
    def name(self) -> str:
        """Its name in errors and plans: ``scale_by_lion`` for the class ``ScaleByLion``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


@dataclasses.dataclass(frozen=True)
class Rule(Definition):
    """The math of one array.

    A subclass is a frozen dataclass with hashable fields and an `apply`. Fields made with `scalar`
    are checked; in `apply` and `prepare` they are the values of this step, floats or 0-d arrays.
    Fields named ``..._dtype`` say how slots are stored.
    """

    scope: ClassVar[Literal["none", "leaf", "tree"]] = "none"
    """Whether ``step.norms`` are those of each leaf or of all leaves together."""

    norms_of: ClassVar[tuple[Literal["update", "param"], ...]] = ()
    """The arrays whose norms `apply` needs."""

    any_dtype: ClassVar[bool] = False
    """Whether leaves that are not floating-point are accepted."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_dtype"):
                value = storage.check_storage(value, self.name, field.name)
            elif "scalar" in field.metadata and not (value is None and field.default is None):
                value = check_scalar(value, field.metadata["scalar"], self.name, field.name)
            object.__setattr__(self, field.name, value)

    @property
    def needs_params(self) -> bool:
        """Whether `apply` reads the parameter, or its norm."""
        return "param" in self.norms_of

    def init(self, param: jax.Array) -> Any:
        """The slots of one parameter: a NamedTuple of arrays, whose dtypes never change."""
        return optax.EmptyState()

    def prepare(self, count: jax.Array, dtype: np.dtype) -> Any:
        """What all leaves of a compute dtype share; `apply` gets it as ``step.shared``."""
        return None

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        """The new update and the new slots.

        Args:
          update: the gradient, or what the rules before this one made of it.
          slots: as `init` made them, in the compute dtype.
          param: the parameter in the compute dtype; None if the caller gave none.
          step: the count, the norms, and what `prepare` returned.
        """
        raise NotImplementedError

    def check_dtype(self, leaf: jax.Array, what: str) -> None:
        """Refuses an array that is not floating-point, unless the rule takes any."""
        if self.any_dtype or jnp.issubdtype(leaf.dtype, jnp.floating):
            return
        remedy = "keep it out of the transformation with lionax.masked or lionax.partition"
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            remedy = "wrap the transformation in optax.contrib.split_real_and_imaginary"
        raise TypeError(f"{self.name}: {what} has dtype {leaf.dtype}; floating-point is accepted; "
                        f"{remedy}")


class Observer(Rule):
    """A rule that watches the parameters, also those without a gradient.

    At the end of a chain `step` calls `apply` with the parameters that it has written and updates
    of zero. ``update`` is None for a leaf without a gradient; then `apply` may return None, too.
    """

    @property
    def needs_params(self) -> bool:
        return True
