"""Trajectories of lionax beside those of the installed Optax, and lionax inside of Optax."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from benchmarks.peers import optax_step
from lionax.core.layout import Layout, sweeps
from lionax.core.tree import Leaves

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 50
PEERS = [name for name, case in cases.CASES.items() if case.peer]
LOW_STATE = ["lion_mu_bfloat16",
             "sgd_accumulator"]  # Optax also multiplies in the state's bfloat16, lionax in float32


def trajectories(case, tree, compiled):
    """Parameters of lionax and Optax after each step."""
    ours, peer = cases.CASES[case].make(), cases.CASES[case].peer()
    params = cases.TREES[tree]()
    steps = [ours.step, optax_step(peer)]
    steps = [jax.jit(step) for step in steps] if compiled else steps
    carries = [(params, ours.init(params)), (params, peer.init(params))]
    for t in range(STEPS if compiled else 12):
        grads = cases.gradients(params, t)
        carries = [step(*carry, grads) for step, carry in zip(steps, carries, strict=True)]
        yield carries[0][0], carries[1][0]


@pytest.mark.one_in(3)
@pytest.mark.promise("Exact", "The trajectories in float32 are those of Optax's optimizers")
@pytest.mark.parametrize("case", cases.grouped(
    [case for case in PEERS if case not in LOW_STATE], 8))
@pytest.mark.parametrize(
    ("tree", "compiled"),
    [("nested", True), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("array", True), ("scalar", True), ("zero_size", True), ("empty", True),
        ("nested", False), ("scalar", False)))])
def test_float32_trajectory(case, tree, compiled, figure):
    largest = None  # so far: a sum that cancels keeps the rounding of its terms
    for ours, theirs in trajectories(case, tree, compiled):
        largest = jax.tree.map(lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), theirs,
                               theirs if largest is None else largest)
        # Outside of jit Optax rounds each product, lionax what a compiled stage leaves of them.
        figure("largest error", cases.assert_close(
            ours, theirs, max(cases.CASES[case].rtol, 0 if compiled else 1e-6), largest))


EXACT = {
    "lion_mu_bfloat16": lambda: optax.lion(0.01), "sgd_accumulator": lambda: optax.sgd(0.01, 0.9)
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", cases.grouped(["lion_decay", "lamb", "sgd_momentum", "chain", *LOW_STATE], 2))
def test_low_precision_is_nearer_to_the_float64_result_than_optax(case):
    """Float32 inside: one rounding, where Optax rounds after every operation."""
    ours, peer = cases.CASES[case].make(), cases.CASES[case].peer()
    exact = EXACT.get(case, cases.CASES[case].peer)()
    with jax.enable_x64(True):
        params = {
            "w": cases.normal(64, 32, dtype=jnp.float32 if case in LOW_STATE else jnp.bfloat16)
        }
        exact_params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        states = [ours.init(params), peer.init(params), exact.init(exact_params)]
        error = np.zeros(2)
        for t in range(12):
            grads = jax.tree.map(lambda p, t=t: normal_like(p, t), params)
            updates = []
            for i, (tx, p) in enumerate(((ours, params), (peer, params), (exact, exact_params))):
                update, states[i] = tx.update(
                    jax.tree.map(lambda g, x: g.astype(x.dtype), grads, p), states[i], p)
                updates.append(np.asarray(update["w"]).astype(np.float64))
            error += [np.sum(np.abs(update - updates[2])) for update in updates[:2]]
    assert error[0] < error[1]


def normal_like(leaf, step):
    return cases.normal(*leaf.shape, seed=step + 1, dtype=leaf.dtype)


@pytest.mark.slow
def test_float64_trajectory_of_lamb():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))}
        ours, peer = lionax.lamb(0.01, weight_decay=0.1), optax.lamb(0.01, weight_decay=0.1)
        a, b = (params, ours.init(params)), (params, peer.init(params))
        for t in range(10):
            grads = jax.tree.map(lambda g: g.astype(jnp.float64), cases.gradients(params, t))
            a, b = ours.step(*a, grads), optax_step(peer)(*b, grads)
        cases.assert_close(a[0], b[0], rtol=1e-6)  # Optax's bias correction is in float32
        assert a[0]["w"].dtype == jnp.float64


# lionax inside of Optax.


PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([0.1, -0.2])}
GRADS = {"w": jnp.array([[0.1, 0.2], [-0.3, 0.0]]), "b": jnp.array([1.0, -1.0])}


def run(tx, steps=4, params=PARAMS):
    step = jax.jit(optax_step(tx))
    state = tx.init(params)
    for t in range(steps):
        params, state = step(params, state, jax.tree.map(lambda g, t=t: g * (t + 1), GRADS))
    return params, state


def test_chain():
    cases.assert_equal(
        run(optax.chain(optax.clip(0.5), lionax.lion(0.1)))[0],
        run(optax.chain(optax.clip(0.5), optax.lion(0.1)))[0])


def test_multi_transform_and_partition():
    for combine in (optax.multi_transform, optax.partition):
        labels = {"w": "lion", "b": "lamb"}
        ours = combine({"lion": lionax.lion(0.1), "lamb": lionax.lamb(0.1)}, labels)
        peer = combine({"lion": optax.lion(0.1), "lamb": optax.lamb(0.1)}, labels)
        cases.assert_close(run(ours)[0], run(peer)[0], rtol=1e-6)


def test_multi_steps():
    ours, peer = run(optax.MultiSteps(lionax.lion(0.1),
                                      2))[0], run(optax.MultiSteps(optax.lion(0.1), 2))[0]
    cases.assert_close(ours, peer, rtol=1e-6)


@pytest.mark.slow
def test_masked_apply_if_finite_and_flatten():
    for wrap in (lambda tx: optax.masked(tx, {"w": True, "b": False}),
                 lambda tx: optax.apply_if_finite(tx, 3), optax.flatten):
        cases.assert_equal(run(wrap(lionax.lion(0.1)))[0], run(wrap(optax.lion(0.1)))[0])


def test_inject_hyperparams():
    ours, state = run(optax.inject_hyperparams(lionax.lion)(learning_rate=cases.SCHEDULE, b1=0.9))
    theirs, _ = run(optax.inject_hyperparams(optax.lion)(learning_rate=cases.SCHEDULE, b1=0.9))
    cases.assert_equal(ours, theirs)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(cases.SCHEDULE(3)))


def test_tree_get_finds_slots_and_hyperparameters():
    _, state = run(lionax.lion(0.1))
    assert optax.tree.get(state, "mu")["w"].shape == (2, 2)
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.1)


def test_is_an_optax_transformation():
    tx = lionax.lion(0.1)
    assert isinstance(tx, optax.GradientTransformation)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert len(tx) == 2
    init, update = tx
    state = init(PARAMS)
    cases.assert_equal(update(GRADS, state, PARAMS), tx.update(GRADS, state, PARAMS))


# Optax inside of lionax.


def test_foreign_transformations_end_a_sweep_and_get_extra_arguments():
    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: u * value, updates), state

    takes_value = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = lionax.chain(lionax.scale(2.0), takes_value, optax.scale(0.5), lionax.scale(-1.0))
    names = optax_name(takes_value), optax_name(optax.scale(0.5))
    stages = Layout.of(tx.definition, Leaves.of(PARAMS, PARAMS)).stages
    assert [[stage.rule.name for stage in sweep] for sweep in sweeps(stages)] == [
        ["scale"], [names[0]], [names[1]], ["scale"]]
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS, state, PARAMS, value=3.0, loss=None)
    cases.assert_close(updates, jax.tree.map(lambda g: -3.0 * g, GRADS), rtol=1e-6)
    params, _ = tx.step(PARAMS, state, GRADS, value=3.0)
    cases.assert_close(params, optax.apply_updates(PARAMS, updates))
    outer = optax.chain(tx, lionax.scale(1.0))
    cases.assert_equal(outer.update(GRADS, outer.init(PARAMS), PARAMS, value=3.0)[0], updates)


def optax_name(tx):
    return lionax.chain(tx).definition.name


def test_reduce_on_plateau_takes_the_value():
    tx = lionax.chain(lionax.sgd(1.0),
                      optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0))
    state = tx.init(PARAMS)
    sizes = []
    for _ in range(5):
        updates, state = tx.update(GRADS, state, PARAMS, value=jnp.float32(1.0))
        sizes.append(float(-updates["b"][0]))
    assert sizes[0] == 1.0
    assert sizes[-1] < 1.0


@pytest.mark.parametrize("combine", [
    lambda tx: lionax.masked(tx, {"w": True, "b": False}),
    lambda tx: lionax.partition({"a": tx, "b": lionax.set_to_zero()}, {"w": "a", "b": "b"})
])
def test_foreign_transformations_see_their_leaves_only(combine):
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    tx = combine(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for tree in seen[0]:
        assert isinstance(tree["b"], optax.MaskedNode)
        assert tree["w"].shape == (2, 2)
