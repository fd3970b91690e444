"""What JAX has and does not promise to keep. No other module uses such a thing.

`tests/test_versions.py` has a test of each, which fails first with a JAX that changed it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray, Tracer

__all__ = ["ShapedArray", "Tracer", "buffer_of", "manual_axes", "memory_space", "types_of_result",
           "varying_of"]


def manual_axes() -> tuple[str, ...]:
    """The mesh axes of the ``shard_map`` around; none outside of one."""
    return jax.sharding.get_abstract_mesh().manual_axes


def varying_of(aval: ShapedArray) -> frozenset[str]:
    """The mesh axes over which an array of this type varies."""
    return frozenset(aval.manual_axis_type.varying)


def memory_space(array: Any) -> Any:
    """The ``jax.memory.Space`` of an array, also of a traced one."""
    return jax.typeof(array).memory_space


def types_of_result(function: Callable[..., Any], *args: Any) -> list[ShapedArray]:
    """The types of the leaves of a function's result."""
    return jax.make_jaxpr(function)(*args).out_avals


def buffer_of(array: jax.Array) -> int:
    """Where an array on one device is in its memory."""
    return array.unsafe_buffer_pointer()
