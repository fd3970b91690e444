"""Resuming: the state of an earlier definition in the structure of a new one."""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey

from lionax.core import storage
from lionax.core.inspection import HeldArray, contents, holds_state
from lionax.core.placement import own_buffers
from lionax.core.quantized import is_quantized

__all__ = ["cast_state"]

_logger = logging.getLogger("lionax")

Where = tuple[Any, ...]
"""The keys that lead to a node of a state."""


def cast_state(state: Any, like: Any, strict: bool = False) -> Any:
    """The state of an earlier definition in the structure of a new one.

    An array with the same rule, field and parameter's path is taken over, in the dtype of the new
    state, in which no number becomes 0. So are counts and hyperparameters, by name. A new array is
    that of ``like``, one that is gone is dropped; the logger ``lionax`` tells so in a line for each
    field. So a run goes on with a group frozen, with a clip, an average, accumulation or an
    injected value more or less.

    A checkpoint that was restored without its structure, as dicts and lists, gets the structure of
    ``like``, which is then of the definition that saved it, but for the dtypes of arrays without
    codes.

    Args:
      state: what was saved, of a lionax transformation, alone or inside of Optax's.
      like: ``tx.init(params)`` of the new transformation.
      strict: whether to refuse all but a change of dtypes.

    Returns:
      ``like`` with the arrays of ``state``.

    Raises:
      TypeError: for what is not a state of lionax, or numbers that a slot cannot hold.
      ValueError: for an array of another shape; with ``strict``, and without a structure, for one
        that is new or gone.

    >>> import jax.numpy as jnp, lionax
    >>> params = jnp.array([1.0])
    >>> _, state = lionax.lion(0.1).step(params, lionax.lion(0.1).init(params), jnp.array([2.0]))
    >>> tx = lionax.chain(lionax.clip(1.0), lionax.lion(0.1, mu_dtype="bfloat16"))
    >>> state = lionax.cast_state(state, tx.init(params))
    >>> int(state.count), state.rules[1].mu
    (1, Array([0.0200195], dtype=bfloat16))
    """
    for name, tree in (("state", state), ("like", like)):
        if isinstance(tree, optax.GradientTransformation):
            raise TypeError(f"cast_state: {name} is a transformation; give its state: what was "
                            "saved, and tx.init(params)")
        is_known = holds_state(tree) or (name == "state" and _is_plain(tree))
        if not is_known and jax.tree.leaves(tree):
            raise TypeError(f"cast_state: {name} holds no state of lionax; give what was saved, "
                            "and tx.init(params) of the definition that saved it; for a run of "
                            "Optax, see lionax.compat.from_optax")
    if not holds_state(state) and jax.tree.leaves(state):
        return own_buffers(_structured(state, like, ()))
    old, new = contents(state), contents(like)
    nodes = _matching_nodes(old, new)
    taken, used, gone = {}, set(), old
    for key_of in (_key, _short_key):
        waiting = defaultdict(list)
        for array in gone:
            waiting[key_of(array, array.node)].append(array)
        for i, array in enumerate(new):
            candidates = waiting[key_of(array, nodes.get(array.node))]
            if candidates and i not in taken:
                taken[i] = _in_place_of(candidates[0], array)
                used.add(id(candidates[0]))
                if array.slot[0] != "State":  # one rate may serve several new groups
                    del candidates[0]
        gone = [array for array in gone if id(array) not in used]
    missing = [array for i, array in enumerate(new) if i not in taken]
    for what, arrays in (("new, as in `like`", missing), ("gone, dropped", gone)):
        for field, count in Counter(array.slot[:2] for array in arrays).items():
            line = f"cast_state: {'.'.join(field)} ({count} arrays) is {what}"
            if strict:
                raise ValueError(f"{line}; strict=True accepts a change of dtypes only")
            _logger.warning(line)
    return own_buffers(jax.tree.unflatten(
        jax.tree.structure(like, is_leaf=is_quantized),
        [taken.get(i, array.leaf) for i, array in enumerate(new)]))


def _key(array: HeldArray, node: Where | None) -> Any:
    """What must be equal: the rule and the path or, of counts and values, the node."""
    return array.slot if array.slot[2] and array.slot[0] != "State" else (node, *array.slot)


def _short_key(array: HeldArray, node: Where | None) -> Any:
    """The same, but a hyperparameter's name is taken without its group."""
    kind, field, path = array.slot
    short = path.partition("/")[0], path.rpartition("/")[2]
    return _key(array._replace(slot=(kind, field, short)) if field == "hyperparameters" else array,
                node)


class _Node(NamedTuple):
    """A State, or the state of a rule."""

    kind: str  # its class
    own: set[str]  # its kind; of a State, the kinds of its rules and the names of hyperparameters
    below: set[tuple[str, str, str]]  # the slots with paths


