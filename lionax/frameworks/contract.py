"""What the helpers of all frameworks share: which transformations they take, and their states."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from lionax.core.transformation import Transformation
from lionax.transforms.combining import chain

__all__ = ["as_lionax", "own_buffers"]


def as_lionax(tx: optax.GradientTransformation) -> Transformation:
    """A transformation with `Transformation.step`; one of Optax's becomes a chain of one."""
    return tx if isinstance(tx, Transformation) else chain(tx)


def own_buffers(state: Any, params: Any) -> Any:
    """The state, with a copy of each array whose buffer an array before it or a parameter has.

    Some of Optax's ``init`` return the parameters themselves. A step that donates both would
    donate a buffer twice.
    """
    taken = {buffer for leaf in jax.tree.leaves(params) for buffer in _buffers(leaf)}

    def own(leaf: Any) -> Any:
        if not taken.isdisjoint(_buffers(leaf)):
            leaf = jnp.copy(leaf)
        taken.update(_buffers(leaf))
        return leaf

    return jax.tree.map(own, state)


def _buffers(leaf: Any) -> list[Any]:
    """What tells the buffers of an array from those of others."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return [id(leaf)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return [(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards]
