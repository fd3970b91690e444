"""A definition laid out over a tree: which rules run, in which order, on which leaves, and where their state is.

Definitions nest (a chain of a masked chain of rules …). A `Layout` flattens one into a list of `Stage`, and takes the state
apart in the same order and puts it together again; `sweeps` groups the stages into runs over memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax import storage
from lionax.masks import is_placeholder, named_leaves, select
from lionax.rule import Definition, Rule

__all__ = ["Combination", "Gate", "Layout", "Leaves", "Member", "Stage", "TreeWide", "Way", "check_structures", "gap", "present",
           "sweeps"]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A flattened tree in which placeholders (None, ``optax.MaskedNode()``) count as leaves."""

    paths: list[str]
    values: list[Any]
    treedef: Any
    params: Any  # the parameters as the caller gave them, for masks that are functions of them; or None

    @classmethod
    def of(cls, tree: Any, params: Any) -> "Leaves":
        """Flattens ``tree``; numbers and NumPy arrays become JAX arrays."""
        paths, values, treedef = named_leaves(tree)
        return cls(paths, [_as_array(v, p) for v, p in zip(values, paths, strict=True)], treedef, params)

    @property
    def all(self) -> list[bool]:
        """What acts on every leaf."""
        return [True] * len(self.values)

    @property
    def present(self) -> list[bool]:
        """For each leaf, whether there is an array to work on."""
        return [not is_placeholder(v) and not storage.is_float0(v) for v in self.values]

    def select(self, chosen: Any, kind: type, owner: str, argument: str) -> tuple[Any, ...]:
        """A frozen mask or label tree as one value for each leaf, see `lionax.masks.select`."""
        return select(chosen, kind, self.params, self.paths, self.present, owner, argument)

    def only(self, active: Sequence[bool]) -> Any:
        """The tree with the active leaves, all others masked."""
        return self.treedef.unflatten(v if a else gap(v) for v, a in zip(self.values, active, strict=True))


def _as_array(leaf: Any, path: str) -> Any:
    if is_placeholder(leaf) or storage.is_float0(leaf) or isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, float | int | complex | np.ndarray | np.generic) or hasattr(leaf, "__jax_array__"):
        return jnp.asarray(leaf)
    raise TypeError(f"the leaf {path!r} is {leaf!r}, not an array; keep only arrays in the tree (with Equinox: "
                    "eqx.filter(model, eqx.is_inexact_array))")


def present(tree: Any) -> list[jax.Array]:
    """The arrays of a tree, without placeholders and float0."""
    leaves = Leaves.of(tree, None)
    return [value for value, here in zip(leaves.values, leaves.present, strict=True) if here]


def check_structures(grads: Leaves, params: Leaves) -> None:
    """Refuses gradients that do not have the structure and the shapes of the parameters."""
    if grads.treedef != params.treedef:
        missing = [p for p in params.paths if p not in set(grads.paths)]
        extra = [p for p in grads.paths if p not in set(params.paths)]
        detail = (f"there is no gradient for {missing[0]!r}" if missing else
                  f"there is no parameter for the gradient {extra[0]!r}" if extra else
                  f"the containers differ: {grads.treedef} and {params.treedef}")
        raise ValueError(f"the gradients do not have the structure of the parameters: {detail}")
    for grad, present, param, path in zip(grads.values, grads.present, params.values, grads.paths, strict=True):
        if present and (is_placeholder(param) or grad.shape != param.shape):
            what = f"is {param!r}" if is_placeholder(param) else f"has shape {param.shape}"
            raise ValueError(f"the gradient of {path!r} has shape {grad.shape}, the parameter {what}; they must be equal "
                             "(nothing is broadcast)")


def gap(value: Any) -> Any:
    """What a tree holds for a leaf on which a rule does not act."""
    return value if is_placeholder(value) else optax.MaskedNode()


class TreeWide(Definition):
    """A definition that needs the whole tree at once; it ends a sweep."""

    @property
    def name(self) -> str:
        """What errors call it."""
        raise NotImplementedError

    def init(self, params: Any) -> Any:
        """The state for a parameter tree."""
        raise NotImplementedError


