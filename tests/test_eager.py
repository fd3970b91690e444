"""Calls outside of jit: one small program for each shape, kept across calls."""

import contextlib
import dataclasses

import cases
import jax
import jax.numpy as jnp
import optax
import pytest

import lionax

PARAMS = {"w": cases.normal(4, 3), "v": cases.normal(4, 3, seed=1), "b": cases.normal(3)}


@contextlib.contextmanager
def compilations():
    """The durations of the compilations made meanwhile."""
    made = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_a_thousand_calls_with_a_schedule_compile_nothing_after_the_first():
    seen = []

    def schedule(step):
        seen.append(int(step))  # a number, as outside of jit in Optax
        return 1e-3 / (1 + float(step))

    tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(schedule))
    state = tx.init(PARAMS)
    seen.clear()
    _, state = tx.update(PARAMS, state, PARAMS)
    with compilations() as made:
        for _ in range(999):
            _, state = tx.update(PARAMS, state, PARAMS)
    assert not made
    assert seen == list(range(1000))  # called once in each call


@pytest.mark.parametrize("make", [lionax.lion, lionax.lamb, lambda rate: lionax.sgd(rate, 0.9)])
def test_another_learning_rate_compiles_nothing(make):
    for rate in (0.5, 0.25):
        tx = make(rate)
        state = tx.init(PARAMS)
        with compilations() as made:
            tx.step(PARAMS, state, PARAMS)
    assert not made


@pytest.mark.parametrize("make", [
    lambda tx: lionax.accumulate(tx, 2), lambda tx: lionax.skip_nonfinite(tx, 3),
    lambda tx: lionax.dynamic_loss_scale(tx, 2.0, 3),
    lambda tx: lionax.skip_nonfinite(lionax.accumulate(tx, 2), 3)])
def test_conditionals_compile_nothing_anew(make):
    bad = {**PARAMS, "w": PARAMS["w"].at[0, 0].set(jnp.nan)}
    tx = make(lionax.chain(lionax.lamb(0.1), lionax.params_ema(0.9)))
    for _ in range(2):
        params, state = PARAMS, tx.init(PARAMS)
        with compilations() as made:
            for grads in (PARAMS, PARAMS, bad, PARAMS, PARAMS, PARAMS):
                params, state = tx.step(params, state, grads)
    assert not made


def test_masks_and_extra_arguments_that_are_functions_are_called_as_often_as_by_optax():
    seen = {"mask": 0, "value": 0}

    def mask(params):
        seen["mask"] += 1
        return jax.tree.map(lambda p: p.ndim == 2, params)

    def value_fn(params):
        seen["value"] += 1
        return jnp.float32(0.0)

    def count(tx):
        state = tx.init(PARAMS)
        seen.update(mask=0, value=0)
        for _ in range(3):
            with jax.numpy_dtype_promotion("standard"):
                _, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(0.0), grad=PARAMS,
                                     value_fn=value_fn)
        return dict(seen)

    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=2)
    ours = count(lionax.chain(lionax.add_decayed_weights(0.1, mask), search))
    assert ours == count(optax.chain(optax.add_decayed_weights(0.1, mask), search))
    assert ours["mask"] == 3


def test_a_trace_holds_one_function_for_all_leaves_of_a_shape():
    params = {str(i): jnp.ones((4, 3)) for i in range(20)}
    sizes = []
    for count in (10, 20):
        some = dict(list(params.items())[:count])
        tx = lionax.lion(1e-3)
        text = jax.jit(tx.step).lower(some, tx.init(some), some).as_text()
        sizes.append(text.count("func.func private @apply"))
    assert sizes == [3, 3]  # one for each rule


@dataclasses.dataclass(frozen=True)
class Typed(lionax.Rule):
    """A field that nothing converts, of which Python says that 2 == 2.0 == True."""

    factor: object

    def apply(self, update, slots, param, step):
        return update * {int: 3.0, float: 5.0, bool: 7.0}[type(self.factor)], slots


def test_rules_are_told_apart_by_the_types_of_their_fields():
    for factor, expected in ((2, 3.0), (2.0, 5.0), (1, 3.0), (True, 7.0)):
        tx = lionax.Transformation.of(Typed(factor))
        assert float(tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0]) == expected


def test_inputs_that_are_not_jax_arrays():
    tx = lionax.lion(0.1)
    update, _ = tx.update(3.0, tx.init(1.0), 1.0)
    assert float(update) == pytest.approx(-0.1001)
    rate = jax.jit(lambda rate: lionax.sgd(rate).update(PARAMS, lionax.sgd(rate).init(PARAMS))[0])
    cases.assert_close(rate(2.0), jax.tree.map(lambda p: -2.0 * p, PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    pytest.param(lambda: lionax.monitor(lionax.lion(0.1)), marks=pytest.mark.slow),
    lambda: lionax.accumulate(lionax.sgd(0.1), 2),
    pytest.param(lambda: lionax.skip_nonfinite(lionax.lamb(0.1), 2), marks=pytest.mark.slow)])
def test_outside_of_jit_on_an_explicit_mesh(make):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    tx, params = make(), jax.device_put(jnp.ones((8, 8)), sharding)
    new, _ = tx.step(params, tx.init(params), params)
    alone, _ = tx.step(jnp.ones((8, 8)), tx.init(jnp.ones((8, 8))), jnp.ones((8, 8)))
    assert jnp.allclose(jax.device_get(new), alone)
