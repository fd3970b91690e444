"""Where the arrays of a state lie: slots like their parameters, scalars on the same mesh."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lionax.core.inspection import contents
from lionax.core.internals import Tracer, buffer_of
from lionax.core.quantized import fitting, is_quantized
from lionax.core.tree import Leaves
from lionax.core.varying import axes_of, split_over

__all__ = ["as_structs", "check_whole", "common_place", "laid_out", "local", "on_mesh_of",
           "own_buffers", "shardings_of_leaves", "split_further"]

Placing = Callable[[Sharding, tuple[int, ...], int], Sharding]
"""The sharding of a leaf's slots, from the leaf's own, its shape and the length of their blocks."""


def shardings_of_leaves(leaves: Leaves) -> list[Sharding | None]:
    """The sharding of each leaf that has one."""
    return [None if not here or isinstance(value, Tracer) else getattr(value, "sharding", None)
            for value, here in zip(leaves.values, leaves.present, strict=True)]


def common_place(shardings: list[Sharding | None]) -> Sharding | None:
    """A sharding for scalars: on the one mesh, or the one device, of all leaves; else None."""
    known = [sharding for sharding in shardings if sharding is not None]
    meshes = {sharding.mesh for sharding in known if isinstance(sharding, NamedSharding)}
    if known and len(meshes) == 1 and all(isinstance(x, NamedSharding) for x in known):
        return NamedSharding(meshes.pop(), PartitionSpec())
    return known[0] if len(set(known)) == 1 and not meshes else None


def on_mesh_of(params: Any, state: Any) -> Any:
    """A state whose arrays that lie nowhere in particular lie on the mesh of the parameters."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    if not arrays or any(isinstance(x, Tracer) or not x.committed for x in arrays):
        return state
    place = common_place([x.sharding for x in arrays])
    if not isinstance(place, NamedSharding):
        return state

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x, Tracer) or x.committed:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        # `device_put` would compare the values of all processes.
        value = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: value[index])

    return jax.tree.map(one, state)


def own_buffers(state: Any, params: Any = None) -> Any:
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
    if not isinstance(leaf, jax.Array):
        return []
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(leaf) if is_key else leaf
    if isinstance(data, Tracer):  # also of a key that is none
        return [id(leaf)]
    try:
        return [(shard.device, buffer_of(shard.data))
                for shard in data.addressable_shards if shard.data.size]
    except RuntimeError:  # donated before, or on a backend that shows no pointers
        return [id(leaf)]


def as_structs(state: Any, params: Any) -> Any:
    """A state of shapes, with shardings if all parameters, shapes, too, have one."""
    leaves = Leaves.of(params, params)
    shardings = shardings_of_leaves(leaves)
    place = common_place(shardings)
    if place is None or any(x is None for x, here in zip(
            shardings, leaves.present, strict=True) if here):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), state, laid_out(state, leaves, shardings, place))


def laid_out(state: Any, leaves: Leaves, shardings: list[Sharding | None], place: Sharding,
             placing: Placing = lambda sharding, shape, block: sharding) -> Any:
    """The shardings of a state: of slots by those of their leaves, of all else a place."""
    arrays, blocks = contents(state), {}
    for held in arrays:
        if is_quantized(held.leaf):
            blocks[held.keys] = max(held.leaf.format.block, blocks.get(held.keys, 1))
    by_keys = {keys: (placing(sharding, value.shape, blocks.get(keys, 1)), value.shape)
               for keys, value, sharding in zip(leaves.keys, leaves.values, shardings, strict=True)
               if sharding is not None}

    def one(keys: Any, slot: Any) -> Any:
        # Before the path there may be fields of Optax's wrappers.
        ends = (by_keys.get(keys[n:], (place, ())) for n in range(len(keys) + 1))
        sharding = next((found for found, shape in ends if shape == slot.shape != ()), place)
        if not is_quantized(slot):
            return sharding
        return jax.tree.map(lambda array: fitting(sharding, array.shape), slot)

    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=is_quantized),
                              [one(held.keys, held.leaf) for held in arrays])


def split_further(sharding: Any, shape: tuple[int, ...], axis: str,
                  block: int = 1) -> tuple[Any, str]:
    """A sharding that also splits over a mesh axis the largest axis of a leaf that it divides.

    Where there is none the sharding stays; the second value says why. It splits the last axis
    between blocks, if it can choose.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding, "on no mesh"
    if axis not in sharding.mesh.shape:
        return sharding, f"on a mesh without the axis {axis!r}"
    spec = [*axes_of(sharding.spec), *[()] * len(shape)][:len(shape)]
    if any(axis in names for names in spec):
        return sharding, f"split over {axis!r} already"
    size = sharding.mesh.shape[axis]
    local = [n // math.prod(sharding.mesh.shape[name] for name in names)
             for n, names in zip(shape, spec, strict=True)]
    in_blocks = [n // block if i == len(local) - 1 and n % (size * block) else n
                 for i, n in enumerate(local)]
    best = max((i for i, n in enumerate(local) if n and n % size == 0), default=None,
               key=lambda i: in_blocks[i])
    if best is None:
        return sharding, f"no axis of a shard {tuple(local)} is a multiple of {size}"
    spec[best] = (*spec[best], axis)
    return split_over(sharding, spec), ""


def local(array: Any) -> Any:
    """An array that each process holds whole, as this one does: no other has to take part."""
    is_global = isinstance(array, jax.Array) and not isinstance(array, Tracer) and (
        array.is_fully_replicated and not array.is_fully_addressable)
    return array.addressable_data(0) if is_global else array


def check_whole(state: Any) -> None:
    """Refuses to pickle a state of which this process holds a part only."""
    for keys, x in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and not (
                x.is_fully_addressable or x.is_fully_replicated):
            raise pickle.PicklingError(
                f"pickle: {jax.tree_util.keystr(keys)} of the state is spread over the devices of "
                f"several processes, by {x.sharding}; no process holds it whole. Save the state "
                "with Orbax, or call jax.experimental.multihost_utils.process_allgather(state, "
                "tiled=True) on all processes and pickle what it returns")
