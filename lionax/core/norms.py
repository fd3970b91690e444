"""Norms over leaves and devices, safe from overflow and underflow.

A norm is one plain sum of squares. In float32 that sum overflows above a norm of 1.8e19 and loses
digits below one of 1e-9. Only then is it taken again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lionax.core.programs import Kept
from lionax.core.storage import compute_dtype, is_complex
from lionax.core.varying import Split, summed_axes

__all__ = ["ByAxes", "all_finite", "by_axes", "factors", "fused_norms", "in_three_sums",
           "in_two_branches", "joint_norm", "norm_of_each", "total"]

ByAxes = dict[tuple[str, ...], tuple[jax.Array, ...]]
"""Arrays by the mesh axes over which their elements lie."""

Groups = tuple[ByAxes, ...]


def by_axes(arrays: Iterable[jax.Array | None], splits: Iterable[Split | None] = ()) -> ByAxes:
    """Arrays by the axes over which `total` sums them: of their splits, else of their types."""
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    for x, split in zip(arrays, itertools.chain(splits, itertools.repeat(None)), strict=False):
        if x is not None:
            found.setdefault(summed_axes(x, split), []).append(x)
    return {axes: tuple(members) for axes, members in found.items()}


def joint_norm(arrays: Sequence[jax.Array], splits: Sequence[Split | None] = ()) -> jax.Array:
    """The Euclidean norm of all elements of all arrays, on all devices.

    Inside ``shard_map`` each array is summed over the mesh axes over which it is split or, where no
    split is known, over which its type varies. So a replicated array counts once. The norm is a
    float32 scalar, float64 if an array is, 0 for no arrays, inf or NaN if an element is. A finite
    norm above the largest number is that number, so that no gradient is scaled to 0.
    """
    return _norms((_real_parts(by_axes(arrays, splits)),))[0]


def fused_norms(groups: Sequence[ByAxes]) -> tuple[jax.Array, ...]:
    """The norm of each group, without a branch for which arrays are kept, and no derivative."""
    return _fused(lax.stop_gradient(tuple(map(_real_parts, groups))))


@functools.partial(Kept, most=64)  # of trees, not of leaves
def _fused(parts: Groups) -> tuple[jax.Array, ...]:
    if compute_dtype(*jax.tree.leaves(parts)) == jnp.float64:
        return in_three_sums(parts)
    return lax.platform_dependent(parts, cpu=in_float64, default=in_three_sums)


def norm_of_each(arrays: Sequence[jax.Array], batch_axes: Sequence[int] = (),
                 split: Split | None = None) -> tuple[jax.Array, ...]:
    """The norm of each array by itself, as `joint_norm`; of each index along the batch axes."""
    if batch_axes:
        return tuple(_norm_of_rows(array, batch_axes, split) for array in arrays)
    return _norms(tuple(_real_parts(by_axes([array], [split])) for array in arrays))


def _norm_of_rows(array: jax.Array, batch_axes: Sequence[int], split: Split | None) -> jax.Array:
    axes = sorted({axis % array.ndim for axis in batch_axes})
    last = jnp.moveaxis(array, axes, range(len(axes)))
    rows = last.reshape(math.prod(last.shape[:len(axes)]), *last.shape[len(axes):])
    rest = split and Split(tuple(x for i, x in enumerate(split.axes) if i not in axes))
    each = jax.vmap(lambda row: joint_norm([row], [rest]))(rows)
    return each.reshape([n if i in axes else 1 for i, n in enumerate(array.shape)])


def factors(dividend: jax.Array, divisor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors whose product is a quotient of norms, which may be no normal number.

    XLA on the CPU takes a quotient below 1e-38 for 0. The second factor is 1 but for such.
    """
    quotient = dividend / divisor
    low, high, down, up = (_power(k, quotient.dtype) for k in (-100, 100, -64, 96))
    # Of a quotient of 0 the divisor may be as small as a number can be.
    second = jnp.where((quotient < low) & (divisor > 1), down,
                       jnp.where(quotient > high, up, 1.0)).astype(quotient.dtype)
    return dividend / (divisor * second), second


def all_finite(arrays: ByAxes) -> jax.Array:
    """Whether every element is finite: a bool scalar, the same on every device."""
    # x - x is 0 or NaN. XLA on the CPU would keep what `isfinite` makes, before it is summed.
    return total(jax.tree.map(lambda x: jnp.isnan(jnp.sum(x - x)).astype(jnp.float32), arrays)) == 0


def _real_parts(arrays: ByAxes) -> ByAxes:
    """The arrays, each complex one as its real and its imaginary part."""
    return {axes: tuple(part for x in members
                        for part in ((x.real, x.imag) if is_complex(x) else (x,)))
            for axes, members in arrays.items()}


