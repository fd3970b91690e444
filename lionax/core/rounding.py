"""Stochastic rounding to low-precision floats, with random bits from a counter.

A value between two neighbours a < x < b becomes b with the probability (x - a) / (b - a), else a:
its expected value is x. So an average goes on moving where each step is less than half an ulp, and
rounding to the nearest would undo it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lionax.core.table import shown
from lionax.core.varying import Split, explicit_sharding, is_unchecked, varying_axes

__all__ = ["as_uniform", "bounded", "check_seed", "folded", "is_low_precision", "key_of", "lifted",
           "random_bits", "rounded", "to_integers", "ulp"]


def is_low_precision(dtype) -> bool:
    """Whether a dtype is a float of at most 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 2


def folded(key: jax.Array, number: jax.Array | int) -> jax.Array:
    """A key for one of several uses of a key."""
    return _mixed(key ^ (jnp.asarray(number).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
                         + jnp.uint32(0x85EBCA6B)))


def key_of(seed: int, *numbers: jax.Array | int) -> jax.Array:
    """A key from a seed and the numbers that tell uses of it apart."""
    return functools.reduce(folded, numbers, jnp.uint32(seed % 2**32))


def check_seed(seed: int, owner: str) -> None:
    """Refuses what is not an int of 64 bits."""
    is_int = isinstance(seed, int) and not isinstance(seed, bool)
    if not is_int or not -2**63 <= seed < 2**64:
        raise TypeError(f"{owner}: seed={shown(seed)} is not accepted; give an int of at most 64 "
                        "bits")


def random_bits(key: jax.Array, like: jax.Array, split: Split | None = None) -> jax.Array:
    """A uint32 for each element: a hash of the key and of the element's index in the whole array.

    It is the same on any mesh under ``jit``, and inside ``shard_map`` where the split is known.
    Else, and where the array has another rank than the leaf that is split, an index counts within a
    shard, and the device's index along the axes over which the array varies is mixed in. A ``vmap``
    gives all its members the same bits.
    """
    split = None if split is None or len(split.axes) != like.ndim else split
    if split is None and is_unchecked():
        raise ValueError("stochastic rounding: inside of shard_map(check_vma=False) and of pmap "
                         "types do not say along which axes an array differs, so replicas would "
                         "differ; leave check_vma=True, store with Storage(dtype, "
                         "rounding='nearest') or say it with lionax.sharded(tx, specs), which is "
                         "of slots with the axes of their leaf")
    for axis in sorted(varying_axes(like)) if split is None else ():
        key = folded(key, lax.axis_index(axis))
    out = explicit_sharding(like)
    whole = like.shape if split is None else split.whole(like.shape)
    inner = next(d for d in range(like.ndim + 1) if math.prod(whole[d:]) < 2**32)
    index, stride, outer, outer_stride = jnp.uint32(0), 1, jnp.uint32(0), 1
    for axis in reversed(range(like.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, like.shape, axis, out_sharding=out)
        if split is not None:
            along = along + jnp.asarray(split.start(axis, like.shape[axis])).astype(jnp.uint32)
        if axis >= inner:
            index, stride = index + along * jnp.uint32(stride), stride * whole[axis]
        else:
            outer = outer + along * jnp.uint32(outer_stride)
            outer_stride *= whole[axis]
    if inner:
        key = folded(key, outer)
    return _mixed(index ^ key)


def as_uniform(bits: jax.Array) -> jax.Array:
    """Float32 numbers in [0, 1) from the upper 24 of 32 bits."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def rounded(value: jax.Array, dtype, bits: jax.Array) -> jax.Array:
    """A value rounded stochastically to a float of at most 16 bits; a finite one stays finite."""
    value = value.astype(jnp.float32)
    raw = lax.bitcast_convert_type(value, jnp.uint32)
    if dtype == jnp.bfloat16:
        upper = jnp.uint32(0xFFFF0000)
        new = lax.bitcast_convert_type((raw + (bits >> 16)) & upper, jnp.float32)
        below = lax.bitcast_convert_type(raw & upper, jnp.float32)
        new = jnp.where(jnp.isfinite(new), new, below)
    else:
        unit, largest = ulp(value, dtype), jnp.float32(jnp.finfo(dtype).max)
        new = jnp.clip(to_integers(value / unit, bits) * unit, -largest, largest)
    return jnp.where(jnp.isfinite(value), new, value).astype(dtype)


def bounded(value: jax.Array, dtype) -> jax.Array:
    """A value that is finite in another dtype, if it is."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(value), jnp.clip(value, -largest, largest), value)


def lifted(value: jax.Array, dtype) -> jax.Array:
    """A value within the range of a float of fewer bits: not 0 and finite, unless it was."""
    own = jnp.dtype(jnp.float64 if value.dtype == jnp.float64 else jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize >= own.itemsize:
        return value
    # Arithmetic in float32 takes bfloat16's subnormal numbers for 0.
    least = max(float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    value = bounded(value.astype(own), dtype)
    return jnp.where(value == 0, value, jnp.copysign(jnp.maximum(jnp.abs(value), least), value))


def ulp(value: jax.Array, dtype) -> jax.Array:
    """The distance of neighbouring numbers of a dtype at a float32 value: a power of two."""
    info = jnp.finfo(dtype)
    raw = lax.bitcast_convert_type(value, jnp.uint32)
    power = lax.bitcast_convert_type(raw & jnp.uint32(0x7F800000), jnp.float32)
    return jnp.maximum(power, jnp.float32(2.0**info.minexp)) * jnp.float32(2.0**-info.nmant)


def to_integers(values: jax.Array, bits: jax.Array) -> jax.Array:
    """Values rounded stochastically to whole numbers."""
    below = jnp.floor(values)
    return jnp.where(as_uniform(bits) < values - below, below + 1, below)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which each bit of x changes half of all bits.

    Source: Wellons, Prospecting for Hash Functions, 2018: two multiplications.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
