"""Meshes: how a state is laid out over one, and how leaves are split inside of ``shard_map``."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from lionax.core.definition import Foreign, Sharded, nested
from lionax.core.placement import common_place, laid_out, shardings_of_leaves, split_further
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import Leaves, named_specs, split_of
from lionax.transforms.combining import definition_of

__all__ = ["sharded", "state_sharding"]


def state_sharding(tx: Transformation, params: Any, zero_axis: str | None = None, *,
                   specs: Any = None, mesh: Mesh | None = None,
                   memory_kind: str | None = None) -> Any:
    """The shardings of a whole state: the ``out_shardings`` of ``jax.jit(tx.init)``.

    A slot has the sharding of its parameter; so have averages and sums of gradients. Codes have it,
    too, and scales where each shard holds whole blocks. All else is replicated over the mesh.

    With ``zero_axis`` the slots of a parameter are split over that axis of the mesh, too, along the
    largest axis of the parameter that it divides (ZeRO, stage 1). The step computes each update
    where its slots are, and gathers the parameters. Give the shardings of both to ``jax.jit``, so
    that parameters come back as they went in:

        shardings = state_sharding(tx, params, zero_axis="data")
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(tx.step, donate_argnums=(0, 1),
                       out_shardings=(jax.tree.map(lambda x: x.sharding, params), shardings))

    Args:
      tx: a lionax transformation.
      params: the parameters, or a ``jax.ShapeDtypeStruct`` with a sharding for each.
      zero_axis: an axis of the mesh over which parameters are replicated.
      specs: a ``PartitionSpec`` for each parameter, or for a node above several, together with a
        mesh; instead of shardings in ``params``.
      mesh: the mesh of the specs.
      memory_kind: where slots are kept, such as "pinned_host"; scalars stay on the device.

    Returns:
      A tree like ``tx.init(params)`` of shardings.

    Raises:
      TypeError: if ``tx`` is not lionax's.
      ValueError: for no parameters, one without a sharding, or several meshes; for a
        ``zero_axis`` that the mesh lacks or that splits no parameter; for a kind of memory that the
        devices lack.

    >>> import jax, jax.numpy as jnp, lionax
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    >>> shardings = lionax.state_sharding(lionax.lion(1e-3), params, specs={"w": P("x")},
    ...                                   mesh=jax.make_mesh((1,), ("x",)))
    >>> tuple(shardings.rules[0].mu["w"].spec), tuple(shardings.count.spec)
    (('x',), ())

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
      2020, arXiv:1910.02054.
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"state_sharding: {tx!r} is not a lionax transformation; wrap an Optax one "
                        "in lionax.chain(...)")
    if specs is not None or mesh is not None:
        params = _with_specs(params, specs, mesh)
    leaves = Leaves.of(params, params)
    if not any(leaves.present):
        raise ValueError("state_sharding: there are no parameters, whose mesh the state would have")
    shardings = shardings_of_leaves(leaves)
    for path, sharding, here in zip(leaves.paths, shardings, leaves.present, strict=True):
        if here and sharding is None:
            raise ValueError(f"state_sharding: {path!r} has no sharding; give arrays, shapes with "
                             "jax.ShapeDtypeStruct(shape, dtype, sharding=...), or specs= and "
                             "mesh=")
    place = common_place(shardings)
    if place is None:
        raise ValueError("state_sharding: the parameters lie on several meshes or devices; put all "
                         "on one mesh with jax.device_put")
    if zero_axis is not None:
        _check_axis(zero_axis, place, leaves, shardings)

    def placing(sharding: Sharding, shape: tuple[int, ...], block: int) -> Sharding:
        if zero_axis is not None:
            sharding, _ = split_further(sharding, shape, zero_axis, block)
        return sharding if memory_kind is None else _in_memory(sharding, memory_kind)

    is_explicit = isinstance(place, NamedSharding) and AxisType.Explicit in place.mesh.axis_types
    if memory_kind is not None or (zero_axis is not None and is_explicit):
        _refuse_foreign(tx, "memory_kind" if memory_kind is not None else "zero_axis")
    state = jax.eval_shape(tx.init, jax.tree.map(_without_sharding, params))
    return laid_out(state, leaves, shardings, place, placing)


