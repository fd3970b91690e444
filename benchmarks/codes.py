"""Codes of 8 bits that others use for optimizer state, rounded to the nearest.

Each function rounds the numbers of one array as storing and loading them would. The scale of a
block, its largest magnitude, stays in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RoundTrip", "dynamic", "dynamic_levels", "linear", "softsign"]

RoundTrip = Callable[[jax.Array, bool], jax.Array]
"""From an array, and whether its numbers are never negative, to the numbers of its codes."""


def _in_blocks(values: jax.Array, block: int,
               rounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rounds each block of an array, divided by its largest magnitude."""
    flat = values.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scales = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    shares = rounded(blocks / jnp.where(scales == 0, 1.0, scales))
    return (shares * scales).reshape(-1)[:flat.size].reshape(values.shape)


def linear(values: jax.Array, is_nonnegative: bool) -> jax.Array:
    """Codes at equal distances, blocks of 256."""
    levels = 255 if is_nonnegative else 127
    return _in_blocks(values, 256, lambda share: jnp.round(share * levels) / levels)


def dynamic_levels(is_nonnegative: bool) -> np.ndarray:
    """The 256 numbers of the dynamic code, in order.

    Each of seven decades below 1 has half as many numbers as the one above it. In a decade they are
    the middles of equal intervals. 0 and 1 are added. Without a sign each decade has twice as many.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv:2110.02861.
    """
    numbers = [np.array([0.0, 1.0])]
    for decade in range(7):
        count = 2**(6 - decade + is_nonnegative)
        middles = 10.0**-decade * (0.1 + 0.9 * (np.arange(count) + 0.5) / count)
        numbers += [middles] if is_nonnegative else [middles, -middles]
    return np.sort(np.concatenate(numbers)).astype(np.float32)


def dynamic(values: jax.Array, is_nonnegative: bool) -> jax.Array:
    """The dynamic code of bitsandbytes, blocks of 256."""
    levels = dynamic_levels(is_nonnegative)
    between = jnp.asarray((levels[1:] + levels[:-1]) / 2)

    def rounded(share: jax.Array) -> jax.Array:
        return jnp.asarray(levels)[jnp.searchsorted(between, share, method="scan_unrolled")]

    return _in_blocks(values, 256, rounded)


def softsign(values: jax.Array, is_nonnegative: bool) -> jax.Array:
    """The companding of FlashOptim, blocks of 32: ``2x / (1 + |x|)``; the root of a square."""
    if is_nonnegative:
        return jnp.square(_in_blocks(jnp.sqrt(values), 32,
                                     lambda share: jnp.round(share * 255) / 255))

    def rounded(share: jax.Array) -> jax.Array:
        code = jnp.round(127 * 2 * share / (1 + jnp.abs(share))) / 127
        return code / (2 - jnp.abs(code))

    return _in_blocks(values, 32, rounded)