class Gate(TreeWide):
    """A definition that runs another in some of the steps only. Its state is a NamedTuple whose field ``inner`` is that one's."""

    part: Definition
    arguments: ClassVar[tuple[str, ...]] = ()  # the extra arguments that it takes; the others are for its part

    def open(self, updates: Any, state: Any, extra: Mapping[str, Any]) -> tuple[jax.Array, Any, list["Way"]]:
        """Chooses how to go on.

        Args:
          updates: what has come this far.
          state: the gate's.
          extra: the values of its ``arguments`` that were given.

        Returns:
          The index of the way to take in this step, an int32 scalar; the state that all ways start from; and the ways.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Way:
    """A way on from a gate. Unless it says otherwise, updates of zero go on, and the state stays as it is."""

    updates: Callable[[Any], Any] | None = None  # makes what goes on, out of the state
    runs: bool = False  # whether the part runs
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # new values for fields of the state
    emptied: str | None = None  # a field of the state whose arrays ``updates`` reads, and which is zero at the end


@dataclasses.dataclass(frozen=True)
class Member:
    """A part of a combination."""

    definition: Definition
    acts_on: Sequence[bool]  # for each leaf
    name: str = ""  # qualifies the names of hyperparameters


class Combination(Definition):
    """A definition made of others, each of which acts on some of the leaves."""

    def members(self, leaves: Leaves) -> list[Member]:
        """The parts, in the order in which they run."""
        raise NotImplementedError

    def pack(self, states: list[Any]) -> Any:
        """The state of the combination, from those of its members."""
        raise NotImplementedError

    def unpack(self, state: Any) -> Sequence[Any]:
        """The states of the members; raises TypeError or KeyError for a state of another form."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A rule at its place in a definition."""

    rule: Any  # a Rule or a TreeWide
    key: tuple[str, ...]  # names of the members that lead to it
    chosen: tuple[bool, ...]  # for each leaf, whether masks and labels let the rule act on it
    present: tuple[bool, ...]  # for each leaf, whether there is an array

    @property
    def active(self) -> list[bool]:
        """For each leaf, whether the rule acts on it."""
        return [c and p for c, p in zip(self.chosen, self.present, strict=True)]

    @property
    def tree_wide(self) -> bool:
        """Whether it sees all leaves at once."""
        return isinstance(self.rule, TreeWide)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A definition laid out over a tree."""

    definition: Definition
    parts: tuple["Layout", ...] = ()  # of a combination
    stage: Stage | None = None  # of a rule, or of what is tree-wide

    @classmethod
    def of(cls, definition: Definition, leaves: Leaves, chosen: Sequence[bool] | None = None) -> "Layout":
        """Resolves masks and labels, once for a step; ``chosen`` tells the leaves on which it is to act at most."""
        return cls._of(definition, leaves, leaves.all if chosen is None else chosen, ())

    @classmethod
    def _of(cls, definition: Definition, leaves: Leaves, chosen: Sequence[bool], key: tuple[str, ...]) -> "Layout":
        if isinstance(definition, Combination):
            parts = []
            for member in definition.members(leaves):
                both = [c and bool(m) for c, m in zip(chosen, member.acts_on, strict=True)]
                parts.append(cls._of(member.definition, leaves, both, (*key, member.name) if member.name else key))
            return cls(definition, parts=tuple(parts))
        if isinstance(definition, Rule | TreeWide):
            return cls(definition, stage=Stage(definition, key, tuple(chosen), tuple(leaves.present)))
        raise TypeError(f"{definition!r} is not a definition: a Rule, a Combination or a TreeWide")

    @property
    def stages(self) -> list[Stage]:
        """The rules in the order in which they run."""
        return [self.stage] if self.stage is not None else [stage for part in self.parts for stage in part.stages]

    def unpack(self, state: Any) -> list[Any]:
        """The states of the stages, out of that of the definition."""
        if not isinstance(self.definition, Combination):
            return [state]
        try:
            pairs = list(zip(self.parts, self.definition.unpack(state), strict=True))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"the state {jax.tree.map(jnp.shape, state)} does not fit {self.definition}: it was made by "
                             "another transformation") from None
        return [inner for part, own in pairs for inner in part.unpack(own)]

    def pack(self, states: Iterator[Any]) -> Any:
        """The inverse of `unpack`."""
        if not isinstance(self.definition, Combination):
            return next(states)
        return self.definition.pack([part.pack(states) for part in self.parts])


def sweeps(program: Sequence[Stage], start: int = 0) -> list[list[int]]:
    """Groups the indices of stages, from ``start`` on, into runs over the leaves.

    A new one begins at a rule that needs a norm over the tree, and before and after whatever is tree-wide.
    """
    groups: list[list[int]] = []
    for i, stage in list(enumerate(program))[start:]:
        if i == start or stage.tree_wide or program[i - 1].tree_wide or stage.rule.scope == "tree":
            groups.append([])
        groups[-1].append(i)
    return groups
