"""The contract of a rule: the math of one array. Read this first.

Every transformation of lionax is a **rule**: a frozen dataclass whose fields are its hyperparameters and whose methods
say what happens to ONE array. It never sees a tree, a mask, a mesh, a dtype other than float32 (float64 for float64
leaves), a schedule or a missing leaf. All that is the engine's (`lionax.engine`), once for all rules. Momentum is

    @dataclass(frozen=True)
    class Momentum(Rule):
        decay: Scalar = scalar(0.9, low=0, high=1)              # checked when constructed; may be a schedule or injected

        def init(self, param):
            return MomentumState(m=storage.zeros(param, None))  # this rule's slots for one parameter

        def apply(self, update, slots, param, step):
            m = self.decay * slots.m + update                   # self.decay is a number here, update and m are float32
            return m, MomentumState(m=m)

and SGD is ``chain(Transformation.of(Momentum(0.9)), scale_by_learning_rate(0.1))``. A rule that must know norms before it
can act names the arrays whose norms it needs, and finds them in ``step.norms``, summed over leaves and over devices:

    @dataclass(frozen=True)
    class ClipByGlobalNorm(Rule):
        scope = "tree"                                          # "leaf" for a norm of each leaf
        max_norm: Scalar = scalar(low=0)

        def measure(self, update, param):
            return (update,)

        def apply(self, update, slots, param, step):
            return update * jnp.minimum(1.0, self.max_norm / step.norms[0]), slots

Since rules are data, two optimizers built alike are equal, hash alike, pickle by value and compile once.
"""

import dataclasses
import re
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from lionax import storage
from lionax.hyperparameters import check_scalar

__all__ = ["Definition", "Rule", "Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rule is told about the step, besides its arrays."""

    count: jax.Array  # int32 []: how many steps were made before this one
    norms: tuple[jax.Array, ...] = ()  # compute dtype []: the norm of each array that `measure` named
    shared: Any = None  # what `prepare` gave


class Definition:
    """What a transformation is made of: a `Rule`, a combination of definitions, or something that sees whole trees."""


@dataclasses.dataclass(frozen=True)
class Rule(Definition):
    """The math of one array.

    Subclasses are frozen dataclasses. Their fields are hashable; those made with `scalar` are checked here, those named
    ``..._dtype`` are storage. In `apply`, scalar fields hold the value of the step: a float or a 0-d array.
    """

    scope: ClassVar[Literal["none", "leaf", "tree"]] = "none"
    """Over what the norms that `measure` asks for are taken."""

    update_reads_old_slots: ClassVar[bool] = False
    """Whether `apply` computes the update from the old slots, not the new: then writes are ordered (`lionax.ordering`), as they are
    where slots are stored in another dtype than they are computed in."""

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
    def name(self) -> str:
        """The name of the function that makes it: ``scale_by_lion`` for ``ScaleByLion``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def needs_params(self) -> bool:
        """Whether `apply` or `measure` reads the parameter."""
        return False

    @property
    def changes_update(self) -> bool:
        """Whether the update that `apply` returns may be another than it was given."""
        return True

    @property
    def acts_without_gradient(self) -> bool:
        """Whether it is applied, with an update of zero, to parameters whose gradient is None."""
        return False

    def init(self, param: jax.Array) -> Any:
        """The slots of one parameter: a NamedTuple of arrays, whose dtypes stay for good."""
        return optax.EmptyState()

    def prepare(self, count: jax.Array, dtype: Any) -> Any:
        """What is the same for all leaves of a compute dtype, as bias corrections are; `apply` finds it in ``step.shared``."""
        return None

    def measure(self, update: jax.Array, param: jax.Array | None) -> tuple[jax.Array, ...]:
        """The arrays whose norms `apply` needs, where ``scope`` is not ``"none"``."""
        raise NotImplementedError

    def apply(self, update: jax.Array, slots: Any, param: jax.Array | None, step: Step) -> tuple[jax.Array, Any]:
        """The new update and the new slots.

        Args:
          update: the gradient, or what the rules before this one made of it.
          slots: as `init` made them, loaded in the compute dtype.
          param: the parameter in the compute dtype; None if the caller gave none and ``needs_params`` is False.
          step: the count, the norms, and what `prepare` gave.
        """
        raise NotImplementedError

    def check_dtype(self, leaf: jax.Array, what: str) -> None:
        """Refuses an array that is not floating-point, unless any is accepted."""
        if self.any_dtype or jnp.issubdtype(leaf.dtype, jnp.floating):
            return
        remedy = ("wrap the transformation in optax.contrib.split_real_and_imaginary" if
                  jnp.issubdtype(leaf.dtype, jnp.complexfloating) else
                  "keep it out of the tree, or out of the transformation with lionax.masked or lionax.partition")
        raise TypeError(f"{self.name}: {what} has dtype {leaf.dtype}; floating-point is accepted; {remedy}")
