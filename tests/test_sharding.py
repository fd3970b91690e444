"""`state_sharding`: where the arrays of a state lie, before the first step and after it."""

import collections
import re

import cases
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import lionax

SPECS = {"kernel": P(None, "model"), "embed": P(), "bias": P(), "gain": P()}
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def host_params():
    return {"kernel": cases.normal(16, 256), "embed": cases.normal(64, 512, seed=1),
            "bias": cases.normal(6), "gain": cases.normal()}


def placed(tree, mesh):
    return {name: jax.device_put(jnp.copy(x), NamedSharding(mesh, SPECS[name]))
            for name, x in tree.items()}


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_laid_out(tree, shardings):
    def one(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
        assert x.sharding.memory_kind == sharding.memory_kind

    jax.tree.map(one, tree, shardings)


@pytest.mark.parametrize("case", cases.but_for_fast(
    ["lion", "accumulate", "monitor", *list(cases.CASES)[::3]], "lion", "accumulate", "monitor"))
def test_the_state_lies_where_the_parameters_lie(case):
    """By `init` outside of `jit`, inside of it, and as the shapes of shapes."""
    mesh, tx = mesh_of(), cases.CASES[case].make()
    with jax.numpy_dtype_promotion("standard"):
        params, state = placed(host_params(), mesh), tx.init(host_params())
        shardings = lionax.state_sharding(tx, params)
        eager, jitted = tx.init(params), jax.jit(tx.init, out_shardings=shardings)(params)
        shapes = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding), params))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for tree in (eager, jitted):
        cases.assert_equal(jax.device_get(tree), jax.device_get(state))
        assert_laid_out(tree, shardings)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), shapes) == jax.tree.map(
        lambda x, sharding: (x.shape, x.dtype, sharding), state, shardings)


def test_slots_follow_their_parameters_and_scales_whole_blocks():
    mesh = mesh_of()
    specs = {"kernel": P("data", "model"), "narrow": P(None, ("data", "model"))}
    params = {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32),
              "narrow": jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)}
    tx = lionax.chain(lionax.lion(0.1, mu_dtype="int8"), lionax.params_ema(0.9))
    state = lionax.state_sharding(tx, params, specs=specs, mesh=mesh)
    mu, average = state.rules[0].mu, state.rules[-1].params_ema
    assert mu["kernel"].codes.spec == mu["kernel"].scales.spec == specs["kernel"]
    assert mu["narrow"].codes.spec == specs["narrow"]
    assert mu["narrow"].scales.spec == P()  # 2 blocks on 8 devices
    assert {name: x.spec for name, x in average.items()} == specs
    assert state.count.spec == state.hyperparameters.values["learning_rate"].spec == P()


@pytest.mark.parametrize("how", cases.but_for_fast([None, "int8", "int4"], "int8"))
@pytest.mark.parametrize("spec", [(None, None), ("data", None), (None, "model"), ("data", "model"),
                                  (None, ("data", "model"))], ids=str)
@kinds
def test_a_step_compiles_once(kind, spec, how):
    """An explicit mesh has an entry for each axis; elsewhere XLA drops those behind the last."""
    mesh, tx, step = mesh_of(kind), lionax.lion(0.1, mu_dtype=how), None
    with jax.set_mesh(mesh):
        params = jax.jit(jnp.copy)(jax.device_put(
            cases.normal(16, 256), NamedSharding(mesh, P(*spec))))
        for init in (tx.init, jax.jit(tx.init, out_shardings=lionax.state_sharding(tx, params))):
            carry, step = (params, init(params)), jax.jit(tx.step)
            for _ in range(3):
                carry = step(*carry, params)
            assert step._cache_size() == 1


@pytest.mark.slow
def test_codes_on_a_mesh_of_which_shard_map_has_one_axis():
    tx, mesh = lionax.lion(0.1, mu_dtype="int8"), mesh_of(AxisType.Explicit)

    def run(param):
        return jax.lax.scan(lambda carry, _: (tx.step(*carry, param), None),
                            (param, tx.init(param)), None, length=2)[0][0]

    with jax.set_mesh(mesh):
        param = jax.device_put(cases.normal(64, 256), NamedSharding(mesh, P("data", "model")))
        found = jax.jit(jax.shard_map(run, mesh=mesh, axis_names={"data"}, in_specs=P("data"),
                                      out_specs=P("data")))(param)
    cases.assert_close(jax.device_get(found), jax.device_get(run(cases.normal(64, 256))))


