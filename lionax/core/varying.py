"""What JAX keeps in the type of a value: the mesh axes over which it differs, its sharding."""

import math
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import AxisType, NamedSharding

__all__ = ["explicit_sharding", "is_unchecked", "number_of_elements", "varying_axes"]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array or a type varies; none outside of ``shard_map``."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that an array's type says: on an explicit mesh; else None."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_unchecked() -> bool:
    """Whether types do not say what varies: inside of ``shard_map(check_vma=False)``."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return any(not varying_axes(jax.lax.axis_index(axis)) for axis in axes)


def number_of_elements(x: jax.Array) -> int:
    """The number of elements of an array on all devices."""
    return math.prod([x.size, *map(jax.lax.axis_size, varying_axes(x))])