@jax.custom_jvp
@functools.partial(Kept, most=64)
def _norms(groups: Groups) -> tuple[jax.Array, ...]:
    """The joint norm of each group."""
    # A GPU's host would wait for a branch, and its compiler makes one loop of three sums.
    return lax.platform_dependent(groups, cpu=in_two_branches, default=in_three_sums)


@_norms.defjvp
def _norms_jvp(primals, tangents):
    (groups,), (directions,) = primals, tangents
    norms = _norms(groups)
    return norms, tuple(map(_slope, norms, groups, directions))


def _slope(norm, arrays, directions):
    """The derivative of a norm along directions: Σ x·dx / ‖x‖, and 0 at 0."""
    length = jnp.where(norm == 0, jnp.ones_like(norm), norm)
    return total(jax.tree.map(
        lambda x, dx: jnp.sum(x.astype(norm.dtype) / length * dx.astype(norm.dtype)),
        arrays, directions), norm.dtype)


def in_two_branches(groups: Groups) -> tuple[jax.Array, ...]:
    """One sum for each group. If one is out of range, all are taken again, in float64."""
    if compute_dtype(*jax.tree.leaves(groups)) == jnp.float64:
        return in_three_sums(groups)
    plain = [_sum_of_squares(group, jnp.float32) for group in groups]
    in_range = functools.reduce(jnp.logical_and, [_scale_for(x) == 1 for x in plain],
                                jnp.bool_(True))

    return lax.cond(in_range, lambda groups: tuple(map(jnp.sqrt, plain)), in_float64, groups)


def in_float64(groups: Groups) -> tuple[jax.Array, ...]:
    """One sum for each group, in float64."""
    with jax.enable_x64(True):
        return tuple(_rounded(jnp.sqrt(_sum_of_squares(group, jnp.float64))) for group in groups)


def in_three_sums(groups: Groups) -> tuple[jax.Array, ...]:
    """Three sums for each group, of which one is in range."""
    return tuple(map(_in_three_sums, groups))


def _in_three_sums(group: ByAxes) -> jax.Array:
    dtype = compute_dtype(*jax.tree.leaves(group))
    up, down, low, high = (_power(k, dtype) for k in (90, -90, -70, 60))
    plain = _sum_of_squares(group, dtype)
    # The bounds do not bind where a sum is used. Without them XLA makes (x·c)·(x·c) into
    # (x·x)·(c·c), which is out of range.
    small = _sum_of_squares(group, dtype, lambda x: jnp.minimum(jnp.abs(x) * up, high))
    large = _sum_of_squares(group, dtype, lambda x: jnp.maximum(jnp.abs(x) * down, low))
    scale = _scale_for(plain)
    total = jnp.where(scale > 1, small, jnp.where(scale < 1, large, plain))
    norm = jnp.sqrt(total) / scale  # inf, also if only this division overflows
    return jnp.where(jnp.isfinite(total), jnp.minimum(norm, jnp.finfo(dtype).max), norm)


def _power(exponent: int, dtype) -> float:
    """A power of two that is as near to the limits of the dtype as 2^exponent is to float32's."""
    return 2.0 ** (exponent * jnp.finfo(dtype).maxexp / 128)


def _scale_for(plain: jax.Array) -> jax.Array:
    """The scale for elements of this sum of squares: 1 if it is in range; NaN and inf are large."""
    up, down, low, high = (_power(k, plain.dtype) for k in (90, -90, -60, 100))
    return jnp.where(plain < low, up, jnp.where(plain < high, 1.0, down)).astype(plain.dtype)


def _sum_of_squares(arrays: ByAxes, dtype, scaled: Callable = lambda x: x) -> jax.Array:
    return total(jax.tree.map(lambda x: jnp.sum(jnp.square(scaled(x.astype(dtype)))), arrays),
                 dtype)


def _rounded(norm: jax.Array) -> jax.Array:
    """A norm in float32; a finite one stays finite."""
    largest = lax.full_like(norm, jnp.finfo(jnp.float32).max)
    return lax.select(lax.is_finite(norm), lax.min(norm, largest), norm).astype(jnp.float32)


def total(sums: ByAxes, dtype=jnp.float32) -> jax.Array:
    """The sum over arrays and devices, with one collective for each set of mesh axes."""
    totals = [lax.psum(_by_halves(values), axes) if axes else _by_halves(values)
              for axes, values in sums.items()]
    return _by_halves(totals) if totals else jnp.zeros((), dtype)


def _by_halves(values: Sequence[jax.Array]) -> jax.Array:
    """A sum whose error grows with the logarithm of the number of values."""
    rows = jnp.stack(values)
    while len(rows) > 1:
        first = len(rows) % 2
        halves = rows[first::2] + rows[first + 1::2]
        rows = jnp.concatenate([halves, rows[:1]]) if first else halves
    return rows[0]
