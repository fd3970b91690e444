"""What holds for every transformation, over the table of cases and trees."""

import functools
import pickle

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

EVERY_CASE = pytest.mark.parametrize("case", cases.CASES)


def over(*names, slow=("array", "zero_size", "float16")):
    """Trees; on some of them only the slow tests run."""
    return pytest.mark.parametrize("tree", [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names])


def structure(state):
    """Shapes, dtypes and containers, as the compiler sees them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type), jax.eval_shape(lambda: state))


@EVERY_CASE
@over(*cases.TREES)
def test_state_and_params_keep_their_form_and_the_update_has_the_gradients(case, tree):
    tx, params = cases.CASES[case].make(), cases.TREES[tree]()
    state = tx.init(params)
    grads = cases.gradients(params, 1)
    call = (lambda f, *arguments: f(*arguments)) if tree == "nested" else jax.eval_shape
    updates, new_state = call(tx.update, grads, state, params)
    assert structure(new_state) == structure(state)
    assert structure(updates) == structure(grads)
    new_params, stepped = call(tx.step, params, state, grads)
    assert structure(new_params) == structure(params)
    assert structure(stepped) == structure(state)


@EVERY_CASE
@over("nested", "none_leaves", "empty", "mixed", slow=("empty", "mixed"))
def test_steps_run_in_scan(case, tree):
    tx, params = cases.CASES[case].make(), cases.TREES[tree]()
    state = tx.init(params)
    grads = [cases.gradients(params, t) for t in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scanned, _ = jax.lax.scan(lambda carry, g: (tx.step(*carry, g), None), (params, state), stacked, length=4)
    step = jax.jit(tx.step)
    for g in grads:
        params, state = step(params, state, g)
    cases.assert_equal(scanned, (params, state), rtol=2e-2 if tree == "mixed" else 1e-5)


@EVERY_CASE
@over(*cases.FLOAT32)
def test_step_is_update_and_apply_updates_bit_for_bit(case, tree):
    tx, params = cases.CASES[case].make(), cases.TREES[tree]()

    def two_calls(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    runs = [(jax.jit(tx.step), jax.jit(two_calls), 8)]
    if tree == "nested":
        runs.append((tx.step, two_calls, 2))
    for one, two, steps in runs:
        a = b = params, state
        for t in range(steps):
            grads = cases.gradients(params, t)
            a, b = one(*a, grads), two(*b, grads)
        cases.assert_equal(a, b)


@EVERY_CASE
def test_jit_is_eager(case):
    # Products are fused with sums under jit, so elements differ in the last bit; a sign could differ wholly, which the
    # gradients, being far from cancelling, do not provoke.
    tx, params = cases.CASES[case].make(), cases.TREES["nested"]()
    eager = jitted = params, tx.init(params)
    step = jax.jit(tx.step)
    for t in range(4):
        grads = cases.gradients(params, t)
        eager, jitted = tx.step(*eager, grads), step(*jitted, grads)
    cases.assert_equal(jitted, eager, rtol=1e-5)


@EVERY_CASE
def test_equal_definitions_are_equal_objects(case):
    one, two = cases.CASES[case].make(), cases.CASES[case].make()
    if case == "chain_foreign":  # two functions made by two calls of Optax differ
        assert one != two
        return
    assert one == two
    assert hash(one) == hash(two)
    assert repr(one) == repr(two)
    assert {one: 1}[two] == 1


def _picklable(case):
    """Functions that are local to another cannot be pickled; a schedule of Optax's is one."""
    return "schedule" not in case and case not in ("chain_foreign", "sgd_nesterov", "lion_decoupled", "lamb_decay_mask")


@pytest.mark.parametrize("case", [case for case in cases.CASES if _picklable(case)])
def test_pickles(case):
    tx = cases.CASES[case].make()
    again = pickle.loads(pickle.dumps(tx))
    assert type(again) is lionax.Transformation
    assert again == tx
    assert repr(again) == repr(tx)


@pytest.mark.parametrize("case", [name for name in cases.CASES if "<function" not in repr(cases.CASES[name].make())])
def test_repr_is_the_call(case):
    tx = cases.CASES[case].make()
    assert eval(repr(tx), vars(lionax).copy()) == tx


def test_repr_leaves_defaults_out():
    assert repr(lionax.lion(1e-3)) == "lion(learning_rate=0.001)"
    assert repr(lionax.lion(1e-3, 0.9, mask=lionax.matching("bias"))) == "lion(learning_rate=0.001, mask=matching('bias'))"
    assert repr(lionax.chain(lionax.clip(1.0), lionax.lion(lionax.inject(1e-3)))) == (
        "chain(clip(max_delta=1.0), lion(learning_rate=inject(0.001)))")


@EVERY_CASE
def test_equal_static_arguments_share_a_trace(case):
    if case == "chain_foreign":
        pytest.skip("Optax's own functions compare by identity")
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params, state, grads):
        traces.append(1)
        return tx.step(params, state, grads)

    params = cases.TREES["array"]()
    for _ in range(3):
        tx = cases.CASES[case].make()
        step(tx, params, tx.init(params), params)
    assert len(traces) == 1


