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

import contextlib
import dataclasses
import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax.core import storage
from lionax.core.hyperparameters import Held, Interval, check_scalar
from lionax.core.internals import Tracer
from lionax.core.masks import check_matched
from lionax.core.tree import Keys

__all__ = ["Applied", "Definition", "Observer", "Rule", "Step", "at_path", "check_paths"]

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

    @property
    def takes(self) -> Collection[str]:
        """The extra arguments that it takes; ``**`` stands for any."""
        return ()

    def context(self) -> AbstractContextManager[Any]:
        """In what `Transformation` enters the engine."""
        return contextlib.nullcontext()


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

    dtypes: ClassVar[tuple[Any, ...]] = (jnp.floating, jnp.complexfloating)
    """The kinds of leaves that are accepted: of `jax.numpy`'s scalar types."""

    nonnegative: ClassVar[tuple[str, ...]] = ()
    """The slots that are never negative. No positive element of them is rounded to 0."""

    is_memoryless: ClassVar[bool] = False
    """Whether there are neither slots nor a look at ``step.count``. Then the state may be empty."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_dtype"):
                value = storage.check_storage(value, self.name, field.name)
            elif "scalar" in field.metadata and not (value is None and field.default is None):
                number = check_scalar(value, self.accepted(field.name), self.name, field.name)
                is_held = field.metadata["recorded"] and isinstance(value, Tracer)
                value = Held(number) if is_held else number
            object.__setattr__(self, field.name, value)

    def accepted(self, field: str) -> Interval:
        """The numbers that a field made with `scalar` accepts."""
        return self.__dataclass_fields__[field].metadata["scalar"]

    @property
    def norm_axes(self) -> tuple[int, ...]:
        """The axes of a leaf along which each index has a norm of its own, in the scope "leaf"."""
        return ()

    @property
    def needs_params(self) -> bool:
        """Whether `apply` reads the parameter, or its norm."""
        return "param" in self.norms_of

    def storage_of(self, slot: str) -> storage.Storage | None:
        """How a slot is rounded: as its field ``<slot>_dtype`` or ``accumulator_dtype`` says."""
        return getattr(self, f"{slot}_dtype", getattr(self, "accumulator_dtype", None))

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

    def check_leaf(self, leaf: jax.Array, what: str) -> None:
        """Refuses an array of a kind that the rule does not take."""
        if any(jnp.issubdtype(leaf.dtype, kind) for kind in self.dtypes):
            return
        remedy = "keep it out of the transformation with lionax.masked or lionax.partition"
        if storage.is_complex(leaf):
            remedy = "wrap the transformation in optax.contrib.split_real_and_imaginary"
        kinds = " or ".join(kind.__name__ for kind in self.dtypes)
        raise TypeError(f"{self.name}: {what} has dtype {leaf.dtype}; {kinds} is accepted; "
                        f"{remedy}")


def at_path(rule: Rule, path: str) -> Rule:
    """The rule for one leaf, whose slots may be stored in a way of their own."""
    chosen = {name: value.at(path) for name, value in _by_path(rule).items()}
    return dataclasses.replace(rule, **chosen) if chosen else rule


def check_paths(rule: Rule, keys: Sequence[Keys]) -> None:
    """Refuses a storage by path of which a regular expression matches no leaf."""
    for value in _by_path(rule).values():
        check_matched(value.rules, keys, rule.name)


def _by_path(rule: Rule) -> dict[str, storage.StorageByPath]:
    return {name: value for name, value in vars(rule).items()
            if isinstance(value, storage.StorageByPath)}


class Observer(Rule):
    """A rule that watches the parameters, also those without a gradient.

    At the end of a chain `step` calls `apply` with the parameters that it has written and updates
    of zero. ``update`` is None for a leaf without a gradient; then `apply` may return None, too.
    """

    @property
    def needs_params(self) -> bool:
        return True
