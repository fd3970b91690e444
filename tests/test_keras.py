"""The installed Keras 3, running on its JAX backend beside lionax."""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import lionax
from lionax.compat import from_weights, keras3, keras_schedules, to_weights

# Keras's variables do not know NumPy's newest protocol; and Keras tells of gradients that are None.
pytestmark = [pytest.mark.usefixtures("standard_promotion"),
              pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy "
                                         "keyword:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")]
SHAPES = {"dense/kernel": (5, 3), "dense/bias": (3,), "norm/scale": (4,), "logit": ()}
STEPS, SWITCH = 25, 10

# The arguments, and what is excluded from decay: the runs that were recorded have one of these at a
# time, here they meet.
RUNS = {
    "decay": ({"weight_decay": 0.1}, {}),
    "exclusions": ({"weight_decay": 0.1,
                    "clipnorm": 0.7}, {"var_names": ["bias", "^sc"], "var_list": ["logit"]}),
    "average": ({
        "weight_decay": 0.05, "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3
    }, {"var_names": ["bias"]}),
    "accumulation": ({
        "weight_decay": 0.1, "gradient_accumulation_steps": 3, "global_clipnorm": 1.0
    }, {"var_names": ["scale"]}),
    "all_at_once": ({
        "weight_decay": 0.1, "gradient_accumulation_steps": 2, "clipvalue": 0.5, "use_ema": True,
        "ema_momentum": 0.7, "ema_overwrite_frequency": 4, "loss_scale_factor": 8.0
    }, {"var_names": ["bias"], "var_list": ["norm/scale"]}),
}
SCHEDULE = ("CosineDecay", {
    "initial_learning_rate": 0.001, "decay_steps": 18, "warmup_target": 0.05, "warmup_steps": 5,
    "alpha": 0.1
})
OPTIMIZERS = {"Lion": {}, "SGD": {"momentum": 0.9, "nesterov": True}, "Lamb": {}}


def initial():
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


@functools.cache
def gradients(call):
    rng = np.random.default_rng([1, call])
    grads = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    if call % 6 == 4:
        grads["dense/bias"] = None
    return grads


class Reference:
    """A Keras optimizer and its variables."""

    def __init__(self, name, arguments, excluded, rate):
        schedule = getattr(keras.optimizers.schedules, rate[0])(
            **rate[1]) if isinstance(rate, tuple) else rate
        self.optimizer = getattr(keras.optimizers, name)(learning_rate=schedule, **arguments)
        self.variables = {}
        for path, value in initial().items():
            *scopes, last = path.split("/")
            with keras.name_scope("/".join(scopes)) if scopes else keras.name_scope(""):
                self.variables[path] = keras.Variable(value, name=last)
        if excluded:
            self.optimizer.exclude_from_weight_decay(
                var_list=[self.variables[path] for path in excluded.get("var_list", [])],
                var_names=excluded.get("var_names"))
        self.optimizer.build(list(self.variables.values()))
        self.apply = jax.jit(self.optimizer.stateless_apply)

    @property
    def params(self):
        return {path: np.asarray(variable) for path, variable in self.variables.items()}

    @property
    def weights(self):
        return [np.asarray(variable) for variable in self.optimizer.variables]

    def step(self, grads):
        held, own = list(self.variables.values()), self.optimizer.variables
        grads = [None if g is None else jnp.asarray(g) for g in grads.values()]
        params, weights = self.apply([variable.value for variable in own], grads,
                                     [variable.value for variable in held])
        for variable, value in zip([*held, *own], [*params, *weights], strict=True):
            variable.assign(value)


def ours(name, arguments, excluded, rate):
    schedule = getattr(keras_schedules, rate[0])(**rate[1]) if isinstance(rate, tuple) else rate
    return getattr(keras3, name)(schedule, exclude_from_weight_decay=excluded, **arguments)


def assert_close(actual, expected, name, where):
    for path, value in expected.items():
        tolerance = (2e-5 if name == "Lamb" else 2e-6) * max(np.max(np.abs(value)), 1.0)
        np.testing.assert_allclose(np.asarray(actual[path]), value, rtol=0, atol=tolerance,
                                   err_msg=f"{path} {where}")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rate", [pytest.param(0.02, marks=pytest.mark.slow), SCHEDULE],
                         ids=["number", "schedule"])
