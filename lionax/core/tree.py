"""Trees: paths of leaves, masks and labels by path, and flattening.

A leaf's path joins the keys that lead to it with ``/``: ``blocks/0/dense/kernel``. Dicts,
NamedTuples, dataclasses, lists, Flax NNX states and Equinox modules all give the same kind of path,
so a mask written for one matches another.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey

__all__ = ["Leaves", "Mask", "PathMask", "PathTree", "check_structures", "freeze", "is_float0",
           "is_placeholder", "matching", "named_leaves", "not_matching", "paths", "placeholder",
           "present_arrays"]

Mask = Any
"""A tree of bools or a prefix of one, a function of the parameters, or ``matching(...)``."""


def is_placeholder(leaf: Any) -> bool:
    """Whether a leaf stands for an absent array: ``None`` or ``optax.MaskedNode()``."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def is_float0(leaf: Any) -> bool:
    """Whether a leaf is the gradient that JAX gives to an integer input."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def placeholder(leaf: Any) -> Any:
    """The placeholder for a masked leaf: a placeholder stays itself."""
    return leaf if is_placeholder(leaf) else optax.MaskedNode()


def _variables(tree: Any) -> set[tuple[Any, ...]]:
    """Where a tree holds variables of Flax NNX, which wrap an array in a field ``value``."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return set()
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return {keys for keys, node in pairs if isinstance(node, nnx.Variable)}


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure of a tree, in which placeholders count as leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_placeholder)
    has_value = any(keys and keys[-1] == GetAttrKey("value") for keys, _ in pairs)
    variables = _variables(tree) if has_value else ()
    own = [keys[:-1] if keys[:-1] in variables else keys for keys, _ in pairs]
    names = [jax.tree_util.keystr(tuple(keys), simple=True, separator="/") for keys in own]
    return names, [leaf for _, leaf in pairs], treedef


def paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, in the order of ``jax.tree.leaves``.

    Args:
      tree: any pytree. ``None`` and ``optax.MaskedNode()`` are not leaves.

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
class Leaves:
    """A flattened tree in which placeholders count as leaves."""

    paths: list[str]
    values: list[Any]  # arrays and placeholders
    treedef: Any
    params: Any  # the parameters as the caller gave them, for masks that are functions; or None

    @classmethod
    def of(cls, tree: Any, params: Any) -> "Leaves":
        """Flattens a tree; numbers and NumPy arrays become JAX arrays."""
        names, values, treedef = named_leaves(tree)
        return cls(names, list(map(_as_array, values, names)), treedef, params)

    @functools.cached_property
    def present(self) -> list[bool]:
        """For each leaf, whether there is an array to work on."""
        return [not is_placeholder(value) and not is_float0(value) for value in self.values]

    def tree(self, values: Sequence[Any], active: Sequence[bool]) -> Any:
        """A tree of these values on the active leaves, placeholders on all others."""
        columns = zip(values, self.values, active, strict=True)
        return self.treedef.unflatten(a if active else placeholder(b) for a, b, active in columns)

    def select(self, chosen: Any, kind: type, owner: str, argument: str) -> tuple[Any, ...]:
        """A mask or label tree, as `freeze` gave it, as one value a leaf; None without an entry."""
        if not isinstance(chosen, PathMask | PathTree):
            if self.params is None:
                raise ValueError(f"{owner}: {argument} is a function of the parameters; pass them: "
                                 "update(grads, state, params)")
            result = chosen(self.params)
            chosen = freeze(result, kind, owner, argument)
            if not isinstance(chosen, PathMask | PathTree):
                raise TypeError(f"{owner}: the function given as {argument} must return a tree of "
                                f"{kind.__name__}; got {result!r}")
        return chosen.select(self.paths, self.present, owner)


def _as_array(leaf: Any, path: str) -> Any:
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    if is_array or is_placeholder(leaf) or is_float0(leaf):
        return leaf
    is_number = isinstance(leaf, float | int | complex | np.ndarray | np.generic)
    if is_number or hasattr(leaf, "__jax_array__"):
        return jnp.asarray(leaf)
    raise TypeError(f"the leaf {path!r} is {leaf!r}, not an array; keep only arrays in the tree "
                    "(with Equinox: eqx.filter(model, eqx.is_inexact_array))")


def present_arrays(tree: Any) -> list[jax.Array]:
    """The arrays of a tree, without placeholders and float0."""
    leaves = Leaves.of(tree, None)
    return [value for value, here in zip(leaves.values, leaves.present, strict=True) if here]


def check_structures(grads: Leaves, params: Leaves) -> None:
    """Refuses gradients that do not have the structure and the shapes of the parameters."""
    if grads.treedef != params.treedef:
        missing = [path for path in params.paths if path not in set(grads.paths)]
        extra = [path for path in grads.paths if path not in set(params.paths)]
        detail = (f"there is no gradient for {missing[0]!r}" if missing else
                  f"there is no parameter for the gradient {extra[0]!r}" if extra else
                  f"the containers differ: {grads.treedef} and {params.treedef}")
        raise ValueError(f"the gradients do not have the structure of the parameters: {detail}")
    for grad, here, param, path in zip(grads.values, grads.present, params.values, grads.paths,
                                       strict=True):
        if here and (is_placeholder(param) or grad.shape != param.shape):
            what = f"is {param!r}" if is_placeholder(param) else f"has shape {param.shape}"
            raise ValueError(f"the gradient of {path!r} has shape {grad.shape}, the parameter "
                             f"{what}; they must be equal (nothing is broadcast)")


