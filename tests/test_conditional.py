"""Steps that are not taken."""

import dataclasses
from typing import NamedTuple

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.core.rule import Rule

PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([0.5])}
BAD = {"w": jnp.array([jnp.nan, 1.0]), "b": jnp.array([1.0])}


def test_a_step_that_is_not_finite_touches_nothing():
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), PARAMS)
        bad = jax.tree.map(lambda p, d=dtype: p.astype(d), BAD)
        tx = lionax.skip_nonfinite(lionax.lamb(0.1), 3)
        step = jax.jit(tx.step)
        carry = step(params, tx.init(params), params)
        skipped = step(*carry, bad)
        cases.assert_equal(skipped[0], carry[0])
        cases.assert_equal(skipped[1].rules.inner, carry[1].rules.inner)
        assert (int(skipped[1].rules.consecutive), int(skipped[1].rules.skipped)) == (1, 1)
        again = step(*skipped, params)
        assert (int(again[1].rules.consecutive), int(again[1].rules.skipped)) == (0, 1)


def test_past_the_limit_the_parameters_show_it_and_the_state_stays_good():
    tx = lionax.skip_nonfinite(lionax.lion(0.1), 2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = tx.step(params, state, BAD)
    assert np.all(np.isnan(params["b"]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_loss_scale_grows_backs_off_and_keeps_within_its_bounds():
    tx = lionax.dynamic_loss_scale(lionax.lion(0.1), 4.0, 2, min_scale=2.0, max_scale=16.0)
    step, carry, scales = jax.jit(tx.step), (PARAMS, tx.init(PARAMS)), []
    for finite in (1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1):
        before = carry
        carry = step(*carry, PARAMS if finite else BAD)
        scales.append(float(optax.tree.get(carry[1], "loss_scale")))
        if not finite:
            cases.assert_equal(carry[0], before[0])
            cases.assert_equal(carry[1].rules.inner, before[1].rules.inner)
    assert scales == [4, 8, 8, 16, 16, 16, 8, 4, 2, 2, 2]
    assert int(carry[1].rules.skipped) == 4


def test_scaled_gradients_give_the_step_of_true_ones():
    """Float16 gradients that vanish without a scale."""
    true = jax.tree.map(lambda p: p * 1e-8, PARAMS)
    assert float(true["b"][0].astype(jnp.float16)) == 0.0
    scaled = jax.tree.map(lambda g: (g * 2.0**15).astype(jnp.float16), true)
    for tx in (lionax.dynamic_loss_scale(lionax.sgd(1e8)),
               lionax.chain(lionax.unscale(2.0**15), lionax.sgd(1e8))):
        params, _ = tx.step(PARAMS, tx.init(PARAMS), scaled)
        np.testing.assert_allclose(params["w"], PARAMS["w"] - 1e8 * true["w"], atol=2e-3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: lionax.unscale(0.0), "unscale: factor=0"),
    (lambda: lionax.skip_nonfinite(lionax.lion(0.1), 0), "skip_nonfinite: max_consecutive=0"),
    (lambda: lionax.dynamic_loss_scale(lionax.lion(0.1), 0.0), "dynamic_loss_scale: "
     "initial_scale=0"),
    (lambda: lionax.dynamic_loss_scale(lionax.lion(0.1), growth_interval=0), "growth_interval=0"),
    (lambda: lionax.dynamic_loss_scale(lionax.lion(0.1), growth_factor=0.5), "growth_factor=0.5"),
    (lambda: lionax.dynamic_loss_scale(lionax.lion(0.1), backoff_factor=2.0), "backoff_factor=2.0"),
    (lambda: lionax.dynamic_loss_scale(lionax.lion(0.1), min_scale=4.0, max_scale=2.0),
     "max_scale=2.0"),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_follows_a_conditional_may_change_its_state():
    tx = lionax.partition({"a": lionax.skip_nonfinite(lionax.sgd(0.1), 5), "b": optax.adamw(0.1)},
                          {"x": "a", "y": "b"})
    params = {"x": jnp.ones(2), "y": jnp.ones(2, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("standard"):
        new, _ = jax.jit(tx.step)(params, tx.init(params), {"x": jnp.ones(2), "y": jnp.ones(2)})
    np.testing.assert_allclose(new["x"], 0.9)
    assert new["y"].dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [lambda: lionax.skip_nonfinite(lionax.sgd(0.1), 5),
                                  lambda: lionax.dynamic_loss_scale(lionax.sgd(0.1), 2.0)])
def test_parameters_that_come_to_differ_between_devices(make):
    """Inside `shard_map`: each device makes a step of its own, and then they add up."""
    tx, params = make(), jnp.ones(4)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    step = jax.shard_map(lambda p, s, g: jax.lax.psum(tx.step(p, s, g)[0], "d"), mesh=mesh,
                         in_specs=(spec(), spec(), spec("d")), out_specs=spec())
    grads = jnp.arange(32.0)
    scale = float(getattr(tx.init(params).rules, "loss_scale", 1.0))
    np.testing.assert_allclose(
        jax.jit(step)(params, tx.init(params), grads), 8 - 0.1 * grads.reshape(8, 4).sum(0) / scale,
        rtol=1e-5)


class Kept(NamedTuple):
    kept: jax.Array


@dataclasses.dataclass(frozen=True)
class Keep(Rule):
    """Keeps a slot of some dtype."""

    kind: str

    def init(self, param):
        return Kept(jnp.zeros(() if self.kind == "bool" else param.shape, self.kind))

    def apply(self, update, slots, param, step):
        return update, slots


@pytest.mark.parametrize("kind", cases.but_for_fast(
    ["int32", "bool", "int4", "float8_e4m3fn", "bfloat16"], "int32", "bfloat16"))
def test_a_large_window_with_slots_of_any_dtype(kind):
    """Sums are set to zero after the slots are written, of which some cannot be looked at."""
    tx = lionax.accumulate(lionax.chain(lionax.Transformation.of(Keep(kind)), lionax.sgd(1.0)), 2)
    params = jnp.ones(1 << 14)
    new, state = jax.jit(tx.step)(params, tx.init(params), params)
    new, state = jax.jit(tx.step)(new, state, params)
    np.testing.assert_array_equal(new, 0.0)
    assert int(state.rules.live) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 1 << 14])
def test_complex_windows(size):
    tx, params = lionax.accumulate(optax.sgd(0.5), 2), jnp.full(size, 1.0 + 2.0j)
    step, carry = jax.jit(tx.step), (params, tx.init(params))
    with jax.numpy_dtype_promotion("standard"):
        for grads in (params, params, params, params.at[0].set(jnp.nan * 1j)):
            carry = step(*carry, grads)
    np.testing.assert_allclose(carry[0], params / 2)
    assert int(carry[1].rules.dropped) == 1


def test_loss_scales_without_a_reciprocal_are_refused():
    with pytest.raises(ValueError, match=r"dynamic_loss_scale: .*max_scale"):
        lionax.dynamic_loss_scale(lionax.sgd(0.1), max_scale=2.0**127)


def test_skip_if_a_predicate_holds():
    def is_too_large(updates, params, *, loss, **extra):
        return loss > 10.0 * jnp.sum(params["b"])

    tx = lionax.skip_if(lionax.lion(0.1), is_too_large, max_consecutive=2)
    for step in (tx.step, jax.jit(tx.step)):
        params, state = PARAMS, tx.init(PARAMS)
        params, state = step(params, state, PARAMS, loss=1.0)
        assert int(state.rules.skipped) == 0
        kept, state = step(params, state, PARAMS, loss=99.0)
        cases.assert_equal(kept, params)
        assert (int(state.rules.skipped), int(state.rules.inner.count)) == (1, 1)
        lost, state = step(kept, state, PARAMS, loss=99.0)
        assert jnp.isnan(lost["w"]).all()


def test_skip_if_never_shows_a_lost_run_unless_asked():
    tx = lionax.skip_if(lionax.sgd(0.1), lambda updates, params: True)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = tx.step(params, state, PARAMS)
    cases.assert_equal(params, PARAMS)
    for given in (lambda u, p: u["w"] > 0, lambda u, p: None, lambda u, p: "no", lambda u, p: {}):
        with pytest.raises(TypeError, match="skip_if: the predicate must return one bool"):
            (tx := lionax.skip_if(lionax.sgd(0.1), given)).step(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="skip_if: predicate=3 is not a function"):
        lionax.skip_if(lionax.sgd(0.1), 3)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("inner", cases.but_for_fast([
    lambda: optax.adam(0.1), lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.rmsprop(0.1)]))
@pytest.mark.parametrize("wrap", [
    lambda tx: lionax.accumulate(tx, 2), lambda tx: lionax.skip_nonfinite(tx, 3),
    lambda tx: lionax.dynamic_loss_scale(tx, 1.0), lionax.monitor, lionax.master_weights])
def test_the_state_of_an_optimizer_of_optaxs_keeps_its_dtypes(wrap, inner):
    """Inside gradients are in float32, whatever the dtype of the parameters."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = wrap(lionax.chain(lionax.clip(1.0), inner()))
    carry, _ = jax.lax.scan(lambda carry, _: (tx.step(*carry, params), None),
                            (params, tx.init(params)), length=4)
    chex.assert_trees_all_equal_dtypes(carry, (params, tx.init(params)))
    assert not jnp.array_equal(carry[0]["w"], params["w"])


def test_a_schedule_with_an_if_inside_of_a_conditional():
    def warm_up(step):
        return 0.1 if step < 3 else 0.2

    tx = lionax.accumulate(lionax.sgd(warm_up), 2)
    with pytest.raises(TypeError, match=r"the schedule <function .*warm_up.* jnp\.where"):
        jax.jit(tx.step)(PARAMS, tx.init(PARAMS), PARAMS)
