"""Several micro-batches, one step."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from benchmarks.peers import optax_step

PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([0.5])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_is_that_of_float32(dtype):
    params = jnp.zeros(64, dtype)
    micro = [cases.normal(64, seed=i, dtype=dtype) for i in range(5)]
    tx = lionax.accumulate(lionax.sgd(1.0), 5)
    state = tx.init(params)
    for g in micro:
        updates, state = tx.update(g, state, params)
    exact = -np.mean([np.asarray(g).astype(np.float64) for g in micro], axis=0)
    np.testing.assert_allclose(
        np.asarray(updates).astype(np.float64), exact,
        atol=1e-6 if dtype == jnp.float32 else 2.0**-8)
    assert updates.dtype == dtype
    assert state.rules.gradients.dtype == jnp.float32


def test_it_is_optax_with_the_mean():
    tx, peer = lionax.accumulate(lionax.lion(0.1), 4), optax.MultiSteps(optax.lion(0.1), 4)
    ours, theirs = (PARAMS, tx.init(PARAMS)), (PARAMS, peer.init(PARAMS))
    step, their_step = jax.jit(tx.step), jax.jit(optax_step(peer))
    with jax.numpy_dtype_promotion("standard"):
        for t in range(9):
            grads = cases.gradients(PARAMS, t)
            ours, theirs = step(*ours, grads), their_step(*theirs, grads)
    cases.assert_close(ours[0], theirs[0], rtol=1e-6)


def test_weights_of_uneven_micro_batches_and_a_flush():
    tx = lionax.accumulate(lionax.sgd(1.0), 10)
    state = tx.init(jnp.zeros(1))
    for g, weight, flush in ((3.0, 2.0, False), (6.0, 1.0, True)):
        updates, state = jax.jit(tx.update)(jnp.array([g]), state, weight=weight, flush=flush)
    assert updates.tolist() == [-4.0]
    assert int(state.rules.calls) == 0
    assert float(state.rules.weight) == 0.0
    updates, _ = tx.update(jnp.array([2.0]), state, flush=True)
    assert updates.tolist() == [-2.0]  # nothing is left of the window before


def test_the_state_of_an_eager_step_can_be_donated():
    tx = lionax.accumulate(lionax.lion(0.1), 3)
    params, state = tx.step(PARAMS, tx.init(PARAMS), PARAMS)
    _, state = jax.jit(tx.step, donate_argnums=(0, 1))(params, state, PARAMS)
    assert int(state.rules.calls) == 2


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_window_that_is_not_finite_is_dropped_and_the_next_is_good(bad):
    tx = lionax.accumulate(lionax.lamb(0.1), 2)
    params, state = PARAMS, tx.init(PARAMS)
    for value in (1.0, bad, 1.0, 1.0):
        if value is bad:
            before = state.rules.inner
        params, state = tx.step(params, state, jax.tree.map(lambda p, v=value: p * v, PARAMS))
        if value is bad:
            cases.assert_equal(state.rules.inner, before)
            cases.assert_equal(params, PARAMS)
    assert int(state.rules.dropped) == 1
    assert int(state.rules.inner.count) == 1
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("every", [3, 7])
def test_the_mean_of_float64_gradients_is_one(every):
    with jax.enable_x64(True):
        tx, params = lionax.accumulate(lionax.sgd(1.0), every), jnp.zeros(1, jnp.float64)
        state = tx.init(params)
        for _ in range(every):
            params, state = tx.step(params, state, jnp.ones(1, jnp.float64))
    assert abs(float(params[0]) + 1) < 1e-15


def test_the_derivative_by_a_weight_of_0_is_finite():
    tx, params = lionax.accumulate(lionax.sgd(1.0), 2), jnp.zeros(1)

    def moved(weights):
        carry = params, tx.init(params)
        for i, weight in enumerate(weights):
            carry = tx.step(*carry, jnp.full(1, 1.0 + 2 * i), weight=weight)
        return carry[0][0]

    assert jax.grad(moved)(jnp.ones(2)).tolist() == [0.5, -0.5]
    assert jnp.isfinite(jax.grad(moved)(jnp.asarray([0.0, 1.0]))).all()


def test_a_leaf_without_gradient_keeps_its_sum():
    tx = lionax.accumulate(lionax.sgd(1.0), 2)
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    updates, state = tx.update({"w": PARAMS["w"], "b": None}, state, PARAMS)
    assert updates["b"] is None
    for _ in range(2):
        updates, state = tx.update(PARAMS, state, PARAMS)
    assert updates["w"].tolist() == [-1.0, -2.0]
    np.testing.assert_allclose(updates["b"], [-0.5 * 3 / 2])  # kept, as Keras on JAX does


def test_a_none_adds_nothing_to_its_sum():
    tx = lionax.accumulate(lionax.sgd(1.0), 2)
    state = tx.init(PARAMS)
    for _ in range(2):  # the second window begins as the first does
        _, state = tx.update({"w": PARAMS["w"], "b": None}, state, PARAMS)
        updates, state = tx.update(PARAMS, state, PARAMS)
        assert updates["w"].tolist() == [-1.0, -2.0]
        assert updates["b"].tolist() == [-0.25]


@pytest.mark.slow
def test_learning_rates_inside_are_assignable_and_extra_arguments_pass():
    tx = lionax.accumulate(lionax.chain(lionax.sgd(0.5), optax.contrib.reduce_on_plateau()), 1)
    state = lionax.set_hyperparams(tx.init(PARAMS), learning_rate=0.25)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))
    np.testing.assert_allclose(updates["w"], [-0.25, -0.5])


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_bad_windows(every):
    with pytest.raises(ValueError, match="accumulate: every="):
        lionax.accumulate(lionax.lion(0.1), every)


@pytest.mark.slow
def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    tx = lionax.accumulate(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)), 2)
    params = cases.normal(16)
    state = tx.init(params)
    specs = jax.tree.map(lambda leaf: spec if leaf.ndim else jax.sharding.PartitionSpec(), state)
    step = jax.jit(
        jax.shard_map(tx.step, mesh=mesh, in_specs=(spec, specs, spec), out_specs=(spec, specs)))
    sharded = whole = params, state
    for t in range(4):
        grads = cases.gradients(params, t)
        sharded, whole = step(*sharded, grads), jax.jit(tx.step)(*whole, grads)
    cases.assert_close(sharded, whole, rtol=1e-6)


def test_a_micro_batch_of_weight_0_is_left_out():
    tx = lionax.accumulate(lionax.sgd(1.0), 2)
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.array([0.5]), state, weight=4.0)
    updates, state = tx.update(jnp.array([jnp.nan]), state, weight=0.0)
    assert updates.tolist() == [-0.5]
    assert int(state.rules.dropped) == 0


@pytest.mark.parametrize("jitted", [True, False])
def test_a_window_of_weight_0_takes_no_step(jitted):
    tx = lionax.accumulate(lionax.lion(1.0), 2)
    params, state = jnp.ones(1), tx.init(jnp.ones(1))
    step = jax.jit(tx.step) if jitted else tx.step
    for _ in range(2):
        params, state = step(params, state, jnp.ones(1), weight=0.0)
    assert params.tolist() == [1.0]
    assert int(state.rules.inner.count) == 0
    params, state = step(params, state, jnp.ones(1), weight=1.0)
    params, state = step(params, state, jnp.ones(1), weight=1.0)
    assert int(state.rules.inner.count) == 1


def test_a_negative_weight_is_refused_or_drops_the_window():
    tx = lionax.accumulate(lionax.sgd(1.0), 2)
    params, state = jnp.ones(1), tx.init(jnp.ones(1))
    with pytest.raises(ValueError, match=r"accumulate: weight=-1\.0 is not accepted"):
        tx.step(params, state, jnp.ones(1), weight=-1.0)
    for weight in (-1.0, 1.0):
        params, state = jax.jit(tx.step)(params, state, jnp.ones(1), weight=weight)
    assert params.tolist() == [1.0]
    assert int(state.rules.dropped) == 1


def test_windows_that_grow_as_in_multi_steps():
    every = lambda windows: jnp.where(windows < 2, 1, 3)
    tx = lionax.accumulate(lionax.sgd(1.0), every)
    peer = optax.MultiSteps(optax.sgd(1.0), every)
    ours, theirs = (PARAMS, tx.init(PARAMS)), (PARAMS, peer.init(PARAMS))
    step, their_step = jax.jit(tx.step), jax.jit(optax_step(peer))
    for t in range(9):
        grads = cases.gradients(PARAMS, t)
        with jax.numpy_dtype_promotion("standard"):
            ours, theirs = step(*ours, grads), their_step(*theirs, grads)
        cases.assert_close(ours[0], theirs[0], rtol=2e-6)
    assert int(ours[1].rules.windows) == 4


@pytest.mark.parametrize("inner", [
    lambda: lionax.skip_nonfinite(lionax.sgd(1.0), 3), lambda: lionax.dynamic_loss_scale(
        lionax.sgd(1.0)), lambda: lionax.chain(lionax.clip(1.0), lionax.dynamic_loss_scale(
            lionax.sgd(1.0)))])
def test_what_waits_for_an_overflow_is_refused_inside(inner):
    with pytest.raises(ValueError, match=r"accumulate: a (skip_nonfinite|dynamic_loss_scale) "
                                         r"inside .*write \1\(accumulate\(tx, \.\.\.\), \.\.\.\)"):
        lionax.accumulate(inner(), 2)
