"""How numbers are kept: the one place where a slot is stored and loaded, and where a result is cast.

Arithmetic runs in float32 (float64 for float64 leaves). A slot's dtype is fixed when it is made; `store` returns to it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lionax.masks import is_placeholder

__all__ = ["Storage", "accumulator", "add", "check_storage", "compute_dtype", "in_place_of", "is_float0", "load", "store", "unloaded",
           "zeros"]

Storage = Any
"""How a slot is kept: None for the parameter's dtype, or a floating-point dtype (``jnp.bfloat16``, ``"bfloat16"``)."""


def check_storage(value: Storage, owner: str, argument: str) -> np.dtype | None:
    """A storage argument as a dtype; refuses all but floating-point ones."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{owner}: {argument}={value!r} is not a floating-point dtype; give None for the parameter's "
                         "own dtype, or one such as jnp.bfloat16 or 'float32'")
    return dtype


def is_float0(leaf: Any) -> bool:
    """True for the gradient that JAX gives to an integer input."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype of arithmetic on these arrays: float64 if one of them is, else float32."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def accumulator(param: jax.Array, dtype: np.dtype | None) -> np.dtype:
    """The dtype of a slot in which small amounts are to add up: as given, or the parameter's but at least float32."""
    if dtype is None and jnp.issubdtype(param.dtype, jnp.complexfloating):
        return param.dtype
    return compute_dtype(param) if dtype is None else dtype


def zeros(param: jax.Array, dtype: np.dtype | None) -> jax.Array:
    """An all-zero slot of a parameter's shape and sharding, in ``dtype`` or in the parameter's own."""
    # Naming the dtype also makes the slot strongly typed, whatever the parameter is, so that a scan can carry it.
    return jnp.zeros_like(param, dtype=jax.dtypes.canonicalize_dtype(param.dtype if dtype is None else dtype))


def load(slot: jax.Array, dtype: np.dtype) -> jax.Array:
    """A stored slot as numbers to compute with; integers and bools stay what they are."""
    return slot.astype(dtype) if jnp.issubdtype(slot.dtype, jnp.floating) else slot


def unloaded(measure: Callable[..., tuple[jax.Array, ...]], dtype: np.dtype, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """What a function makes of arrays loaded in ``dtype``; such as it returns untouched, as they are stored.

    For norms, which load for themselves: of a loaded array that a branch reads, the compiler keeps a copy.
    """
    loaded = [array if array is None else load(array, dtype) for array in arrays]
    stored = {id(new): old for new, old in zip(loaded, arrays, strict=True) if old is not None and compute_dtype(old) == dtype}
    return tuple(stored.get(id(array), array) for array in measure(*loaded))


def store(value: jax.Array, slot: jax.Array) -> jax.Array:
    """New numbers in the form of the slot that they replace."""
    return value.astype(slot.dtype)


def in_place_of(value: Any, old: Any) -> Any:
    """A value in the form of the array that it replaces: its dtype, shape, placement and container, so that a compiled step fits."""

    def one(array):
        new = jnp.broadcast_to(jnp.asarray(value).astype(array.dtype), array.shape)
        placed = isinstance(array, jax.Array) and not isinstance(array, Tracer) and not isinstance(new, Tracer)
        return jax.device_put(new, array.sharding) if placed and array.committed else new

    return jax.tree.map(one, old)  # a Flax optimizer keeps each array of the state in a variable


def add(param: Any, update: Any) -> Any:
    """A parameter plus its update, rounded once; unchanged where there is no update."""
    if is_placeholder(param) or is_placeholder(update) or is_float0(update):
        return param
    param, update = jnp.asarray(param), jnp.asarray(update)
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return (param + update).astype(param.dtype)
    dtype = compute_dtype(param, update)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
