"""Trees: paths of leaves, and flattening.

A leaf's path joins the keys that lead to it with ``/``: ``blocks/0/dense/kernel``. Dicts,
NamedTuples, dataclasses, lists, Flax NNX states and Equinox modules all give the same kind of path,
so a mask written for one matches another.
"""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from lionax.core.internals import Tracer
from lionax.core.quantized import is_quantized
from lionax.core.varying import Split, axes_of, is_unchecked

__all__ = ["Keys", "Leaves", "check_structures", "is_beyond", "is_float0", "is_placeholder",
           "keyed_leaves", "named_leaves", "named_specs", "paths", "placeholder", "split_of",
           "splitting"]

Keys = tuple[str, ...]
"""The parts of a leaf's path."""

Specs = tuple[tuple[Keys, tuple[tuple[str, ...], ...]], ...]
"""The first parts of leaves' paths and, for each axis, the mesh axes over which it is split."""

_specs: ContextVar[Specs | None] = ContextVar("specs", default=None)


@contextlib.contextmanager
def splitting(specs: Specs) -> Iterator[None]:
    """Inside of it `Leaves` know by their paths how they are split."""
    token = _specs.set(specs)
    try:
        yield
    finally:
        _specs.reset(token)


def named_specs(specs: Any, owner: str) -> Specs:
    """A tree of specs, flattened; refuses what is none."""
    keys, values, _ = keyed_leaves(specs)
    for path, value in zip(keys, values, strict=True):
        if not isinstance(value, PartitionSpec | NamedSharding) and value is not None:
            raise TypeError(f"{owner}: specs has {value!r} at {'/'.join(path)!r}; give a "
                            "PartitionSpec or a NamedSharding for each parameter, or for a node "
                            "above several")
    return tuple((path, axes_of(getattr(value, "spec", value)))
                 for path, value in zip(keys, values, strict=True) if value is not None)


def split_of(specs: Specs, path: Keys, owner: str) -> tuple[tuple[str, ...], ...]:
    """For each axis of a leaf the mesh axes over which it is split."""
    for first, axes in specs:
        if path[:len(first)] == first:
            return axes
    raise ValueError(f"{owner}: there is no PartitionSpec for {'/'.join(path)!r}; give one for "
                     "each parameter, or for a node above several")


def _splits(keys: Sequence[Keys], leaves: Sequence[Any]) -> list[Split | None]:
    specs = _specs.get()
    if specs is None:
        return [None] * len(keys)
    return [None if is_placeholder(leaf) else
            Split.of(split_of(specs, path, "sharded"), leaf.ndim)
            for path, leaf in zip(keys, leaves, strict=True)]


def is_placeholder(leaf: Any) -> bool:
    """Whether a leaf stands for an absent array: ``None`` or ``optax.MaskedNode()``."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def is_float0(leaf: Any) -> bool:
    """Whether a leaf is the gradient that JAX gives to an integer input."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_beyond(leaf: Any) -> bool:
    """Whether JAX would wrap an integer of NumPy around: without x64 it takes 2^32 for 0."""
    is_integer = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "iu"
    return is_integer and bool((leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype)) != leaf)
                               .any())


def placeholder(leaf: Any) -> Any:
    """The placeholder for a masked leaf: a placeholder stays itself."""
    return leaf if is_placeholder(leaf) else optax.MaskedNode()


def _variables(tree: Any) -> set[tuple[Any, ...]]:
    """Where a tree holds variables of Flax NNX or boxes of Linen: an array in a field ``value``."""
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    kinds = (*((nnx.Variable,) if nnx else ()), *((meta.AxisMetadata,) if meta else ()))
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, kinds))
    return {keys for keys, node in pairs if isinstance(node, kinds)}


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure of a tree, in which placeholders count as leaves."""
    keys, leaves, treedef = keyed_leaves(tree)
    return list(map("/".join, keys)), leaves, treedef


def keyed_leaves(tree: Any) -> tuple[list[Keys], list[Any], Any]:
    """The same, with the parts of the paths."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_placeholder(node) or is_quantized(node))
    has_value = any(keys and keys[-1] == GetAttrKey("value") for keys, _ in pairs)
    variables = _variables(tree) if has_value else ()
    own = [keys[:-1] if keys[:-1] in variables else keys for keys, _ in pairs]
    names = [tuple(jax.tree_util.keystr((key,), simple=True) for key in keys) for keys in own]
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


