"""Counters: int32 scalars, which one step too many would make negative."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["LARGEST_COUNT", "next_count", "next_in_turn"]

LARGEST_COUNT = 2**31 - 1
"""The largest int32."""


def next_count(count: jax.Array, when: Any = True) -> jax.Array:
    """A counter, one higher where a predicate holds; at its end it stands.

    Schedules then keep their last value, and what is done every n-th step is done no more: the end
    is a prime number.
    """
    higher = jnp.asarray(optax.safe_increment(count))
    return higher if when is True else jnp.where(when, higher, count)


def next_in_turn(count: jax.Array, every: int = 1) -> jax.Array:
    """A counter of what is done every n-th step; near its end it begins at 0 again."""
    return next_count(count) % (LARGEST_COUNT // every * every)
