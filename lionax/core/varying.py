"""What is known of an array on a mesh: how it is split, over which axes it varies, its sharding."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lionax.core.internals import ShapedArray, manual_axes, varying_of

__all__ = ["Split", "axes_of", "explicit_sharding", "is_unchecked", "number_of_elements",
           "split_over", "summed_axes", "varying_axes"]


@dataclasses.dataclass(frozen=True)
class Split:
    """Over which mesh axes each axis of a leaf is split inside of ``shard_map``."""

    axes: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, axes: tuple[tuple[str, ...], ...], ndim: int) -> "Split | None":
        """The split over those axes of the mesh that are ``shard_map``'s; None outside of it."""
        manual = manual_axes()
        each = (*axes, *[()] * ndim)[:ndim]
        return cls(tuple(tuple(x for x in names if x in manual) for names in each)) if (
            manual) else None

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the leaf, or of a slot with further axes before, of such a shard."""
        names = (*[()] * (len(shape) - len(self.axes)), *self.axes)
        return tuple(n * math.prod(map(jax.lax.axis_size, each))
                     for n, each in zip(shape, names, strict=True))

    def start(self, axis: int, length: int) -> jax.Array | int:
        """Where a shard of this length begins along an axis of the leaf."""
        names = self.axes[axis]
        return jax.lax.axis_index(names) * length if names else 0


def axes_of(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each entry of a spec."""
    return tuple(entry if isinstance(entry, tuple) else () if entry is None else (str(entry),)
                 for entry in spec)


def split_over(sharding: NamedSharding, axes: Sequence[tuple[str, ...]]) -> NamedSharding:
    """A sharding over these mesh axes, written as ``jit``, which compares specs, gives it back."""
    entries = [each[0] if len(each) == 1 else each or None for each in axes]
    while entries and entries[-1] is None and AxisType.Explicit not in sharding.mesh.axis_types:
        entries.pop()
    return sharding.update(spec=PartitionSpec(*entries))


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array or a type varies; none outside of ``shard_map``."""
    return varying_of(x if isinstance(x, ShapedArray) else jax.typeof(x))


def summed_axes(x: Any, split: Split | None = None) -> tuple[str, ...]:
    """The mesh axes over which the elements of a leaf lie: of its split, else of its type."""
    axes = varying_axes(x) if split is None else {axis for names in split.axes for axis in names}
    return tuple(sorted(axes))


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that an array's type says: on an explicit mesh; else None."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_unchecked() -> bool:
    """Whether types do not say what varies: inside of ``shard_map(check_vma=False)``."""
    return any(not varying_axes(jax.lax.axis_index(axis)) for axis in manual_axes())


def number_of_elements(x: jax.Array, split: Split | None = None) -> int:
    """The number of elements of a leaf on all devices."""
    return math.prod([x.size, *map(jax.lax.axis_size, summed_axes(x, split))])
