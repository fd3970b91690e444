"""`master_weights`, and storage chosen by path."""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lionax

REMAINDERS = [None, "int8", "bfloat16", "float32"]
HALVES = [jnp.bfloat16, jnp.float16]
BYTES = {None: 0, "int8": 1, "bfloat16": 2, "float32": 4}


def run(tx, params, grads, steps, state=None):
    """The parameters and the state after so many steps in one scan."""
    def body(carry, _):
        return tx.step(*carry, grads), None
    carry = (params, tx.init(params) if state is None else state)
    return jax.jit(lambda carry: jax.lax.scan(body, carry, None, steps)[0])(carry)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", cases.but_for_slow(HALVES, [jnp.float16]))
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("wrap", [
    lambda tx: tx, pytest.param(lambda tx: lionax.accumulate(tx, 1), marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.skip_nonfinite(tx, 3), marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.chain(lionax.clip(1.0), tx), marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.masked(tx, True), marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.monitor(tx, every=3), marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.partition(
        {"a": tx, "b": lionax.sgd(1.0)}, {"w": "a", "x": "b"}), marks=pytest.mark.slow)])
def test_a_thousand_steps_of_a_hundredth_of_an_ulp(wrap, remainder, dtype):
    small = float(jnp.finfo(dtype).eps) / 100
    params = {"w": jnp.ones(2048, dtype), "x": jnp.ones((), jnp.float32)}
    grads = {"w": jnp.full(2048, -small, jnp.float32), "x": jnp.float32(-small)}
    tx = wrap(lionax.master_weights(lionax.sgd(1.0), remainder))
    new, _ = run(tx, params, grads, 1000)
    assert new["w"].dtype == dtype
    moved = float(new["w"].astype(jnp.float32).mean()) - 1
    assert moved == pytest.approx(1000 * small, rel=0.05)
    assert float(new["x"]) - 1 == pytest.approx(1000 * small, rel=0.05)
    lost, _ = run(wrap(lionax.sgd(1.0)), params, grads, 1000)
    np.testing.assert_array_equal(lost["w"], params["w"])


@pytest.mark.slow
@pytest.mark.promise("Low precision", "The error of bfloat16 parameters after 10,000 steps is "
                     "below the bound of what `master_weights` keeps")
@pytest.mark.parametrize(("remainder", "error"), [
    (None, 0.03), ("int8", 0.0024), ("bfloat16", 0.0021), ("float32", 0.00205)])
def test_the_error_after_ten_thousand_steps(remainder, error, figure):
    """Against float32; the parameter itself, rounded to bfloat16, is 0.0019 off."""
    params = cases.normal(4096, dtype=jnp.bfloat16)

    def after(tx, params):
        def one(t, carry):
            noise = jax.random.normal(jax.random.key(t), params.shape)
            return tx.step(*carry, 1e-5 * (1 + noise))
        return jax.lax.fori_loop(0, 10_000, one, (params, tx.init(params)))[0]

    exact = after(lionax.sgd(1.0), params.astype(jnp.float32))
    found = after(lionax.master_weights(lionax.sgd(1.0), remainder), params).astype(jnp.float32)
    actual = float(jnp.sqrt(jnp.mean((found - exact)**2)))
    figure(f"largest error with {remainder}", actual)
    assert actual < error


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_the_state_takes_what_the_table_says(remainder):
    params = {"w": jnp.ones((64, 128), jnp.bfloat16), "x": jnp.ones(64, jnp.float32)}
    plain, mine = lionax.lion(0.1), lionax.master_weights(lionax.lion(0.1), remainder)
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params))) for tx in (plain, mine)]
    assert held[1] - held[0] == 8 + BYTES[remainder] * params["w"].size


@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS, None))
def test_float32_parameters_are_stepped_as_without_it(remainder):
    params, grads = {"w": cases.normal(5, 3)}, {"w": cases.normal(5, 3, seed=1)}
    tx, plain = lionax.master_weights(lionax.lamb(0.1), remainder), lionax.lamb(0.1)
    cases.assert_close(run(tx, params, grads, 3)[0], run(plain, params, grads, 3)[0])


