"""Runs of Keras and Optax that go on in lionax, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TREES, assert_equal, gradients, grouped
from cases import assert_close as assert_trees_close
from test_compat import OURS, REPLAYED, assert_close, inputs, make
from test_golden import CONFIG, GOLDEN, SHAPES, split

import lionax
from benchmarks.peers import optax_step
from lionax.compat import (
    dtensor,
    from_optax,
    from_weights,
    keras2,
    keras3,
    keras_schedules,
    tf_models,
    to_optax,
    to_weights,
)

SWITCH = 10
pytestmark = pytest.mark.usefixtures("standard_promotion")


def names_of(entry):
    return entry.get("optimizer_variable_paths") or entry.get("optimizer_variable_names")


def recorded_weights(entry, trace, call):
    """The optimizer's weights after a call, by the names that were recorded with the run."""
    weights = {}
    for name in names_of(entry):
        last = name.rpartition("/")[2].removesuffix(":0")
        if last in ("iteration", "iter"):
            weights[name] = trace.get("raw_iterations", trace["iterations"])[call]
        elif last == "learning_rate":
            weights[name] = np.float32(trace["lr"][call])
        else:
            spelled = {"ema": {"average"}, "momentum": {"m", "momentum"}}
            words = {*name.removesuffix(":0").split("/"), last.rpartition("_")[2]}
            slot = next(slot for slot in entry["slots"] if words & spelled.get(slot, {slot}))
            path = next(path for path in SHAPES if path in name or path.replace("/", "_") in name)
            weights[name] = split(trace[f"slot/{slot}"][call])[path]
    return weights


RECORDED = [name for name in REPLAYED if OURS[name].get("slots") and names_of(OURS[name])]


@pytest.mark.one_in(4)
@pytest.mark.promise("Exact", "A recorded run of Keras or TensorFlow goes on from its weights")
@pytest.mark.parametrize("form", [
    "list", *(pytest.param(form, marks=pytest.mark.slow) for form in ("dict", "numbers"))])
@pytest.mark.parametrize("name", grouped(RECORDED, 32))
def test_a_recorded_run_goes_on(name, form):
    entry, order = OURS[name], list(SHAPES)
    with np.load(GOLDEN / entry["file"]) as recorded:
        trace = {key: recorded[key] for key in recorded.files}
    tx, tolerance = make(entry), 2e-5 if "lamb" in name else 2e-6
    params = {
        leaf: jnp.asarray(values) for leaf, values in split(trace["param"][SWITCH - 1]).items()
    }
    weights = recorded_weights(entry, trace, SWITCH - 1)
    values = list(weights.values())
    count = SWITCH if entry["system"] == "dtensor_sgd_tf212" else None
    if form == "dict":
        state = from_weights(tx, params, weights, count=count)
    elif form == "list":
        state = from_weights(tx, params, values, order, count=count)
    else:
        state = from_weights(tx, params, {str(i): value for i, value in enumerate(values)},
                             {path: path for path in order}, count=count)
    assert jax.tree.map(lambda x: (x.shape, x.dtype),
                        state) == jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(params))
    for back, value in zip(to_weights(tx, state, order), values, strict=True):
        np.testing.assert_array_equal(back, value)
    if form != "list":
        return
    step = jax.jit(tx.step)
    for call in range(SWITCH, CONFIG["steps"]):
        params, state = step(params, *inputs(entry, trace, call, state))
        assert_close(params, trace["param"], call, tolerance, f"after call {call}")
    expected = recorded_weights(entry, trace, CONFIG["steps"] - 1)
    for (key, value), back in zip(expected.items(), to_weights(tx, state, order), strict=True):
        np.testing.assert_allclose(back, value, rtol=0,
                                   atol=2e-5 * np.max(np.abs(value), initial=1e-3), err_msg=key)


PARAMS = {"a/kernel": jnp.ones((2, 3)), "a/bias": jnp.ones(3), "b": jnp.ones(3)}