def test_a_majority_vote_needs_all_axes_that_types_split_over():
    mesh, tx = mesh_of(AxisType.Explicit), lionax.majority_vote_lion(0.1, axis_name="data")
    step = jax.jit(jax.shard_map(
        lambda p, g: tx.step({"w": p}, tx.init({"w": p}), {"w": g[0]})[0], mesh=mesh,
        axis_names={"data"}, in_specs=(P(), P("data")), out_specs=P()))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'w' is split over axes of the mesh"):
        step(jax.reshard(jnp.ones((8, 8)), P(None, "model")),
             jax.reshard(jnp.ones((4, 8, 8)), P("data", None, "model")))


@pytest.mark.parametrize("wrap", cases.but_for_fast([
    lambda tx: optax.masked(tx, True), lambda tx: optax.partition({"all": tx}, "all"),
    lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    lambda tx: optax.apply_if_finite(tx, 2), lambda tx: optax.named_chain(("one", tx))]))
def test_slots_inside_of_optaxs_wrappers_follow_their_parameters(wrap):
    tx, params = lionax.chain(wrap(optax.trace(0.9))), placed(host_params(), mesh_of())
    assert_laid_out(tx.init(params), lionax.state_sharding(tx, params))


def test_a_key_in_a_state_of_optaxs_is_laid_out_and_traced():
    tx = lionax.chain(optax.add_noise(0.1, 0.55, key=jax.random.key(0)), lionax.sgd(0.1))
    params = placed(host_params(), mesh_of())
    state = tx.init(params)
    assert_laid_out(state, lionax.state_sharding(tx, params))
    jitted = jax.jit(tx.init, out_shardings=shardings_of(state))(params)
    keys = [jax.random.key_data(each.rules[0].rng_key) for each in (state, jitted)]
    cases.assert_equal(*map(jax.device_get, keys))


def test_scalars_stay_on_the_device():
    tx = lionax.dynamic_loss_scale(lionax.accumulate(lionax.sgd(0.1, momentum=0.9), 2))
    params = placed(host_params(), mesh_of())
    shardings = lionax.state_sharding(tx, params, memory_kind="pinned_host")
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state) if not x.ndim} == {"device"}
    jax.jit(tx.step)(params, state, params)


def test_the_real_slot_of_a_complex_parameter_lies_beside_it():
    param = jax.device_put(jnp.ones((8, 8), jnp.complex64), NamedSharding(
        mesh_of(), P("data", "model")))
    state = lionax.scale_by_adam().init(param)
    assert state.rules.nu.dtype == jnp.float32
    assert_laid_out(state, lionax.state_sharding(lionax.scale_by_adam(), param))


def test_scales_of_two_moments_are_split_where_blocks_of_both_are_whole():
    tx, param = lionax.adamw(0.1, mu_dtype="int8", nu_dtype="int4"), jax.device_put(
        cases.normal(16, 256), NamedSharding(mesh_of(), P()))
    held = lionax.state_sharding(tx, param, zero_axis="data").rules[0]
    assert {x.spec for x in jax.tree.leaves(held)} == {P("data")}


def test_shapes_without_shardings_stay_so():
    state = lionax.lion(0.1).init({"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)})
    assert state.rules[0].mu["w"].dtype == jnp.bfloat16
    assert state.count.sharding is None


def test_parameters_on_one_device_or_of_the_host_have_a_state_there():
    tx, (first, second, *_) = lionax.lion(0.1), jax.devices()
    on_second = jax.device_put(jnp.ones(4), second)
    assert tx.init(on_second).rules[0].mu.devices() == {second}
    assert lionax.state_sharding(tx, on_second).count.device_set == {second}
    assert not tx.init(jnp.ones(4)).count.committed
    both = {"a": jax.device_put(jnp.ones(4), first), "b": on_second}
    assert not tx.init(both).count.committed
    with pytest.raises(ValueError, match="lie on several meshes or devices"):
        lionax.state_sharding(tx, both)


ZERO = {
    "lion": lambda: lionax.lion(0.01),
    "lion_masked": lambda: lionax.lion(0.01, weight_decay=0.1, mask=lionax.not_matching("bias")),
    "lamb_int8": lambda: lionax.lamb(0.01, mu_dtype="int8", nu_dtype="int8"),
    "lion_int4": lambda: lionax.lion(0.01, mu_dtype="int4"),
    "accumulate": lambda: lionax.accumulate(lionax.chain(
        lionax.clip_by_global_norm(1.0), lionax.lion(0.1, mu_dtype="int8"),
        lionax.params_ema(0.9)), 2),
    "skip_nonfinite": lambda: lionax.skip_nonfinite(lionax.lamb(0.1), 3),
    "monitor": lambda: lionax.monitor(lionax.lamb(0.1)),
    "master_weights": lambda: lionax.master_weights(lionax.adamw(0.01), "bfloat16"),
}
EXPLICIT = ("lion_int4", "lamb_int8", "accumulate", "skip_nonfinite", "master_weights")
HOST = ("lion", "lamb_int8", "accumulate", "master_weights")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "memory_kind", "kind"), cases.but_for_fast(
    [(name, memory_kind, kind) for kind, memory_kind, names in (
        (AxisType.Auto, None, ZERO), (AxisType.Explicit, None, EXPLICIT),
        (AxisType.Auto, "pinned_host", HOST), (AxisType.Explicit, "pinned_host", ["lion"]))
     for name in names],
    ("lion", None, AxisType.Auto), ("lion", "pinned_host", AxisType.Explicit)))