def _refuse_foreign(tx: Transformation, argument: str) -> None:
    """Optax's own arithmetic takes arrays of one sharding and one memory only."""
    for part in nested(tx.definition):
        if isinstance(part, Foreign):
            raise ValueError(f"state_sharding: {argument}= with {part.name}, which is Optax's, on "
                             "an explicit mesh or another memory: it cannot compute there; take "
                             "lionax's transformations, or leave the argument away")


def _without_sharding(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _with_specs(params: Any, specs: Any, mesh: Mesh | None) -> Any:
    """The parameters as shapes with these specs."""
    if mesh is None or specs is None:
        raise ValueError("state_sharding: specs= are those of a mesh; give specs= and mesh= "
                         "together, or neither")
    leaves, named = Leaves.of(params, params), named_specs(specs, "state_sharding")
    return leaves.treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(
            *split_of(named, keys, "state_sharding")))) if here else x
        for x, keys, here in zip(leaves.values, leaves.keys, leaves.present, strict=True))


def _check_axis(axis: str, place: Sharding, leaves: Leaves, shardings: Any) -> None:
    """Refuses an axis over which nothing would be split."""
    names = place.mesh.axis_names if isinstance(place, NamedSharding) else ()
    if axis not in names:
        raise ValueError(f"state_sharding: zero_axis={axis!r} is not an axis of the mesh, which "
                         f"has {names}")
    whys = {path: split_further(sharding, value.shape, axis)[1] for path, sharding, value, here
            in zip(leaves.paths, shardings, leaves.values, leaves.present, strict=True) if here}
    if all(whys.values()):
        reasons = "; ".join(f"{path!r}: {why}" for path, why in list(whys.items())[:3])
        raise ValueError(f"state_sharding: zero_axis={axis!r} splits no parameter ({reasons}); "
                         "leave zero_axis away")


def _in_memory(sharding: Sharding, kind: str) -> Sharding:
    device = min(sharding.device_set, key=lambda device: device.id)
    known = [memory.kind for memory in device.addressable_memories()]
    if kind not in known:
        raise ValueError(f"state_sharding: memory_kind={kind!r} is not known to {device.platform} "
                         f"devices, which have {', '.join(known)}")
    return sharding.with_memory_kind(kind)


@constructor
def sharded(tx: Any, specs: Any) -> Transformation:
    """Says how the leaves are split over the mesh inside of ``shard_map``.

    Without it lionax reads from the type of a value over which mesh axes it varies, and sums norms
    over these. The specs overrule the types:

    - with ``check_vma=False``, and in ``pmap``, types say nothing. There norms and stochastic
      rounding are refused without it;
    - independent members that are spread over an axis, as in ``shard_map(jax.vmap(tx.step))``, have
      ``PartitionSpec()``: no norm is summed over the members;
    - the random bits and the blocks of codes are those of the whole leaf, so a state of low
      precision is the same as on one device, bit for bit.

    Outside of ``shard_map`` it changes nothing. The state is that of ``tx``.

    Args:
      tx: the whole transformation; lionax's or Optax's.
      specs: the ``in_specs`` of the parameters: a ``PartitionSpec`` or ``NamedSharding`` for each,
        or for a node above several.

    Raises:
      TypeError: for what is no spec, and for a `sharded` inside of another transformation.
      ValueError: at the first call, for a leaf without a spec.

    >>> import jax, jax.numpy as jnp, lionax
    >>> from jax.sharding import PartitionSpec as P
    >>> tx = lionax.sharded(lionax.clip_by_global_norm(1.0), P("x"))
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    >>> clip = jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=P("x"),
    ...                      out_specs=P("x"), check_vma=False)
    >>> clip(jnp.array([2.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    return Transformation.of(Sharded(definition_of(tx, "sharded"), named_specs(specs, "sharded")))
