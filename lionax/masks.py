"""Names of leaves, and what is said about leaves by name: masks and labels.

A leaf's path joins the keys that lead to it with ``/``: ``blocks/0/dense/kernel``. Dicts, NamedTuples, dataclasses,
lists, Flax NNX states and Equinox modules all give the same kind of path, so a mask written for one matches another.
NNX wraps each array in a variable; the ``value`` that this adds to the end of a path is dropped.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey

__all__ = ["Mask", "PathMask", "PathTree", "freeze", "is_placeholder", "matching", "named_leaves", "not_matching",
           "paths", "select"]

Mask = Any
"""A tree of bools (or a prefix of one), a function of the parameters that gives one, or ``matching(...)``."""


def is_placeholder(leaf: Any) -> bool:
    """True for what stands where an array was left out: ``None`` or ``optax.MaskedNode()``."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _join(keys: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def _variables(tree: Any) -> set[tuple[Any, ...]]:
    """Where a tree holds variables of Flax NNX, which wrap an array in a node with the field ``value``."""
    nnx = sys.modules.get("flax.nnx")  # without it there are none
    if nnx is None:
        return set()
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    return {keys for keys, node in pairs if isinstance(node, nnx.Variable)}


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure of a tree, in which placeholders count as leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_placeholder)
    variables = _variables(tree) if any(keys and keys[-1] == GetAttrKey("value") for keys, _ in pairs) else ()
    names = [_join(keys[:-1] if keys[:-1] in variables else keys) for keys, _ in pairs]
    return names, [leaf for _, leaf in pairs], treedef


def paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, in the order of ``jax.tree.leaves``.

    Args:
      tree: any pytree.

    Returns:
      One string per leaf, its keys joined with ``/``. ``None`` and ``optax.MaskedNode()`` are not leaves.

    >>> import lionax
    >>> lionax.paths({"dense": {"kernel": 1.0, "bias": 0.0}, "blocks": [2.0]})
    ['blocks/0', 'dense/bias', 'dense/kernel']
    """
    names, leaves, _ = named_leaves(tree)
    return [name for name, leaf in zip(names, leaves, strict=True) if not is_placeholder(leaf)]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """The names most like ``wanted``, by whole path or by last part."""
    parts = {part: name for name in names for part in (name, name.rpartition("/")[2])}
    close = [parts[match] for match in difflib.get_close_matches(wanted, parts, n=5, cutoff=0.5)]
    shown = list(dict.fromkeys(close)) or list(names)[:5]
    return "nearest paths: " + ", ".join(repr(name) for name in shown)


@dataclass(frozen=True)
class PathMask:
    """A mask by regular expressions over leaf paths; made by `matching` and `not_matching`.

    It is hashable, compares by value, and can be called with parameters, so it serves as a mask in Optax too.
    """

    patterns: tuple[str, ...]
    inverted: bool = False

    def __post_init__(self):
        if not self.patterns:
            raise ValueError(f"{self._name}() needs at least one regular expression, such as {self._name}('bias')")
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{self._name} takes regular expressions as strings; got {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{self._name}: {pattern!r} is not a regular expression: {error}") from None

    @property
    def _name(self) -> str:
        return "not_matching" if self.inverted else "matching"

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(map(repr, self.patterns))})"

    def select(self, names: Sequence[str], owner: str) -> tuple[bool, ...]:
        """One bool per path; raises if a pattern matches none of them."""
        for pattern in self.patterns:
            if names and not any(re.search(pattern, name) for name in names):
                raise ValueError(f"{owner}: the regular expression {pattern!r} of {self!r} matches no leaf; "
                                 f"{_nearest(pattern, names)}")
        return tuple(any(re.search(p, name) for p in self.patterns) != self.inverted for name in names)

    def __call__(self, params: Any) -> Any:
        names, leaves, treedef = named_leaves(params)
        chosen = zip(leaves, self.select(names, "mask"), strict=True)
        return treedef.unflatten(leaf if is_placeholder(leaf) else bit for leaf, bit in chosen)


def matching(*regexes: str) -> PathMask:
    """Mask: the leaves whose path is matched by one of the regular expressions.

    Args:
      *regexes: searched for anywhere in the path (``re.search``): ``"bias"`` finds ``dense/bias`` and ``bias_gate/w``;
        anchor with ``"(^|/)bias$"`` to find leaves of that very name.

    Returns:
      A mask for every ``mask`` argument of lionax, and, being a function of the parameters, of Optax.

    Raises:
      ValueError: where it is used, if one of the expressions matches no leaf; the message lists the nearest paths.

    >>> import lionax
    >>> lionax.matching("bias")({"kernel": 1.0, "bias": 0.0})
    {'bias': True, 'kernel': False}
    """
    return PathMask(regexes)


def not_matching(*regexes: str) -> PathMask:
    """Mask: the leaves whose path none of the regular expressions matches. Otherwise as `matching`.

    Args:
      *regexes: as `matching`.

    Raises:
      ValueError: as `matching`.

    >>> import lionax
    >>> lionax.not_matching("bias", "scale")({"kernel": 1.0, "bias": 0.0, "scale": 1.0})
    {'bias': False, 'kernel': True, 'scale': False}
    """
    return PathMask(regexes, inverted=True)


@dataclass(frozen=True)
class PathTree:
    """A tree of bools or labels as path and value pairs: hashable, and free of the container types it came from."""

    entries: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][0] == "":
            return repr(self.entries[0][1])
        return repr(dict(self.entries))

    def select(self, names: Sequence[str], owner: str, skipped: Sequence[str] = ()) -> tuple[Any, ...]:
        """The value for each path: its own entry's or that of the nearest ancestor.

        Args:
          names: paths of the leaves.
          owner: the transformation, for error messages.
          skipped: paths where the tree holds a placeholder; entries at, above or below them are allowed.
        """
        values, used, chosen = dict(self.entries), set(), []
        for name in names:
            entry = next((p for p in _ancestors(name) if p in values), None)
            if entry is None:
                raise ValueError(f"{owner}: the mask or label tree has no entry for the leaf {name!r}; it must have the "
                                 f"parameters' structure or be a prefix of it. It has: {', '.join(values) or 'nothing'}")
            used.add(entry)
            chosen.append(values[entry])
        for name in skipped:
            used.update(e for e in values if e in _ancestors(name) or name in _ancestors(e))
        unused = [entry for entry in values if entry not in used]
        if names and unused:
            raise ValueError(f"{owner}: the mask or label tree has an entry at {unused[0]!r}, where the parameters have "
                             f"no leaf; {_nearest(unused[0], names)}")
        return tuple(chosen)


def _ancestors(name: str) -> list[str]:
    """``a/b/c`` gives itself, ``a/b``, ``a`` and the root."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]


