"""Definitions made of definitions: combinations, Optax's transformations, conditionals."""

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from lionax.core import norms
from lionax.core.hyperparameters import Held, Injected
from lionax.core.rule import Definition, Rule
from lionax.core.tree import Leaves, Specs, splitting

__all__ = ["Combination", "Conditional", "Foreign", "Member", "OfOne", "Sharded",
           "TreeWide", "is_stateless", "nested"]


@dataclasses.dataclass(frozen=True)
class Member:
    """A part of a combination."""

    definition: Definition
    acts_on: Sequence[bool]  # for each leaf
    name: str = ""  # qualifies the names of its hyperparameters


class Combination(Definition):
    """A definition made of others, each of which acts on some of the leaves."""

    def members(self, leaves: Leaves) -> list[Member]:
        """The parts, in the order in which they run."""
        raise NotImplementedError

    def pack(self, states: list[Any]) -> Any:
        """The state of the combination, from those of its members."""
        raise NotImplementedError

    def unpack(self, state: Any) -> Sequence[Any]:
        """The states of the members; TypeError or KeyError for a state of another form."""
        raise NotImplementedError


class OfOne(Combination):
    """A combination of one member, whose state is its own."""

    def pack(self, states: list[Any]) -> Any:
        return states[0]

    def unpack(self, state: Any) -> Sequence[Any]:
        return [state]


@dataclasses.dataclass(frozen=True)
class Sharded(OfOne):
    """The definition of `sharded`: another one, and how the leaves are split over a mesh."""

    part: Definition
    specs: Specs

    def context(self) -> AbstractContextManager[Any]:
        return splitting(self.specs)

    def members(self, leaves: Leaves) -> list[Member]:
        return [Member(self.part, [True] * len(leaves.values))]


class TreeWide(Definition):
    """A definition that sees the whole tree at once."""

    def init(self, params: Any) -> Any:
        """The state for a parameter tree."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Foreign(TreeWide):
    """An Optax transformation. It sees its leaves only, in the gradients' dtypes."""

    tx: optax.GradientTransformation

    @property
    def name(self) -> str:
        name = getattr(self.tx.update, "__qualname__", repr(self.tx))
        return name.removesuffix(".<locals>.update_fn")

    @property
    def takes(self) -> Collection[str]:
        if not isinstance(self.tx, optax.GradientTransformationExtraArgs):
            return ()
        parameters = inspect.signature(self.tx.update).parameters.values()
        return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]

    def init(self, params: Any) -> Any:
        return self.tx.init(params)

    def update(self, updates: Any, state: Any, params: Any,
               extra: Mapping[str, Any]) -> tuple[Any, Any]:
        """The new updates and the new state, in the dtypes of the old one."""
        update = optax.with_extra_args_support(self.tx).update
        updates, new = update(updates, state, params, **extra)
        is_alike = jax.tree.structure(new) == jax.tree.structure(state)
        # Inside of a conditional gradients are in float32, whatever the dtype of the parameters.
        return updates, jax.tree.map(_in_dtype_of, new, state) if is_alike else new


def _in_dtype_of(new: Any, old: Any) -> Any:
    dtypes = [getattr(x, "dtype", None) for x in (new, old)]
    is_other = dtypes[0] != dtypes[1] and all(
        dtype is not None and jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
    return new.astype(old.dtype) if is_other else new


class Conditional(TreeWide):
    """A definition that runs an inner one in some steps only.

    Its state is a NamedTuple whose field ``inner`` is the state of the inner definition. In a step
    the engine calls `open`. In the branch of a due call it calls `accepts` and, in a branch of its
    own if that holds, runs the inner definition with `inner_updates`. Then it calls `close`, which
    changes scalars only.
    """

    inner: Definition
    sums = True  # whether `accepts` sums over all leaves
    arguments: ClassVar[tuple[str, ...]] = ()  # the extra arguments that it takes from its caller
    inner_gradients: ClassVar[str] = ""  # what `inner_updates` are, as the prefix of a metric

    @property
    def takes(self) -> Collection[str]:
        return self.arguments

    def open(self, updates: Any, state: Any, params: Any,
             extra: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """The parameters, the state with these updates taken in, and whether the call is due."""
        return params, state, True

    def inner_updates(self, updates: Any, state: Any) -> Any:
        """What the inner definition gets, from the updates and the state of `open`."""
        return updates

    def accepts(self, updates: Any, state: Any, params: Any,
                extra: Mapping[str, Any]) -> jax.Array:
        """Whether the inner definition runs, from the updates and the state of `open`."""
        leaves = Leaves.of(updates, None)
        present = [value if here else None
                   for value, here in zip(leaves.values, leaves.present, strict=True)]
        return norms.all_finite(norms.by_axes(present, leaves.splits))

    def close(self, updates: Any, state: Any, due: Any, accepted: jax.Array) -> Any:
        """The state after the call; ``accepted`` is False where the call was not due."""
        raise NotImplementedError

    def write(self, new: Any, opened: Any, params: Any, state: Any,
              writes: bool) -> tuple[Any, Any]:
        """What the inner definition made, for these parameters, of those of `open`; and the state.

        With ``writes`` that are new parameters, else updates.
        """
        return new, state

    def poisons(self, state: Any) -> jax.Array | bool:
        """Whether the updates are NaN in this call, by the state of `close`."""
        return False


def nested(definition: Any) -> Iterator[Definition]:
    """A definition and all the definitions in it."""
    if isinstance(definition, Definition):
        yield definition
    if isinstance(definition, tuple):
        for item in definition:
            yield from nested(item)
    elif isinstance(definition, Definition) and dataclasses.is_dataclass(definition):
        for field in dataclasses.fields(definition):
            yield from nested(getattr(definition, field.name))


def is_stateless(definition: Definition, but_for_rates: bool = False) -> bool:
    """Whether it keeps nothing from step to step: no slots, no count, no hyperparameters."""
    return all(isinstance(part, Combination)
               or (isinstance(part, Rule) and _is_constant(part, but_for_rates))
               for part in nested(definition))


def _is_constant(rule: Rule, but_for_rates: bool) -> bool:
    """Whether a rule needs neither slots nor the count, nor a value that the state holds."""
    scalars = [(field.metadata, getattr(rule, field.name)) for field in dataclasses.fields(rule)
               if "scalar" in field.metadata]
    return rule.is_memoryless and not any(
        isinstance(value, Injected) or callable(value)
        or (metadata["recorded"] and not but_for_rates and not isinstance(value, Held | None))
        for metadata, value in scalars)