@EVERY_CASE
@pytest.mark.parametrize("tree", ["nested", "bfloat16"])
def test_donated_buffers_alias(case, tree):
    tx, params = cases.CASES[case].make(), cases.TREES[tree]()
    state = tx.init(params)
    compiled = jax.jit(tx.step, donate_argnums=(0, 1)).lower(params, state, cases.gradients(params, 0)).compile()
    written = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= written
    # Copied, since an eager step may hand back an array that it was given.
    expected = jax.tree.map(jnp.array, tx.step(params, state, cases.gradients(params, 0)))
    donated = compiled(params, state, cases.gradients(params, 0))
    cases.assert_equal(donated, expected, rtol=1e-2 if tree == "bfloat16" else 1e-5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.size)


@EVERY_CASE
def test_a_gradient_of_none_keeps_the_slots(case):
    tx, params = cases.CASES[case].make(), {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    if case == "chain_foreign":
        pytest.skip("Optax's trace drops the state of a None")
    _, state = tx.step(params, tx.init(params), {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})
    updates, new = tx.update({"a": jnp.ones((2, 2)), "b": None}, state, params)
    assert updates["b"] is None
    assert structure(new) == structure(state)
    stepped, new = jax.jit(tx.step)(params, state, {"a": jnp.ones((2, 2)), "b": None})
    assert structure(new) == structure(state)
    np.testing.assert_array_equal(stepped["b"], params["b"])
    before = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.rules) if "'b'" in jax.tree_util.keystr(path[-1:])]
    after = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new.rules) if "'b'" in jax.tree_util.keystr(path[-1:])]
    cases.assert_equal(after, before)


@EVERY_CASE
def test_other_placeholders_pass_through(case):
    tx = cases.CASES[case].make()
    params = {"a": jnp.ones((2, 2)), "b": optax.MaskedNode(), "c": None}
    state = tx.init(params)
    grads = {"a": jnp.ones((2, 2)), "b": optax.MaskedNode(), "c": None}
    updates, new = tx.update(grads, state, params)
    assert isinstance(updates["b"], optax.MaskedNode)
    assert updates["c"] is None
    assert structure(new) == structure(state)


@EVERY_CASE
def test_permuting_leaves_permutes_results(case):
    tx = cases.CASES[case].make()
    shapes = {"a": (3, 2), "b": (2,), "c": (3, 2)}
    params = {name: cases.normal(*shape, seed=ord(name)) for name, shape in shapes.items()}
    grads = {name: cases.normal(*shape, seed=ord(name) + 9) for name, shape in shapes.items()}
    turned = dict(zip("abc", "cab", strict=True))

    def run(rename):
        p = {rename[name]: leaf for name, leaf in params.items()}
        state = tx.init(p)
        for _ in range(3):
            p, state = tx.step(p, state, {rename[name]: leaf for name, leaf in grads.items()})
        return {name: p[rename[name]] for name in params}

    # A norm over the tree is summed in the order of the leaves.
    cases.assert_equal(run(turned), run({name: name for name in params}), rtol=1e-6 if "chain" in case or "global" in case else 0)


@EVERY_CASE
def test_zero_gradients_on_zero_parameters_stay_zero(case):
    tx, params = cases.CASES[case].make(), {"w": jnp.zeros((3, 2))}
    new, _ = tx.step(params, tx.init(params), params)
    np.testing.assert_array_equal(new["w"], 0)


@EVERY_CASE
def test_scalars_never_change_a_dtype(case):
    params = {"half": jnp.ones((2, 2), jnp.float16), "brain": jnp.ones((2, 2), jnp.bfloat16), "single": jnp.ones((2, 2))}
    tx = cases.CASES[case].make()
    updates, _ = tx.update(params, tx.init(params), params)
    assert {name: leaf.dtype for name, leaf in updates.items()} == {name: leaf.dtype for name, leaf in params.items()}


@EVERY_CASE
def test_float64(case):
    if case == "chain_foreign":
        pytest.skip("Optax's own rule decides")
    with jax.enable_x64(True):
        params = {"w": jnp.linspace(0.1, 1.0, 6, dtype=jnp.float64).reshape(3, 2)}
        tx = cases.CASES[case].make()
        state = tx.init(params)
        updates, new = tx.update(jax.tree.map(lambda p: p / 3, params), state, params)
        assert updates["w"].dtype == jnp.float64
        assert structure(new) == structure(state)
        rounded, _ = tx.update({"w": (params["w"] / 3).astype(jnp.float32)}, state, {"w": params["w"].astype(jnp.float32)})
        np.testing.assert_allclose(updates["w"], rounded["w"], rtol=1e-5)


@pytest.mark.parametrize("make", [lionax.lion, lionax.lamb, lambda lr: lionax.sgd(lr, 0.9), lionax.scale_by_learning_rate])
def test_learning_rates_can_be_mapped_and_differentiated(make):
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])

    def train(lr):
        tx = make(lr)
        return tx.step(params, tx.init(params), grads)[0]

    rates = jnp.array([0.1, 0.2, 0.4])
    cases.assert_equal(jax.vmap(train)(rates), jnp.stack([train(float(rate)) for rate in rates]), rtol=1e-6)
    slope = jax.jacobian(train)(0.1)
    np.testing.assert_allclose(slope, (train(0.2) - train(0.1)) / np.float32(0.1), rtol=1e-4)
