"""Masks and labels: trees, functions of the parameters, regular expressions over leaf paths.

They choose leaves by path, so one that is written for a dict serves a Flax or an Equinox model.
"""

import difflib
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lionax.core.internals import Tracer
from lionax.core.table import shown
from lionax.core.tree import Keys, Leaves, is_placeholder, keyed_leaves

__all__ = ["Mask", "PathLabels", "PathMask", "PathTree", "check_matched", "check_regexes",
           "first_match", "freeze", "labels", "matching", "not_matching", "select"]

Mask = Any
"""A tree of bools or a prefix of one, a function of the parameters, or ``matching(...)``."""


def check_regexes(patterns: Iterable[str], owner: str) -> None:
    """Refuses what is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (TypeError, re.error, OverflowError, RecursionError) as error:
            kind = ValueError if isinstance(pattern, str) else TypeError
            raise kind(f"{owner}: {shown(pattern)} is not a regular expression: "
                       f"{error}") from None


def first_match(rules: Iterable[tuple[str, Any]], path: str, default: Any = None) -> Any:
    """What stands beside the first regular expression that a path matches."""
    return next((value for regex, value in rules if re.search(regex, path)), default)


@dataclass(frozen=True)
class PathMask:
    """A mask by regular expressions over leaf paths; made by `matching` and `not_matching`.

    It is a value, and can be called with parameters: so it serves as a mask in Optax, too.
    """

    patterns: tuple[str, ...]
    inverted: bool = False
    missing_ok: bool = False

    def __post_init__(self):
        if not self.patterns:
            raise ValueError(f"{self._name}() needs at least one regular expression, such as "
                             f"{self._name}('bias')")
        check_regexes(self.patterns, self._name)

    @property
    def _name(self) -> str:
        return "not_matching" if self.inverted else "matching"

    def __repr__(self) -> str:
        given = [*map(repr, self.patterns), *(["missing_ok=True"] if self.missing_ok else [])]
        return f"{self._name}({', '.join(given)})"

    def select(self, keys: Sequence[Keys], present: Sequence[bool], owner: str) -> tuple[bool, ...]:
        """One bool for each leaf; refuses a pattern that matches none of them."""
        names = list(map("/".join, keys))
        for pattern in () if self.missing_ok else self.patterns:
            if names and not any(re.search(pattern, name) for name in names):
                raise ValueError(f"{owner}: the regular expression {pattern!r} of {self!r} matches "
                                 f"no leaf; {_nearest(pattern, names)}")
        matched = (any(re.search(p, name) for p in self.patterns) for name in names)
        return tuple(is_matched != self.inverted for is_matched in matched)

    def __call__(self, params: Any) -> Any:
        keys, leaves, treedef = keyed_leaves(params)
        chosen = zip(leaves, self.select(keys, [True] * len(keys), "mask"), strict=True)
        return treedef.unflatten(leaf if is_placeholder(leaf) else bit for leaf, bit in chosen)


def matching(*regexes: str, missing_ok: bool = False) -> PathMask:
    """Mask: the leaves whose path is matched by one of the regular expressions.

    Args:
      *regexes: searched for anywhere in the path (``re.search``): ``"bias"`` finds ``dense/bias``
        and ``bias_gate/w``; anchor with ``"(^|/)bias$"`` to find leaves of that very name.
      missing_ok: whether an expression may match no leaf.

    Returns:
      A mask for lionax and, being a function of the parameters, for Optax.

    Raises:
      ValueError: where it is used, if an expression matches no leaf; it names the nearest paths.

    >>> import lionax
    >>> lionax.matching("bias")({"kernel": 1.0, "bias": 0.0})
    {'bias': True, 'kernel': False}
    """
    return PathMask(regexes, missing_ok=missing_ok)


def not_matching(*regexes: str, missing_ok: bool = False) -> PathMask:
    """Mask: the leaves whose path none of the regular expressions matches. Otherwise as `matching`.

    Args:
      *regexes: as `matching`.
      missing_ok: as `matching`.

    Raises:
      ValueError: as `matching`.

    >>> import lionax
    >>> lionax.not_matching("bias", "scale")({"kernel": 1.0, "bias": 0.0, "scale": 1.0})
    {'bias': False, 'kernel': True, 'scale': False}
    """
    return PathMask(regexes, inverted=True, missing_ok=missing_ok)


def check_matched(rules: Iterable[tuple[str, Any]], keys: Sequence[Keys], owner: str) -> None:
    """Refuses a regular expression that matches no leaf."""
    PathMask(tuple(regex for regex, _ in rules)).select(keys, (), owner)


@dataclass(frozen=True)
class PathLabels:
    """Labels by regular expressions over leaf paths; made by `labels`."""

    rules: tuple[tuple[str, Any], ...]  # expression and label
    default: Any = None

    def __post_init__(self):
        check_regexes((regex for regex, _ in self.rules), "labels")

    def __repr__(self) -> str:
        default = "" if self.default is None else f", default={self.default!r}"
        return f"labels({dict(self.rules)!r}{default})"

    def select(self, keys: Sequence[Keys], present: Sequence[bool], owner: str) -> tuple[Any, ...]:
        """The label of the first expression that matches each leaf's path, or the default."""
        found = []
        for name, here in zip(map("/".join, keys), present, strict=True):
            label = first_match(self.rules, name, self.default)
            if label is None and here:
                raise ValueError(f"{owner}: no regular expression of {self!r} matches the leaf "
                                 f"{name!r}; add one, or give a default")
            found.append(label)
        return tuple(found)

    def __call__(self, params: Any) -> Any:
        keys, leaves, treedef = keyed_leaves(params)
        present = [not is_placeholder(leaf) for leaf in leaves]
        chosen = zip(leaves, self.select(keys, present, "labels"), strict=True)
        return treedef.unflatten(leaf if is_placeholder(leaf) else x for leaf, x in chosen)


