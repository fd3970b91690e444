"""Runs that last: counters at their end, bias correction, averages over millions of steps."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, but_for_fast

import lionax
from lionax.compat.keras_parts import EveryWindow
from lionax.core.counting import next_count
from lionax.transforms.momentum import debiasing, share_of

LAST = 2**31 - 1  # the largest int32, at which a counter stands
PARAMS = {"w": cases.normal(2, 3), "v": cases.normal(3)}
GRADS = {"w": cases.normal(2, 3, seed=1), "v": cases.normal(3, seed=1)}
ROUNDED = ("lamb_trust_mask",)  # stochastically: the bits follow the count
BAD = {"skip_nonfinite": jnp.nan, "dynamic_loss_scale": jnp.inf, "accumulate": jnp.nan,
       "skip_if": 1e6, "monitor_conditional": jnp.nan}


def is_counter(keys, leaf):
    """Whether a leaf of a state counts; flags say whether a value counts."""
    name = jax.tree_util.keystr(keys)
    return leaf.dtype == jnp.int32 and ".assigned" not in name and ".live" not in name


def counted(state, number):
    """A state that has counted so far."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jnp.full_like(leaf, number) if is_counter(keys, leaf) else leaf, state)


def counters(state):
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    return [int(leaf) for keys, leaf in pairs if is_counter(keys, leaf)]


def after(tx, number, grads, steps=4):
    """The parameters and the counters after each of some steps of a run that counted so far."""
    params, state, seen = PARAMS, counted(tx.init(PARAMS), number), []
    for _ in range(steps):
        params, state = tx.step(params, state, grads)
        seen.append((params, counters(state)))
    return seen


@pytest.mark.promise("Long runs", "Counters stop at 2^31 - 1, and a step then is as after 10^6.")
@pytest.mark.parametrize("name", but_for_fast(CASES, "lion_schedule", "lamb"))
def test_counters_stop_at_their_end(name, figure):
    tx = CASES[name].make()
    last, early = (after(tx, number, GRADS) for number in (LAST - 1, 10**6))
    for (params, seen), (expected, _) in zip(last, early, strict=True):
        assert all(0 <= number <= LAST for number in seen)
        if name == "params_ema_overwrite" or name in ROUNDED:
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        else:
            cases.assert_close(params, expected)
    figure("steps at the end", len(last))


@pytest.mark.promise("Long runs", "Counters of skipped steps stop at 2^31 - 1, too.")
@pytest.mark.parametrize("name", but_for_fast(BAD, "dynamic_loss_scale"))
def test_counters_of_bad_steps_stop_at_their_end(name, figure):
    grads = jax.tree.map(lambda g: g + BAD[name], GRADS)
    for _, seen in after(CASES[name].make(), LAST - 1, grads):
        assert all(0 <= number <= LAST for number in seen)
        figure("steps at the end", 1)


SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(0.1, 1000, alpha=0.5),
    "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000, end_value=0.01),
    "linear": optax.linear_schedule(0.1, 0.01, 1000),
    "piecewise": optax.piecewise_constant_schedule(0.1, {10: 0.5, 1000: 0.1}),
    "windows": EveryWindow(optax.linear_schedule(0.1, 0.01, 1000), 3),
}


@pytest.mark.promise("Long runs", "A schedule keeps its last value at 2^31 - 1 steps.")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_their_last_value(name, figure, standard_promotion):
    tx, one = lionax.scale_by_schedule(SCHEDULES[name]), jnp.ones(2)
    state = counted(tx.init(one), LAST - 1)
    expected = tx.update(one, counted(state, 10**6))[0]
    for _ in range(3):
        update, state = tx.update(one, state)
        assert jnp.array_equal(update, expected)
        figure("steps at the end", 1)


@pytest.mark.slow
@pytest.mark.promise("Long runs", "monitor goes on measuring every n-th step after 2^31 - 1.")
def test_a_monitor_measures_on():
    tx, ages = lionax.monitor(lionax.sgd(0.1), every=3), []
    params, state = PARAMS, tx.init(PARAMS)
    rules = state.rules._replace(calls=jnp.int32(LAST // 3 * 3 - 3))
    state = state._replace(rules=rules)
    for _ in range(7):
        params, state = tx.step(params, state, GRADS)
        ages.append(int(state.rules.age["age"]))
    assert ages == [-1, -1, 0, 1, 2, 0, 1]


@pytest.mark.slow
@pytest.mark.promise("Long runs", "After 2^31 - 1 steps params_ema overwrites no more, and moves.")
@pytest.mark.parametrize("every", [2, 3])
def test_an_average_overwrites_no_more(every):
    tx = lionax.chain(lionax.sgd(0.1), lionax.params_ema(0.9, overwrite_every=every))
    params, state = PARAMS, counted(tx.init(PARAMS), LAST - 1)
    for _ in range(3):
        new, state = tx.step(params, state, GRADS)
        cases.assert_close(new, jax.tree.map(lambda p, g: p - 0.1 * g, params, GRADS))
        params = new


@pytest.mark.slow
@pytest.mark.promise("Long runs", "The random bits of master_weights go on after 2^31 - 1 steps.")
def test_random_bits_go_on():
    tx = lionax.master_weights(lionax.sgd(1.0))
    params = jnp.ones(64, jnp.bfloat16)
    state, seen = tx.init(params), set()
    state = state._replace(rules=state.rules._replace(calls=jnp.int32(LAST - 2)))
    for _ in range(4):
        new, state = tx.step(params, state, jnp.full(64, 2.0**-10))
        seen.add(np.asarray(new).tobytes())
    assert len(seen) == 4


COUNTS = np.unique(np.r_[1:50, np.logspace(0, 7, 400).astype(int), LAST - 1, LAST])


@pytest.mark.promise("Long runs", "The bias correction of ema and params_ema is right to 4e-7, of "
                     "Adam to 2^-24 / (1 - b), from 1 step to 10^7 and to 2^31 - 1.")
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.9999, 0.999999, 1 - 2**-24])
def test_bias_correction(decay, figure):
    true = -np.expm1(COUNTS * np.log1p(-(1 - decay))) if decay else np.ones(len(COUNTS))
    counts = jnp.asarray(COUNTS, jnp.int32)
    of_ema = np.float64(share_of(1.0 - decay, counts, jnp.float32))
    of_adam = 1 / np.float64(debiasing(decay, counts, jnp.float32))
    np.testing.assert_allclose(of_ema, true, rtol=4e-7)
    np.testing.assert_allclose(of_adam, true, rtol=2**-24 / (1 - decay) + 2**-23)
    figure("counts", len(COUNTS))
    figure("largest relative error of ema's", float(np.abs(of_ema / true - 1).max()))


@pytest.mark.promise("Long runs", "A decay that is 1 in float32 is refused where 1 is.")
@pytest.mark.parametrize("make", [
    lambda b: lionax.scale_by_adam(b2=b), lambda b: lionax.ema(b),
    lambda b: lionax.params_ema(b, debias=True), lambda b: lionax.lamb(0.1, b1=lionax.inject(b))])
def test_a_decay_that_float32_takes_for_1(make):
    make(1 - 2**-24)
    with pytest.raises(ValueError, match=r"0\.99999999 is not accepted; .*also in float32"):
        make(0.99999999)


def test_counters_stop():
    assert [int(next_count(jnp.int32(LAST - n))) for n in (2, 1, 0)] == [LAST - 1, LAST, LAST]
