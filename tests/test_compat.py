"""The constructors of other systems, on the recorded runs of these systems."""

import inspect
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_golden import CONFIG, ENTRIES, GOLDEN, split

import lionax
from lionax.compat import dtensor, keras2, keras3, keras_schedules, tf_models

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONSTRUCTORS = {
    "tf_keras2_lion": keras2.Lion, "tf_keras2_sgd": keras2.SGD, "dtensor_sgd_tf212": dtensor.SGD,
    "dtensor_sgd_tf213": keras2.SGD, "keras3_lion": keras3.Lion, "keras3_sgd": keras3.SGD,
    "keras3_lamb": keras3.Lamb, "tfm_lamb": tf_models.LAMB
}
SLOTS = {"momentum": "mu", "velocity": "nu", "m": "mu", "v": "nu", "ema": "params_ema"}


def exempt(entry):
    """A function of no arguments is refused; gradients are dense in JAX."""
    return (entry["ctor"].get("learning_rate") == {"callable": "counter"} or
            "sparse_gradients_for" in entry)


def make(entry):
    arguments = dict(entry["ctor"])
    rate = arguments.get("learning_rate")
    if isinstance(rate, dict) and "schedule" in rate:
        rate = dict(rate)
        arguments["learning_rate"] = getattr(keras_schedules, rate.pop("schedule"))(**rate)
    elif isinstance(rate, dict) and "tensor" in rate:
        arguments["learning_rate"] = jnp.float32(rate["tensor"])
    for key in ("exclude_from_weight_decay", "exclude_after_build"):
        if key in entry and key not in arguments:
            excluded = entry[key]
            # After the optimizer is built, Keras 3 accepts the call and takes it.
            arguments["exclude_from_weight_decay"] = excluded
    if "mesh" in entry and entry["system"].endswith("tf213") and entry["config"] != "mesh_none":
        arguments["mesh"] = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    return CONSTRUCTORS[entry["system"]](**arguments)


OURS = {
    name: entry
    for name, entry in ENTRIES.items()
    if entry["system"] in CONSTRUCTORS and not exempt(entry)
}
REPLAYED = [name for name, entry in OURS.items() if entry["file"]]
REFUSED = [name for name, entry in OURS.items() if not entry["file"]]


def slot(state, name, entry):
    if name == "momentum" and "sgd" in entry["system"]:
        return jax.tree.map(lambda t: -t, optax.tree.get(state, "trace"))  # Keras's points downhill
    if name == "accumulator":  # a sum that is not live was used
        return jax.tree.map(lambda total, live: jnp.where(live == 0, 0.0, total),
                            optax.tree.get(state, "gradients"), optax.tree.get(state, "live"))
    return optax.tree.get(state, SLOTS[name])


def assert_close(actual, trace, call, tolerance, where):
    """To a fraction of the leaf's greatest magnitude so far: a sum that cancels keeps roundings.

    Returns the largest error in these terms.
    """
    largest = split(np.fmax.reduce(np.abs(trace[: call + 1])))
    error = 0.0
    for leaf, values in split(trace[call]).items():
        scale = np.nanmax(np.abs(largest[leaf]), initial=1e-30)
        np.testing.assert_allclose(np.asarray(actual[leaf]), values, rtol=0, atol=tolerance * scale,
                                   err_msg=f"{leaf}: {where}")
        error = max(error, cases.largest_error(actual[leaf], values, scale))
    return error


def inputs(entry, trace, call, state):
    """The state and the gradients with which a recorded call was made."""
    absent = entry.get("none_gradient", {}).get(str(call), [])
    grads = {
        leaf: None if leaf in absent else jnp.asarray(values)
        for leaf, values in split(trace["grad"][call]).items()
    }
    if call == entry.get("lr_assign", {}).get("before_call"):
        state = lionax.set_hyperparams(state, learning_rate=entry["lr_assign"]["value"])
    return state, grads


@pytest.mark.one_in(4)
@pytest.mark.promise("Exact", "Recorded runs of Keras 2 and 3, DTensor and the Model Garden are "
                     "replayed by their own arguments")
@pytest.mark.parametrize("mode", ["jitted step", *(
    pytest.param(mode, marks=pytest.mark.slow) for mode in ("jitted update", "step", "update"))])
@pytest.mark.parametrize("name", cases.grouped(REPLAYED, 16))
def test_replay(name, mode, figure):
    entry = OURS[name]
    with np.load(GOLDEN / entry["file"]) as recorded:
        trace = {key: recorded[key] for key in recorded.files}
    tx, tolerance = make(entry), 2e-5 if "lamb" in name else 2e-6
    params = {leaf: jnp.asarray(values) for leaf, values in split(trace["init"]).items()}

    def by_update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return lionax.apply_updates(params, updates), state

    step = by_update if mode.endswith("update") else tx.step
    step = jax.jit(step) if mode.startswith("jitted") else step
    state, errors = tx.init(params), []
    for call in range(CONFIG["steps"]):
        params, state = step(params, *inputs(entry, trace, call, state))
        errors.append(assert_close(params, trace["param"], call, tolerance, f"after call {call}"))
        errors += [
            assert_close(slot(state, key, entry), trace[f"slot/{key}"], call, tolerance,
                         f"{key} after call {call}") for key in entry.get("slots", [])
            if f"slot/{key}" in trace and not (key == "momentum" and "sgd" in name and
                                               not entry["ctor"].get("momentum"))]
    figure("calls", CONFIG["steps"])
    figure("largest error", max(errors))
    if "final" in trace and entry["ctor"].get("use_ema"):
        assert_close(lionax.averaged_params(state), trace["final"][None], 0, tolerance, "final")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reference_refuses_is_refused(name):
    with pytest.raises((ValueError, TypeError)):
        make(OURS[name])


