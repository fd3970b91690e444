"""What docs/guides/meshes.md says of layouts, beside what its own code shows."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_eager import compilations
from test_sharding import mesh_of, shardings_of

import lionax

pytestmark = pytest.mark.slow

HOST = {"kernel": np.asarray(cases.normal(64, 128)), "bias": np.asarray(cases.normal(128))}
LAYOUTS = {"data": {"kernel": P(), "bias": P()}, "fsdp": {"kernel": P("data"), "bias": P("data")},
           "tensor": {"kernel": P(None, "model"), "bias": P("model")}}
TX = lionax.lion(0.01, mu_dtype="int8")  # sums nothing, so each bit is the same


def placed(specs, axis_type=AxisType.Auto):
    mesh = mesh_of(axis_type)
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name]))
            for name, array in HOST.items()}


def steps(step, params, state, number=3):
    for _ in range(number):
        params, state = step(params, state, jax.tree.map(jnp.copy, params))
    return params, state


@pytest.mark.parametrize(("layout", "zero_axis"), [
    pytest.param("data", None, marks=pytest.mark.slow), ("data", "data"), ("fsdp", None),
    pytest.param("tensor", None, marks=pytest.mark.slow), ("tensor", "data")])
def test_each_layout_gives_the_step_of_one_device_bit_for_bit(layout, zero_axis):
    params = placed(LAYOUTS[layout])
    both = shardings_of(params), lionax.state_sharding(TX, params, zero_axis)
    state = jax.jit(TX.init, out_shardings=both[1])(params)
    actual = steps(jax.jit(TX.step, out_shardings=both), params, state)
    expected = steps(jax.jit(TX.step), HOST, TX.init(HOST))
    cases.assert_equal(jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize(("keeps_params", "compiles"), [(True, 0), (False, 1)])
def test_the_second_zero_step_compiles_where_parameters_took_the_sharding_of_the_state(
        keeps_params, compiles):
    tx, params = lionax.lion(0.01), placed(LAYOUTS["tensor"])
    shardings = lionax.state_sharding(tx, params, "data")
    own = shardings_of(params) if keeps_params else None
    step = jax.jit(tx.step, out_shardings=(own, shardings))
    state, grads = jax.jit(tx.init, out_shardings=shardings)(params), params
    params, state = step(params, state, grads)
    assert params["kernel"].sharding.spec == (P(None, "model") if keeps_params else
                                              P("data", "model"))
    with compilations() as made:
        step(params, state, grads)
    assert len(made) == compiles


def test_an_explicit_mesh_keeps_both_shardings_by_type():
    params, tx = placed(LAYOUTS["tensor"], AxisType.Explicit), lionax.lion(0.01)
    shardings = lionax.state_sharding(tx, params, "data")
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    new, state = jax.jit(tx.step)(params, state, params)
    assert jax.typeof(new["kernel"]) == jax.typeof(params["kernel"])
    assert jax.typeof(state.rules[0].mu["kernel"]).sharding.spec == P("data", "model")
    alone = lionax.lion(0.01)
    cases.assert_close(jax.device_get(new), alone.step(HOST, alone.init(HOST), HOST)[0])


def test_codes_under_sharded_are_those_of_one_device():
    specs = LAYOUTS["tensor"]
    whole = lionax.sharded(TX, specs)

    def run(tx, params):
        return steps(tx.step, params, tx.init(params))[0]

    inside = jax.shard_map(lambda params: run(whole, params), mesh=mesh_of(), in_specs=(specs,),
                           out_specs=specs, check_vma=False)
    cases.assert_equal(jax.device_get(jax.jit(inside)(placed(specs))),
                       jax.device_get(jax.jit(lambda params: run(TX, params))(HOST)))


def test_a_norm_in_pmap_is_refused():
    tx = lionax.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=r"pmap types do not say .*lionax.sharded\(tx, specs\)"):
        jax.pmap(lambda grads: tx.update(grads, tx.init(grads))[0])(
            jnp.ones((jax.device_count(), 1, 3)))


@pytest.mark.parametrize(("spec", "is_own"), [(P(), True), (None, False)])
def test_members_spread_over_an_axis_have_norms_of_their_own_only_with_a_spec(spec, is_own):
    tx, members = lionax.lamb(0.1), cases.normal(16, 64)
    train = jax.vmap(tx.step if spec is None else lionax.sharded(tx, spec).step)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(train, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    new, _ = jax.jit(spread)(members, jax.vmap(tx.init)(members), members)
    alone = jnp.stack([tx.step(one, tx.init(one), one)[0] for one in members])
    assert bool(jnp.allclose(new, alone, atol=1e-5)) == is_own