def labels(rules: Mapping[str, Any], default: Any = None) -> PathLabels:
    """Labels for `partition`: by the first regular expression that matches a leaf's path.

    Args:
      rules: regular expression -> label, searched for as in `matching`.
      default: the label of leaves that none matches; without one such a leaf is an error.

    Returns:
      Labels for lionax and, being a function of the parameters, for Optax.

    Raises:
      TypeError, ValueError: for a key that is not a regular expression.

    >>> import lionax
    >>> lionax.labels({"bias": "small"}, default="large")({"kernel": 1.0, "bias": 0.0})
    {'bias': 'small', 'kernel': 'large'}
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"labels: {rules!r} is not a mapping from regular expressions to labels")
    return PathLabels(tuple(rules.items()), default)


@dataclass(frozen=True)
class PathTree:
    """A tree of bools or labels as pairs of a path and a value, whatever its containers."""

    entries: tuple[tuple[Keys, Any], ...]

    def __repr__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][0] == ():
            return repr(self.entries[0][1])
        return repr({"/".join(keys): value for keys, value in self.entries})

    def select(self, keys: Sequence[Keys], present: Sequence[bool], owner: str) -> tuple[Any, ...]:
        """The value for each leaf: its own entry's or that of the nearest ancestor."""
        values = dict(self.entries)
        # Another container may join parts of a path: {"a/b": ...} and {"a": {"b": ...}}.
        joined = {"/".join(entry): entry for entry in values}
        nearest = [next((p for p in _ancestors(leaf) if p in values), None) or
                   next((joined[name] for name in map("/".join, _ancestors(_split(leaf)))
                         if name in joined), None) for leaf in keys]
        names = list(map("/".join, keys))
        for name, here, entry in zip(names, present, nearest, strict=True):
            if here and entry is None:
                raise ValueError(f"{owner}: the mask or label tree has no entry for the leaf "
                                 f"{name!r}; it must have the parameters' structure or be a prefix "
                                 f"of it. It has: {', '.join(joined) or 'nothing'}")
        absent = {_split(leaf) for leaf, here in zip(keys, present, strict=True) if not here}
        for entry in values if names else ():
            if entry not in nearest and absent.isdisjoint(_ancestors(_split(entry))):
                path = "/".join(entry)
                raise ValueError(f"{owner}: the mask or label tree has an entry at {path!r}, where"
                                 f" the parameters have no leaf; {_nearest(path, names)}")
        return tuple(None if entry is None else values[entry] for entry in nearest)


