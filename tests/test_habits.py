"""What users of Optax do, beside what its own test files do (test_optax_files.py)."""

import enum
import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}
GRADS = {"w": jnp.array([[0.5, 1.0], [-2.0, 0.0]]), "b": jnp.array([3.0, -1.0])}
COMPLEX = {"z": jnp.array([1 + 2j, -0.5j, 3.0], jnp.complex64)}
STATELESS = {
    "clip": lambda: lionax.clip(1.0), "clip_by_norm": lambda: lionax.clip_by_norm(1.0),
    "clip_by_global_norm": lambda: lionax.clip_by_global_norm(1.0),
    "scale": lambda: lionax.scale(2.0), "decay": lambda: lionax.add_decayed_weights(0.1),
    "trust": lionax.scale_by_trust_ratio, "identity": lionax.identity,
    "zero": lionax.set_to_zero, "unscale": lambda: lionax.unscale(2.0),
    "chain": lambda: lionax.chain(lionax.clip(1.0), lionax.scale(2.0)),
    "masked": lambda: lionax.masked(lionax.scale(2.0), lionax.matching("w")),
    "partition": lambda: lionax.partition({"a": lionax.set_to_zero()}, "a"),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", STATELESS)
def test_what_keeps_nothing_has_an_empty_state_and_takes_any(name):
    tx = STATELESS[name]()
    assert tx.init(PARAMS) == optax.EmptyState()
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for state in (None, (), {"anything": 1}):
        again, kept = tx.update(GRADS, state, PARAMS)
        assert kept is state
        cases.assert_equal(again, updates)


@pytest.mark.parametrize("tx", [
    lionax.scale_by_schedule(lambda step: 0.1), lionax.scale(lionax.inject(2.0)),
    lionax.scale_by_learning_rate(0.1), lionax.trace(0.9), lionax.chain(lionax.clip(1.0),
                                                                       lionax.sgd(0.1))])
def test_what_counts_or_holds_has_a_state(tx):
    assert int(tx.update(GRADS, tx.init(PARAMS), PARAMS)[1].count) == 1


@pytest.mark.parametrize("case", cases.CASES)
def test_no_leaf_of_a_state_is_a_bool(case):
    for leaf in jax.tree.leaves(cases.CASES[case].make().init(PARAMS)):
        assert jnp.issubdtype(leaf.dtype, jnp.number)


@pytest.mark.parametrize("name", ["sgd", "trace", "ema", "decay", "adam", "lion", "clip", "norm"])
def test_complex_leaves_are_as_in_optax(name):
    make = {
        "sgd": lambda m: m.sgd(0.1, 0.9), "trace": lambda m: m.trace(0.9, True),
        "ema": lambda m: m.ema(0.5), "decay": lambda m: m.add_decayed_weights(0.1),
        "adam": lambda m: m.scale_by_adam(), "lion": lambda m: m.scale_by_lion(),
        "clip": lambda m: m.clip_by_global_norm(0.5), "norm": lambda m: m.scale_by_trust_ratio(),
    }[name]
    ours, theirs = make(lionax), make(optax)
    states = ours.init(COMPLEX), theirs.init(COMPLEX)
    for t in range(4):
        grads = jax.tree.map(lambda z, t=t: z * (0.3 + 0.1j * t), COMPLEX)
        (a, one), (b, two) = (tx.update(grads, state, COMPLEX)
                              for tx, state in zip((ours, theirs), states, strict=True))
        states = one, two
        assert a["z"].dtype == jnp.complex64
        np.testing.assert_allclose(a["z"], b["z"], rtol=3e-6)


def test_a_loss_scale_keeps_the_imaginary_part():
    params = jnp.array([0j])
    for tx in (lionax.dynamic_loss_scale(lionax.sgd(1.0), 1.0),
               lionax.chain(lionax.unscale(1.0), lionax.sgd(1.0))):
        updates, _ = tx.update(jnp.array([1j]), tx.init(params), params)
        assert complex(updates[0]) == -1j


def test_a_complex_accumulator_and_none_without_an_imaginary_part():
    state = lionax.sgd(0.1, 0.9, accumulator_dtype=jnp.complex64).init(COMPLEX)
    assert optax.tree.get(state, "trace")["z"].dtype == jnp.complex64
    for dtype in (jnp.bfloat16, jnp.float32):
        with pytest.raises(TypeError, match=r"trace: 'z': .*imaginary part"):
            lionax.trace(0.9, accumulator_dtype=dtype).init(COMPLEX)


@pytest.mark.parametrize("make", [lambda m: m.scale(2.0), lambda m: m.clip(2.0),
                                  lambda m: m.identity(), lambda m: m.set_to_zero()])
def test_integer_leaves_are_taken_by_what_has_no_state(make):
    leaf = {"n": jnp.array([1, -5])}
    ours, theirs = (make(m).update(leaf, make(m).init(leaf))[0] for m in (lionax, optax))
    np.testing.assert_array_equal(ours["n"], theirs["n"])


class Group(enum.Enum):
    """Labels."""

    SLOW = 1
    FAST = 2


@pytest.mark.parametrize("labels", [(0, 1), (True, False), (Group.SLOW, Group.FAST), ("a", "b")])
def test_labels_are_anything_hashable(labels):
    one, two = labels
    tx = lionax.partition({one: lionax.scale(2.0), two: lionax.trace(0.5)}, {"w": one, "b": two})
    state = tx.init(PARAMS)
    assert set(state.rules) == {str(one), str(two)}
    updates, _ = tx.update(GRADS, state)
    cases.assert_equal(updates, {"w": 2 * GRADS["w"], "b": GRADS["b"]})


def test_labels_that_are_one_string_are_refused():
    with pytest.raises(ValueError, match=r"two labels are both '1'"):
        lionax.partition({1: lionax.scale(2.0), "1": lionax.scale(3.0)}, "1")


def test_labels_of_no_tree():
    tx = lionax.partition({}, {})
    assert tx.update({}, tx.init({}))[0] == {}


def test_functions_see_the_updates_where_there_are_no_parameters():
    tx = lionax.masked(lionax.scale(2.0), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    cases.assert_equal(updates, {"w": 2 * GRADS["w"], "b": GRADS["b"]})


def test_a_path_that_two_leaves_share():
    params = {"a/b": jnp.array(1.0), "a": {"b": jnp.array(1.0)}}
    tree = {"a/b": True, "a": {"b": False}}
    for mask in (tree, lambda params: tree, {"a/b": True, "a": False}):
        updates, _ = (tx := lionax.masked(lionax.scale(2.0), mask)).update(params, tx.init(params))
        assert (float(updates["a/b"]), float(updates["a"]["b"])) == (2.0, 1.0)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("init", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("update", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_rate_that_optax_holds_may_be_traced_or_not(momentum, init, update):
    def build(learning_rate):
        return lionax.chain(lionax.clip(1.0), lionax.sgd(learning_rate, momentum))

    tx = optax.inject_hyperparams(build)(learning_rate=0.1)
    state = init(tx.init)(PARAMS)
    updates, new = update(tx.update)(GRADS, state, PARAMS)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert float(updates["b"][1]) == pytest.approx(0.1)


@pytest.mark.parametrize("jitted", [True, False])
def test_inject_hyperparams(jitted):
    tx = optax.inject_hyperparams(lionax.sgd)(learning_rate=0.1, momentum=0.9, nesterov=True)
    init = jax.jit(tx.init) if jitted else tx.init
    state = init(PARAMS)
    updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert float(jnp.max(jnp.abs(updates["w"]))) == 0.0
    if jitted:
        assert float(optax.tree.get(state, "learning_rate")) == 0.0


def test_a_traced_decay():
    ema = jax.jit(lambda d: lionax.ema(d).init(jnp.ones(2)))(0.9)
    assert ema.rules.ema.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("case", cases.but_for_fast(
    ["lion", "lamb", "accumulate", "skip_nonfinite", "chain"], "lion"))
def test_arithmetic_on_states_and_steps_inside_of_cond(case):
    tx = cases.CASES[case].make()
    state = tx.init(PARAMS)
    finite = optax.apply_if_finite(tx, 3)
    finite.update(GRADS, jax.jit(finite.init)(PARAMS), PARAMS)
    jax.eval_shape(lambda: tx.step(PARAMS, state, GRADS))
    taken = jax.lax.cond(True, lambda: tx.step(PARAMS, state, GRADS), lambda: (PARAMS, state))
    cases.assert_close(taken, jax.jit(tx.step)(PARAMS, state, GRADS), rtol=2e-6)
    look = optax.lookahead(tx, 2, 0.5, reset_state=True)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    look_state = look.init(pair)
    for _ in range(2):
        _, look_state = jax.jit(look.update)(GRADS, look_state, pair)
    chex.assert_trees_all_equal_shapes_and_dtypes(look_state, look.init(pair))


@pytest.mark.slow
def test_leaves_on_devices_of_their_own():
    one, two = jax.devices()[:2]
    params = {"w": jax.device_put(PARAMS["w"], one), "b": jax.device_put(PARAMS["b"], two)}
    grads = {"w": jax.device_put(GRADS["w"], one), "b": jax.device_put(GRADS["b"], two)}
    for tx in (lionax.lion(0.1), lionax.lamb(0.1), lionax.accumulate(lionax.sgd(0.1, 0.9), 2)):
        if tx == lionax.accumulate(lionax.sgd(0.1, 0.9), 2):
            with pytest.raises(ValueError, match=r"same devices; 'b' is on .*, 'w' on"):
                tx.step(params, tx.init(params), grads)
            continue
        new, state = tx.step(params, tx.init(params), grads)
        assert new["w"].devices() == {one}
        assert optax.tree.get(state, "mu")["b"].devices() == {two}
        cases.assert_close(jax.device_get(new), jax.device_get(
            tx.step(PARAMS, tx.init(PARAMS), GRADS)[0]))
    with pytest.raises(ValueError, match=r"same devices; 'b' is on .*, 'w' on"):
        (tx := lionax.clip_by_global_norm(1.0)).update(grads, tx.init(params))


def test_injected_values_are_no_constants_of_the_program():
    texts = []
    for rate in (1e-3, 1e-4):
        tx = lionax.lion(lionax.inject(rate), b1=lionax.inject(rate))
        texts.append(jax.jit(tx.step).lower(PARAMS, tx.init(PARAMS), GRADS).as_text())
    assert texts[0] == texts[1]


def test_an_extra_argument_like_the_parameters_is_masked_as_the_updates_are():
    seen = []

    def update(updates, state, params=None, *, grad, value):
        seen.append((grad, value))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = lionax.partition({"a": spy, "b": lionax.sgd(0.1)}, {"w": "a", "b": "b"})
    tx.update(GRADS, tx.init(PARAMS), PARAMS, grad=GRADS, value=1.0)
    assert seen[0][0]["w"] is not None
    assert isinstance(seen[0][0]["b"], optax.MaskedNode)
    assert seen[0][1] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda m: functools.partial(m.adam, 0.01),
                                  lambda m: functools.partial(m.adamw, 0.01, weight_decay=0.1)])
def test_adam_is_optax_with_low_precision_moments(make):
    tx = make(lionax)(mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "nu")["w"].dtype == jnp.bfloat16
    ours, _ = tx.update(GRADS, state, PARAMS)
    theirs, _ = (peer := make(optax)()).update(GRADS, peer.init(PARAMS), PARAMS)
    cases.assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [lionax.clip_by_norm, lionax.clip_by_global_norm])
def test_maml_through_a_clip_at_zero(clip):
    def loss(w):
        grad = jax.grad(lambda w: jnp.sum(w**2))(w)
        return jnp.sum((w - (tx := clip(1.0)).update(grad, tx.init(w))[0] - 1.0) ** 2)

    derivative = jax.grad(loss)(jnp.zeros(3))
    assert derivative.tolist() == [2.0, 2.0, 2.0]  # 2·(0 - 1)·(1 - 2)


def test_an_average_without_memory_is_the_last_value():
    state = (tx := lionax.ema(0.0)).init(jnp.zeros(1))
    _, state = tx.update(jnp.array([1e8]), state)
    assert tx.update(jnp.ones(1), state)[0].tolist() == [1.0]


def test_shapes_are_enough_for_init():
    for dtype in (jnp.float32, jnp.complex64):
        shapes = {"w": jax.ShapeDtypeStruct((2, 3), dtype)}
        for tx in (lionax.lion(0.1), lionax.lamb(0.1), lionax.sgd(0.1, 0.9)):
            tx.init(shapes)


def test_averages_with_a_decay_near_one():
    one = jnp.ones(1)
    updates, _ = (tx := lionax.ema(0.99999)).update(one, tx.init(one))
    assert float(updates[0]) == pytest.approx(1.0, rel=1e-6)
    for debias in (False, True):
        tx = lionax.params_ema(0.99999, debias=debias)
        step = jax.jit(lambda state, _, tx=tx: (tx.update(jnp.zeros(1), state, one)[1], None))
        state, _ = jax.lax.scan(step, tx.init(jnp.zeros(1)), length=10**5)
        exact = 1.0 if debias else 1 - 0.99999**10**5
        assert float(lionax.averaged_params(state)[0]) == pytest.approx(exact, rel=3e-4)


def test_an_average_that_warms_up():
    tx = lionax.params_ema(lambda step: jnp.minimum(0.9, step / (step + 1.0)))
    params, state = jnp.array([7.0]), tx.init(jnp.array([0.0]))
    _, state = tx.update(jnp.zeros(1), state, params)
    assert lionax.averaged_params(state).tolist() == [7.0]
    with pytest.raises(ValueError, match="debias=True is not accepted with a schedule"):
        lionax.params_ema(lambda step: 0.9, debias=True)


@pytest.mark.slow
def test_trust_ratios_are_bounded_and_taken_by_layer():
    params, update = jnp.full((2, 3, 4), 5.0), jnp.ones((2, 3, 4))
    params = params.at[1].mul(2.0)
    tx = lionax.scale_by_trust_ratio(batch_axes=(0,))
    stacked, _ = tx.update(update, tx.init(params), params)
    for i in range(2):
        alone, _ = (one := lionax.scale_by_trust_ratio()).update(update[i], one.init(params[i]),
                                                                 params[i])
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-6)
    tx = lionax.scale_by_trust_ratio(max_ratio=2.0)
    assert float(tx.update(update, tx.init(params), params)[0][0, 0, 0]) == 2.0
    with pytest.raises(ValueError, match=r"'s' has shape \(\), not all of .*batch_axes=\(0,\)"):
        lionax.scale_by_trust_ratio(batch_axes=(0,)).init({"s": jnp.ones(())})
    empty = jnp.zeros((3, 0))
    tx = lionax.scale_by_trust_ratio(batch_axes=(0,))
    assert tx.update(empty, tx.init(empty), empty)[0].shape == (3, 0)


def test_a_transformation_with_another_init_is_optax_s():
    tx = lionax.ema(0.9)
    new = tx._replace(init=lambda params: tx.init(jnp.zeros(1)))
    chained = lionax.chain(new, lionax.scale(2.0))
    chained.init(jnp.zeros(5))
    assert "Foreign" in repr(new)