def freeze(tree: Any, kind: type, owner: str, argument: str) -> Callable[[Any], Any] | PathMask | PathTree:
    """A mask (``kind=bool``) or label (``kind=str``) argument in hashable form; refuses what cannot be one.

    A callable is a function of the parameters only if it is not itself a pytree: an Equinox module full of bools is a
    mask, although it can be called.
    """
    if isinstance(tree, PathMask | PathTree | functools.partial) or (callable(tree) and jax.tree_util.all_leaves([tree])):
        return tree
    names, leaves, _ = named_leaves(tree)
    entries = []
    for name, leaf in zip(names, leaves, strict=True):
        if is_placeholder(leaf):
            continue
        if kind is bool and isinstance(leaf, np.bool_ | np.ndarray | jax.Array) and leaf.dtype == bool:
            if isinstance(leaf, Tracer) or leaf.shape != ():
                raise TypeError(f"{owner}: {argument} must be known when tracing, one bool per leaf; at {name!r} it has "
                                f"{leaf!r}. Build it outside jit, or give a function of the parameters")
            leaf = bool(leaf)
        if not isinstance(leaf, kind):
            remedy = "; to choose leaves by name, use lionax.matching(...)" if kind is bool else ""
            raise TypeError(f"{owner}: {argument} must be a tree of {kind.__name__}, a function of the parameters that "
                            f"gives one, or lionax.matching(...); at {name!r} it has {leaf!r}{remedy}")
        if any(name == other for other, _ in entries):
            raise ValueError(f"{owner}: {argument} has two entries with the path {name!r}; rename one, or give a function of the "
                             "parameters")
        entries.append((name, leaf))
    return PathTree(tuple(entries))


def select(chosen: Any, kind: type, params: Any, names: Sequence[str], present: Sequence[bool], owner: str,
           argument: str) -> tuple[Any, ...]:
    """A frozen mask or label tree resolved to one value per leaf; None for a leaf that is not there and has no entry.

    Args:
      chosen: what `freeze` gave.
      kind: as in `freeze`.
      params: the parameters, for a function of them; None where the caller has none.
      names: the paths of the leaves.
      present: for each leaf, whether there is an array.
      owner: the transformation, for error messages.
      argument: the argument's name, for error messages.
    """
    if not isinstance(chosen, PathMask | PathTree):
        if params is None:
            raise ValueError(f"{owner}: {argument} is a function of the parameters; pass them: update(grads, state, params)")
        result = chosen(params)
        chosen = freeze(result, kind, owner, argument)
        if not isinstance(chosen, PathMask | PathTree):
            raise TypeError(f"{owner}: the function given as {argument} must return a tree of {kind.__name__}; "
                            f"got {result!r}")
    if isinstance(chosen, PathMask):  # a leaf without a gradient in this step still has a name to match
        return chosen.select(names, owner)
    values = iter(chosen.select([name for name, here in zip(names, present, strict=True) if here], owner,
                                skipped=[name for name, here in zip(names, present, strict=True) if not here]))
    return tuple(next(values) if here else None for here in present)
