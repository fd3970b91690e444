"""Arrays of codes: what they hold, and states that are made of them."""

import functools
import pickle

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lionax
from benchmarks import trees
from lionax.core.quantized import Format, QuantizedArray, encode, format_of, is_quantized
from lionax.core.rounding import random_bits
from lionax.frameworks.nnx import Optimizer

P = PartitionSpec
FORMATS = {f"{'nonnegative' * nonnegative or 'signed'}-{bits}-{block}":
           Format(bits, block, nonnegative)
           for bits, block in ((8, 128), (8, 64), (4, 32)) for nonnegative in (False, True)}
KEY = np.uint32(3)
FORMS = pytest.mark.parametrize("form", [
    pytest.param(form, id=name, marks=[pytest.mark.slow] * (
        name not in ("signed-8-128", "nonnegative-4-32"))) for name, form in FORMATS.items()])
STORED = ("bfloat16", "int8", "int4")
MAKERS = {
    "lion": lambda how: lionax.lion(0.01, weight_decay=0.0, mu_dtype=how),
    "adamw": lambda how: lionax.adamw(0.01, weight_decay=0.0, mu_dtype=how, nu_dtype=how),
    "lamb": lambda how: lionax.lamb(0.01, mu_dtype=how, nu_dtype=how),
    "sgd": lambda how: lionax.sgd(0.01, 0.9, accumulator_dtype=how),
}


@functools.partial(jax.jit, static_argnums=(1, 2))
def coded(values, form, stochastic=True, key=KEY):
    return encode(values, form, random_bits(key, values) if stochastic else None)


def numbers_of(form):
    """The numbers between 0 and 1 that codes stand for, in order."""
    codes = np.arange(form.levels + 1) / form.levels
    return codes**(4 if form.nonnegative else 2)


