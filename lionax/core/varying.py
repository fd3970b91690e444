"""Inside ``shard_map``: the mesh axes over which a value differs, which JAX keeps in its type."""

import math
from typing import Any

import jax
from jax.core import ShapedArray

__all__ = ["is_unchecked", "number_of_elements", "varying_axes"]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array or a type varies; none outside of ``shard_map``."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def is_unchecked() -> bool:
    """Whether types do not say what varies: inside of ``shard_map(check_vma=False)``."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return any(not varying_axes(jax.lax.axis_index(axis)) for axis in axes)


def number_of_elements(x: jax.Array) -> int:
    """The number of elements of an array on all devices."""
    return math.prod([x.size, *map(jax.lax.axis_size, varying_axes(x))])