@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", cases.but_for_fast(OPTIMIZERS, "Lion"))
def test_side_by_side_and_switched(name, run, rate):
    """The run beside Keras; one that comes from Keras at step 10 and goes back at step 18."""
    arguments, excluded = {**OPTIMIZERS[name], **RUNS[run][0]}, RUNS[run][1]
    reference = Reference(name, arguments, excluded, rate)
    tx = ours(name, arguments, excluded, rate)
    step = jax.jit(tx.step)
    params = {path: jnp.asarray(value) for path, value in initial().items()}
    state = tx.init(params)
    switched = back = None
    for call in range(STEPS):
        if call == SWITCH:
            switched = {path: jnp.asarray(value) for path, value in reference.params.items()}
            switched_state = from_weights(tx, switched, reference.weights, list(SHAPES))
            by_path = {
                variable.path: np.asarray(variable) for variable in reference.optimizer.variables
            }
            jax.tree.map(np.testing.assert_array_equal, from_weights(tx, switched, by_path),
                         switched_state)
        if call == 18:
            back = Reference(name, arguments, excluded, rate)
            for path, variable in back.variables.items():
                variable.assign(params[path])
            weights = to_weights(tx, state, list(SHAPES))
            assert [w.shape for w in weights] == [w.shape for w in reference.weights]
            back.optimizer.load_own_variables({str(i): weight for i, weight in enumerate(weights)})
        grads = gradients(call)
        params, state = step(params, state, grads)
        reference.step(grads)
        assert_close(params, reference.params, name, f"after call {call}")
        if switched is not None:
            switched, switched_state = step(switched, switched_state, grads)
            assert_close(switched, reference.params, name, f"switched to lionax, after call {call}")
        if back is not None:
            back.step(grads)
            where = f"switched to Keras, after call {call}"
            assert_close(back.params, reference.params, name, where)
    for weight, expected in zip(to_weights(tx, state, list(SHAPES)), reference.weights,
                                strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0,
                                   atol=5e-5 * max(np.max(np.abs(expected)), 1.0))


def test_an_assigned_learning_rate_is_carried_over():
    reference, tx = Reference("Lion", {}, {}, 0.02), keras3.Lion(0.02)
    reference.optimizer.learning_rate = 0.005
    state = from_weights(tx, initial(), reference.weights, list(SHAPES))
    assert float(lionax.get_hyperparams(state)["learning_rate"]) == np.float32(0.005)
    assert to_weights(tx, state, list(SHAPES))[1] == np.float32(0.005)


@pytest.mark.parametrize("rate", [0.02, SCHEDULE], ids=["number", "schedule"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_configs_of_the_installed_keras(name, rate):
    optimizer = Reference(name, {**OPTIMIZERS[name], **RUNS["all_at_once"][0]}, {}, rate).optimizer
    tx = keras3.from_config(optimizer.get_config())
    assert keras3.to_config(tx) == optimizer.get_config()
    assert keras3.from_config(keras.optimizers.serialize(optimizer)) == tx
    again = type(optimizer).from_config(keras3.to_config(tx))
    assert again.get_config() == optimizer.get_config()


SCHEDULES = [
    ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 20, "alpha": 0.2}),
    SCHEDULE,
    ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5}),
    ("ExponentialDecay",
     {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5, "staircase": True}),
    ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5}),
    ("InverseTimeDecay",
     {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5, "staircase": True}),
    ("PiecewiseConstantDecay", {"boundaries": [3, 10, 11], "values": [0.1, 0.05, 0.01, 0.001]}),
    ("PolynomialDecay",
     {"initial_learning_rate": 0.1, "decay_steps": 9, "end_learning_rate": 0.01, "power": 2.0}),
    ("PolynomialDecay", {
        "initial_learning_rate": 0.1, "decay_steps": 9, "end_learning_rate": 0.01, "power": 0.5,
        "cycle": True
    }),
]


@pytest.mark.parametrize(("name", "arguments"), [
    pytest.param(*each, marks=[pytest.mark.slow] * (i % 3 != 1))
    for i, each in enumerate(SCHEDULES)])
