"""Values that are not ordinary: `docs/guides/values.md` is true, cell by cell."""

import re

import cases
import hostile
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lionax
from lionax.core.quantized import Format, encode

GRADIENTS, PARAMETERS = (dict(hostile.rows(title)) for title in ("In a gradient", "In a parameter"))
FORMATS = {f"{name}{of}": row
           for title, suffixes in (("Stochastic rounding", [""]),
                                   ("Rounding to the nearest", [", nearest"]),
                                   ("Second moments", [", second moment",
                                                       ", second moment, nearest"]))
           for of in suffixes for name, row in hostile.rows(title)}


def check(row, seen, figure, columns=hostile.COLUMNS):
    """Each word of the cells of a row, for each value."""
    lies = {}
    for column in columns:
        for one in seen(column):
            figure("values checked", 1)
            if words := hostile.fails(row[column], one):
                lies[column] = words
    assert lies == {}


promise = pytest.mark.promise(
    "Hostile values", "NaN, infinities, subnormal numbers, the largest floats, -0.0, 1e30, leaves "
    "of zeros and of one element do in each transformation, wrapper and storage format what the "
    "page about such values says.")


def test_every_public_transformation_and_every_word_is_on_the_page():
    assert GRADIENTS.keys() == hostile.TRANSFORMATIONS.keys()
    assert GRADIENTS.keys() == {case.public for case in cases.CASES.values()} | cases.IN_SHARD_MAP
    assert PARAMETERS.keys() == hostile.PARAMETERS.keys()
    legend = hostile.PAGE.read_text().split("## The words\n")[1].split("\n## ")[0]
    words = re.findall(r"^\| (?!word|---)(.+?) \|", legend, re.M)
    assert sorted(words) == sorted({*hostile.WORDS, *hostile.STORED})


SAMPLE = ("lion", "adam", "clip_by_global_norm", "skip_nonfinite")


@promise
@pytest.mark.parametrize(("name", "how"), [
    ("lion", hostile.jitted), *cases.but_for_fast([
        *((name, hostile.eager) for name in SAMPLE),
        *((name, hostile.jitted) for name in GRADIENTS if name != "lion")])],
    ids=lambda x: getattr(x, "__name__", x))
def test_in_a_gradient(name, how, figure):
    check(GRADIENTS[name], lambda column: hostile.seen(
        hostile.InGradient, name, column, how=how), figure)


@promise
@pytest.mark.parametrize("name", cases.but_for_fast(PARAMETERS))
def test_in_a_parameter(name, figure):
    check(PARAMETERS[name], lambda column: hostile.seen(
        hostile.InParameter, name, column), figure)


@promise
@pytest.mark.parametrize("name", cases.but_for_fast(FORMATS))
def test_in_storage(name, figure):
    check(FORMATS[name], lambda column: hostile.stored(name, column), figure)


# In float16 the largest floats are ordinary numbers of the arithmetic; so are subnormal ones.
LOW = [("bfloat16", hostile.COLUMNS), ("float16", ("NaN", "±∞", "−0.0", "zeros", "one element"))]


@promise
@pytest.mark.slow
@pytest.mark.parametrize("name", list(GRADIENTS)[::probes.sized(5, 1)])
@pytest.mark.parametrize(("dtype", "columns"), LOW, ids=["bfloat16", "float16"])
def test_in_gradients_of_low_precision(name, dtype, columns, figure):
    check(GRADIENTS[name], lambda column: hostile.seen(
        hostile.InGradient, name, column, jnp.dtype(dtype), hostile.jitted), figure, columns)


@promise
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_step_adds_the_update_whatever_it_is(name, figure):
    @jax.jit
    def both(grads):
        tx, params = hostile.TRANSFORMATIONS[name](), jax.tree.map(jnp.ones_like, grads)
        updates, state = tx.update(grads, tx.init(params), params)
        return (lionax.apply_updates(params, updates), state), tx.step(
            params, tx.init(params), grads)

    for column in hostile.COLUMNS:
        for one in hostile.seen(hostile.InGradient, name, column):
            cases.assert_equal(*both(one.given))
            figure("values checked", 1)


# Laws.

MAGNITUDES = st.floats(-37.5, 38.5)


def power(exponent):
    return np.float32(min(10.0**exponent, hostile.LARGEST))