@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS, None, "int8"))
@pytest.mark.parametrize("make", cases.but_for_slow(
    [lionax.lion, lionax.lamb, lionax.adamw], [lionax.lamb, lionax.adamw]))
def test_a_run_stays_near_its_float32_twin(make, remainder):
    """The error of a remainder stays below an ulp; that of stochastic rounding grows as a walk."""
    start, steps = cases.normal(64, 64), 300
    grads = [cases.normal(64, 64, seed=seed) for seed in range(4)]

    def trained(params, tx):
        def body(carry, t):
            grad = jnp.stack(grads)[t % 4].astype(params.dtype)
            return tx.step(*carry, grad), None
        return jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps)))()

    low = start.astype(jnp.bfloat16)
    like = trained(low.astype(jnp.float32), lionax.master_weights(make(1e-4)))[0][0]
    kind = {"mu_dtype": "float32"} if make is lionax.lion else {
        "mu_dtype": "float32", "nu_dtype": "float32"}
    new = trained(low, lionax.master_weights(make(1e-4, **kind), remainder))[0][0]
    error = np.abs(np.asarray(new.astype(jnp.float32) - like))
    ulps = error / np.maximum(np.abs(np.asarray(like)), 1e-3) * 128
    assert np.mean(ulps) < (12 if remainder is None else 2)
    plain = trained(low, make(1e-4, **kind))[0][0]
    assert np.mean(error) < np.mean(np.abs(np.asarray(plain.astype(jnp.float32) - like)))


def test_a_loaded_parameter_wins_over_an_old_master():
    tx = lionax.master_weights(lionax.sgd(1.0), "float32")
    params = jnp.ones(4, jnp.bfloat16)
    _, state = tx.step(params, tx.init(params), jnp.full(4, 1e-4, jnp.bfloat16))
    loaded = jnp.asarray([3.0, -2.0, 1.0, 0.5], jnp.bfloat16)
    new, state = tx.step(loaded, state, jnp.zeros(4, jnp.bfloat16))
    np.testing.assert_array_equal(new, loaded)
    kept = np.asarray(state.rules.remainder)
    np.testing.assert_allclose(kept, [3.0, -2.0, 1.0 - 1e-4, 0.5], rtol=1e-6)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_a_parameter_that_was_replaced_loses_its_remainder(remainder):
    tx = lionax.master_weights(lionax.sgd(1.0), remainder)
    params = jnp.full(4, 100.0, jnp.bfloat16)
    _, state = tx.step(params, tx.init(params), jnp.full(4, -0.2, jnp.bfloat16))
    zeros = jnp.zeros(4, jnp.bfloat16)
    for grads in (jnp.zeros(4, jnp.bfloat16), jnp.full(4, 1e-6, jnp.bfloat16)):
        new, state = tx.step(zeros, state, grads)
        np.testing.assert_allclose(new.astype(jnp.float32), -grads.astype(jnp.float32), rtol=0.02)


def test_decay_reaches_parameters_whose_update_is_below_its_last_digit():
    params = {"w": jnp.full(4, 256.0, jnp.bfloat16)}
    tx = lionax.lion(1.0, weight_decay=0.01)
    new, _ = tx.step(params, tx.init(params), {"w": jnp.ones(4, jnp.bfloat16)})
    assert float(new["w"][0]) == float(jnp.bfloat16(256.0 - 1.0 - 2.56))


@pytest.mark.slow
@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS, None, "int8"))
def test_update_gives_the_difference(remainder):
    tx = lionax.master_weights(lionax.sgd(1.0), remainder)
    params, grads = cases.normal(64, dtype=jnp.bfloat16), cases.normal(64, seed=1) * 1e-3
    stepped, state = tx.step(params, tx.init(params), grads)
    updates, other = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(lionax.apply_updates(params, updates), stepped)
    chex.assert_trees_all_equal(state, other)


@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS, None))
def test_on_a_mesh_the_bits_are_those_of_one_device(remainder):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, grads = cases.normal(64, 128, dtype=jnp.bfloat16), cases.normal(64, 128, seed=1) * 1e-2
    tx = lionax.master_weights(lionax.lion(1e-3, mu_dtype="bfloat16"), remainder)
    alone = run(tx, params, grads, 5)[0]
    placed = jax.device_put((params, grads), NamedSharding(mesh, PartitionSpec("x", "y")))
    np.testing.assert_array_equal(run(tx, *placed, 5)[0], alone)


