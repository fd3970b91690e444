"""A slot that is never negative holds no positive number as 0: a step divides by its root."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.core.rounding import lifted

TINY = float(jnp.finfo(jnp.float32).tiny)
DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lifted_number_is_0_only_where_it_was_and_keeps_its_sign(dtype):
    values = jnp.asarray([0.0, -0.0, TINY, -TINY, 1e-10, -1e-10, 0.3, 7.0, jnp.inf, jnp.nan])
    got = np.asarray(lifted(values, jnp.dtype(dtype)).astype(dtype).astype(jnp.float32))
    np.testing.assert_array_equal(np.signbit(got[:8]), np.signbit(values[:8]))
    np.testing.assert_array_equal(got == 0, np.asarray(values) == 0)
    np.testing.assert_array_equal(got[6:], values[6:].astype(dtype).astype(jnp.float32))
    assert lifted(values, jnp.dtype("float32")) is values


@pytest.mark.parametrize("rounding", cases.but_for_fast(["stochastic", "nearest"], "stochastic"))
@pytest.mark.parametrize("dtype", cases.but_for_fast(DTYPES, "float16"))
@pytest.mark.parametrize("make", [lionax.scale_by_adam, lionax.lamb])
def test_small_gradients_make_no_large_updates(make, dtype, rounding):
    def largest(nu_dtype):
        """The largest updates of 40 steps, with gradients in some of them, and the last nu."""
        tx = make(nu_dtype=nu_dtype) if make is lionax.scale_by_adam else make(
            1.0, nu_dtype=nu_dtype, max_trust_ratio=1.0)
        params, state, update, found = jnp.ones((64, 64)), None, jax.jit(tx.update), []
        state = tx.init(params)
        for t in range(40):
            # Their squares, of 1e-10, are far below float16's smallest number, of 6e-8.
            grads = 1e-5 * cases.normal(64, 64, seed=t) * float(t % 7 < 3)
            updates, state = update(grads.at[:8].set(0.0), state, params)
            found.append(np.abs(updates).max())
        return np.asarray(found), np.asarray(optax.tree.get(state, "nu").astype(jnp.float32))

    found, nu = largest(lionax.Storage(dtype, rounding=rounding))
    exact, _ = largest(None)
    assert (found <= 1.05 * exact).all()
    assert found[0] > 0
    assert (nu[:8] == 0).all()
    assert (nu[8:] > 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "int4", None])
def test_squares_of_float64_gradients_are_not_0(dtype):
    """Of 1e-50, which is 0 in float32."""
    with jax.enable_x64(True):
        tx = lionax.scale_by_adam(eps=0.0, nu_dtype=dtype)
        grads = jnp.full((64, 128), 1e-25, jnp.float64)
        _, state = tx.update(grads, tx.init(grads))
        assert np.isfinite(tx.update(0 * grads, state)[0]).all()


def test_a_momentum_is_rounded_to_0_so_that_its_mean_is_exact():
    tx = lionax.scale_by_adam(b1=0.0, mu_dtype="float16", nu_dtype="float16")
    grads = jnp.full((64, 64), 1e-8)
    mu = optax.tree.get(tx.update(grads, tx.init(grads))[1], "mu").astype(jnp.float32)
    assert (mu == 0).any()
    assert float(mu.mean()) == pytest.approx(1e-8, rel=0.1)


def test_a_state_that_is_cast_keeps_its_small_numbers_off_0():
    params = jnp.ones(8)
    _, state = lionax.scale_by_adam().update(1e-5 * params.at[0].set(0.0), lionax.scale_by_adam(
        ).init(params))
    tx = lionax.scale_by_adam(nu_dtype="float16")
    nu = optax.tree.get(lionax.cast_state(state, tx.init(params)), "nu")
    assert nu.dtype == jnp.float16
    assert (nu == 0).tolist() == [True] + [False] * 7


def test_a_rule_of_ones_own_names_its_slots():
    class Squares(lionax.transforms.adaptive.ScaleByAdam):
        nonnegative = ()

    param = jnp.zeros((64, 64))
    own, adam = (lionax.Transformation.of(rule(nu_dtype="float16")) for rule in (
        Squares, lionax.transforms.adaptive.ScaleByAdam))
    lost, kept = (optax.tree.get(tx.update(param + 1e-5, tx.init(param))[1], "nu")
                  for tx in (own, adam))
    assert (lost == 0).mean() > 0.9
    assert (kept > 0).all()
