"""What a state holds: its arrays by rule, field and leaf."""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from lionax.core.quantized import is_quantized
from lionax.core.table import Table, in_bytes, shown
from lionax.core.tree import Keys, Leaves, is_beyond, is_placeholder, keyed_leaves

__all__ = ["HeldArray", "bytes_of", "contents", "contents_by_leaf", "contents_table", "described",
           "holds_state", "kind_of"]

LONGEST = 1400  # characters of a description


class HeldArray(NamedTuple):
    """An array of a state, and what it is whatever stands around it."""

    scope: Any  # keys of the nearest State above
    node: Any  # keys of the rule's state
    slot: tuple[str, str, str]  # class of the rule's state, field, path of the parameter
    keys: Keys  # the parts of the path
    leaf: Any  # the array


def contents(state: Any) -> list[HeldArray]:
    """The arrays of a state, in the order of ``jax.tree.leaves``."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_quantized)
    names, values, _ = keyed_leaves(state)
    present = [name for name, value in zip(names, values, strict=True) if not is_placeholder(value)]
    ways: dict[Any, bool] = {}
    return [_held(state, keys, name, leaf, ways)
            for (keys, leaf), name in zip(pairs, present, strict=True)]


def _held(state: Any, keys: Any, names: Keys, leaf: Any, ways: dict[Any, bool]) -> HeldArray:
    """Goes down chains, groups and conditionals to the state of a rule."""
    node, scope = state, ()
    for depth, key in enumerate(keys):
        name, is_state = getattr(key, "name", ""), _is_state(node)
        if is_state:
            scope = keys[:depth]
        here = keys[:depth + 1]
        if here not in ways:  # asked once for all arrays below
            ways[here] = name == ("rules" if is_state else "inner") or (
                not is_state and holds_state(getattr(node, name, None)))
        is_way = ways[here]
        if not (is_way or isinstance(key, DictKey | SequenceKey)):
            own = names[depth + 1:]
            slot = type(node).__name__, name, "/".join(own)
            return HeldArray(scope, keys[:depth], slot, own, leaf)
        node = getattr(node, name) if is_way else node[key.key if isinstance(key, DictKey) else
                                                       key.idx]
    return HeldArray(scope, keys, ("", "", jax.tree_util.keystr(keys)), names, leaf)


def _is_state(node: Any) -> bool:
    """Whether a node is a `lionax.core.state.State`; a type of Flax has that name, too."""
    return getattr(node, "_fields", ()) == ("count", "hyperparameters", "rules")


def holds_state(node: Any) -> bool:
    """Whether there is a State in a node, such as Flax's train state or a wrapper of Optax's."""
    return any(map(_is_state, jax.tree.leaves(node, is_leaf=_is_state)))


def kind_of(leaf: Any) -> tuple[str, ...]:
    """The shape of an array and the kind of its numbers, or what stands in its place."""
    if isinstance(leaf, bool | int | float | complex | np.generic):
        leaf = np.asarray(leaf)
    is_array = isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct)
    dtype = leaf.dtype if is_array else None
    kinds = {"whole numbers": jnp.integer, "numbers": jnp.floating, "bools": jnp.bool_,
             "complex numbers": jnp.complexfloating, "keys": jax.dtypes.extended}
    kind = next((name for name, dtypes in kinds.items() if dtype is not None
                 and jnp.issubdtype(dtype, dtypes)), None)
    if kind is None or is_beyond(leaf):
        return (shown(leaf),)
    return kind, f"shape {jnp.shape(leaf)}"


def contents_by_leaf(state: Any, leaves: Leaves) -> list[list[tuple[str, Any]]]:
    """For each leaf the fields that a state holds for it, and their arrays.

    Such a field is a tree with the paths of the parameters, some of which may be masked.
    """
    found = defaultdict(list)
    for held in contents(state):
        if held.slot[0] not in ("", "State"):
            found[held.keys].append((held.slot[1], held.leaf))
    if leaves.keys != [()]:
        return [found[keys] for keys in leaves.keys]
    # One array: a counter has its empty path, too.
    shape = jnp.shape(leaves.values[0])
    return [[(field, array) for field, array in found[()]
             if field in ("live", "gradients") or array.shape == shape != ()]]


def bytes_of(array: Any) -> int:
    """The bytes of an array, of codes with their scales, or of what has a shape and a dtype."""
    return array.nbytes if is_quantized(array) else math.prod(array.shape) * array.dtype.itemsize


def contents_table(state: Any) -> Table:
    """A row for each field of a rule."""
    fields = defaultdict(list)
    for held in contents(state):
        fields[held.slot[:2]].append(held.leaf)
    rows = []
    for (kind, field), arrays in fields.items():
        # A state may be mapped to shardings, bools or names.
        kinds = sorted({str(getattr(array, "dtype", type(array).__name__)) for array in arrays})
        size = sum(bytes_of(array) for array in arrays if hasattr(array, "dtype"))
        rows.append((kind, field, f"{len(arrays)} {', '.join(kinds)}", in_bytes(size)))
    return Table(("state", "field", "arrays", "bytes"), rows)


def described(state: Any) -> str:
    """The same in one paragraph."""
    rows = (f"{kind}.{field}: {arrays}, {size}" for kind, field, arrays, size
            in contents_table(state).rows)
    text = f"State({'; '.join(rows)})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ...)"
