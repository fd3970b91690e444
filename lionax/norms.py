"""Norms over leaves and devices, safe from overflow: the one place where a chain's measured sums are added up.

A sum of squares in float32 overflows once an element passes 1.8e19 and vanishes below 1e-23. So it is taken in float64, at once or
when that in float32 was out of range; or, where a second pass or float64 is dear, of ``x·c`` with three powers of two for ``c``, of
which one is in range (Blue, 1978, has three such sums likewise).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lionax import ordering, storage

__all__ = ["all_finite", "in_few_passes", "in_one_pass", "joint_norm", "norm_of_each", "varying_axes"]


_LARGE = 1 << 14  # elements, from which on a sum in float64 costs more than a branch
_SMALL = 1 << 12  # elements, below which the CPU's compiler makes three or four loops of one sum, and one of two sums at once


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which ``x`` differs inside ``shard_map``: none for a replicated value or outside of it."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def joint_norm(arrays: Sequence[jax.Array]) -> jax.Array:
    """The Euclidean norm of all elements of all arrays, over all the devices that hold a part of them.

    Inside ``shard_map`` each array is summed over the mesh axes that its type says it varies on, so a replicated one counts
    once. With ``check_vma=False`` types do not say, and the norm is that of the local shard. Under ``jit`` on a mesh the arrays
    are global and there is nothing to add.

    Args:
      arrays: floating-point, of any shapes. Squares are taken in float32, or in float64 if one of them is.

    Returns:
      A scalar, float32 or float64; 0 for no arrays. A norm above the largest finite number is that number, so that a
      finite gradient is never scaled to zero; inf and NaN elements give inf and NaN.
    """
    return _norms((tuple(arrays),), storage.compute_dtype(*arrays))[0]


def norm_of_each(arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The norm of every array by itself, as `joint_norm` gives it; all in one dtype."""
    return _norms(tuple((array,) for array in arrays), storage.compute_dtype(*arrays))


def all_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    """Whether every element of all arrays, on all devices, is finite: a bool scalar, the same on every device."""
    parts = [(x.real, x.imag) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,) for x in arrays]
    return jnp.isfinite(joint_norm([part for both in parts for part in both]))