def test_a_function_of_no_arguments_is_refused_with_the_remedy():
    for constructor in set(CONSTRUCTORS.values()):
        with pytest.raises(TypeError, match=r"takes no step; .* Give a schedule,"):
            constructor(learning_rate=lambda: 0.1)


def test_equal_calls_are_equal():
    schedule = keras_schedules.PiecewiseConstantDecay([5, 12], [0.1, 0.05, 0.01])
    again = keras_schedules.PiecewiseConstantDecay((5, 12), (0.1, 0.05, 0.01))
    for constructor in set(CONSTRUCTORS.values()):
        assert constructor(schedule) == constructor(again)
        assert hash(constructor(schedule)) == hash(constructor(again))


@pytest.mark.parametrize("bad",
                         ["bias", {"names": ["bias"]}, {"var_names": "bias"}, {"var_list": [3]}])
def test_bad_exclusions(bad):
    with pytest.raises((ValueError, TypeError), match="exclude_from_weight_decay"):
        keras2.Lion(weight_decay=0.1, exclude_from_weight_decay=bad)


def test_bad_schedules():
    for make_schedule in (keras_schedules.ExponentialDecay, keras_schedules.InverseTimeDecay):
        with pytest.raises(ValueError, match="decay_steps=0"):
            make_schedule(0.1, 0, 0.5)
    with pytest.raises(ValueError, match="one value more than boundaries"):
        keras_schedules.PiecewiseConstantDecay([1, 2], [0.1, 0.2])


KERAS3 = [name for name in REPLAYED if name.startswith("keras3")]


@pytest.mark.parametrize("name", KERAS3)
def test_keras_configs_there_and_back(name):
    entry = OURS[name]
    tx = keras3.from_config(entry["get_config"])
    assert keras3.to_config(tx) == entry["get_config"]
    made = {**keras3.to_config(make(entry)), "name": entry["get_config"]["name"]}
    rate = made.pop("learning_rate")
    expected = dict(entry["get_config"])
    recorded = expected.pop("learning_rate")  # Keras keeps it in float32
    assert made == expected
    if isinstance(rate, dict):
        assert keras3.from_config({"learning_rate": rate
                                   }) == keras3.from_config({"learning_rate": recorded})
    else:
        assert rate == pytest.approx(recorded, rel=1e-7)
    serialized = {
        "module": "keras.optimizers", "class_name": type_of(entry), "config": entry["get_config"],
        "registered_name": None
    }
    assert keras3.from_config(serialized) == tx


def type_of(entry):
    return entry["cls"].rpartition(".")[2]


@pytest.mark.parametrize(("config", "message"), [
    (3, "is not a dict"),
    ({"class_name": "Adam", "config": {}}, "class_name='Adam'"),
    ({"class_name": "Lion"}, "config=None"),
    ({"learning_rate": 0.1, "foo": 1}, "Lion.foo is not accepted"),
    ({"learning_rate": "0.1"}, "Lion.learning_rate='0.1'"),
    ({"learning_rate": {"class_name": "os.system", "config": {}}}, "learning_rate: "
     "class_name='os.system'"),
    ({"learning_rate": {"class_name": "CosineDecay", "config": {"steps": 1}}}, "CosineDecay.steps "
     "is not accepted"),
    ({"learning_rate": {"class_name": "CosineDecay", "config": {}}}, "CosineDecay: .*missing"),
    ({"beta_1": 0.0}, "beta_1=0.0"),
    ({"exclude_from_weight_decay": None}, "exclude_from_weight_decay "
     "is not accepted"),
])
def test_bad_keras_configs(config, message):
    with pytest.raises(ValueError, match=message):
        keras3.from_config(config)


def test_what_keras_has_no_config_for():
    with pytest.raises(TypeError, match="was not made by Lion, SGD, Lamb"):
        keras3.to_config(lionax.lion(0.1))
    with pytest.raises(TypeError, match="has no config in Keras"):
        keras3.to_config(keras3.Lion(optax.constant_schedule(0.1)))


def test_the_table_names_recorded_runs_and_every_argument():
    text = (GOLDEN.parent.parent / "docs" / "compat.md").read_text()
    runs = set(re.findall(r"`((?:tf_keras2|optax|keras3|dtensor|tfm|torch|lion)_\w+/[\w-]+)`",
                          text))
    assert runs <= set(ENTRIES)
    assert len(runs) > 60
    for constructor in set(CONSTRUCTORS.values()):
        for argument in inspect.signature(constructor).parameters:
            assert argument == "kwargs" or re.search(rf"[`(]{argument}[`(]", text), argument
