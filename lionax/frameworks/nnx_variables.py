"""The variables of Flax NNX in which an optimizer's state lies, and their shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd

from lionax.core.tree import is_placeholder

__all__ = ["is_variable", "placed", "unwrapped"]


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is a variable."""
    return isinstance(node, nnx.Variable)


def unwrapped(state: Any) -> Any:
    """A state made for variables, without those whose metadata is not that of their array.

    A masked leaf needs no variable. The sharding of a parameter does not fit a lower rank.
    """

    def one(node: Any) -> Any:
        if not is_variable(node):
            return node
        value = node.get_raw_value()
        rank = min(map(jnp.ndim, jax.tree.leaves(value)), default=0)
        return value if is_placeholder(value) or _rank(_sharding(node)) > rank else node

    return jax.tree.map(one, state, is_leaf=is_variable)


def placed(variable: Any, value: Any) -> Any:
    """A new value of a variable, with the sharding that the variable's metadata names, if any.

    Else the compiler might give a parameter the sharding of its slots.
    """
    sharding = _sharding(variable)
    if sharding is None or _rank(sharding) != getattr(value, "ndim", None):
        return value  # under ``nnx.vmap`` there may be one axis more, of which it says nothing
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.lax.with_sharding_constraint(value, sharding)
    mesh = variable.get_metadata("mesh", None) or jax.sharding.get_abstract_mesh()
    if mesh.empty or not (mesh.are_all_axes_auto or mesh.are_all_axes_explicit):
        return value  # no mesh to place it on, or inside of shard_map
    return spmd.shard_value(value, sharding, variable.get_metadata("sharding_rules", None), mesh)


def _sharding(variable: Any) -> Any:
    """What the metadata of a variable says of its sharding, if Flax follows it; else None."""
    is_followed = variable.get_metadata("eager_sharding", True)
    return variable.get_metadata("out_sharding", None) if is_followed else None


def _rank(sharding: Any) -> int:
    """How many axes a sharding describes."""
    sharding = getattr(sharding, "sharding", sharding)  # of a Format
    return len(getattr(sharding, "spec", sharding) or ())