def _split(keys: Keys) -> Keys:
    return tuple("/".join(keys).split("/")) if keys else keys


def _ancestors(keys: Keys) -> list[Keys]:
    """``(a, b, c)`` gives itself, ``(a, b)``, ``(a,)`` and the root."""
    return [keys[:n] for n in range(len(keys), -1, -1)]


def freeze(tree: Any, kind: type, owner: str,
           argument: str) -> Callable[[Any], Any] | PathMask | PathTree | PathLabels:
    """A mask (``kind=bool``) or label (``kind=object``) argument in hashable form.

    A callable is a function of the parameters only if it is no pytree: an Equinox module full of
    bools is a mask, although it can be called.
    """
    is_function = callable(tree) and jax.tree_util.all_leaves([tree])
    if is_function or isinstance(tree, PathMask | PathTree | PathLabels | functools.partial):
        return tree
    keys, leaves, _ = keyed_leaves(tree)
    entries = []
    for key, leaf in zip(keys, leaves, strict=True):
        name = "/".join(key)
        if is_placeholder(leaf):
            continue
        is_array = isinstance(leaf, np.bool_ | np.ndarray | jax.Array)
        if kind is bool and is_array and leaf.dtype == bool:
            if isinstance(leaf, Tracer) or leaf.shape != ():
                raise TypeError(f"{owner}: {argument} must be known when tracing, one bool per "
                                f"leaf; at {name!r} it has {leaf!r}. Build it outside jit, or give "
                                "a function of the parameters")
            leaf = bool(leaf)
        if not isinstance(leaf, kind) or not isinstance(leaf, Hashable):
            by_path = "lionax.matching(...)" if kind is bool else "lionax.labels({...})"
            raise TypeError(f"{owner}: {argument} must be a tree of {_named(kind)}, a function of "
                            f"the parameters that gives one, or {by_path} to choose leaves by "
                            f"path; at {name!r} it has {leaf!r}")
        entries.append((key, leaf))
    return PathTree(tuple(entries))


def select(leaves: Leaves, chosen: Any, kind: type, owner: str,
           argument: str) -> tuple[Any, ...]:
    """A mask or label tree, as `freeze` gave it, as one value a leaf; None without an entry."""
    if not isinstance(chosen, PathMask | PathTree | PathLabels):
        chosen = _made_by(leaves, chosen, kind, owner, argument)
    return chosen.select(leaves.keys, leaves.present, owner)


def _made_by(leaves: Leaves, function: Callable[[Any], Any], kind: type, owner: str,
             argument: str) -> Any:
    """The mask or label tree that a function of the parameters makes."""
    remedy = (f"it is called once, with the tree of the parameters, and must return a tree of "
              f"{_named(kind)}; to choose by path give "
              f"{'lionax.matching(...)' if kind is bool else 'lionax.labels({...})'}")
    try:
        result = function(leaves.params)
    except (TypeError, AttributeError) as error:
        raise TypeError(f"{owner}: the function given as {argument} failed ({error}); "
                        f"{remedy}") from error
    chosen = freeze(result, kind, owner, argument)
    is_tree = isinstance(chosen, PathMask | PathTree | PathLabels) and result is not None
    is_one = is_tree and isinstance(result, bool) and len(leaves.keys) > 1
    if not is_tree or is_one:
        raise TypeError(f"{owner}: the function given as {argument} returned {result!r}; "
                        f"{remedy}")
    return chosen


def _named(kind: type) -> str:
    return "labels" if kind is object else kind.__name__


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """The names most like ``wanted``, by whole path or by last part."""
    parts = {part: name for name in names for part in (name, name.rpartition("/")[2])}
    close = [parts[match] for match in difflib.get_close_matches(wanted, parts, n=5, cutoff=0.5)]
    shown = list(dict.fromkeys(close)) or list(names)[:5]
    return "nearest paths: " + ", ".join(repr(name) for name in shown)