def test_zero_splits_the_state_and_changes_no_number(name, memory_kind, kind):
    mesh, tx = mesh_of(kind), ZERO[name]()
    dtype = jnp.bfloat16 if name == "master_weights" else jnp.float32
    whole = jax.tree.map(lambda x: x.astype(dtype), host_params())
    with jax.set_mesh(mesh):
        params = placed(whole, mesh)
        layout = shardings_of(params), lionax.state_sharding(
            tx, params, zero_axis="data", memory_kind=memory_kind)
        carry = params, jax.jit(tx.init, out_shardings=layout[1])(params)
        step = jax.jit(tx.step, donate_argnums=(0, 1), out_shardings=layout)
        expected, step_whole = (whole, tx.init(whole)), jax.jit(tx.step)
        for t in range(20):
            grads = cases.gradients(whole, t)
            carry = step(*carry, placed(grads, mesh))
            expected = step_whole(*expected, grads)
    assert step._cache_size() == 1
    assert_laid_out(carry, layout)
    cases.assert_close(jax.device_get(carry[0]), jax.device_get(expected[0]), rtol=1e-6)
    for x in jax.tree.leaves(carry[1]):
        parts = 4 if x.size > 6 and x.size % 4 == 0 and x.ndim else 1
        shard = x.addressable_shards[0].data
        assert parts == 1 or shard.size <= x.size // parts or x.dtype == jnp.bfloat16


def compiled(tx, zero_axis, params, options=None):
    layout = shardings_of(params), lionax.state_sharding(tx, params, zero_axis=zero_axis)
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), state, layout[1])
    return jax.jit(tx.step, donate_argnums=(0, 1), out_shardings=layout,
                   compiler_options=options).lower(params, state, params).compile()


def collectives(program):
    """The names of the collectives that are in no branch, and how often each is there."""
    entry = program.as_text().split("\nENTRY")[1]
    return collections.Counter(re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        entry))


def test_bytes_of_state_on_a_device_fall_by_the_size_of_the_axis():
    mesh = mesh_of()
    params = {name: jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
              for name in "abc"}
    own = {axis: compiled(lionax.lion(0.1), axis, params).memory_analysis().argument_size_in_bytes
           for axis in (None, "data")}
    slots = 3 * 64 * 256 * 4
    assert own[None] - own["data"] == slots - slots // 4


@pytest.mark.slow
def test_collectives_of_a_step():
    mesh = mesh_of()
    params = {str(i): jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(
        mesh, P(("data", "model")))) for i in range(12)}
    clipped = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(0.1))
    for tx, expected in ((lionax.lion(0.1), {}), (lionax.lamb(0.1), {"all-reduce": 1}),
                         (clipped, {"all-reduce": 2})):
        assert collectives(compiled(tx, None, params)) == expected, tx
        specs, layout = (jax.tree.map(lambda x: x.spec, tree) for tree in (
            shardings_of(params), lionax.state_sharding(tx, params)))
        in_shards = jax.shard_map(tx.step, mesh=mesh, in_specs=(specs, layout, specs),
                                  out_specs=(specs, layout))
        program = jax.jit(in_shards).lower(params, tx.init(params), params).compile()
        assert collectives(program) == expected, tx
    replicated = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P())), params)
    found = collectives(compiled(lionax.lion(0.1), "data", replicated))
    assert found["all-reduce"] == 0
    assert 1 <= found["all-gather"] <= 12


def test_fsdp_keeps_nothing_of_a_leafs_size():
    mesh = mesh_of()
    params = {str(i): jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=NamedSharding(
        mesh, P(("data", "model")))) for i in range(6)}
    program = compiled(lionax.lion(0.1), None, params, lionax.compiler_options())
    local = 6 * 256 * 512 * 4 // 8
    assert program.memory_analysis().temp_size_in_bytes <= 0.1 * local


