"""Calls outside of jit: compiled once, with the numbers and the freedoms of running operation by operation."""

import dataclasses
import pickle

import cases
import jax
import jax.numpy as jnp
import optax
import pytest

import lionax
from lionax import eager, engine
from lionax.compat import keras3, keras_schedules

PARAMS = {"w": cases.normal(9, 5), "b": cases.normal(5)}
NORMS = ("lamb", "scale_by_trust_ratio", "clip_by_norm", "clip_by_global_norm", "chain", "accumulate", "skip_nonfinite",
         "dynamic_loss_scale", "scale_by_adam")  # sums, powers


def compiled(tx):
    """How many programs there are for a transformation's data."""
    data = tx.update.program.data
    return None if data is None else eager.compiled(data, False, True)._cache_size()


@pytest.mark.parametrize("name", cases.CASES)
def test_the_numbers_are_those_of_operation_by_operation(name):
    tx = cases.CASES[name].make()
    state = by_operation = tx.init(PARAMS)
    for step in range(4):
        grads = cases.gradients(PARAMS, step)
        updates, state = tx.update(grads, state, PARAMS)
        expected, by_operation = engine.run(tx.definition, grads, by_operation, PARAMS, {}, write=False)
        rtol = 1e-6 if cases.CASES[name].public in NORMS else 0.0
        cases.assert_equal(updates, expected, rtol)
        cases.assert_equal(state, by_operation, rtol)


def test_compiled_once_for_equal_definitions():
    for _ in range(3):
        tx = lionax.lion(0.125, b1=0.875)
        state = tx.init(PARAMS)
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS)
        state = lionax.set_hyperparams(state, learning_rate=0.5)
        tx.update(PARAMS, state, PARAMS)
    assert compiled(tx) == 1
    assert pickle.loads(pickle.dumps(tx)) == tx


def test_schedules_are_called_at_every_call():
    """Even those which are no pure functions of the step, or take it for a number."""
    rate = {"now": 1.0}
    seen = []

    def schedule(step):
        seen.append(int(step))
        return rate["now"] if step < 2 else 0.0

    tx = lionax.sgd(schedule)
    state = tx.init(PARAMS)
    for now, expected in ((1.0, -1.0), (0.5, -0.5), (0.5, 0.0)):
        rate["now"] = now
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state)
        assert float(updates["b"][0]) == expected
    assert seen[-3:] == [0, 1, 2]
    assert float(lionax.get_hyperparams(state)["learning_rate"]) == 0.0
    assert compiled(tx) == 1


@dataclasses.dataclass(frozen=True)
class Branching(lionax.Rule):
    """A rule of the user's own with Python in it."""

    def apply(self, update, slots, param, step):
        return (update if step.count > 0 else -update), slots


@pytest.mark.parametrize("tx", [
    lionax.Transformation.of(Branching()), lionax.chain(lionax.clip(1.0), optax.scale(-1.0)), lionax.accumulate(optax.sgd(0.1), 2),
    lionax.lion(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    lionax.accumulate(lionax.sgd(optax.constant_schedule(0.1)), 2), optax.chain(lionax.lion(optax.constant_schedule(0.1))),
])
def test_what_is_not_data_runs_operation_by_operation(tx):
    if isinstance(tx, lionax.Transformation):
        assert tx.update.program.data is None
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert updates["w"].shape == PARAMS["w"].shape


@pytest.mark.parametrize("tx", [
    lionax.lion(keras_schedules.CosineDecay(0.1, 10), mask=lionax.not_matching("b")),
    keras3.Lamb(keras_schedules.ExponentialDecay(0.1, 10, 0.5), gradient_accumulation_steps=2, weight_decay=0.1, use_ema=True),
    lionax.partition({"a": lionax.lion(optax.constant_schedule(0.1)), "b": lionax.set_to_zero()}, {"w": "a", "b": "b"}),
])
def test_data(tx):
    assert tx.update.program.data is not None
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert compiled(tx) == 1
    assert int(state.count) == 3


def test_inputs_that_are_not_jax_arrays_and_traced_ones():
    tx = lionax.lion(0.1)
    update, _ = tx.update(3.0, tx.init(1.0), 1.0)
    assert float(update) == pytest.approx(-0.1001)
    with pytest.raises(TypeError, match="the leaf 'w' is 'a'"):
        tx.update({"w": "a"}, tx.init({"w": 1.0}), {"w": 1.0})
    before = compiled(tx)
    jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert compiled(tx) == before
    rate = jax.jit(lambda rate: lionax.sgd(rate).update(PARAMS, lionax.sgd(rate).init(PARAMS))[0])(2.0)
    cases.assert_equal(rate, jax.tree.map(lambda p: -2.0 * p, PARAMS))