def test_schedules(name, arguments):
    theirs, own = getattr(keras.optimizers.schedules,
                          name)(**arguments), getattr(keras_schedules, name)(**arguments)
    for step in range(45):
        expected = np.asarray(theirs(step))
        for value in (own(step), own(jnp.int32(step)), jax.jit(own)(step)):
            np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-9,
                                       err_msg=f"at step {step}")


def test_what_keras_refuses_is_refused():
    for name, arguments in (("Lion", {"beta_1": 0.0}), ("SGD", {"momentum": 1.5}),
                            ("SGD", {"momentum": 1}), ("Lion", {"clipnorm": 1.0, "clipvalue": 1.0}),
                            ("Lamb", {"gradient_accumulation_steps": 1
                                      }), ("Lion", {"use_ema": True, "ema_momentum": 1.5}),
                            ("Lion", {"use_ema": True, "ema_overwrite_frequency": -1
                                      }), ("Lion", {"learning_rate": "0.1"})):
        with pytest.raises((ValueError, TypeError)):
            getattr(keras.optimizers, name)(**arguments)
        with pytest.raises((ValueError, TypeError),
                           match=next(iter(arguments)) if len(arguments) == 1 else "."):
            getattr(keras3, name)(**arguments)


TYPES = {
    "None": None, "True": True, "False": False, "an int": 1, "a float": 0.5, "text": "a",
    "a list": [0.5], "a tuple": (), "a dict": {}, "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5), "np.int64": np.int64(2), "an array of NumPy": np.array(0.5),
    "an array of JAX": jnp.float32(0.5), "a complex number": 1j, "an object": object(),
    "a schedule": lambda step: 0.5, "a function of nothing": lambda: 0.5,
}
LISTS = "Keras broadcasts a list against each parameter"
NOTHING = "Keras takes what is empty for nothing"
OUT_OF_RANGE = "Keras takes a number out of range, and gives NaN or no average"
TYPE_EXCEPTIONS = {
    ("learning_rate", "a schedule"): "Keras's schedules are of a class; here a function is one",
    ("learning_rate", "a function of nothing"): "a compiled step would call it only once",
    ("weight_decay", "a list"): LISTS, ("beta_2", "a list"): LISTS, ("epsilon", "a list"): LISTS,
    **{(limit, empty): NOTHING for limit in ("clipnorm", "clipvalue", "global_clipnorm")
       for empty in ("a tuple", "a dict")},
    ("epsilon", "a complex number"): LISTS, ("loss_scale_factor", "a complex number"): LISTS,
    **{(beta, number): OUT_OF_RANGE for beta in ("beta_1", "beta_2")
       for number in ("True", "an int", "np.int64")},
    ("loss_scale_factor", "False"): OUT_OF_RANGE,
}


def _refuses(make, use):
    try:
        use(make())
    except (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError):
        return True
    return False


def _two_steps_of_keras(optimizer):
    variable = keras.Variable(np.ones((2, 2), np.float32), name="w")
    optimizer.build([variable])
    for _ in range(2):
        optimizer.apply([jnp.ones((2, 2))], [variable])


def _two_steps(tx):
    params = {"w": jnp.ones((2, 2))}
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.step(params, state, params)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_of_every_type_is_refused_where_keras_refuses_it(name):
    arguments = [*inspect.signature(getattr(keras3, name)).parameters][:-1]
    wrong = []
    for argument in [*arguments, "lr", "experimental_relax_shapes"]:
        for kind, value in TYPES.items():
            given = {argument: value}
            if argument.startswith("ema_"):
                given["use_ema"] = True
            theirs = _refuses(lambda g=given: getattr(keras.optimizers, name)(**g),
                              _two_steps_of_keras)
            ours = _refuses(lambda g=given: getattr(keras3, name)(**g), _two_steps)
            if ours != theirs and (argument, kind) not in TYPE_EXCEPTIONS:
                wrong.append((argument, kind, f"Keras refuses: {theirs}"))
    assert not wrong


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_without_effect_with_the_warning_of_keras(name):
    for make in (getattr(keras.optimizers, name), getattr(keras3, name)):
        with pytest.warns(UserWarning, match="Argument `decay` is no longer supported and will be"):
            make(decay=0.1)
    with pytest.warns(UserWarning, match="decay"):
        with_decay = getattr(keras3, name)(decay=0.1)
    assert with_decay == getattr(keras3, name)()