@pytest.mark.slow
def test_under_vmap_the_members_share_their_bits():
    tx = lionax.master_weights(lionax.sgd(1.0))
    params = jnp.ones((3, 256), jnp.bfloat16)
    grads = jnp.full((3, 256), -1e-3)
    state = jax.vmap(tx.init)(params)
    new, _ = jax.vmap(tx.step)(params, state, grads)
    np.testing.assert_array_equal(new[0], new[2])
    assert len(np.unique(np.asarray(new[0], np.float32))) == 2


def test_donated_and_not_the_bits_are_equal():
    params, grads = cases.normal(64, 64, dtype=jnp.bfloat16), cases.normal(64, 64, seed=1)
    tx = lionax.master_weights(lionax.lion(1e-3, mu_dtype="int8"), "int8")
    expected = tx.step(params, tx.init(params), grads)
    step = jax.jit(tx.step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    chex.assert_trees_all_equal(step(params, tx.init(params), grads), expected)


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="master_weights: remainder='int4' is not accepted"):
        lionax.master_weights(lionax.sgd(1.0), "int4")
    with pytest.raises(TypeError, match=r"master_weights: seed=0\.5 is not accepted; give an int"):
        lionax.master_weights(lionax.sgd(1.0), seed=0.5)
    tx = lionax.master_weights(lionax.sgd(1.0))
    with pytest.raises(ValueError, match="master_weights: needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="Storage: rounding='up' is not accepted"):
        lionax.Storage("int8", rounding="up")
    with pytest.raises(TypeError, match="Storage: seed=None is not accepted"):
        lionax.Storage("int8", seed=None)


PARAMS = {"embed": jnp.ones((32, 128)), "dense": jnp.ones((64, 128)), "bias": jnp.ones(3)}


@pytest.mark.parametrize("make", [
    lambda kind: lionax.lion(0.1, mu_dtype=kind), lambda kind: lionax.adamw(0.1, nu_dtype=kind),
    lambda kind: lionax.sgd(0.1, 0.9, accumulator_dtype=kind),
    lambda kind: lionax.ema(0.9, accumulator_dtype=kind)])
def test_the_first_expression_that_matches_chooses_the_storage(make):
    tx = make({"embed": "bfloat16", "e": lionax.Storage("int8", rounding="nearest")})
    assert lionax.from_config(lionax.to_config(tx)) == tx
    state = tx.init(PARAMS)
    _, new = jax.jit(tx.update)(PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    rule = new.rules if hasattr(new.rules, "_fields") else next(x for x in new.rules if x)
    slots = rule[-1]
    assert slots["embed"].dtype == jnp.bfloat16
    assert isinstance(slots["dense"], lionax.QuantizedArray)
    assert slots["bias"].dtype == jnp.float32


def test_an_expression_that_matches_no_leaf_is_refused():
    with pytest.raises(ValueError, match="scale_by_lion: the regular expression 'head'"):
        lionax.lion(0.1, mu_dtype={"head": "int8"}).init(PARAMS)
    with pytest.raises(ValueError, match=r"scale_by_lion: '\(' is not a regular expression"):
        lionax.lion(0.1, mu_dtype={"(": "int8"})
    for storage in ({}, {"kernel": {"bias": "int8"}}):
        with pytest.raises(ValueError, match="give at least one regular expression, and a dtype"):
            lionax.lion(0.1, mu_dtype=storage)
    with pytest.raises(ValueError, match="mu_dtype='int9' is not accepted"):
        lionax.lion(0.1, mu_dtype={"dense": "int9"})


@pytest.mark.slow
def test_optax_reads_and_maps_states_of_codes():
    tx = lionax.lion(0.1, mu_dtype="int8")
    _, state = tx.step(PARAMS, tx.init(PARAMS), PARAMS)
    assert isinstance(optax.tree.get(state, "mu")["dense"], lionax.QuantizedArray)
    doubled = jax.tree.map(lambda leaf: leaf, state)
    chex.assert_trees_all_equal(doubled, state)
