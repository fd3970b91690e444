"""The same update on any mesh: data-parallel, fsdp, tensor-parallel; `jit` and `shard_map`."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import lionax

STEPS = 20
KERNEL = {"data": P(), "fsdp": P("d"), "tensor": P(None, "d")}
LOW = {
    "lion_int8": lambda: lionax.lion(0.01, weight_decay=0.1, mu_dtype="int8"),
    "lion_int4": lambda: lionax.lion(0.01, mu_dtype="int4"),
    "lion_bfloat16": lambda: lionax.lion(0.01, mu_dtype="bfloat16"),
    "lamb_int8": lambda: lionax.lamb(0.01, mu_dtype="int8", nu_dtype="int8"),
    "adamw_int4": lambda: lionax.adamw(0.01, mu_dtype="int4", nu_dtype="int4"),
    "sgd_int8": lambda: lionax.accumulate(lionax.sgd(0.01, 0.9, accumulator_dtype="int8"), 3),
}
# What is the same bit for bit, since it sums nothing over devices.
EXACT = {"lion", "lion_decay", "sgd", "sgd_momentum", "lion_int8", "lion_int4", "lion_bfloat16",
         "sgd_int8", "master_weights", "adamw_int4"}


def make(name):
    return LOW[name]() if name in LOW else cases.CASES[name].make()


@functools.cache
def problem():
    """Parameters whose larger leaves have codes, and their gradients, one of which is all zero."""
    params = {"kernel": cases.normal(16, 512), "bias": cases.normal(16), "gain": cases.normal()}
    grads = [cases.gradients(params, t) for t in range(STEPS)]
    return params, jax.tree.map(lambda *each: jnp.stack(each), *grads)


def specs(layout):
    return {"kernel": KERNEL[layout], "bias": P("d") if layout == "fsdp" else P(), "gain": P()}


def run(tx, params, grads):
    """The parameters after a scan of steps."""
    return jax.lax.scan(lambda carry, g: (tx.step(*carry, g), None), (params, tx.init(params)),
                        grads)[0][0]


@functools.cache
def on_one_device(name):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(functools.partial(run, make(name)))(*problem())


def assert_the_same(name, found, figure):
    found, expected = jax.device_get((found, on_one_device(name)))
    if name in EXACT:
        cases.assert_equal(found, expected)
    figure("largest error", cases.assert_close(found, expected, rtol=1e-6))


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])


def in_jit(name, layout, devices):
    mesh = mesh_of(devices)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(layout))
    of_grads = jax.tree.map(lambda spec: NamedSharding(mesh, P(None, *spec)), specs(layout))
    return jax.jit(functools.partial(run, make(name)), in_shardings=(shardings, of_grads),
                   out_shardings=shardings)(*problem())


def in_shard_map(name, layout, devices, check_vma=True):
    own = specs(layout)
    of_grads = jax.tree.map(lambda spec: P(None, *spec), own)
    tx = make(name)
    if not isinstance(tx.definition, lionax.core.definition.Sharded):
        tx = lionax.sharded(tx, own)
    else:
        tx = lionax.sharded(lionax.Transformation.of(tx.definition.part), own)
    return jax.jit(jax.shard_map(
        functools.partial(run, tx), mesh=mesh_of(devices), in_specs=(own, of_grads),
        out_specs=own, check_vma=check_vma))(*problem())


PRODUCT = list(itertools.product(KERNEL, (2, 4, 8)))
# Of the whole product of cases, layouts and devices one in nine, of low precision one in three.
SAMPLE = [(name, *PRODUCT[i % 9]) for i, name in enumerate(cases.CASES)]
SAMPLE += [(name, *PRODUCT[i]) for name in LOW for i in (2, 4, 6)]
PLAIN = [("lamb_int8", "tensor", 8), ("lion", "fsdp", 4)]


THE_SAME = pytest.mark.promise("Meshes", "On any mesh 20 steps give the parameters of one device")


@pytest.mark.one_in(2)
@THE_SAME
@pytest.mark.parametrize(("name", "layout", "devices"), [
    *cases.but_for_fast([PLAIN[0], *SAMPLE[::2]]), PLAIN[1]])
@pytest.mark.usefixtures("standard_promotion")
def test_under_jit(name, layout, devices, figure):
    assert_the_same(name, in_jit(name, layout, devices), figure)


@pytest.mark.one_in(2)
@THE_SAME
@pytest.mark.parametrize(("name", "layout", "devices"), [
    *PLAIN, *cases.but_for_fast([each for each in SAMPLE if each not in PLAIN])])
@pytest.mark.usefixtures("standard_promotion")
def test_inside_of_shard_map(name, layout, devices, figure):
    assert_the_same(name, in_shard_map(name, layout, devices), figure)


@THE_SAME
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [("lamb_int8", "fsdp"), *cases.but_for_fast(
    [("lion_int4", "tensor"), ("monitor", "tensor"), ("master_weights_int8", "fsdp")])])
def test_without_the_check_of_types_the_specs_suffice(name, layout, figure):
    assert_the_same(name, in_shard_map(name, layout, 8, check_vma=False), figure)


def test_codes_of_shards_without_whole_blocks_are_those_of_one_device():
    """A shard of 64 elements holds half a block. Its scales are those of the whole leaf."""
    own, (params, grads) = specs("tensor"), problem()
    tx, mesh = lionax.lamb(0.01, mu_dtype="int8", nu_dtype="int8"), mesh_of(8)
    layout = jax.tree.map(lambda x: x.spec, lionax.state_sharding(
        tx, params, specs=own, mesh=mesh))
    assert layout.rules[0].mu["kernel"].codes == P(None, "d")
    first = lambda tx: lambda p, g: tx.step(p, tx.init(p), g)[1]
    found = jax.jit(jax.shard_map(first(lionax.sharded(tx, own)), mesh=mesh, in_specs=(own, own),
                                  out_specs=layout))(params, jax.tree.map(lambda g: g[0], grads))
    expected = jax.jit(first(tx))(params, jax.tree.map(lambda g: g[0], grads))
    cases.assert_equal(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("check_vma", cases.but_for_fast([True, False], False))
def test_independent_members_over_an_axis(check_vma):
    """No norm is summed over the members."""
    tx = lionax.sharded(lionax.lamb(0.1), P())
    step = jax.shard_map(jax.vmap(lambda p: tx.step(p, tx.init(p), jnp.ones_like(p))[0]),
                         mesh=mesh_of(4), in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)
    params = jnp.array([[3.0, 1.0], [4.0, 2.0], [3.0, 1.0], [4.0, 9.0]])
    alone = [lionax.lamb(0.1).step(p, tx.init(p), jnp.ones_like(p))[0] for p in params]
    np.testing.assert_allclose(step(params), jnp.stack(alone), rtol=1e-6)


@pytest.mark.slow
def test_a_stack_of_models_inside_of_a_mesh():
    """`vmap` over the first axis, the second split over the mesh."""
    mesh, tx = mesh_of(8), lionax.lamb(0.1)
    params = {"kernel": cases.normal(3, 16, 32), "bias": cases.normal(3, 16)}
    step = jax.vmap(lambda p, g: tx.step(p, tx.init(p), g)[0])
    grads = cases.gradients(params, 0)
    placed = jax.device_put((params, grads), NamedSharding(mesh, P(None, "d")))
    cases.assert_close(jax.device_get(jax.jit(step)(*placed)), jax.jit(step)(params, grads))


NORMS = {
    "clip_by_global_norm": lambda: lionax.clip_by_global_norm(1.0),
    "clip_by_norm": lambda: lionax.clip_by_norm(1.0),
    "scale_by_trust_ratio": lionax.scale_by_trust_ratio,
    "skip_nonfinite": lambda: lionax.skip_nonfinite(lionax.sgd(0.1), 3),
    "accumulate": lambda: lionax.accumulate(lionax.sgd(0.1), 2),
    "monitor": lambda: lionax.monitor(lionax.sgd(0.1)),
}


@pytest.mark.parametrize("name", NORMS)
def test_sums_that_types_do_not_describe_are_refused(name):
    tx, params = NORMS[name](), {"w": jnp.ones((8, 2))}
    one = lambda p: tx.step(p, tx.init(p), p)[0]
    unchecked = jax.shard_map(one, mesh=mesh_of(8), in_specs=(P("d"),), out_specs=P("d"),
                              check_vma=False)
    for function in (unchecked, jax.pmap(one, axis_name="d")):
        with pytest.raises(ValueError, match=rf"{name}: .* 'w' .*lionax\.sharded\(tx, specs\)"):
            function(jax.tree.map(lambda x: x[:, None], params))


@pytest.mark.slow
def test_norms_along_batch_axes_need_the_axis_that_is_split():
    tx, params = lionax.scale_by_trust_ratio(batch_axes=(0,)), {"w": cases.normal(8, 6)}
    expected = tx.update(params, tx.init(params), params)[0]
    on_mesh = functools.partial(jax.shard_map, mesh=mesh_of(2), in_specs=(P("d"),),
                                out_specs=P("d"))
    update = lambda tx: lambda p: tx.update(p, tx.init(p), p)[0]
    with pytest.raises(ValueError, match="batch_axes inside of shard_map"):
        on_mesh(update(tx))(params)
    cases.assert_close(on_mesh(update(lionax.sharded(tx, P("d"))))(params), expected)


@pytest.mark.parametrize(("specs", "error"), [
    ({"kernel": P("d")}, "no PartitionSpec for 'bias'"), ({}, "no PartitionSpec for 'bias'"),
    ({"kernel": "d"}, "specs has 'd' at 'kernel'")])
def test_specs_that_do_not_fit_are_refused(specs, error):
    with pytest.raises((TypeError, ValueError), match=error):
        lionax.sharded(lionax.lion(0.1), specs).init(problem()[0])


def test_sharded_is_the_outermost():
    inner = lionax.sharded(lionax.lion(0.1), P())
    with pytest.raises(TypeError, match=r"write sharded\(chain\(...\), specs\)"):
        lionax.chain(lionax.clip(1.0), inner)