@dataclass(frozen=True)
class PathMask:
    """A mask by regular expressions over leaf paths; made by `matching` and `not_matching`.

    It is a value, and can be called with parameters: so it serves as a mask in Optax, too.
    """

    patterns: tuple[str, ...]
    inverted: bool = False

    def __post_init__(self):
        if not self.patterns:
            raise ValueError(f"{self._name}() needs at least one regular expression, such as "
                             f"{self._name}('bias')")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except (TypeError, re.error) as error:
                kind = ValueError if isinstance(pattern, str) else TypeError
                message = f"{pattern!r} is not a regular expression: {error}"
                raise kind(f"{self._name}: {message}") from None

    @property
    def _name(self) -> str:
        return "not_matching" if self.inverted else "matching"

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(map(repr, self.patterns))})"

    def select(self, names: Sequence[str], present: Sequence[bool], owner: str) -> tuple[bool, ...]:
        """One bool for each path; refuses a pattern that matches none of them."""
        for pattern in self.patterns:
            if names and not any(re.search(pattern, name) for name in names):
                raise ValueError(f"{owner}: the regular expression {pattern!r} of {self!r} matches "
                                 f"no leaf; {_nearest(pattern, names)}")
        matched = (any(re.search(p, name) for p in self.patterns) for name in names)
        return tuple(is_matched != self.inverted for is_matched in matched)

    def __call__(self, params: Any) -> Any:
        names, leaves, treedef = named_leaves(params)
        chosen = zip(leaves, self.select(names, [True] * len(names), "mask"), strict=True)
        return treedef.unflatten(leaf if is_placeholder(leaf) else bit for leaf, bit in chosen)


def matching(*regexes: str) -> PathMask:
    """Mask: the leaves whose path is matched by one of the regular expressions.

    Args:
      *regexes: searched for anywhere in the path (``re.search``): ``"bias"`` finds ``dense/bias``
        and ``bias_gate/w``; anchor with ``"(^|/)bias$"`` to find leaves of that very name.

    Returns:
      A mask for lionax and, being a function of the parameters, for Optax.

    Raises:
      ValueError: where it is used, if an expression matches no leaf; it names the nearest paths.

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
    """A tree of bools or labels as pairs of a path and a value, whatever its containers."""

    entries: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][0] == "":
            return repr(self.entries[0][1])
        return repr(dict(self.entries))

    def select(self, names: Sequence[str], present: Sequence[bool], owner: str) -> tuple[Any, ...]:
        """The value for each path: its own entry's or that of the nearest ancestor."""
        values = dict(self.entries)
        nearest = [next((p for p in _ancestors(name) if p in values), None) for name in names]
        for name, here, entry in zip(names, present, nearest, strict=True):
            if here and entry is None:
                raise ValueError(f"{owner}: the mask or label tree has no entry for the leaf "
                                 f"{name!r}; it must have the parameters' structure or be a prefix "
                                 f"of it. It has: {', '.join(values) or 'nothing'}")
        absent = {name for name, here in zip(names, present, strict=True) if not here}
        for entry in values if names else ():
            if entry not in nearest and absent.isdisjoint(_ancestors(entry)):
                raise ValueError(f"{owner}: the mask or label tree has an entry at {entry!r}, where"
                                 f" the parameters have no leaf; {_nearest(entry, names)}")
        return tuple(None if entry is None else values[entry] for entry in nearest)


def _ancestors(name: str) -> list[str]:
    """``a/b/c`` gives itself, ``a/b``, ``a`` and the root."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]


def freeze(tree: Any, kind: type, owner: str,
           argument: str) -> Callable[[Any], Any] | PathMask | PathTree:
    """A mask (``kind=bool``) or label (``kind=str``) argument in hashable form.

    A callable is a function of the parameters only if it is no pytree: an Equinox module full of
    bools is a mask, although it can be called.
    """
    is_function = callable(tree) and jax.tree_util.all_leaves([tree])
    if is_function or isinstance(tree, PathMask | PathTree | functools.partial):
        return tree
    names, leaves, _ = named_leaves(tree)
    entries = []
    for name, leaf in zip(names, leaves, strict=True):
        if is_placeholder(leaf):
            continue
        is_array = isinstance(leaf, np.bool_ | np.ndarray | jax.Array)
        if kind is bool and is_array and leaf.dtype == bool:
            if isinstance(leaf, Tracer) or leaf.shape != ():
                raise TypeError(f"{owner}: {argument} must be known when tracing, one bool per "
                                f"leaf; at {name!r} it has {leaf!r}. Build it outside jit, or give "
                                "a function of the parameters")
            leaf = bool(leaf)
        if not isinstance(leaf, kind):
            remedy = "; to choose leaves by name, use lionax.matching(...)" if kind is bool else ""
            raise TypeError(f"{owner}: {argument} must be a tree of {kind.__name__}, a function of "
                            f"the parameters that gives one, or lionax.matching(...); at {name!r} "
                            f"it has {leaf!r}{remedy}")
        if any(name == other for other, _ in entries):
            raise ValueError(f"{owner}: {argument} has two entries with the path {name!r}; rename "
                             "one, or give a function of the parameters")
        entries.append((name, leaf))
    return PathTree(tuple(entries))
