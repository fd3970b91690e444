"""Numbers, schedules, tracers, injected values; reading and assigning them in the state."""

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

PARAMS, GRADS = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, -1.0])}


def structure(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)


@pytest.mark.parametrize("make",
                         [lionax.lion, lionax.lamb, lionax.sgd, lionax.scale_by_learning_rate])
def test_the_same_state_tree_for_every_kind_of_learning_rate_and_mask(make):
    kinds = [
        0.1,
        np.float32(0.1),
        jnp.float32(0.1),
        optax.constant_schedule(0.1), cases.SCHEDULE,
        lionax.inject(0.1)
    ]
    trees = [structure(make(rate).init(PARAMS)) for rate in kinds]
    assert all(tree == trees[0] for tree in trees)
    if make is not lionax.scale_by_learning_rate:
        assert structure(make(0.1, mask={"w": False}).init(PARAMS)) == trees[0]
    restored = make(0.1).init(PARAMS)
    make(cases.SCHEDULE).update(GRADS, restored, PARAMS)


@pytest.mark.parametrize("scalar", [
    0.25,
    np.float32(0.25),
    np.float64(0.25),
    jnp.float32(0.25),
    jnp.bfloat16(0.25),
    np.array(0.25),
    optax.constant_schedule(0.25), lambda step: jnp.bfloat16(0.25),
    lionax.inject(0.25)
])
def test_scalars_of_every_kind(scalar):
    for dtype in (jnp.float32, jnp.bfloat16):
        g = jnp.array([4.0, -8.0], dtype)
        for tx in (lionax.sgd(scalar), lionax.chain(lionax.scale(scalar), lionax.scale(-1.0))):
            update, _ = jax.jit(tx.update)(g, tx.init(g))
            assert update.dtype == dtype
            assert update.tolist() == [-1.0, 2.0]
        clipped, _ = (tx := lionax.clip_by_global_norm(scalar)).update(g, tx.init(g))
        assert clipped.dtype == dtype


def test_a_schedule_sees_the_steps_from_zero():
    tx = lionax.sgd(lambda step: step.astype(jnp.float32))
    state, seen = tx.init(PARAMS), []
    for _ in range(3):
        update, state = tx.update({"w": jnp.array([1.0, 1.0])}, state)
        seen.append(-float(update["w"][0]))
    assert seen == [0.0, 1.0, 2.0]


def test_get_hyperparams_reports_what_the_last_step_used():
    tx = lionax.lion(cases.SCHEDULE, b1=lionax.inject(0.8))
    state = tx.init(PARAMS)
    for step in range(3):
        _, state = tx.update(GRADS, state, PARAMS)
        held = lionax.get_hyperparams(state)
        assert set(held) == {"learning_rate", "b1"}
        assert float(held["learning_rate"]) == pytest.approx(float(cases.SCHEDULE(step)))
        assert float(held["b1"]) == pytest.approx(0.8)
        assert held["b1"].dtype == jnp.float32


@pytest.mark.parametrize("rate", [0.5, optax.constant_schedule(0.5), lionax.inject(0.5)])
def test_assigning_needs_no_retrace(rate):
    tx, traces = lionax.sgd(rate), []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        return tx.step(params, state, grads)

    def moved(state):
        return float(PARAMS["w"][0] - step(PARAMS, state, GRADS)[0]["w"][0])

    state = tx.init(PARAMS)
    assert moved(state) == 0.5
    for value in (0.25, 1, np.float64(0.125), jnp.bfloat16(2.0)):
        assert moved(lionax.set_hyperparams(state, learning_rate=value)) == float(value)
    assigned = lionax.set_hyperparams(state, learning_rate=0.25)
    _, later = step(PARAMS, assigned, GRADS)
    assert moved(later) == 0.25  # it stays
    back = lionax.set_hyperparams(assigned, learning_rate=None)
    if not isinstance(rate, type(lionax.inject(0.5))):
        assert moved(back) == 0.5
    assert len(traces) == 1


def test_assigning_works_under_jit_and_inside_of_optax():
    tx = optax.chain(optax.clip(1.0), lionax.lion(0.5, weight_decay=0.0))
    state = jax.jit(lambda state, value: lionax.set_hyperparams(state, learning_rate=value))(
        tx.init(PARAMS), 0.25)
    updates, _ = tx.update(GRADS, state, PARAMS)
    assert updates["w"].tolist() == [-0.25, 0.25]