def test_reductions_of_a_window():
    """`accumulate` adds up without a collective; the norm of the clip is in the branch."""
    mesh = mesh_of()
    params = {str(i): jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(
        mesh, P(("data", "model")))) for i in range(3)}
    tx = lionax.accumulate(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)), 4)
    assert collectives(compiled(tx, None, params)) == {}


@pytest.mark.parametrize(("arguments", "error"), [
    ({"zero_axis": "batch"}, r"zero_axis='batch' is not an axis of the mesh, which has \('data'"),
    ({"memory_kind": "disk"}, "memory_kind='disk' is not known to cpu devices, which have device"),
    ({"specs": {"w": P()}}, "give specs= and mesh= together"),
    ({"mesh": mesh_of()}, "give specs= and mesh= together")])
def test_what_cannot_be_laid_out_is_refused(arguments, error):
    params = {"w": jax.device_put(cases.normal(8, 8), NamedSharding(mesh_of(), P()))}
    with pytest.raises(ValueError, match=error):
        lionax.state_sharding(lionax.lion(0.1), params, **arguments)


@pytest.mark.parametrize("spec", [P("data"), P(None, ("model", "data"))])
def test_a_zero_axis_that_splits_nothing_is_refused(spec):
    params = {"w": jax.device_put(cases.normal(8, 8), NamedSharding(mesh_of(), spec)),
              "odd": jax.device_put(cases.normal(3), NamedSharding(mesh_of(), P()))}
    with pytest.raises(ValueError, match="zero_axis='data' splits no parameter"):
        lionax.state_sharding(lionax.lion(0.1), params, zero_axis="data")


def test_a_summary_says_what_is_left_whole():
    params = placed(host_params(), mesh_of())
    found = lionax.summary(lionax.lion(0.1), params, zero_axis="data")
    assert {leaf.path: leaf.whole for leaf in found.leaves if leaf.whole} == {
        "bias": "no axis of a shard (6,) is a multiple of 4",
        "gain": "no axis of a shard () is a multiple of 4"}
    assert "left whole: bias, no axis of a shard (6,) is a multiple of 4" in str(found)
    (leaf,) = lionax.summary(lionax.lion(0.1), params["embed"], zero_axis="batch").leaves
    assert leaf.whole == "on a mesh without the axis 'batch'"


def test_what_is_no_transformation_and_has_no_sharding_is_refused():
    with pytest.raises(TypeError, match=r"lionax.chain\(...\)"):
        lionax.state_sharding(optax.lion(0.1), {})
    with pytest.raises(ValueError, match="'w' has no sharding"):
        lionax.state_sharding(lionax.lion(0.1), {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ValueError, match="there are no parameters"):
        lionax.state_sharding(lionax.lion(0.1), {})


@pytest.mark.parametrize(("kind", "memory_kind"), [(AxisType.Explicit, None),
                                                   (AxisType.Auto, "pinned_host")])
def test_optaxs_own_arithmetic_is_refused_where_it_cannot_run(kind, memory_kind):
    params = placed(host_params(), mesh_of(kind))
    with pytest.raises(ValueError, match="which is Optax's"):
        lionax.state_sharding(lionax.chain(optax.adam(0.1)), params, zero_axis="data",
                              memory_kind=memory_kind)


@pytest.mark.slow
@kinds
def test_outside_of_jit_zero_works_too(kind):
    with jax.set_mesh(mesh_of(kind)):
        tx, params = lionax.lion(0.1), placed(host_params(), mesh_of(kind))
        state = jax.jit(tx.init, out_shardings=lionax.state_sharding(
            tx, params, zero_axis="data"))(params)
        found = tx.step(params, state, params)[0]
    expected = tx.step(host_params(), tx.init(host_params()), host_params())[0]
    cases.assert_close(jax.device_get(found), jax.device_get(expected))


def test_with_the_shardings_of_the_state_alone_a_step_compiles_twice():
    """Why `state_sharding` says to give those of the parameters to `jit`, too."""
    mesh, tx = mesh_of(), lionax.lion(0.1)
    params = placed(host_params(), mesh)
    shardings = lionax.state_sharding(tx, params, zero_axis="data")
    step = jax.jit(tx.step, out_shardings=(None, shardings))
    carry = params, jax.jit(tx.init, out_shardings=shardings)(params)
    for _ in range(2):
        carry = step(*carry, params)
    assert step._cache_size() == 2
    assert carry[0]["embed"].sharding != params["embed"].sharding

