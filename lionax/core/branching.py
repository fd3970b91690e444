"""Branches that a step takes where a traced predicate holds, and buffers are not copied."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lionax.core.internals import Tracer, manual_axes, types_of_result
from lionax.core.varying import varying_axes

__all__ = ["branch", "reading_branch"]


def branch(predicate: Any, function: Callable[..., Any], *carry: Any) -> Any:
    """What the function makes of the carry where the predicate holds, else the carry."""
    if isinstance(predicate, Tracer):
        if manual_axes():  # the branches must have one type; outside the function is not traced
            carry = _varying_like(carry, types_of_result(function, *carry))
            function = functools.partial(_varying_like_carry, function)
        # Identity last: as the true branch XLA copies every buffer (12 copies, jaxlib 0.10.2).
        return jax.lax.cond(predicate, function, lambda *same: same, *carry)
    return function(*carry) if predicate else carry


def reading_branch(predicate: Any, function: Callable[..., Any], reads: Any, *carry: Any) -> Any:
    """`branch` of a function that also reads arrays; returns these before what it returns."""
    # XLA copies what a branch reads and a later instruction overwrites, unless it passes through
    # the branch. A barrier for each array keeps JAX from taking what passes unchanged out of it.
    if not isinstance(predicate, Tracer):
        return reads, *branch(predicate, functools.partial(function, reads), *carry)
    return branch(predicate, lambda reads, *carry: (
        jax.tree.map(jax.lax.optimization_barrier, reads), *function(reads, *carry)), reads, *carry)


def _varying_like_carry(function: Callable[..., Any], *carry: Any) -> Any:
    return _varying_like(function(*carry), jax.tree.leaves(carry))


def _varying_like(tree: Any, others: Iterable[Any]) -> Any:
    """A tree of arrays that vary at least over the axes over which others vary."""
    leaves, treedef = jax.tree.flatten(tree)
    missing = [tuple(varying_axes(other) - varying_axes(own))
               for own, other in zip(leaves, others, strict=True)]
    return treedef.unflatten(jax.lax.pcast(x, axes, to="varying") if axes else x
                             for x, axes in zip(leaves, missing, strict=True))
