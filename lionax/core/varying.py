"""Inside ``shard_map``: the mesh axes over which a value differs, which JAX keeps in its type."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray

__all__ = ["number_of_elements", "varying_axes", "varying_like_result"]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array or a type varies; none outside of ``shard_map``."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def number_of_elements(x: jax.Array) -> int:
    """The number of elements of an array on all devices."""
    return math.prod([x.size, *map(jax.lax.axis_size, varying_axes(x))])


def varying_like_result(function: Callable[..., Any], carry: Any) -> Any:
    """The carry, varying over the axes over which what the function makes of it varies.

    The branches of a conditional must have one type. Outside of ``shard_map`` the function is not
    traced.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    results = jax.make_jaxpr(function)(*carry).out_avals
    leaves, treedef = jax.tree.flatten(carry)
    missing = [tuple(varying_axes(new) - varying_axes(old))
               for old, new in zip(leaves, results, strict=True)]
    return treedef.unflatten(jax.lax.pcast(x, axes, to="varying") if axes else x
                             for x, axes in zip(leaves, missing, strict=True))
