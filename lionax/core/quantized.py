"""Arrays of 8-bit and 4-bit codes with a scale for each block."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from lionax.core.internals import Tracer, manual_axes
from lionax.core.rounding import as_uniform, lifted
from lionax.core.varying import Split, axes_of, explicit_sharding, split_over, varying_axes

__all__ = ["Format", "QuantizedArray", "encode", "fitting", "format_of", "is_quantized",
           "shapes_of", "zeros"]

SMALLEST = 4096  # elements; a smaller leaf saves too few bytes
PARTS = 8  # of a block, whose maxima are taken first
BLOCKS = {8: (128, 64), 4: (32,)}  # accepted lengths of blocks by bits, the first that fits


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers become codes: ``x = scale · sign(c) · (|c| / L)^power`` with ``|c| <= L``.

    Codes are dense near 0, where most elements of a block lie. Numbers that may be negative have
    the power 2, and ``L`` is 127 or 7. The others, averages of squares, whose root is used, have
    the power 4, and ``L`` is 255 or 15.
    """

    bits: int
    block: int
    nonnegative: bool = False

    @property
    def levels(self) -> int:
        """``L``, the largest code."""
        return 2**self.bits - 1 if self.nonnegative else 2**(self.bits - 1) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array of codes, a pytree of two arrays.

    Invariants, for an array of shape ``(*lead, n)`` and blocks of ``B`` elements along the last
    axis:

    - ``codes`` has the shape ``(*lead, n)`` and int8, or uint8 where no element is negative. With
      4 bits it has the shape ``(*lead, n/2)`` and uint8: the lower half of byte ``i`` is the
      element ``2i``, the upper half the next.
    - ``scales`` has the shape ``(*lead, n/B)`` and bfloat16: the largest magnitude in the block,
      rounded up. A finite one is at most bfloat16's largest number.
    - ``format`` is static: ``x = scale · sign(c) · (|c| / L)^k``, where ``k`` is 2 and ``L`` is 127
      or 7; where no element is negative ``k`` is 4 and ``L`` 255 or 15.
    - An element is 0 if and only if its code or its scale is. The code of a positive number that
      may not be negative is at least 1.
    - A NaN or an infinite element makes its block NaN.

    Args:
      codes: the codes.
      scales: a scale for each block.
      format: how numbers become codes.

    Raises:
      ValueError: where it is used, if codes and scales do not have the format's dtypes and shapes.

    >>> import jax.numpy as jnp, lionax
    >>> mu = lionax.lion(0.1, mu_dtype="int8").init(jnp.ones((64, 128))).rules[0].mu
    >>> mu.shape, mu.codes.shape, mu.scales.shape, mu.nbytes
    ((64, 128), (64, 128), (64, 1), 8320)
    """

    codes: jax.Array
    scales: jax.Array
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that is stored."""
        last = self.codes.shape[-1] * (8 // self.format.bits)
        return *self.codes.shape[:-1], last

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its codes: int8, also without a sign, or int4."""
        return np.dtype(f"int{self.format.bits}")

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return sum(x.size * x.dtype.itemsize for x in (self.codes, self.scales))

    def decode(self, dtype: Any = jnp.float32, split: Split | None = None) -> jax.Array:
        """The numbers that the codes stand for; inside of ``shard_map`` by their split."""
        self.check()
        return _decoded(self, dtype, split)

    def check(self) -> None:
        """Refuses arrays that are no codes and scales of the format."""
        bits, blocks = self.format.bits, self.shape[-1] // self.format.block
        dtype = jnp.int8 if bits == 8 and not self.format.nonnegative else jnp.uint8
        *lead, last = self.scales.shape
        # Inside of shard_map a shard may hold a part of a block, and the scale of the whole.
        is_part = bool(manual_axes()) and self.shape[-1] % self.format.block != 0
        if (self.codes.dtype != dtype or not jnp.issubdtype(self.scales.dtype, jnp.floating)
                or tuple(lead) != self.shape[:-1] or (last != blocks and not is_part)):
            raise ValueError(f"a QuantizedArray of {bits} bits with codes of dtype "
                             f"{self.codes.dtype} and shape {self.codes.shape} has scales of dtype "
                             f"{self.scales.dtype} and shape {self.scales.shape}; codes of dtype "
                             f"{jnp.dtype(dtype)} and a scale for each {self.format.block} of "
                             "them, in bfloat16, are accepted")


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _decoded(array: QuantizedArray, dtype: Any, split: Split | None) -> jax.Array:
    format, blocks = array.format, array.shape[-1] // array.format.block
    codes = _unpacked(_in_whole_blocks(array.codes, blocks), format).astype(dtype)
    share = codes * np.asarray(1 / format.levels, dtype)
    if format.nonnegative:
        share = share * share
    scales = _spread(array.scales.astype(dtype), format, share, split)
    return _placed(share * jnp.abs(share) * scales, array.codes)


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a `QuantizedArray` of arrays, not of their dtypes or specs."""
    return isinstance(node, QuantizedArray) and isinstance(node.format, Format) and all(
        getattr(array, "ndim", 0) > 0 for array in (node.codes, node.scales))


def shapes_of(slots: Any) -> list[tuple[int, ...]]:
    """The shapes of slots, of codes the shapes that they stand for."""
    return [getattr(slot, "shape", ()) for slot in jax.tree.leaves(slots, is_leaf=is_quantized)]


def format_of(bits: int, shape: tuple[int, ...], nonnegative: bool) -> Format | None:
    """The format for a leaf of a shape; None for one that is small or has no whole blocks."""
    if math.prod(shape) < SMALLEST:
        return None
    fitting = (block for block in BLOCKS[bits] if shape[-1] % block == 0)
    return next((Format(bits, block, nonnegative) for block in fitting), None)


def zeros(like: Any, format: Format) -> QuantizedArray:
    """An array of zeros with the shape of another, and its sharding where whole blocks allow it."""
    dtype = jnp.int8 if format.bits == 8 and not format.nonnegative else jnp.uint8
    *lead, last = like.shape
    codes = _zeros(like, (*lead, last * format.bits // 8), dtype)
    return QuantizedArray(codes, _zeros(like, (*lead, last // format.block), jnp.bfloat16), format)


def _zeros(like: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    sharding = explicit_sharding(like) if isinstance(like, Tracer) else like.sharding
    is_placed = isinstance(sharding, NamedSharding)
    zero = jnp.zeros(shape, dtype, device=fitting(sharding, shape) if is_placed else None)
    axes = tuple(varying_axes(like)) if isinstance(like, Tracer) else ()
    return lax.pcast(zero, axes, to="varying") if axes else zero


def fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """A sharding for a shape with another last axis, which is not split where it cannot be."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    *lead, last = (*axes_of(sharding.spec), *[()] * len(shape))[:len(shape)]
    is_whole = shape[-1] % math.prod(sharding.mesh.shape[axis] for axis in last) == 0
    return sharding if is_whole else split_over(sharding, (*lead, ()))


def _in_whole_blocks(array: jax.Array, blocks: int) -> jax.Array:
    """On an explicit mesh, whose shards a reshape must not split, shards of whole blocks."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    wanted = fitting(sharding, (*array.shape[:-1], blocks))
    return jax.sharding.reshard(array, wanted) if wanted != sharding else array


def _placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """On an explicit mesh an array in the sharding of another, where its last axis allows it."""
    sharding = explicit_sharding(like)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, fitting(sharding, array.shape))


@functools.partial(jax.jit, static_argnums=(1, 3), inline=True)
def encode(values: jax.Array, format: Format, bits: jax.Array | None,
           split: Split | None = None) -> QuantizedArray:
    """Codes for numbers, rounded stochastically with random bits, or to the nearest without.

    Inside of ``shard_map`` a shard that holds no whole blocks has the scales of all, like a mesh.
    """
    levels, given = format.levels, values
    values = lifted(values, jnp.dtype(jnp.float32)).astype(jnp.float32)
    values = _in_whole_blocks(values, values.shape[-1] // format.block)
    if bits is not None:
        bits = _in_whole_blocks(bits, values.shape[-1] // format.block)
    scales = _scales(values, format, split)
    # The reciprocals of the largest scales are no normal numbers, which XLA takes for 0.
    factor = jnp.where(scales > 2.0**100, 2.0**-64, 1.0)
    reciprocals = 1.0 / jnp.where(scales == 0, 1.0, scales * factor)
    spread = functools.partial(_spread, format=format, like=values, split=split)
    share = jnp.abs(values) * spread(factor) * spread(reciprocals)
    if format.nonnegative:  # the share of a positive number may be no normal number
        share = jnp.where(values > 0, jnp.maximum(share, float(jnp.finfo(jnp.float32).tiny)), share)
    root = jnp.sqrt(share)
    steps = levels * (jnp.sqrt(root) if format.nonnegative else root)
    below = jnp.clip(jnp.floor(steps), 1 if format.nonnegative else 0, levels - 1)
    low, high = _power(below, format), _power(below + 1, format)
    limit = 0.5 if bits is None else as_uniform(bits)
    is_above = limit * (high - low) < share * _power(jnp.float32(levels), format) - low
    codes = jnp.where(share > 0, below + is_above.astype(jnp.float32), 0.0)
    codes = codes if format.nonnegative else jnp.where(values < 0, -codes, codes)
    codes, scales = _packed(codes.astype(jnp.int32), format), scales.astype(jnp.bfloat16)
    return QuantizedArray(_placed(codes, given), _placed(scales, given), format)


def _power(codes: jax.Array, format: Format) -> jax.Array:
    square = codes * codes
    return square * square if format.nonnegative else square


def _in_parts_of(format: Format, shape: tuple[int, ...], split: Split | None) -> bool:
    """Whether a shard of a shape holds no whole blocks, inside of ``shard_map``."""
    return split is not None and bool(split.axes[-1]) and shape[-1] % format.block != 0


def _scales(values: jax.Array, format: Format, split: Split | None) -> jax.Array:
    """The largest magnitude of each block, rounded up to bfloat16; NaN if one is not finite."""
    raw = lax.bitcast_convert_type(jnp.abs(values), jnp.int32)  # in the order of the numbers
    if split is not None and _in_parts_of(format, values.shape, split):
        whole = jnp.zeros((*values.shape[:-1], split.whole(values.shape)[-1]), jnp.int32)
        raw = lax.dynamic_update_slice_in_dim(
            whole, raw, split.start(-1, values.shape[-1]), -1)
        return _scales_of(lax.pmax(_largest(raw, format), split.axes[-1]))
    return _scales_of(_largest(raw, format))


def _largest(raw: jax.Array, format: Format) -> jax.Array:
    """The largest number of each block."""
    # XLA on the CPU keeps the values in memory for a maximum of floats, or of more at once.
    parts = raw.reshape(*raw.shape[:-1], -1, PARTS, format.block // PARTS)
    largest = parts[..., 0, :]
    for part in range(1, PARTS):
        largest = jnp.maximum(largest, parts[..., part, :])
    return jnp.max(largest, axis=-1)


def _scales_of(raw: jax.Array) -> jax.Array:
    """Scales, of the bits of the largest magnitudes."""
    up = lax.bitcast_convert_type((raw + 0xFFFF) & ~0xFFFF, jnp.float32)
    is_finite = raw < 0x7F800000
    return jnp.where(is_finite, jnp.minimum(up, float(jnp.finfo(jnp.bfloat16).max)), jnp.nan)


def _spread(scales: jax.Array, format: Format, like: jax.Array, split: Split | None) -> jax.Array:
    """A number for each block as one for each element of an array."""
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, format.block))
    each = each.reshape(*scales.shape[:-1], -1)
    if split is None or not _in_parts_of(format, like.shape, split):
        return each
    start = split.start(-1, like.shape[-1])
    return lax.dynamic_slice_in_dim(each, start, like.shape[-1], -1)


def _packed(codes: jax.Array, format: Format) -> jax.Array:
    """Whole numbers as an array of codes."""
    if format.bits == 8:
        return codes.astype(jnp.uint8 if format.nonnegative else jnp.int8)
    halves = (codes & 15).reshape(*codes.shape[:-1], -1, 2)
    # XLA on the CPU computes a sum in vectors, but not what reads every second element.
    return jnp.sum(halves * np.array([1, 16], np.int32), axis=-1).astype(jnp.uint8)


def _unpacked(codes: jax.Array, format: Format) -> jax.Array:
    """The inverse of `_packed`."""
    if format.bits == 8:
        return codes
    shifts = jnp.arange(2, dtype=jnp.int32) * 4
    halves = ((codes.astype(jnp.int32)[..., None] >> shifts) & 15).reshape(*codes.shape[:-1], -1)
    return halves if format.nonnegative else (halves ^ 8) - 8  # two's complement