def test_checkpoints_of_tensorflow():
    """The keys that its reader lists, of the new optimizers and of the old."""
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    moments = {
        path: np.full(np.shape(leaf), i, np.float32)
        for i, (path, leaf) in enumerate(PARAMS.items())
    }
    tx = keras2.Lion(0.5)
    new = {f"optimizer/_variables/{i + 1}{end}": value for i, value in enumerate(moments.values())}
    new |= {
        f"optimizer/_iterations{end}": 7, f"optimizer/_learning_rate{end}": 0.25,
        f"model/w{end}": np.ones(3)
    }
    state = from_weights(tx, PARAMS, new, list(PARAMS))
    assert int(state.count) == 7
    assert float(lionax.get_hyperparams(state)["learning_rate"]) == 0.25
    assert_equal(optax.tree.get(state, "mu"), jax.tree.map(jnp.asarray, moments))
    tx = tf_models.LAMB(0.5)
    old = {f"model/{path}/.OPTIMIZER_SLOT/optimizer/{slot}{end}": value * (1 if slot == "m" else 10)
           for path, value in moments.items() for slot in "mv"}
    more = {
        f"optimizer/iter{end}": 7, f"optimizer/beta_1{end}": 0.9, f"model/a/kernel{end}": np.ones(
            (2, 3))
    }
    state = from_weights(tx, PARAMS, old | more)
    assert_equal(optax.tree.get(state, "mu"), jax.tree.map(jnp.asarray, moments))
    assert_equal(optax.tree.get(state, "nu"), jax.tree.map(lambda m: 10 * jnp.asarray(m), moments))
    named = {path: path.replace("a/", "layer_with_weights-0/") for path in PARAMS}
    old = {key.replace("a/", "layer_with_weights-0/"): value for key, value in old.items()}
    assert_equal(from_weights(tx, PARAMS, old | {f"optimizer/iter{end}": 7}, named), state)


@pytest.mark.parametrize(("tx", "weights", "variables", "message"), [
    (keras3.Lion(), [1, 0.1, *PARAMS.values()], None, "order of the reference's variables is not "
     "known; give variables="),
    (keras3.Lion(), [1, 0.1, *PARAMS.values()], ["a", "b"], "are not the paths of the leaves, each "
     "once"),
    (keras3.Lion(), [1, *PARAMS.values()], list(PARAMS), "expected are the iteration, the learning "
     "rate, momentum of"),
    (keras3.Lion(), [1, 0.1, *PARAMS.values()], ["b", "a/bias", "a/kernel"], r"momentum of 'b' has "
     r"shape \(2, 3\), the "
     r"parameter \(3,\)"),
    (keras3.Lion(), {"lion/iteration": 1, "lion/learning_rate": 0.1}, None,
     "no weight named a_bias_momentum, the momentum of 'a/bias'"),
    (keras2.Lion(), {
        "iteration:0": 1, "m/a/kernel:0": PARAMS["a/kernel"], "m/a/bias:0": PARAMS["b"],
        "m/b:0": PARAMS["b"], "average/b:0": PARAMS["b"]
    }, None, "'average/b' belongs to no slot"),
    (keras2.Lion(), {
        "m/a/kernel:0": PARAMS["a/kernel"], "m/a/bias:0": PARAMS["b"], "m/b:0": PARAMS["b"]
    }, None, "give count="),
    (keras2.Lion(), {"0": 1, "2": PARAMS["b"]}, list(PARAMS), r"of the numbered weights there are "
     r"only \[0, 2\]"),
])
def test_weights_that_do_not_fit(tx, weights, variables, message):
    with pytest.raises(ValueError, match=message):
        from_weights(tx, PARAMS, weights, variables)


def test_whose_weights_are_not_known():
    with pytest.raises(TypeError, match=r"lion\(learning_rate=0.1\) was not returned by one of "
                                        r"compat.keras3.Lion"):
        from_weights(lionax.lion(0.1), PARAMS, [])
    with pytest.raises(ValueError, match="count=3, but the weights tell of 2 calls"):
        from_weights(dtensor.SGD(), [jnp.ones(2)], {"iteration": 2, "m/0": jnp.ones(2)}, count=3)
    with pytest.raises(ValueError, match="order of the reference's variables is not known"):
        to_weights(keras2.Lion(), keras2.Lion().init(PARAMS))


SCHEDULE = optax.exponential_decay(0.05, 5, 0.8)
PEERS = {
    "lion": (lambda system, rate: system.lion(rate, weight_decay=0.1), 0.0),
    "lion_bfloat16": (lambda system, rate: optax.chain(system.lion(rate, mu_dtype=jnp.bfloat16)),
                      0.0),
    "lamb": (lambda system, rate: system.lamb(rate, weight_decay=0.1), 2e-6),
    "sgd": (lambda system, rate: system.sgd(rate, 0.9, nesterov=True), 0.0),
    "sgd_plain": (lambda system, rate: system.sgd(rate), 0.0),
    "chain": (lambda system, rate: system.chain(system.clip_by_global_norm(1.0), system.lamb(rate)),
              2e-6),
    "masked": (lambda system, rate: system.masked(
        system.lion(rate, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), lambda p: jax.tree.
        map(lambda x: x.ndim > 0, p)), 0.0),
}


