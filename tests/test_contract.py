"""What holds for every transformation, over the table of cases and trees."""

import functools
import pickle

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.transforms.measuring import MonitorState

EVERY_SIXTH_CASE = pytest.mark.parametrize("case", cases.grouped(cases.CASES, 6))
CONDITIONALS = ("accumulate", "skip_nonfinite", "skip_if", "dynamic_loss_scale", "monitor",
                "monitor_conditional")


def over(*names, slow=()):
    """Trees; on some of them only the slow tests run."""
    return pytest.mark.parametrize("tree", cases.but_for_slow(names, slow))


def kept(tree):
    """The arrays that a step reads: all but measurements, which it replaces without a look."""
    measured = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, MonitorState))
    measured = {id(leaf) for node in measured if isinstance(node, MonitorState)
                for leaf in jax.tree.leaves((node.values, node.age))}
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.size and id(leaf) not in measured]


def structure(state):
    """Shapes, dtypes and containers, as the compiler sees them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type),
        jax.eval_shape(lambda: state))


@pytest.mark.parametrize("case", cases.grouped(cases.CASES)[::3])  # test_sweep.py has the others
@over(*cases.TREES, slow=("array", "zero_size", "float16"))
def test_state_and_params_keep_their_form_and_the_update_has_the_gradients(case, tree):
    tx, params, state, _ = cases.prepared(case, tree)
    grads = cases.gradients(params, 1)
    updates, new_state = jax.eval_shape(tx.update, grads, state, params)
    assert structure(new_state) == structure(state)
    assert structure(updates) == structure(grads)
    new_params, stepped = jax.eval_shape(tx.step, params, state, grads)
    assert structure(new_params) == structure(params)
    assert structure(stepped) == structure(state)


@pytest.mark.one_in(3)
@EVERY_SIXTH_CASE
@over(*cases.FLOAT32, slow=set(cases.FLOAT32) - {"nested"})
def test_step_is_update_and_apply_updates(case, tree):
    """Bit for bit in one compiled program, but to 1e-6 for conditionals."""
    run = cases.prepared(case, tree)

    @jax.jit
    def two_calls(params, state, grads):
        updates, state = run.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    a = b = run[1:3]
    for t in range(8):
        grads = cases.gradients(run.params, t)
        a, b = run.step(*a, grads), two_calls(*b, grads)
    if case in CONDITIONALS:
        cases.assert_close(a, b)
    else:
        cases.assert_equal(a, b)


@pytest.mark.one_in(2)
@EVERY_SIXTH_CASE
@over("nested", "bfloat16", slow=("bfloat16",))
def test_donated_steps_give_equal_bits_with_and_without_the_compiler_options(case, tree):
    run = cases.prepared(case, tree)
    with_options = jax.jit(run.tx.step, donate_argnums=(0, 1),
                           compiler_options=lionax.compiler_options())
    results = []
    for step in (run.donating, with_options):
        carry = jax.tree.map(jnp.copy, run[1:3])
        program = step.lower(*carry, cases.gradients(run.params, 0)).compile()
        written = sum(leaf.nbytes for leaf in kept(carry))
        assert program.memory_analysis().alias_size_in_bytes >= written
        for t in range(4):
            given, carry = carry, step(*carry, cases.gradients(run.params, t))
            assert all(leaf.is_deleted() for leaf in kept(given))
        results.append(carry)
    cases.assert_equal(*results)


@EVERY_SIXTH_CASE
def test_no_two_leaves_of_a_first_state_share_a_buffer(case):
    """A buffer cannot be donated twice."""
    leaves = jax.tree.leaves(cases.prepared(case, "nested").state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@EVERY_SIXTH_CASE
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
    return "schedule" not in case and case not in ("chain_foreign", "sgd_nesterov",
                                                   "lion_decoupled", "lamb_decay_mask")


@pytest.mark.parametrize("case", [case for case in cases.CASES if _picklable(case)])
def test_pickles(case):
    tx = cases.CASES[case].make()
    again = pickle.loads(pickle.dumps(tx))
    assert type(again) is lionax.Transformation
    assert again == tx
    assert repr(again) == repr(tx)


@pytest.mark.parametrize(
    "case", [name for name in cases.CASES if "<function" not in repr(cases.CASES[name].make())])
def test_repr_is_the_call(case):
    tx = cases.CASES[case].make()
    assert eval(repr(tx), {**vars(lionax), "P": jax.P}) == tx


def test_repr_leaves_defaults_out():
    assert repr(lionax.lion(1e-3)) == "lion(learning_rate=0.001)"
    assert repr(lionax.lion(
        1e-3, 0.9,
        mask=lionax.matching("bias"))) == "lion(learning_rate=0.001, mask=matching('bias'))"
    assert repr(lionax.chain(lionax.clip(1.0), lionax.lion(lionax.inject(1e-3)))) == (
        "chain(clip(max_delta=1.0), lion(learning_rate=inject(0.001)))")


@EVERY_SIXTH_CASE
def test_equal_static_arguments_share_a_trace(case):
    if case == "chain_foreign":
        pytest.skip("Optax's own functions compare by identity")

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(1)
    def step(tx, params, state, grads):
        return tx.step(params, state, grads)

    params = cases.TREES["array"]()
    for _ in range(3):
        tx = cases.CASES[case].make()
        jax.eval_shape(functools.partial(step, tx), params, tx.init(params), params)


@EVERY_SIXTH_CASE
def test_a_gradient_of_none_keeps_the_slots(case):
    if case == "chain_foreign":
        pytest.skip("Optax's trace drops the state of a None")
    tx, ones = cases.CASES[case].make(), jnp.ones((4, 3))
    params = {"a": ones, "b": ones}
    _, state = tx.step(params, tx.init(params), params)
    updates, new = tx.update({"a": ones, "b": None}, state, params)
    assert updates["b"] is None
    assert structure(new) == structure(state)
    stepped, new = tx.step(params, state, {"a": ones, "b": None})
    assert structure(new) == structure(state)
    chex.assert_trees_all_equal(stepped["b"], params["b"])
    slots = [[leaf for path, leaf in jax.tree_util.tree_leaves_with_path(of)
              if "'b'" in jax.tree_util.keystr(path[-1:])] for of in (state, new)]
    chex.assert_trees_all_equal(*slots)


@EVERY_SIXTH_CASE
def test_other_placeholders_pass_through(case):
    tx = cases.CASES[case].make()
    params = {"a": jnp.ones((4, 3)), "b": optax.MaskedNode(), "c": None}
    state = tx.init(params)
    grads = {"a": jnp.ones((4, 3)), "b": optax.MaskedNode(), "c": None}
    updates, new = tx.update(grads, state, params)
    assert isinstance(updates["b"], optax.MaskedNode)
    assert updates["c"] is None
    assert structure(new) == structure(state)


@EVERY_SIXTH_CASE
def test_permuting_leaves_permutes_results(case):
    if case == "lamb_trust_mask":
        pytest.skip("random bits are by the number of the leaf")
    tx = cases.CASES[case].make()
    shapes = {"a": (4, 3), "b": (3,), "c": (4, 3)}
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
    cases.assert_close(run(turned), run({name: name for name in params}),
                       rtol=1e-6 if "chain" in case or "global" in case else 0)


@EVERY_SIXTH_CASE
def test_zero_gradients_on_zero_parameters_stay_zero(case):
    tx, params = cases.CASES[case].make(), {"w": jnp.zeros((4, 3))}
    new, _ = tx.step(params, tx.init(params), params)
    np.testing.assert_array_equal(new["w"], 0)


@EVERY_SIXTH_CASE
def test_scalars_never_change_a_dtype(case):
    dtypes = {"half": jnp.float16, "brain": jnp.bfloat16, "single": jnp.float32}
    params = {name: jnp.ones((4, 3), dtype) for name, dtype in dtypes.items()}
    tx = cases.CASES[case].make()
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert {name: leaf.dtype for name, leaf in updates.items()
            } == {name: leaf.dtype for name, leaf in params.items()}


@pytest.mark.parametrize(
    "make",
    [lionax.lion, lionax.lamb, lambda lr: lionax.sgd(lr, 0.9), lionax.scale_by_learning_rate])
def test_learning_rates_can_be_mapped_and_differentiated(make):
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])

    def train(lr):
        tx = make(lr)
        return tx.step(params, tx.init(params), grads)[0]

    rates = jnp.array([0.1, 0.2, 0.4])
    cases.assert_close(
        jax.vmap(train)(rates), jnp.stack([train(float(rate)) for rate in rates]), rtol=1e-6)
    slope = jax.jacobian(train)(0.1)
    np.testing.assert_allclose(slope, (train(0.2) - train(0.1)) / np.float32(0.1), rtol=1e-4)
