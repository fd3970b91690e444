"""A run that goes on under another definition."""

import logging
import pickle

import cases
import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lionax

PARAMS = {"head": {"w": cases.normal(3, 2), "b": jnp.zeros(2)}, "body": cases.normal(4)}
STEPS = 3


def frozen(tx):
    return lionax.partition({"train": tx, "freeze": lionax.set_to_zero()},
                            lionax.labels({"head": "freeze"}, default="train"))


CHANGES = {
    "clip": (lambda: lionax.lion(0.1),
             lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1))),
    "average": (lambda: lionax.lamb(0.1),
                lambda: lionax.chain(lionax.lamb(0.1), lionax.params_ema(0.9))),
    "injected": (lambda: lionax.lion(0.1),
                 lambda: lionax.lion(0.1, b1=lionax.inject(0.9))),
    "schedule": (lambda: lionax.lion(0.1), lambda: lionax.lion(cases.SCHEDULE)),
    "accumulate": (lambda: lionax.lamb(0.1), lambda: lionax.accumulate(lionax.lamb(0.1), 2)),
    "skip": (lambda: lionax.lamb(0.1), lambda: lionax.skip_nonfinite(lionax.lamb(0.1), 5)),
    "frozen": (lambda: lionax.lamb(0.1), lambda: frozen(lionax.lamb(0.1))),
    "dtype": (lambda: lionax.lion(0.1), lambda: lionax.lion(0.1, mu_dtype=jnp.bfloat16)),
}


def through_pickle(state, path):
    return pickle.loads(pickle.dumps(state))


def through_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.eval_shape(lambda: state))


def trained(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(STEPS):
        params, state = tx.step(params, state, cases.gradients(params, t))
    return params, state


@pytest.mark.parametrize("saved", cases.but_for_fast([through_pickle, through_orbax],
                                                     through_pickle))
@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_both_definitions_have_is_taken_over(name, back, saved, tmp_path):
    before, after = (make() for make in (CHANGES[name][::-1] if back else CHANGES[name]))
    params, state = trained(before)
    like = after.init(PARAMS)
    state = saved(state, tmp_path)
    moved = lionax.cast_state(state, like)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, like)
    inner = moved.rules.inner if hasattr(moved.rules, "inner") else moved
    of_old = state.rules.inner if hasattr(state.rules, "inner") else state
    assert int(inner.count) == int(of_old.count)
    for old, new in zip(jax.tree.leaves(optax.tree.get(state, "mu")),
                        jax.tree.leaves(optax.tree.get(moved, "mu")), strict=False):
        if name != "frozen":
            assert jnp.array_equal(old.astype(new.dtype), new)
    after.step(params, moved, cases.gradients(params, STEPS))


WRAPPERS = {"skip": lambda tx: lionax.skip_nonfinite(tx, 3), "monitor": lionax.monitor,
            "accumulate": lambda tx: lionax.accumulate(tx, 2),
            "both": lambda tx: lionax.monitor(lionax.accumulate(tx, 2))}
GROUPS = {
    "rates": lambda wrap: lionax.partition(
        {"a": wrap(lionax.adam(1e-3)), "b": wrap(lionax.adam(0.1))},
        lionax.labels({"head": "a"}, default="b")),
    "injected": lambda wrap: lionax.partition(
        {"a": wrap(lionax.sgd(lionax.inject(1e-3))), "b": wrap(lionax.sgd(lionax.inject(0.1)))},
        lionax.labels({"head": "a"}, default="b")),
    "chain": lambda wrap: lionax.chain(wrap(lionax.trace(0.9)), wrap(lionax.trace(0.5)),
                                       lionax.scale(-0.1))}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("groups", GROUPS)
def test_to_the_same_definition_a_state_stays(groups, wrap):
    """Also where several parts have the same rules."""
    tx = GROUPS[groups](WRAPPERS[wrap])
    _, state = trained(tx)
    cases.assert_equal(lionax.cast_state(state, tx.init(PARAMS), strict=True), state)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_counters_stay_with_the_group_that_goes_on(momentum):
    groups = {"a": lionax.accumulate(lionax.sgd(0.1, momentum), 2),
              "b": lionax.accumulate(lionax.sgd(0.1, momentum), 4)}
    labels = lionax.labels({"head": "a"}, default="b")
    params, state = trained(lionax.partition(groups, labels))
    tx = lionax.partition(groups | {"a": lionax.set_to_zero()}, labels)
    moved = lionax.cast_state(state, tx.init(params))
    cases.assert_equal(moved.rules["b"], state.rules["b"])


def test_a_frozen_group_keeps_the_slots_of_the_others():
    _, state = trained(lionax.lamb(0.1))
    moved = lionax.cast_state(state, frozen(lionax.lamb(0.1)).init(PARAMS))
    mu = optax.tree.get(moved, "mu")
    assert isinstance(mu["head"]["w"], optax.MaskedNode)
    assert jnp.array_equal(mu["body"], optax.tree.get(state, "mu")["body"])
    assert float(lionax.get_hyperparams(moved)["train/learning_rate"]) == pytest.approx(0.1)