@pytest.mark.parametrize("rate", [0.05, SCHEDULE], ids=["number", "schedule"])
@pytest.mark.parametrize("name", grouped(PEERS, 4))
def test_a_run_of_optax_goes_on_and_comes_back(name, rate):
    """Optax to step 10, lionax to 18, Optax to 25: as Optax alone."""
    build, rtol = PEERS[name]
    theirs, ours, params = build(optax, rate), build(lionax, rate), TREES["nested"]()
    if not isinstance(ours, lionax.Transformation):
        ours = lionax.lion(rate, mu_dtype=jnp.bfloat16)
    alone, alone_state = params, theirs.init(params)

    step, their_step = jax.jit(ours.step), jax.jit(optax_step(theirs))
    state = theirs.init(params)
    for call in range(25):
        if call == 10:
            state = from_optax(state, ours.init(params), count=call)
            assert int(state.count) == 10
        if call == 18:
            state = to_optax(state, theirs.init(params))
            assert jax.tree.structure(state) == jax.tree.structure(alone_state)
        grads = gradients(params, call)
        params, state = (step if 10 <= call < 18 else their_step)(params, state, grads)
        alone, alone_state = their_step(alone, alone_state, grads)
        if name == "lion_bfloat16":  # Optax rounds products to bfloat16; the trajectories part
            continue
        assert_trees_close(params, alone, rtol)
    if name == "lion_bfloat16":
        assert optax.tree.get(state, "mu")["dense"]["kernel"].dtype == jnp.bfloat16
    else:
        assert_trees_close(state, alone_state, 10 * rtol)


def test_a_state_that_comes_back_can_be_donated():
    """Optax counts twice, in the optimizer and in its schedule."""
    theirs, params = optax.lamb(SCHEDULE), {"w": jnp.ones(3)}
    state = to_optax(lionax.lamb(SCHEDULE).init(params), theirs.init(params))
    step = jax.jit(optax_step(theirs), donate_argnums=(0, 1))
    _, state = step(params, state, {"w": jnp.ones(3)})
    assert [int(count) for _, count in optax.tree.get_all_with_path(state, "count")] == [1, 1]


def test_states_that_do_not_match():
    params = {"w": jnp.ones(3)}
    state = lionax.lion(0.1).init(params)
    with pytest.raises(ValueError, match=r"the moments are of \['adam'\], those of into of "
                                         r"\['lion'\]"):
        from_optax(optax.lamb(0.1).init(params), state)
    with pytest.raises(ValueError, match=r"has shape \(4,\), that of into \(3,\)"):
        from_optax(optax.lion(0.1).init({"w": jnp.ones(4)}), state)
    with pytest.raises(ValueError, match=r"compat\.from_optax: .*"):
        from_optax(optax.lion(0.1).init({"v": jnp.ones(3)}), state)
    with pytest.raises(ValueError, match=r"holds an array of shape \(\) beside moments and counts; "
                                         r"carry over the parts"):
        from_optax(optax.MultiSteps(optax.lion(0.1), 4).init(params), state)
    with pytest.raises(ValueError, match="two of ScaleByLionState"):
        to_optax(
            lionax.chain(lionax.scale_by_lion(), lionax.lion(0.1)).init(params),
            optax.lion(0.1).init(params))
    with pytest.raises(ValueError, match=r"counts \[0\] steps, count=3"):
        from_optax(optax.lion(0.1).init(params), state, count=3)
    for wrong in (from_optax, to_optax):
        with pytest.raises(TypeError, match="not a lionax State"):
            wrong(optax.lion(0.1).init(params), optax.lion(0.1).init(params))


def test_on_a_mesh_the_state_lies_where_it_was():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = [jax.device_put(jnp.ones(16), sharding)]
    mu = np.arange(16, dtype=np.float32)
    tx = keras3.Lion(keras_schedules.CosineDecay(0.1, 10))
    for state in (from_weights(tx, params, [3, mu]),
                  from_optax([optax.ScaleByLionState(3, [mu])],
                             lionax.lion(0.1).init(params))):
        (moment,) = optax.tree.get(state, "mu")
        assert moment.sharding == sharding
        np.testing.assert_array_equal(moment, mu)
