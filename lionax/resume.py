"""Resuming: the state of an earlier definition in the structure of a new one."""

import logging
from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lionax.core import storage
from lionax.core.inspection import HeldArray, contents, holds_state
from lionax.core.quantized import is_quantized

__all__ = ["cast_state"]

_logger = logging.getLogger("lionax")

Where = tuple[Any, ...]
"""The keys that lead to a node of a state."""


def cast_state(state: Any, like: Any, strict: bool = False) -> Any:
    """The state of an earlier definition in the structure of a new one.

    An array with the same rule, field and parameter's path is taken over, in the dtype of the new
    state. So are counts and hyperparameters, by name. A new array is that of ``like``, one that is
    gone is dropped; the logger ``lionax`` tells so in a line for each field. So a run goes on with
    a group frozen, with a clip, an average, accumulation or an injected value more or less.

    Args:
      state: what was saved, of a lionax transformation, alone or inside of Optax's.
      like: ``tx.init(params)`` of the new transformation.
      strict: whether to refuse all but a change of dtypes.

    Returns:
      ``like`` with the arrays of ``state``.

    Raises:
      TypeError: for what is not a state of lionax.
      ValueError: for an array of another shape; with ``strict`` for one that is new or gone.

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
        if not holds_state(tree) and jax.tree.leaves(tree):
            raise TypeError(f"cast_state: {name} holds no state of lionax; for a run of Optax, see "
                            "lionax.compat.from_optax")
    old, new = contents(state), contents(like)
    scopes = _matching_scopes(old, new)
    taken, used, gone = {}, set(), old
    for key_of in (_key, _short_key):
        waiting = defaultdict(list)
        for array in gone:
            waiting[key_of(array, array.scope)].append(array)
        for i, array in enumerate(new):
            candidates = waiting[key_of(array, scopes.get(array.scope))]
            if candidates and i not in taken:
                taken[i] = _in_place_of(candidates[0], array)
                used.add(id(candidates[0]))
                if array.slot[1] != "hyperparameters":  # one rate may serve several new groups
                    del candidates[0]
        gone = [array for array in gone if id(array) not in used]
    missing = [array for i, array in enumerate(new) if i not in taken]
    for what, arrays in (("new, as in `like`", missing), ("gone, dropped", gone)):
        for field, count in Counter(array.slot[:2] for array in arrays).items():
            line = f"cast_state: {'.'.join(field)} ({count} arrays) is {what}"
            if strict:
                raise ValueError(f"{line}; strict=True accepts a change of dtypes only")
            _logger.warning(line)
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_quantized),
                              [taken.get(i, array.leaf) for i, array in enumerate(new)])


def _key(array: HeldArray, scope: Where | None) -> Any:
    """What must be equal: for slots their rule and path, for counts and values also the State."""
    return array.slot if array.slot[0] != "State" else (scope, *array.slot)


def _short_key(array: HeldArray, scope: Where | None) -> Any:
    """The same, but a hyperparameter's name is taken without its group."""
    kind, field, path = array.slot
    short = path.partition("/")[0], path.rpartition("/")[2]
    return _key(array._replace(slot=(kind, field, short)) if field == "hyperparameters" else array,
                scope)


def _matching_scopes(old: list[HeldArray], new: list[HeldArray]) -> dict[Where, Where]:
    """For each State of the new tree, the State of the old one with most in common."""
    ours, theirs = _contents(new), _contents(old)
    best = {scope: max(theirs, key=lambda other: len(mine & theirs[other]), default=())
            for scope, mine in ours.items()}
    is_only = len(ours) == len(theirs) == 1
    return {scope: other for scope, other in best.items()
            if is_only or (theirs and ours[scope] & theirs[other])}


def _contents(arrays: list[HeldArray]) -> dict[Where, set[tuple[str, str]]]:
    """For each State, the rules and hyperparameters in it."""
    contents = defaultdict(set)
    for array in arrays:
        kind, field, path = array.slot
        name = path.rpartition("/")[2]
        contents[array.scope] |= {(kind, name)} if field == "hyperparameters" else set()
        contents[array.scope] |= {(kind, "")} if kind != "State" else set()
    return contents


def _in_place_of(old: HeldArray, new: HeldArray) -> Any:
    if _shape(old.leaf) != _shape(new.leaf):
        raise ValueError(f"cast_state: {'.'.join(new.slot[:2])} of {new.slot[2]!r} has shape "
                         f"{_shape(old.leaf)}, in `like` {_shape(new.leaf)}")
    return storage.in_place_of(old.leaf, new.leaf)


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if is_quantized(leaf) else jnp.shape(leaf)