def _matching_nodes(old: list[HeldArray], new: list[HeldArray]) -> dict[Where, Where]:
    """For each node of the new tree, the one of its kind in the old tree with most in common."""
    ours, theirs = _nodes(new), _nodes(old)
    best: dict[Where, Where] = {}
    for keys, mine in ours.items():
        alike = [other for other in theirs if theirs[other].kind == mine.kind]
        is_only = len(alike) == 1 == sum(node.kind == mine.kind for node in ours.values())
        common = {other: (len(mine.own & theirs[other].own), len(mine.below & theirs[other].below),
                          _labels(keys) == _labels(other), other not in best.values())
                  for other in alike if is_only or mine.own & theirs[other].own}
        if common:
            best[keys] = max(common, key=lambda other: common[other])
    return best


def _labels(keys: Where) -> list[Any]:
    """The labels of the groups that a node is in."""
    return [key.key for key in keys if isinstance(key, DictKey)]


def _nodes(arrays: list[HeldArray]) -> dict[Where, _Node]:
    nodes: dict[Where, _Node] = {}
    for array in arrays:
        kind, field, path = array.slot
        if not kind:  # not of a transformation
            continue
        for keys, its_kind in ((array.scope, "State"), (array.node, kind)):
            nodes.setdefault(keys, _Node(its_kind, set(), set()))
        for keys in (array.scope, array.node) if kind != "State" else ():
            nodes[keys].own.add(kind)
        if field == "hyperparameters":
            nodes[array.scope].own.add(path.rpartition("/")[2])
        for n in range(len(array.node) + 1) if path else ():
            if array.node[:n] in nodes:
                nodes[array.node[:n]].below.add(array.slot)
    return nodes


def _in_place_of(old: HeldArray, new: HeldArray) -> Any:
    if np.shape(old.leaf) != np.shape(new.leaf):
        raise ValueError(f"cast_state: {'.'.join(new.slot[:2])} of {new.slot[2]!r} has shape "
                         f"{np.shape(old.leaf)}, in `like` {np.shape(new.leaf)}")
    try:
        return storage.in_place_of(old.leaf, new.leaf)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cast_state: {'.'.join(new.slot[:2])} of {new.slot[2]!r}: "
                          f"{error}") from None


def _is_plain(tree: Any) -> bool:
    """Whether a tree is one of dicts and lists, as a checkpoint is without its structure."""
    if isinstance(tree, Mapping):
        return all(map(_is_plain, tree.values()))
    if isinstance(tree, list | tuple):
        return not hasattr(tree, "_fields") and all(map(_is_plain, tree))
    return tree is None or jax.tree_util.all_leaves([tree])


def _structured(saved: Any, like: Any, path: Where) -> Any:
    """The arrays of a tree of dicts and lists in the structure of ``like``.

    A field or a key is a key there, a position a position or a key. What holds no array may lack.
    """
    if jax.tree_util.all_leaves([like]) or (is_quantized(like) and not isinstance(saved, Mapping)):
        return _structured_leaf(saved, like, path)
    if isinstance(saved, list | tuple):
        saved = dict(enumerate(saved))
    pairs, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda x: x is not like)
    names = [jax.tree_util.keystr(keys, simple=True) for keys, _ in pairs]
    is_bare = not isinstance(saved, Mapping) or "value" not in saved
    if names == ["value"] and saved is not None and is_bare:  # a variable of NNX, as a pure dict
        saved = {"value": saved}
    if not isinstance(saved, Mapping | None):
        _refuse(saved, like, path)
    given = {str(key): node for key, node in (saved or {}).items()}
    for name in given:
        if name not in names and jax.tree.leaves(given[name]):
            _refuse(given[name], None, (*path, name))
    return treedef.unflatten(_structured(given.get(name), child, (*path, name))
                             if jax.tree.leaves((given.get(name), child)) else child
                             for name, (_, child) in zip(names, pairs, strict=True))


def _structured_leaf(saved: Any, like: Any, path: Where) -> Any:
    """A number, a list of numbers or an array in place of an array."""
    is_bool = not is_quantized(like) and jnp.issubdtype(jnp.result_type(like), jnp.bool_)
    with contextlib.suppress(TypeError, ValueError):  # a ragged list, or what cannot be held
        array = saved if hasattr(saved, "dtype") else np.asarray(saved)
        if array.shape == np.shape(like) and jnp.issubdtype(array.dtype, jnp.bool_) == is_bool:
            return storage.in_place_of(array, like)
    _refuse(saved, like, path)


def _refuse(saved: Any, like: Any, path: Where) -> NoReturn:
    raise ValueError(f"cast_state: at {'/'.join(path)!r} the state, restored without its "
                     f"structure, has {_described(saved)}, `like` has {_described(like)}; give "
                     "tx.init(params) of the definition that saved it. Cast the result again to go "
                     "on under another")


def _described(node: Any) -> str:
    if node is None:
        return "nothing"
    if hasattr(node, "dtype"):
        return f"{node.dtype} of shape {node.shape}"
    if isinstance(node, Mapping):
        return f"a {type(node).__name__} with the keys {list(node)}"
    return f"a value of type {type(node).__name__}"