def _total(sums: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
    """Adds what was summed over each array, over arrays and devices."""
    by_axes: dict[frozenset[str], list[jax.Array]] = {}
    for value in sums:
        by_axes.setdefault(varying_axes(value), []).append(value)
    totals = map(_pairwise, by_axes.values())
    totals = [lax.psum(t, tuple(sorted(axes))) if axes else t for t, axes in zip(totals, by_axes, strict=True)]
    return _pairwise(totals) if totals else jnp.zeros((), dtype)


def _pairwise(values: Sequence[jax.Array]) -> jax.Array:
    """Sum by halves: the error grows with the logarithm of the number of leaves."""
    if len(values) == 1:
        return values[0]
    rows = jnp.stack(values)
    while len(rows) > 1:
        if len(rows) % 2:
            rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2:]
    return rows[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _norms(groups: tuple[tuple[jax.Array, ...], ...], dtype: np.dtype) -> tuple[jax.Array, ...]:
    """The joint norm of each group."""
    return lax.platform_dependent(groups, cpu=functools.partial(in_few_passes, dtype=dtype),
                                  default=functools.partial(in_one_pass, dtype=dtype))


@_norms.defjvp
def _norms_jvp(dtype, primals, tangents):
    ((groups,), (directions,)) = primals, tangents
    norms = _norms(groups, dtype)
    return norms, tuple(_slope(*each, dtype) for each in zip(norms, groups, directions, strict=True))


def _slope(norm: jax.Array, arrays: Sequence[jax.Array], directions: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
    unit = [x.astype(dtype) / jnp.where(norm == 0, jnp.ones_like(norm), norm) for x in arrays]
    return _total([jnp.sum(u * d.astype(dtype)) for u, d in zip(unit, directions, strict=True)], dtype)


def _factors(dtype: np.dtype) -> tuple[float, float]:
    """What elements are multiplied by before they are squared, where the plain sum is too small or too large."""
    return 2.0 ** (90 * _width(dtype)), 2.0 ** (-90 * _width(dtype))


def _width(dtype: np.dtype) -> int:
    """How many times as many exponents as float32 a dtype has: 1 or 8."""
    return jnp.finfo(dtype).maxexp // 128


def _range(dtype: np.dtype) -> tuple[float, float]:
    """Between which bounds a plain sum of squares has lost nothing to underflow or overflow."""
    return 2.0 ** (-60 * _width(dtype)), 2.0 ** (100 * _width(dtype))


def _factor_for(total: jax.Array) -> jax.Array:
    """The factor to use where the plain sum of squares is ``total``; NaN and inf belong to the large."""
    (low, high), (up, down) = _range(total.dtype), _factors(total.dtype)
    return jnp.where(total < high, jnp.where(total > low, 1.0, up), down).astype(total.dtype)


def _sum_of_squares(arrays: Sequence[jax.Array], scale: Callable[[jax.Array], jax.Array], dtype: np.dtype) -> jax.Array:
    return _total([jnp.sum(jnp.square(scale(x.astype(dtype)))) for x in arrays], dtype)


def in_few_passes(groups: Sequence[Sequence[jax.Array]], dtype: np.dtype) -> tuple[jax.Array, ...]:
    """The joint norm of each group, for the CPU, whose compiler makes one pass over memory, and one program, of each reduction.

    A small array is summed in float64, in which no square of a float32 is out of range. That takes twice the time of a sum in
    float32, so of the large ones a sum in float32 is tried first; if one group's is out of range, all are summed in float64.
    """
    if dtype == jnp.float64:
        return in_one_pass(groups, dtype)
    small = [[array for array in group if not _is_large(array)] for group in groups]
    large = [[array for array in group if _is_large(array)] for group in groups]
    with jax.enable_x64(True):
        sums = _sums_in_double(small)
        if any(large):
            plain = [_sum_of_squares(group, lambda x: x, dtype).astype(jnp.float64) for group in large]
            fits = functools.reduce(lax.bitwise_and, map(_fits, plain, map(lax.add, plain, sums)))
            of_large = lax.cond(fits, lambda: plain, lambda: _sums_in_double(large))
            sums = map(lax.add, sums, of_large)
        return tuple(_bounded(jnp.sqrt(total), dtype) for total in sums)


def _is_large(array: jax.Array) -> bool:
    """Whether a sum in float32 is tried first; so it is if a dimension is not known, but not where one in float64 costs no more."""
    if ordering.for_kernels.value:
        return False
    return not isinstance(array.size, int) or array.size >= _LARGE


def _fits(plain: jax.Array, total: jax.Array) -> jax.Array:
    """Whether a sum of squares in float32, a part of ``total``, did not overflow, and lost to underflow only what ``total`` dwarfs."""
    low, high = _range(jnp.dtype(jnp.float32))
    return lax.bitwise_and(plain < high, total > low)  # neither holds of NaN


def _sums_in_double(groups: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    double = jnp.dtype(jnp.float64)
    if _are_small_and_alike(groups):
        return list(_in_one_loop([jnp.square(array.astype(double)) for (array,) in groups]))
    return [_sum_of_squares(group, lambda x: x, double) for group in groups]


def _are_small_and_alike(groups: Sequence[Sequence[jax.Array]]) -> bool:
    """Whether the groups are several, of one small array each, all of one shape and on every device the same."""
    arrays = [array for group in groups for array in group]
    if len(groups) < 2 or any(len(group) != 1 for group in groups) or any(map(varying_axes, arrays)):
        return False
    return len({array.shape for array in arrays}) == 1 and not _is_large(arrays[0]) and arrays[0].size < _SMALL


def _in_one_loop(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """The sum of every array, of arrays of one shape and dtype."""
    zero = np.zeros((), arrays[0].dtype)
    return lax.reduce(arrays, [zero] * len(arrays), lambda a, b: list(map(lax.add, a, b)), range(arrays[0].ndim))


def _bounded(norm: jax.Array, dtype: np.dtype) -> jax.Array:
    """A norm in a dtype; a finite one stays finite."""
    return lax.select(lax.is_finite(norm), lax.min(norm, jnp.asarray(jnp.finfo(dtype).max, norm.dtype)), norm).astype(dtype)


def in_one_pass(groups: Sequence[Sequence[jax.Array]], dtype: np.dtype) -> tuple[jax.Array, ...]:
    """As `in_few_passes`, for compilers that make one pass of three sums, of which one is used; a branch would make the host wait
    for its condition.
    """
    return tuple(_of_three_sums(group, dtype) for group in groups)


def _of_three_sums(arrays: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
    (up, down), width = _factors(dtype), _width(dtype)
    plain = _sum_of_squares(arrays, lambda x: x, dtype)
    # The bounds never bind where a sum is used. They stand there because XLA would make (x·c)·(x·c) into (x·x)·(c·c), whose
    # factors overflow.
    small = _sum_of_squares(arrays, lambda x: jnp.minimum(jnp.abs(x) * up, 2.0 ** (60 * width)), dtype)
    large = _sum_of_squares(arrays, lambda x: jnp.maximum(jnp.abs(x) * down, 2.0 ** (-70 * width)), dtype)
    factor = _factor_for(plain)
    total = jnp.where(factor == 1, plain, jnp.where(factor < 1, large, small))
    norm = jnp.sqrt(total) / factor
    # A sum past the largest number is not finite after the division only.
    return jnp.where(jnp.isfinite(total), jnp.minimum(norm, jnp.finfo(dtype).max), norm)