@dataclass(frozen=True)
class Leaves:
    """A flattened tree in which placeholders count as leaves."""

    keys: list[Keys]
    values: list[Any]  # arrays and placeholders
    treedef: Any
    params: Any  # as the caller gave them, or the updates if not; for masks that are functions
    splits: list[Split | None]  # inside of shard_map, where `sharded` says them

    @classmethod
    def of(cls, tree: Any, params: Any) -> "Leaves":
        """Flattens a tree; numbers and NumPy arrays become JAX arrays."""
        keys, values, treedef = keyed_leaves(tree)
        values = [_as_array(value, path) for value, path in zip(values, keys, strict=True)]
        return cls(keys, values, treedef, tree if params is None else params,
                   _splits(keys, values))

    @functools.cached_property
    def paths(self) -> list[str]:
        """The paths of the leaves."""
        return list(map("/".join, self.keys))

    @functools.cached_property
    def present(self) -> list[bool]:
        """For each leaf, whether there is an array to work on."""
        return [not is_placeholder(value) and not is_float0(value) for value in self.values]

    def tree(self, values: Sequence[Any], active: Sequence[bool]) -> Any:
        """A tree of these values on the active leaves, placeholders on all others."""
        columns = zip(values, self.values, active, strict=True)
        return self.treedef.unflatten(a if active else placeholder(b) for a, b, active in columns)

    def masked(self, extra: Any, active: Sequence[bool]) -> Any:
        """An extra argument; of a tree like the parameters, the active leaves."""
        values, treedef = jax.tree.flatten(extra, is_leaf=is_placeholder)
        if treedef != self.treedef or any(
                here and jnp.shape(value) != jnp.shape(own)
                for value, own, here in zip(values, self.values, self.present, strict=True)):
            return extra
        return self.tree(values, active)

    def check_sum(self, owner: str, which: Iterable[int]) -> None:
        """Refuses a sum over leaves of which nothing says how they are split over the devices."""
        unknown = [leaf for leaf in which if self.splits[leaf] is None]
        if unknown and is_unchecked():
            raise ValueError(
                f"{owner}: inside of shard_map(check_vma=False) and of pmap types do not say over "
                f"which mesh axes {self.paths[unknown[0]]!r} is split, so a sum over it would be "
                "that of one device; leave check_vma=True, or say it: lionax.sharded(tx, specs)")

    def check_devices(self, arrays: Sequence[Any], active: Sequence[bool], owner: str) -> None:
        """Refuses a sum over leaves that were put on different devices by hand."""
        self.check_sum(owner, [leaf for leaf, here in enumerate(active) if here])
        columns = zip(self.paths, arrays, active, strict=True)
        places = {path: array.devices() for path, array, here in columns
                  if here and not isinstance(array, Tracer) and array.committed}
        first = next(iter(places), "")
        for path, devices in places.items():
            if devices != places[first]:
                raise ValueError(f"{owner}: a sum over all leaves needs them on the same devices; "
                                 f"{first!r} is on {places[first]}, {path!r} on {devices}. Put "
                                 "them on one device, or all on one mesh, with jax.device_put")


def _as_array(leaf: Any, path: Keys) -> Any:
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    if is_array or is_placeholder(leaf) or is_float0(leaf):
        return leaf
    is_number = isinstance(leaf, float | int | complex | np.ndarray | np.generic)
    if is_number or hasattr(leaf, "__jax_array__"):
        return jnp.asarray(leaf)
    raise TypeError(f"the leaf {'/'.join(path)!r} is {leaf!r}, not an array; keep only arrays in "
                    "the tree (with Equinox: eqx.filter(model, eqx.is_inexact_array))")


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