def test_names_shared_by_several_are_qualified():
    tx = lionax.partition({"head": lionax.sgd(0.1), "body": lionax.sgd(0.2)},
                          {"a": "head", "b": "body"})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    held = {name: round(float(value), 3) for name, value in lionax.get_hyperparams(state).items()}
    assert held == {"head/learning_rate": 0.1, "body/learning_rate": 0.2}
    state = lionax.set_hyperparams(state, **{"head/learning_rate": 1.0})
    updates, _ = tx.update(params, state, params)
    assert float(updates["a"][0]) == -1.0
    chained = lionax.chain(lionax.scale_by_learning_rate(1.0), lionax.scale_by_learning_rate(2.0))
    assert sorted(map(float, lionax.get_hyperparams(chained.init(params)).values())) == [1.0, 2.0]
    two = optax.chain(lionax.sgd(0.1), lionax.sgd(0.2)).init(params)
    assert len(lionax.get_hyperparams(two)) == 2


def test_bad_assignments():
    state = lionax.lion(0.1).init(PARAMS)
    with pytest.raises(KeyError, match="no hyperparameter 'b1'; it holds learning_rate"):
        lionax.set_hyperparams(state, b1=0.5)
    with pytest.raises(TypeError, match="learning_rate='a'"):
        lionax.set_hyperparams(state, learning_rate="a")
    assert lionax.get_hyperparams({}) == {}


def test_injected_values_can_be_mapped():
    tx = lionax.lion(0.1, b1=lionax.inject(0.9))
    state = tx.init(PARAMS)
    states = jax.vmap(lambda rate: lionax.set_hyperparams(state, learning_rate=rate))(jnp.array(
        [0.1, 0.2]))
    moved = jax.vmap(lambda state: tx.step(PARAMS, state, GRADS)[0]["w"][0])(states)
    np.testing.assert_allclose(1.0 - moved, [0.1001, 0.2002], rtol=1e-5)


def test_assigning_keeps_the_sharding():
    mesh = jax.make_mesh((8,), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(lionax.sgd(0.1).init(PARAMS), everywhere)
    new = lionax.set_hyperparams(state, learning_rate=0.2)
    assert lionax.get_hyperparams(new)["learning_rate"].sharding == everywhere


def test_float64_learning_rates_are_not_rounded():
    with jax.enable_x64(True):
        g = jnp.ones(2, jnp.float64)
        update, _ = (tx := lionax.sgd(0.1)).update(g, tx.init(g))
        assert update.tolist() == [-0.1, -0.1]


def test_an_assigned_rate_fits_a_flax_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lionax.sgd(0.1), wrt=nnx.Param)
    optimizer.opt_state = lionax.set_hyperparams(optimizer.opt_state, learning_rate=0.5)
    assert float(lionax.get_hyperparams(optimizer.opt_state)["learning_rate"]) == 0.5
    before = model.kernel[...]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads))(model, optimizer)
    np.testing.assert_allclose(model.kernel[...], before - 0.5, rtol=1e-6)


def test_states_under_vmap_take_one_value_or_an_array():
    tx = lionax.sgd(0.1)
    states = jax.vmap(lambda p: tx.init(p))(jnp.ones((3, 2)))
    for values in (0.5, jnp.array([0.1, 0.2, 0.3])):
        assigned = lionax.set_hyperparams(states, learning_rate=values)
        moved = jax.vmap(lambda state: tx.update(jnp.ones(2), state)[0][0])(assigned)
        np.testing.assert_allclose(-moved, np.broadcast_to(values, 3), rtol=1e-6)


def test_a_donated_state_takes_no_array_of_the_callers_along():
    rate = jnp.float32(0.1)
    tx = lionax.sgd(optax.constant_schedule(rate))
    params = {"w": jnp.ones(2)}
    jax.jit(tx.step, donate_argnums=(0, 1))(params, tx.init(params), GRADS)
    assert float(rate) == pytest.approx(0.1)


def test_occurrences_are_numbered():
    names = lambda *txs: set(lionax.get_hyperparams(lionax.chain(*txs).init(PARAMS)))
    two = names(lionax.sgd(0.1), lionax.sgd(0.2))
    assert two == {
        "scale_by_learning_rate/0/learning_rate", "scale_by_learning_rate/1/learning_rate"
    }
    assert names(lionax.clip(1.0), lionax.sgd(0.1), lionax.sgd(0.2)) == two


