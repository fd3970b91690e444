"""Norms over leaves and devices, safe from overflow: the one place where a chain's measured sums are added up.

A sum of squares in float32 overflows once an element passes 1.8e19 and vanishes below 1e-23. So each array's sum comes
in three bins (Blue, 1978): squares of ``x·2^k``, of ``x`` and of ``x·2^-k``, of which one is used. Bins add: over leaves,
and over the devices of a mesh.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lionax import storage

__all__ = ["joint_norm", "varying_axes"]


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which ``x`` differs inside ``shard_map``: none for a replicated value or outside of it."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def joint_norm(arrays: Sequence[jax.Array]) -> jax.Array:
    """The Euclidean norm of all elements of all arrays, over all the devices that hold a part of them.

    Inside ``shard_map`` each array is summed over the mesh axes that it varies on, so a replicated one counts once.
    Under ``jit`` on a mesh the arrays are global and there is nothing to add.

    Args:
      arrays: floating-point, of any shapes. Squares are taken in float32, or in float64 if one of them is.

    Returns:
      A scalar, float32 or float64; 0 for no arrays. A norm above the largest finite number is that number, so that a
      finite gradient is never scaled to zero; inf and NaN elements give inf and NaN.
    """
    dtype = storage.compute_dtype(*arrays)
    by_axes: dict[frozenset[str], list[jax.Array]] = {}
    for array in arrays:
        by_axes.setdefault(varying_axes(array), []).append(_binned(array, dtype))
    sums = [_pairwise_sum(jnp.stack(bins)) for bins in by_axes.values()]
    sums = [lax.psum(s, tuple(sorted(axes))) if axes else s for s, axes in zip(sums, by_axes, strict=True)]
    return _norm_of_bins(_pairwise_sum(jnp.stack(sums)) if sums else jnp.zeros(3, dtype))


def _pairwise_sum(rows: jax.Array) -> jax.Array:
    """Sum over the first axis by halves: the error grows with the logarithm of the number of leaves."""
    while len(rows) > 1:
        if len(rows) % 2:
            rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2:]
    return rows[0]


def _scales(dtype: np.dtype) -> tuple[np.ndarray, float, float]:
    """Multipliers of the three bins, and the range in which a sum of squares is trusted as it is."""
    wide = jnp.finfo(dtype).maxexp // 128
    return np.exp2(np.array([90.0, 0.0, -90.0]) * wide).astype(dtype), 2.0 ** (-60 * wide), 2.0 ** (100 * wide)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _binned(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Sums of squares of ``x`` in three bins, of which at most one is not zero: shape (3,)."""
    # The CPU compiler makes one pass over memory of each reduction, so there only the sum that is needed is taken.
    # Elsewhere three reductions are one pass, and a loop would make the host wait for its condition.
    return lax.platform_dependent(x, cpu=functools.partial(_bins_by_retry, dtype=dtype),
                                  default=functools.partial(_bins_at_once, dtype=dtype))


def _sum_of_squares(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    scaled = x.astype(dtype) * scale
    return jnp.sum(scaled * scaled)


def _bin_of(total: jax.Array, low: float, high: float) -> jax.Array:
    """The bin in which an array belongs whose plain sum of squares is ``total``; NaN and inf go to the last."""
    return jnp.where(total < high, jnp.where(total > low, 1, 0), 2)


def _bins_at_once(x: jax.Array, dtype: np.dtype) -> jax.Array:
    scales, low, high = _scales(dtype)
    sums = jnp.stack([_sum_of_squares(x, scale, dtype) for scale in scales])
    return jnp.where(jnp.arange(3, dtype=jnp.int32) == _bin_of(sums[1], low, high), sums, jnp.zeros_like(sums))


def _bins_by_retry(x: jax.Array, dtype: np.dtype) -> jax.Array:
    scales, low, high = _scales(dtype)
    axes = tuple(sorted(varying_axes(x)))

    def retry(carry):
        index, _, _ = carry
        total = _sum_of_squares(x, jnp.asarray(scales)[index], dtype)
        wanted = jnp.where(index == 1, _bin_of(total, low, high), index)
        return wanted, total, wanted == index

    first = (jnp.int32(1), jnp.zeros((), dtype), jnp.bool_(False))
    if axes:
        first = jax.tree.map(lambda value: lax.pcast(value, axes, to="varying"), first)
    index, total, _ = lax.while_loop(lambda carry: ~carry[2], retry, first)
    return jnp.where(jnp.arange(3, dtype=jnp.int32) == index, total, jnp.zeros_like(total))


@_binned.defjvp
def _binned_jvp(dtype, primals, tangents):
    (x,), (dx,) = primals, tangents
    bins = _binned(x, dtype)
    scale = jnp.sum(jnp.where(bins != 0, jnp.asarray(_scales(dtype)[0]), jnp.zeros_like(bins)))
    slope = 2 * jnp.sum((x.astype(dtype) * scale) * (dx.astype(dtype) * scale))
    return bins, jnp.where(bins != 0, slope, jnp.zeros_like(bins))


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root with slope 0 at 0."""
    positive = jnp.where(x == 0, jnp.ones_like(x), x)
    return jnp.where(x == 0, jnp.zeros_like(x), jnp.sqrt(positive))


def _norm_of_bins(bins: jax.Array) -> jax.Array:
    small, middle, large = bins
    up, _, down = _scales(bins.dtype)[0]
    largest = jnp.finfo(bins.dtype).max
    large_norm = _sqrt(large + middle * down * down) / down
    large_norm = jnp.where(jnp.isfinite(large), jnp.minimum(large_norm, largest), large_norm)
    return jnp.where(large != 0, large_norm, jnp.where(middle != 0, _sqrt(middle), _sqrt(small) / up))
