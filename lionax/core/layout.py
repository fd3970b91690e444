"""A definition laid out over a tree: which rules run, in which order, on which leaves.

Definitions nest. A `Layout` flattens one into a list of stages, and packs their states.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lionax.core.definition import Combination, TreeWide
from lionax.core.rule import Definition, Rule
from lionax.core.tree import Leaves

__all__ = ["Layout", "Stage", "StateError", "sweeps"]


class StateError(ValueError):
    """A state that another transformation made."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A rule, or what is tree-wide, at its place in a definition."""

    index: int  # in the order in which the stages run
    rule: Any  # a Rule or a TreeWide
    key: tuple[str, ...]  # names of the members that lead to it
    chosen: tuple[bool, ...]  # for each leaf, whether masks and labels let the rule act on it
    active: tuple[bool, ...]  # the same, and there is an array

    @property
    def is_tree_wide(self) -> bool:
        """Whether it sees all leaves at once."""
        return isinstance(self.rule, TreeWide)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A definition laid out over a tree."""

    definition: Definition
    stages: tuple[Stage, ...]  # in the order in which they run
    parts: tuple["Layout", ...] = ()  # of a combination

    @classmethod
    def of(cls, definition: Definition, leaves: Leaves) -> "Layout":
        """Resolves masks and labels, once for a step."""
        return cls._of(definition, leaves, [True] * len(leaves.values), (), itertools.count())

    @classmethod
    def _of(cls, definition: Definition, leaves: Leaves, chosen: Sequence[bool],
            key: tuple[str, ...], numbers: Iterator[int]) -> "Layout":
        if isinstance(definition, Combination):
            parts = []
            for member in definition.members(leaves):
                both = [a and bool(b) for a, b in zip(chosen, member.acts_on, strict=True)]
                inner_key = (*key, member.name) if member.name else key
                parts.append(cls._of(member.definition, leaves, both, inner_key, numbers))
            stages = tuple(stage for part in parts for stage in part.stages)
            return cls(definition, stages, tuple(parts))
        if isinstance(definition, Rule | TreeWide):
            active = tuple(a and b for a, b in zip(chosen, leaves.present, strict=True))
            return cls(definition, (Stage(next(numbers), definition, key, tuple(chosen), active),))
        raise TypeError(f"{definition!r} is not a definition: a Rule, a Combination or a TreeWide")

    def unpack(self, state: Any) -> list[Any]:
        """The states of the stages, from that of the definition."""
        if not isinstance(self.definition, Combination):
            return [state]
        try:
            pairs = list(zip(self.parts, self.definition.unpack(state), strict=True))
        except (TypeError, KeyError, ValueError):
            raise StateError(f"{self.definition.name}: the state does not fit; it was made by "
                             "another transformation") from None
        return [inner for part, own in pairs for inner in part.unpack(own)]

    def pack(self, states: Iterator[Any]) -> Any:
        """The inverse of `unpack`."""
        if not isinstance(self.definition, Combination):
            return next(states)
        return self.definition.pack([part.pack(states) for part in self.parts])


def sweeps(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Groups consecutive stages into sweeps: runs over the leaves.

    A sweep begins at a rule that needs a norm over the tree; what is tree-wide is a sweep of its
    own.
    """
    groups: list[list[Stage]] = []
    for stage in stages:
        is_first = not groups or stage.is_tree_wide or groups[-1][0].is_tree_wide
        if is_first or stage.rule.scope == "tree":
            groups.append([])
        groups[-1].append(stage)
    return groups