def test_an_assigned_rate_stays_assigned():
    state = lionax.set_hyperparams(lionax.lion(0.1).init(PARAMS), learning_rate=0.5)
    tx = lionax.chain(lionax.clip(1.0), lionax.lion(0.1))
    moved = lionax.cast_state(state, tx.init(PARAMS))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), moved, PARAMS)
    assert float(jnp.max(jnp.abs(updates["body"]))) > 0.4


def test_the_logger_tells_each_field_that_is_new_or_gone(caplog):
    plain, averaged = lionax.lion(0.1), lionax.chain(lionax.lion(0.1), lionax.params_ema(0.9))
    with caplog.at_level(logging.INFO, logger="lionax"):
        lionax.cast_state(plain.init(PARAMS), averaged.init(PARAMS))
        lionax.cast_state(averaged.init(PARAMS), plain.init(PARAMS))
    assert [record.message for record in caplog.records] == [
        "cast_state: ParamsEmaState.params_ema (3 arrays) is new, as in `like`",
        "cast_state: ParamsEmaState.params_ema (3 arrays) is gone, dropped"]


def test_strict_accepts_a_change_of_dtypes_only():
    plain, low = lionax.lion(0.1), lionax.lion(0.1, mu_dtype=jnp.bfloat16)
    lionax.cast_state(plain.init(PARAMS), low.init(PARAMS), strict=True)
    averaged = lionax.chain(plain, lionax.params_ema(0.9))
    with pytest.raises(ValueError, match=r"ParamsEmaState\.params_ema .* is new.*strict"):
        lionax.cast_state(plain.init(PARAMS), averaged.init(PARAMS), strict=True)


def test_another_shape_is_refused():
    tx = lionax.lion(0.1)
    with pytest.raises(ValueError, match=r"ScaleByLionState\.mu of 'w' has shape \(2,\)"):
        lionax.cast_state(tx.init({"w": jnp.ones(2)}), tx.init({"w": jnp.ones(3)}))


@pytest.mark.parametrize("after", [
    lambda: lionax.chain(lionax.clip(1.0), lionax.lion(0.1)),
    lambda: lionax.lion(0.1, b1=lionax.inject(0.9)),
    lambda: lionax.sgd(0.1, 0.9)])
def test_a_state_of_another_definition_is_refused_with_the_first_difference(after):
    state = lionax.lion(0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"(?s)first difference.*lionax\.cast_state\(state"):
        after().step(PARAMS, state, PARAMS)


def test_an_injected_value_does_not_override_a_new_schedule():
    before = lionax.lion(lionax.inject(0.1))
    after = lionax.lion(lambda step: 0.5 / jnp.float32(step + 1))
    state = lionax.cast_state(before.init(PARAMS), after.init(PARAMS))
    _, state = after.step(PARAMS, state, PARAMS)
    assert float(lionax.get_hyperparams(state)["learning_rate"]) == 0.5


def test_an_assigned_rate_serves_all_new_groups():
    state = lionax.set_hyperparams(lionax.sgd(0.1).init(PARAMS), learning_rate=0.5)
    tx = lionax.partition({"x": lionax.sgd(0.1), "y": lionax.sgd(0.2)},
                          lionax.labels({"head": "x"}, default="y"))
    held = lionax.get_hyperparams(lionax.cast_state(state, tx.init(PARAMS)))
    assert {name: float(value) for name, value in held.items()} == {
        "x/learning_rate": 0.5, "y/learning_rate": 0.5}


def test_a_state_of_optax_is_refused_with_the_way():
    with pytest.raises(TypeError, match=r"holds no state of lionax; .*compat\.from_optax"):
        lionax.cast_state(optax.lion(0.1).init(PARAMS), lionax.lion(0.1).init(PARAMS))


def test_a_random_key_in_the_state_is_taken_over():
    noisy = lionax.chain(optax.add_noise(0.1, 0.1, 0), lionax.sgd(0.1))
    state = noisy.init(PARAMS)
    moved = lionax.cast_state(state, lionax.chain(lionax.clip(1.0), noisy).init(PARAMS))
    assert "key" in str([leaf.dtype for leaf in jax.tree.leaves(moved)])


def test_a_train_state_of_flax_goes_on():
    params = {"w": jnp.ones(2)}
    old, new = (TrainState.create(apply_fn=None, params=params, tx=tx) for tx in (
        lionax.lion(0.1), lionax.chain(lionax.clip(1.0), lionax.lion(0.1, mu_dtype="bfloat16"))))
    old = old.apply_gradients(grads=params)
    moved = lionax.cast_state(old, new)
    assert int(moved.opt_state.count) == 1
    assert moved.opt_state.rules[1].mu["w"].dtype == jnp.bfloat16
