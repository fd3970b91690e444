"""States of Optax's lion, lamb and sgd, into lionax's states and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax.core import storage
from lionax.core.hyperparameters import as_count
from lionax.core.inspection import kind_of
from lionax.core.quantized import is_quantized
from lionax.core.state import State
from lionax.core.table import shown
from lionax.transforms.adaptive import ScaleByAdamState
from lionax.transforms.momentum import TraceState
from lionax.transforms.sign_momentum import ScaleByLionState

__all__ = ["from_optax", "to_optax"]

_KINDS = {
    ScaleByLionState: "lion", optax.ScaleByLionState: "lion", ScaleByAdamState: "adam",
    optax.ScaleByAdamState: "adam", TraceState: "trace", optax.TraceState: "trace"
}
_FIELDS = {"lion": ("mu",), "adam": ("mu", "nu"), "trace": ("trace",)}
_COUNTERS = (optax.ScaleByLionState, optax.ScaleByAdamState, optax.ScaleByScheduleState)


def from_optax(optax_state: Any, into: Any, *, count: Any = None) -> Any:
    """The state in which lionax goes on with a run of Optax.

    Args:
      optax_state: of ``optax.lion``, ``optax.lamb``, ``optax.sgd`` or a chain with one of their
        parts of each kind.
      into: ``tx.init(params)`` of the matching transformation, whose dtypes and placement are kept.
      count: how many steps were made; needed only where Optax does not count them, as ``optax.sgd``
        with a constant rate, and there 0 if it is left out.

    Returns:
      ``into`` with the moments and the count of Optax.

    Raises:
      TypeError: if ``into`` is not a lionax state.
      ValueError: for a state with other arrays than these moments, or with moments of another kind,
        structure or shape.

    >>> import jax.numpy as jnp, lionax, optax
    >>> params = jnp.ones(2)
    >>> _, state = optax.lion(0.1).update(jnp.ones(2), optax.lion(0.1).init(params), params)
    >>> int(lionax.compat.from_optax(state, lionax.lion(0.1).init(params)).count)
    1
    """
    owner = "compat.from_optax"
    if isinstance(into, optax.EmptyState):
        return into
    if not isinstance(into, State):
        raise TypeError(f"{owner}: into is a {type(into).__name__}, not a lionax State; give "
                        "tx.init(params)")
    counts = {
        as_count(node.count, owner, "count")
        for node in jax.tree.leaves(optax_state, is_leaf=_is_known)
        if isinstance(node, _COUNTERS)
    }
    count = None if count is None else as_count(count, owner, "count")
    if len(counts) > 1 or (count is not None and counts - {count}):
        raise ValueError(f"{owner}: the state counts {sorted(counts)} steps, count={count!r}; "
                         "these must be equal")
    rules = _filled(into.rules, _moments(optax_state, owner), owner)
    return into._replace(
        count=storage.in_place_of(counts.pop() if counts else count or 0, into.count), rules=rules)


def to_optax(state: State, into: Any) -> Any:
    """The state in which Optax goes on with a run of lionax: the inverse of `from_optax`.

    Args:
      state: of `lionax.lion`, `lionax.lamb`, `lionax.sgd` or a chain with one of their parts of
        each kind.
      into: ``tx.init(params)`` of the matching Optax transformation, whose dtypes and placement are
        kept.

    Returns:
      ``into`` with the moments and the count of lionax.

    Raises:
      TypeError: if ``state`` is not a lionax state.
      ValueError: as `from_optax`.

    >>> import jax.numpy as jnp, lionax, optax
    >>> params = jnp.ones(2)
    >>> _, state = lionax.sgd(0.1, 0.9).update(jnp.ones(2), lionax.sgd(0.1, 0.9).init(params))
    >>> lionax.compat.to_optax(state, optax.sgd(0.1, 0.9).init(params))[0].trace.tolist()
    [1.0, 1.0]
    """
    owner = "compat.to_optax"
    if not isinstance(state, State):
        raise TypeError(f"{owner}: state is a {type(state).__name__}, not a lionax State")
    if kind_of(state.count)[0] != "whole numbers":
        raise ValueError(f"{owner}: the state counts {shown(state.count)} steps, which is no whole "
                         "number of 32 bits")

    def count(node: Any) -> Any:
        if not isinstance(node, _COUNTERS):
            return node
        # a copy for each: a step that donates the state may donate no buffer twice
        return node._replace(count=storage.in_place_of(jnp.copy(state.count), node.count))

    return jax.tree.map(count, _filled(into, _moments(state.rules, owner), owner),
                        is_leaf=_is_known)


def _is_known(node: Any) -> bool:
    return type(node) in _KINDS or isinstance(node, _COUNTERS)


def _moments(state: Any, owner: str) -> dict[str, Any]:
    """The slots of each kind; refuses to leave an array behind."""
    found = {}
    for node in jax.tree.leaves(state, is_leaf=_is_known):
        kind = _KINDS.get(type(node))
        if kind in found or not _is_known(node):
            what = (f"two of {type(node).__name__}" if kind in found else
                    f"an array of shape {np.shape(node)}")
            raise ValueError(f"{owner}: the state holds {what} beside moments and counts; carry "
                             "over the parts of a wrapper one by one")
        if kind is not None:
            found[kind] = node
    return found


def _filled(into: Any, moments: dict[str, Any], owner: str) -> Any:
    """A state with these moments in place of its own."""
    wanted = _moments(into, owner)
    if wanted.keys() != moments.keys():
        raise ValueError(f"{owner}: the moments are of {sorted(moments) or 'no kind'}, those of "
                         f"into of {sorted(wanted) or 'no kind'}; the two transformations must "
                         "match")

    def one(path: Any, old: Any, new: Any) -> Any:
        if np.shape(new) != np.shape(old):
            raise ValueError(f"{owner}: the moment {jax.tree_util.keystr(path)} has shape "
                             f"{np.shape(new)}, that of into {np.shape(old)}")
        return storage.in_place_of(new, old)

    def fill(node: Any) -> Any:
        kind = _KINDS.get(type(node))
        if kind is None:
            return node
        try:
            trees = {field: (getattr(node, field), getattr(moments[kind], field))
                     for field in _FIELDS[kind]}
            return node._replace(**{
                field: jax.tree_util.tree_map_with_path(one, *pair, is_leaf=is_quantized)
                for field, pair in trees.items()})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{owner}: {error}") from None

    return jax.tree.map(fill, into, is_leaf=_is_known)
