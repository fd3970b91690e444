"""Branches that a step takes where a traced predicate holds, and buffers are not copied."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lionax.core.internals import Tracer, manual_axes, types_of_result
from lionax.core.varying import varying_axes

__all__ = ["branch", "reading_branch"]


def branch(predicate: Any, function: Callable[..., Any], *carry: Any) -> Any:
    """What the function makes of the carry where the predicate holds, else the carry."""
    if isinstance(predicate, Tracer):
        carry = _varying_like_result(function, carry)
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


def _varying_like_result(function: Callable[..., Any], carry: Any) -> Any:
    """The carry, varying over the axes over which what the function makes of it varies.

    The branches of a conditional must have one type. Outside of ``shard_map`` the function is not
    traced.
    """
    if not manual_axes():
        return carry
    results = types_of_result(function, *carry)
    leaves, treedef = jax.tree.flatten(carry)
    missing = [tuple(varying_axes(new) - varying_axes(old))
               for old, new in zip(leaves, results, strict=True)]
    return treedef.unflatten(jax.lax.pcast(x, axes, to="varying") if axes else x
                             for x, axes in zip(leaves, missing, strict=True))
