"""The variables of Flax NNX in which an optimizer's state lies, and their shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd

from lionax.core.quantized import is_quantized
from lionax.core.tree import is_placeholder, paths

__all__ = ["check_no_optimizer_sharding", "constrained", "is_variable", "placed", "unwrapped",
           "without_shardings"]


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is a variable."""
    return isinstance(node, nnx.Variable)


def unwrapped(state: Any) -> Any:
    """A state made for variables, without those whose metadata is not that of their array.

    A masked leaf needs no variable. The sharding of a parameter does not fit a lower rank, nor
    codes whose blocks it would split.
    """

    def one(node: Any) -> Any:
        if not is_variable(node):
            return node
        value = node.get_raw_value()
        rank = min(map(jnp.ndim, jax.tree.leaves(value)), default=0)
        if is_placeholder(value) or _rank(_sharding(node)) > rank:
            return value
        return _without_sharding(node) if is_quantized(value) and _is_split(node) else node

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


def constrained(tree: Any, shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    """The arrays of a tree, each with its sharding."""
    arrays, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(map(jax.lax.with_sharding_constraint, arrays, shardings))


def without_shardings(state: Any) -> Any:
    """The state, whose variables say nothing of shardings, so that Flax leaves the arrays alone."""
    return jax.tree.map(lambda node: _without_sharding(node) if is_variable(node) else node, state,
                        is_leaf=is_variable)


def check_no_optimizer_sharding(params: Any) -> None:
    """Refuses metadata that say how the slots are split."""
    variables = jax.tree.leaves(params, is_leaf=is_variable)
    for path, variable in zip(paths(nnx.as_pure(params)), variables, strict=True):
        sharding = variable.get_metadata("optimizer_sharding", None)
        if sharding is not None:
            raise ValueError(f"nnx.Optimizer: zero_axis= and the metadata of {path!r}, "
                             f"optimizer_sharding={sharding!r}, both say how its slots are split; "
                             "leave one of them away")


def _is_split(variable: Any) -> bool:
    """Whether the sharding that Flax will give to a slot does not divide its codes and scales."""
    metadata = variable.get_metadata()
    sharding = metadata.get("optimizer_sharding", _sharding(variable))
    mesh = metadata.get("mesh", None) or jax.sharding.get_abstract_mesh()
    if sharding is None or (mesh.empty and not isinstance(sharding, jax.sharding.NamedSharding)):
        return False
    if not isinstance(sharding, jax.sharding.NamedSharding):
        spec = spmd.get_pspec(sharding, metadata.get("sharding_rules", None))
        sharding = jax.sharding.NamedSharding(mesh, spec)
    try:
        jax.tree.map(lambda leaf: sharding.shard_shape(leaf.shape), variable.get_raw_value())
    except ValueError:
        return True
    return False


def _without_sharding(variable: Any) -> Any:
    metadata = {name: value for name, value in variable.get_metadata().items()
                if name not in ("out_sharding", "optimizer_sharding")}
    return type(variable).from_metadata(variable.get_raw_value(), metadata)


def _sharding(variable: Any) -> Any:
    """What the metadata of a variable says of its sharding, if Flax follows it; else None."""
    is_followed = variable.get_metadata("eager_sharding", True)
    return variable.get_metadata("out_sharding", None) if is_followed else None


def _rank(sharding: Any) -> int:
    """How many axes a sharding describes."""
    sharding = getattr(sharding, "sharding", sharding)  # of a Format
    return len(getattr(sharding, "spec", sharding) or ())