@pytest.mark.slow
@given(st.lists(MAGNITUDES, min_size=3, max_size=3), st.floats(-3, 3))
def test_a_clip_holds_its_limit_and_the_direction_for_every_finite_norm(exponents, limit):
    grads, limit = jnp.asarray([power(x) / 2 for x in exponents]), power(limit)
    exact = probes.wide(grads)
    exact *= min(1.0, limit / np.linalg.norm(exact))
    for name in ("clip_by_norm", "clip_by_global_norm"):
        found = CLIPS[name](grads, limit)
        np.testing.assert_allclose(found, exact, rtol=2e-6, atol=1.2e-38)


CLIPS = {name: jax.jit(lambda grads, limit, name=name: getattr(lionax, name)(limit).update(
    grads, getattr(lionax, name)(limit).init(grads))[0])
    for name in ("clip_by_norm", "clip_by_global_norm")}


@jax.jit
def adapted(grads, params):
    tx = lionax.scale_by_trust_ratio()
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.slow
@given(MAGNITUDES, st.floats(-20, 38))
def test_an_adapted_update_has_the_norm_of_the_parameter(of_update, of_param):
    found = adapted(jnp.asarray([0.6, 0.8]) * power(of_update), jnp.full(2, power(of_param) / 2))
    expected = power(of_param) / np.sqrt(2)
    if of_param - of_update < 65:  # a larger ratio is infinite
        np.testing.assert_allclose(np.linalg.norm(probes.wide(found)), expected, rtol=1e-5)


encoded = jax.jit(encode, static_argnums=1)


@promise
@given(MAGNITUDES, MAGNITUDES, st.sampled_from([Format(8, 128, True), Format(4, 32, True)]),
       st.sampled_from([0, 2**31, 2**32 - 1]))
def test_no_positive_second_moment_becomes_0_beside_any_other(largest, other, format, bits):
    values = jnp.full(format.block, power(other)).at[3].set(power(largest))
    got = encoded(values, format, jnp.full(values.shape, bits, jnp.uint32)).decode()
    assert (np.asarray(got) > 0).all()


REMAINDERS = (None, "int8", "bfloat16", "float32")


@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS))
def test_a_step_of_0_changes_no_parameter_and_no_remainder(remainder):
    tx = lionax.master_weights(lionax.sgd(1.0), remainder)
    params = cases.normal(4096, dtype=jnp.bfloat16)
    step, state = jax.jit(tx.step), tx.init(params)
    for t in range(3):
        params, state = step(params, state, 1e-3 * cases.normal(4096, seed=t + 1))
    for _ in range(3):
        new, after = step(params, state, jnp.zeros(4096))
        cases.assert_equal((new, after.rules.remainder), (params, state.rules.remainder))


@pytest.mark.parametrize("remainder", cases.but_for_fast(REMAINDERS))
def test_a_finite_master_weight_stays_finite_and_comes_back(remainder):
    tx, params = lionax.master_weights(lionax.sgd(1.0), remainder), jnp.full(4, 65504, jnp.float16)
    up, state = tx.step(params, tx.init(params), jnp.full(4, -1000.0))
    np.testing.assert_array_equal(up, 65504.0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    down, _ = tx.step(up, state, jnp.full(4, 2000.0))
    assert (np.asarray(down) < 65504).all()


@pytest.mark.slow
def test_a_parameter_that_was_lost_may_be_restored():
    """The remainder of a parameter that is not finite is 0."""
    for remainder in ("int8", "bfloat16", "float32"):
        tx, good = lionax.master_weights(lionax.sgd(1.0), remainder), jnp.ones(2, jnp.bfloat16)
        _, state = tx.step(good, tx.init(good), jnp.asarray([jnp.nan, jnp.inf]))
        again, _ = tx.step(good, state, jnp.asarray([0.5, 0.5]))
        assert again.tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_a_finite_gradient_that_overflows_in_the_division_by_a_small_scale_is_not_taken():
    tx = lionax.dynamic_loss_scale(lionax.sgd(1.0, 0.9), 2.0**-4, min_scale=2.0**-8)
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    new, after = tx.step(params, state, jnp.asarray([3e38, 1.0]))
    cases.assert_equal((new, after.rules.inner), (params, state.rules.inner))
    assert (int(after.rules.skipped), float(after.rules.loss_scale)) == (1, 2.0**-5)


@pytest.mark.slow
def test_a_state_that_is_cast_stays_finite():
    params = jnp.ones(2)
    tx = lionax.scale_by_adam()
    _, state = tx.update(jnp.full(2, 1e5), tx.init(params))
    nu = lionax.cast_state(state, lionax.scale_by_adam(nu_dtype="float16").init(params)).rules.nu
    assert nu.tolist() == [65504.0] * 2