@pytest.mark.parametrize(("make", "name", "value", "accepted"), [
    (lambda: lionax.lion(0.1), "learning_rate", -0.1, "a finite number of at least 0"),
    (lambda: lionax.lion(0.1), "learning_rate", np.inf, "a finite number of at least 0"),
    (lambda: lionax.lion(0.1), "learning_rate", np.nan, "a finite number of at least 0"),
    (lambda: lionax.lion(0.1, b2=lionax.inject(0.9)), "b2", 1.5, r"a number in \[0, 1\]"),
    (lambda: lionax.lamb(0.1, b2=lionax.inject(0.9)), "b2", 1.0, r"a number in \[0, 1\)"),
    (lambda: lionax.ema(lionax.inject(0.9)), "decay", 1.0, r"a number in \[0, 1\)"),
    (lambda: lionax.ema(lionax.inject(0.9), debias=False), "decay", 2.0, r"a number in \[0, 1\]"),
    (lambda: lionax.params_ema(lionax.inject(0.9)), "decay", 2.0, r"a number in \[0, 1\]"),
    (lambda: lionax.clip(lionax.inject(1.0)), "max_delta", -1.0, "a number of at least 0"),
    (lambda: lionax.clip_by_global_norm(lionax.inject(1.0)), "max_norm", -1.0,
     "a number of at least 0"),
    (lambda: lionax.unscale(lionax.inject(2.0)), "factor", 0.0, "a finite number other than 0"),
    (lambda: lionax.sgd(0.1, lionax.inject(0.9)), "momentum", 1.5, r"a number in \[0, 1\]"),
    (lambda: lionax.adamw(0.1, weight_decay=lionax.inject(0.1)), "weight_decay", -1.0,
     "a finite number of at least 0"),
    (lambda: lionax.lamb(0.1, max_trust_ratio=lionax.inject(9.0)), "max_trust_ratio", -1.0,
     "a finite number of at least 0"),
])
def test_assigned_values_have_the_range_of_given_ones(make, name, value, accepted):
    state = optax.chain(make()).init(PARAMS)
    message = rf"set_hyperparams: {name}={value} is not accepted; give {accepted}"
    with pytest.raises(ValueError, match=message):
        lionax.set_hyperparams(state, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}=.* is not accepted"):
        lionax.set_hyperparams(state, **{name: np.float32(value)})
    jax.jit(lambda state, value: lionax.set_hyperparams(state, **{name: value}))(state, value)


def test_an_infinite_limit_is_a_limit():
    state = lionax.clip_by_global_norm(lionax.inject(1.0)).init(PARAMS)
    lionax.set_hyperparams(state, max_norm=np.inf)


@pytest.mark.parametrize("wrap", [
    lambda tx: tx, lambda tx: lionax.accumulate(tx, 2), lambda tx: lionax.skip_nonfinite(tx, 2),
    lambda tx: lionax.dynamic_loss_scale(lionax.accumulate(tx, 2))])
def test_names_are_short_whatever_stands_around(wrap):
    tx = wrap(lionax.lion(0.1, b1=lionax.inject(0.9)))
    assert set(lionax.get_hyperparams(tx.init(PARAMS))) == {"learning_rate", "b1"}


def test_a_group_s_name_does_not_depend_on_the_other_groups():
    params = {"x": jnp.ones(2), "y": jnp.ones(2)}
    for other in (lionax.sgd(0.1), lionax.set_to_zero()):
        tx = lionax.partition({"x": lionax.sgd(0.1), "y": other}, {"x": "x", "y": "y"})
        assert "x/learning_rate" in lionax.get_hyperparams(tx.init(params))
        lionax.set_hyperparams(tx.init(params), **{"x/learning_rate": 0.2})
        lionax.set_hyperparams(tx.init(params), learning_rate=0.2)


def test_flax_serializes_a_state():
    flax_serialization = pytest.importorskip("flax.serialization")
    state = lionax.set_hyperparams(lionax.lion(0.1).init(PARAMS), learning_rate=0.5)
    data = flax_serialization.to_bytes(state)
    assert isinstance(state.hyperparameters.values["learning_rate"], jax.Array)  # as before
    with pytest.raises(ValueError, match="b1"):  # a file of other names
        flax_serialization.from_bytes(lionax.lion(0.1, b1=lionax.inject(0.9)).init(PARAMS), data)
    restored = flax_serialization.from_bytes(lionax.lion(0.1).init(PARAMS), data)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert float(lionax.get_hyperparams(restored)["learning_rate"]) == 0.5
