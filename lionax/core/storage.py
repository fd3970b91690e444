"""How numbers are stored: the one place where slots are stored and loaded, and results cast.

Arithmetic runs in float32, in float64 for float64 leaves. A slot's dtype is fixed when it is made.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from lionax.core.tree import is_float0, is_placeholder

__all__ = ["Storage", "accumulator_dtype", "add", "check_storage", "compute_dtype", "in_place_of",
           "is_complex", "load", "store", "zero_slot"]

Storage = Any
"""How a slot is stored: None for the parameter's dtype, or a floating-point or complex dtype."""


def check_storage(value: Storage, owner: str, argument: str) -> np.dtype | None:
    """A storage argument as a dtype; refuses all but floating-point and complex ones."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"{owner}: {argument}={value!r} is not a floating-point dtype; give None "
                         "for the parameter's own dtype, or one such as jnp.bfloat16 or 'float32'")
    return dtype


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype of real arithmetic on these arrays: float64 if one is as precise, or float32."""
    is_double = any(array.dtype in (jnp.float64, jnp.complex128) for array in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def accumulator_dtype(param: jax.Array, dtype: np.dtype | None = None) -> np.dtype:
    """The dtype of a slot that adds up small amounts: as given, else at least float32."""
    if dtype is None and is_complex(param):
        return param.dtype
    return compute_dtype(param) if dtype is None else dtype


def is_complex(array: Any) -> bool:
    """Whether an array has a complex dtype."""
    return jnp.issubdtype(array.dtype, jnp.complexfloating)


def zero_slot(param: jax.Array, dtype: Storage = None) -> jax.Array:
    """An all-zero slot of a parameter's shape and sharding, for `Rule.init`.

    Args:
      param: the parameter.
      dtype: the slot's dtype; None for the parameter's own.

    Raises:
      TypeError: for a complex parameter and a dtype that has no imaginary part.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.zero_slot(jnp.ones(2), jnp.bfloat16)
    Array([0, 0], dtype=bfloat16)
    """
    dtype = param.dtype if dtype is None else dtype
    if is_complex(param) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"a slot of dtype {dtype} loses the imaginary part of a parameter of dtype "
                        f"{param.dtype}; give None or a complex dtype")
    # An explicit dtype makes the slot strongly typed, so that a scan can carry it.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.zeros_like(param, dtype=dtype)


def load(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """A stored array in the dtype of the arithmetic, or its complex one; integers stay."""
    if is_complex(array):
        return array.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def store(value: jax.Array, old: jax.Array) -> jax.Array:
    """A new value in the dtype of the array that it replaces and, if types say it, its sharding."""
    value, sharding = value.astype(old.dtype), jax.typeof(old).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and jax.typeof(value).sharding != sharding:
        return jax.sharding.reshard(value, sharding)
    return value


def in_place_of(value: Any, old: Any) -> Any:
    """A value with the dtype, shape, sharding and container of the array that it replaces."""

    def one(array):
        new, dtype = jnp.asarray(value), jnp.result_type(array)
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        new = jnp.broadcast_to(new if is_key else new.astype(dtype), jnp.shape(array))
        is_placed = isinstance(array, jax.Array) and not isinstance(array, Tracer)
        if is_placed and array.committed and not isinstance(new, Tracer):
            return jax.device_put(new, array.sharding)
        return new

    return jax.tree.map(one, old)  # a Flax optimizer wraps each array of the state in a variable


@jax.jit
def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return store(param + update, param)
    dtype = compute_dtype(param, update)
    return store(param.astype(dtype) + update.astype(dtype), param)


def add(param: Any, update: Any) -> Any:
    """A parameter plus its update, rounded once; the parameter where there is no update."""
    if is_placeholder(param) or is_placeholder(update) or is_float0(update):
        return param
    return _sum(param, update)