def drawn(form, magnitude, seed, lead):
    """Values of many magnitudes in a block, with zeros, and one block of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*lead, 2 * form.block)) * 10.0**rng.uniform(-4, 0, (*lead, 1))
    values[..., ::7] = 0
    values.reshape(-1, form.block)[0] = 0
    values /= max(np.abs(values).max(), 1e-30)
    values = np.abs(values) if form.nonnegative else values
    values = (values * magnitude).astype(np.float32)
    # XLA takes subnormal numbers for 0
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values).astype(np.float32)


@FORMS
@pytest.mark.parametrize("stochastic", [pytest.param(False, marks=pytest.mark.slow), True])
@given(magnitude=st.sampled_from([1e-37, 1e-30, 1e-20, 1e-3, 1.0, 7e4, 1e20, 3e37, 3e38]),
       seed=st.integers(0, 99), lead=st.sampled_from([(), (5, 3)]))
def test_an_error_is_at_most_the_gap_between_two_codes(form, stochastic, magnitude, seed, lead):
    values = drawn(form, magnitude, seed, (*lead, 1))[..., 0, :]
    got = coded(values, form, stochastic)
    decoded = np.asarray(got.decode(), np.float64).reshape(-1, form.block)
    exact = np.asarray(values, np.float64).reshape(-1, form.block)
    scales = np.asarray(got.scales, np.float64).reshape(-1, 1)
    numbers = numbers_of(form)
    share = np.abs(exact) / np.where(scales == 0, 1, scales)
    place = np.clip(np.searchsorted(numbers, share, "right"), 1, form.levels)
    gap = (numbers[place] - numbers[place - 1]) * scales
    if form.nonnegative:  # no positive number becomes 0
        gap = np.maximum(gap, np.where(place == 1, numbers[1] * scales, 0) * (
            1 if stochastic else 2))
    slack = 4e-6 * np.maximum(np.abs(exact), gap) + 1.2e-38
    assert (np.abs(decoded - exact) <= gap * (1 if stochastic else 0.5) + slack).all()
    assert (decoded[exact == 0] == 0).all()
    assert (decoded * exact >= 0).all()
    largest = np.abs(exact).max(axis=1)
    assert ((largest <= scales[:, 0]) | (largest > 3.38e38)).all()
    assert (scales[:, 0] <= largest * (1 + 2.0**-7)).all()


@FORMS
def test_invariants(form):
    values = jnp.asarray(drawn(form, 1.0, 0, (3, 5)))
    got = coded(values, form)
    per_byte = 8 // form.bits
    assert got.codes.shape == (3, 5, 2 * form.block // per_byte)
    assert got.codes.dtype == (jnp.int8 if form.bits == 8 and not form.nonnegative else jnp.uint8)
    assert (got.scales.shape, got.scales.dtype) == ((3, 5, 2), jnp.bfloat16)
    assert (got.shape, got.ndim, got.size) == (values.shape, 3, values.size)
    assert got.nbytes == values.size // per_byte + 2 * got.scales.size
    assert got.dtype.name == f"int{form.bits}"
    assert got.decode(jnp.bfloat16).dtype == jnp.bfloat16
    assert len(jax.tree.leaves(got)) == 2
    assert jax.tree.map(lambda leaf: leaf, got).format == form


@pytest.mark.parametrize("nonnegative", cases.but_for_fast([False, True], False))
def test_two_codes_of_4_bits_are_a_byte_of_two_neighbours(nonnegative):
    form = Format(4, 32, nonnegative)
    codes = np.arange(32) % (form.levels + 1)
    codes[-1] = form.levels
    codes = codes if nonnegative else codes * np.where(np.arange(32) % 2, 1, -1)
    values = np.sign(codes) * (np.abs(codes) / form.levels)**(4 if nonnegative else 2)
    got = encode(jnp.asarray(values, jnp.float32), form, None)
    assert got.codes.tolist() == ((codes[::2] & 15) | ((codes[1::2] & 15) << 4)).tolist()


@FORMS
def test_a_positive_number_that_may_not_be_negative_has_a_code(form):
    tiny = 1e-30 if form.nonnegative else 1e-7
    values = jnp.full((64, form.block), tiny).at[:, 0].set(1.0)
    smallest = float(coded(values, form).decode()[:, 1:].min())
    nearest = float(coded(values, form, False).decode()[:, 1:].min())
    assert (smallest > 0, nearest > 0) == (form.nonnegative,) * 2


@FORMS
def test_the_mean_over_keys_is_the_value(form):
    values = jnp.asarray(drawn(form, 1.0, 1, (4,)))
    keys = jnp.arange(2000, dtype=jnp.uint32)
    decoded = jax.jit(jax.vmap(lambda key: coded(values, form, True, key).decode()))(keys)
    mean, exact = np.asarray(decoded, np.float64).mean(0), np.asarray(values, np.float64)
    scales = np.repeat(np.asarray(coded(values, form).scales, np.float64), form.block, axis=-1)
    numbers = numbers_of(form)
    share = np.abs(exact) / np.where(scales == 0, 1, scales)
    place = np.clip(np.searchsorted(numbers, share, "right"), 1, form.levels)
    gap = (numbers[place] - numbers[place - 1]) * scales
    of_mean = (share >= numbers[1]) | (not form.nonnegative)
    assert (np.abs(mean - exact) <= 6 * 0.5 * gap / np.sqrt(2000) + 1e-6)[of_mean].all()


@FORMS
@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_bad_element_spoils_its_block_only(form, bad):
    values = drawn(form, 1.0, 2, (2, 3))
    good = np.asarray(coded(values, form).decode())
    values[1, 2, form.block + 3] = bad
    decoded = np.array(coded(values, form).decode())
    assert np.isnan(decoded[1, 2, form.block:]).all()
    decoded[1, 2, form.block:] = good[1, 2, form.block:]
    np.testing.assert_array_equal(decoded, good)


@pytest.mark.parametrize("bits", [8, 4])
def test_small_leaves_and_unfit_last_axes_stay_as_they_are(bits):
    unfit = [(), (4095,), (63, 64), (4096, 1), (200, 100), (1000, 33), (0, 128)]
    assert [format_of(bits, shape, False) for shape in unfit] == [None] * 7
    blocks = {shape: format_of(bits, shape, True) for shape in ((4096,), (64, 192), (2, 64, 64))}
    assert [form.block for form in blocks.values()] == ([128, 64, 64] if bits == 8 else [32] * 3)
    params = [jnp.zeros(shape) for shape in (*unfit, (64, 64))]
    slots = jax.tree.leaves(lionax.lion(0.1, mu_dtype=f"int{bits}").init(params).rules[0].mu,
                            is_leaf=is_quantized)
    assert [slot.dtype.name for slot in slots] == ["float32"] * 7 + [f"int{bits}"]


@pytest.mark.parametrize(("name", "how", "most"), [
    ("lion", "int8", 1.05), ("lion", "int4", 0.6), ("lamb", "int8", 2.11), ("adamw", "int8", 2.11),
    ("sgd", "int8", 1.05)])
def test_bytes_of_the_state_of_a_transformer(name, how, most):
    shapes = trees.arrays(trees.gpt2())
    state = jax.eval_shape(MAKERS[name](how).init, shapes)
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert found / trees.elements(trees.gpt2()) <= most
    summary = lionax.summary(MAKERS[name](how), shapes)
    assert summary.state_bytes == found
    assert sum(leaf.state_bytes for leaf in summary.leaves) < found
    assert found - sum(leaf.state_bytes for leaf in summary.leaves) < 100


def params_of():
    return {"w": cases.normal(64, 128), "b": jnp.zeros(128)}


def steps(tx, params, state, count=3, **options):
    step = jax.jit(tx.step, **options)
    for t in range(count):
        params, state = step(params, state, cases.gradients(params_of(), t))
    return params, state


@functools.cache
def after(name, how):
    tx, params = MAKERS[name](how), params_of()
    return tx, *steps(tx, params, tx.init(params))


@pytest.mark.parametrize("how", cases.but_for_fast(STORED, "int8"))
@pytest.mark.parametrize("name", cases.but_for_slow(MAKERS, ["lamb", "sgd"]))
def test_an_element_without_gradients_does_not_move(name, how):
    params = {"w": cases.normal(64, 128)}
    grads = {"w": cases.normal(64, 128, seed=1).at[:, ::3].set(0.0)}
    tx = MAKERS[name](how)
    state, new = tx.init(params), params
    step = jax.jit(tx.step)
    for _ in range(5):
        new, state = step(new, state, grads)
    moved = np.asarray(new["w"] != params["w"])
    assert not moved[:, ::3].any()
    assert moved[:, 1::3].mean() > 0.99


WRAPPED = {
    "masked": lambda tx: lionax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: lionax.partition({"a": tx, "b": lionax.sgd(0.1)}, {"w": "a", "b": "b"}),
    "accumulate": lambda tx: lionax.accumulate(tx, 2),
    "skip_nonfinite": lambda tx: lionax.skip_nonfinite(tx, 3),
    "monitor": lionax.monitor,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", cases.but_for_fast(STORED, "int8"))
@pytest.mark.parametrize("wrapper", cases.but_for_fast(WRAPPED, "partition"))
def test_states_go_through_wrappers_jit_with_donation_and_scan(wrapper, how):
    tx, params = WRAPPED[wrapper](MAKERS["lion"](how)), params_of()
    alone = steps(tx, params, tx.init(params))
    donated = jax.tree.map(jnp.copy, (params, tx.init(params)))
    cases.assert_equal(steps(tx, *donated, donate_argnums=(0, 1)), alone)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(
        cases.gradients(params, t) for t in range(3)))
    scanned, _ = jax.lax.scan(lambda carry, g: (tx.step(*carry, g), None),
                              (params, tx.init(params)), grads)
    cases.assert_equal(codes_of(scanned[1]), codes_of(alone[1]))
    assert lionax.from_config(lionax.to_config(tx)) == tx


def codes_of(state):
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(leaf)]


@pytest.mark.parametrize("how", cases.but_for_fast(STORED, "int8"))
def test_states_are_pickled_saved_found_and_described(how, tmp_path):
    tx, params, state = after("adamw", how)
    cases.assert_equal(pickle.loads(pickle.dumps(state)), state)
    nu = optax.tree.get(state, "nu")["w"]
    assert isinstance(nu, QuantizedArray) == (how != "bfloat16")
    cases.assert_equal(jax.tree.map(lambda leaf: leaf + 0, state), state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, state)
        cases.assert_equal(checkpointer.restore(tmp_path / "state", like), state)
    assert lionax.from_config(lionax.to_config(tx)) == tx
    assert how in repr(state)
    assert how in str(lionax.summary(tx, params))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert lionax.plan(tx, params).state_bytes == lionax.summary(tx, params).state_bytes == held


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_goes_on_with_its_state_cast(name):
    _, params, state = after(name, None)
    for how in ("bfloat16", "int8", "int4", None, "int4", "int8", "bfloat16", None):
        tx = MAKERS[name](how)
        cast = lionax.cast_state(state, tx.init(params), strict=True)
        cases.assert_equal(lionax.cast_state(cast, tx.init(params), strict=True), cast)
        assert jax.tree.structure(cast) == jax.tree.structure(tx.init(params))
        count = int(state.count)
        params, state = steps(tx, params, cast, 1)
        assert int(state.count) == count + 1
    assert jnp.isfinite(params["w"]).all()


@pytest.mark.parametrize("how", cases.but_for_fast(STORED, "int8"))
def test_moments_go_to_optax_and_back(how):
    tx, params, state = after("lamb", how)
    into = optax.lamb(0.01).init(params)
    taken = lionax.compat.to_optax(state, into)
    mu, nu = (optax.tree.get(taken, field)["w"] for field in ("mu", "nu"))
    own = state.rules[0]
    for moment, slot in ((mu, own.mu["w"]), (nu, own.nu["w"])):
        expected = slot.decode() if is_quantized(slot) else slot.astype(jnp.float32)
        np.testing.assert_array_equal(moment, expected)
    back = lionax.compat.from_optax(taken, tx.init(params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert [leaf.aval for leaf in jax.tree.leaves(back)] == [
        leaf.aval for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
@pytest.mark.parametrize("how", STORED)
def test_a_step_is_exported(how):
    tx, params, state = after("adamw", how)
    leaves, treedef = jax.tree.flatten((params, state, cases.gradients(params, 0)))
    step = jax.jit(lambda *leaves: jax.tree.leaves(tx.step(*treedef.unflatten(leaves))))
    saved = jax.export.export(step)(*leaves).serialize()
    cases.assert_equal(jax.export.deserialize(saved).call(*leaves), step(*leaves))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("how", cases.but_for_fast(["int8", "int4"], "int4"))
def test_an_nnx_optimizer_holds_and_casts_codes(how):
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, MAKERS["adamw"](how), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    train(model, optimizer)
    state = nnx.as_pure(optimizer.opt_state)
    assert is_quantized(state.rules[0].mu["kernel"])
    assert how in repr(optimizer.opt_state)
    wide = Optimizer(model, MAKERS["adamw"](None), wrt=nnx.Param)
    wide.opt_state = lionax.cast_state(optimizer.opt_state, wide.opt_state)
    np.testing.assert_array_equal(nnx.as_pure(wide.opt_state).rules[0].mu["kernel"],
                                  state.rules[0].mu["kernel"].decode())
    train(model, wide)


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)


AXIS_TYPES = pytest.mark.parametrize("axis_type", cases.but_for_fast(
    [AxisType.Auto, AxisType.Explicit], AxisType.Explicit))


@pytest.mark.usefixtures("standard_promotion")
@AXIS_TYPES
@pytest.mark.slow
@pytest.mark.parametrize("names", [(None, "y"), ("y", None)])
def test_an_nnx_optimizer_on_a_mesh_splits_no_block(names, axis_type):
    with jax.set_mesh(mesh_of(axis_type)):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        model = nnx.Linear(64, 128, kernel_init=kernel, rngs=nnx.Rngs(0))
        optimizer = Optimizer(model, MAKERS["lion"]("int8"), wrt=nnx.Param)
        optimizer.update(model, nnx.state(model, nnx.Param))
        assert model.kernel[...].sharding.spec == P(*names)
        mu = nnx.as_pure(optimizer.opt_state).rules[0].mu["kernel"]
        assert mu.codes.sharding.is_equivalent_to(model.kernel[...].sharding, 2)
        assert mu.scales.sharding.shard_shape(mu.scales.shape)[1] == 1


@pytest.mark.slow
@AXIS_TYPES
@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize(("spec", "of_scales"), [
    (P("x", "y"), True), (P(("x", "y"), None), True), (P(None, ("x", "y")), False)])
def test_codes_and_scales_keep_the_sharding_where_whole_blocks_allow_it(
        spec, of_scales, how, axis_type):
    """512 elements are 4 blocks of int8, which 8 shards split, and 16 blocks of int4."""
    tx, param, grads = MAKERS["adamw"](how), cases.normal(16, 512), cases.normal(16, 512, seed=1)
    step = jax.jit(tx.step)
    expected = step(*step(param, tx.init(param), grads), grads)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = jax.device_put((param, grads), NamedSharding(mesh, spec))
        state = tx.init(placed[0])
        new = step(*step(placed[0], state, placed[1]), placed[1])
        is_whole = how == "int4" or of_scales
        for held in (state, new[1]) if is_whole or axis_type is AxisType.Explicit else (state,):
            for slot in held.rules[0]:
                assert slot.codes.sharding.is_equivalent_to(placed[0].sharding, 2)
                scales = spec if is_whole else P(None, None)
                assert slot.scales.sharding.is_equivalent_to(NamedSharding(mesh, scales), 2)
    cases.assert_equal(jax.device_get(codes_of(new[1])), jax.device_get(codes_of(expected[1])))
    cases.assert_close(jax.device_get(new[0]), jax.device_get(expected[0]))


@pytest.mark.parametrize("spec", cases.but_for_fast([P(), P("x"), P("x", "y")], P("x")))
def test_codes_inside_of_shard_map_are_those_of_each_shard(spec):
    tx = MAKERS["lion"]("int8")

    def run(param, grads):
        carry = param, tx.init(param)
        (param, state), _ = jax.lax.scan(lambda carry, _: (tx.step(*carry, grads), None), carry,
                                         None, length=3)
        assert is_quantized(state.rules[0].mu)
        return param, state.rules[0].mu

    arrays = cases.normal(256, 512), cases.normal(256, 512, seed=1)
    run = jax.jit(jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=(spec, spec),
                                out_specs=(spec, spec)))
    param, mu = run(*arrays)
    assert mu.codes.shape == param.shape
    assert mu.scales.shape == (256, 4)


@pytest.mark.slow
def test_members_of_a_vmap_share_their_codes():
    tx, params = MAKERS["lion"]("int4"), jnp.stack([cases.normal(64, 128)] * 3)
    state = jax.vmap(tx.init)(params)
    for _ in range(2):
        params, state = jax.jit(jax.vmap(tx.step))(params, state, params)
    (mu,) = codes_of(state)
    assert mu.codes.shape == (3, 64, 64)
    np.testing.assert_array_equal(mu.codes, jnp.broadcast_to(mu.codes[:1], mu.codes.shape))
