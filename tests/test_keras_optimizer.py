"""lionax.frameworks.keras: what `Model.fit`, `save` and callbacks ask of an optimizer."""

import itertools
import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.compat import keras3, keras_schedules

os.environ["KERAS_BACKEND"] = "jax"
import keras

from lionax.frameworks.keras import Optimizer

# Keras's variables do not know NumPy's newest protocol.
pytestmark = [pytest.mark.usefixtures("standard_promotion"),
              pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy "
                                         "keyword:DeprecationWarning")]
X = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
Y = np.sin(X.sum(axis=1, keepdims=True))
IN_ORDER = {"shuffle": False, "verbose": 0, "batch_size": 4}
TXS = {
    "lion": lambda: lionax.lion(1e-2, weight_decay=0.1, mask=lionax.not_matching("bias")),
    "lamb": lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(
        keras_schedules.CosineDecay(1e-2, 100))),
    "accumulated": lambda: lionax.chain(lionax.accumulate(lionax.adamw(1e-2), every=3),
                                        lionax.params_ema(0.9)),
    "bfloat16": lambda: lionax.sgd(1e-2, momentum=0.9, accumulator_dtype="bfloat16"),
    "groups": lambda: lionax.partition({"a": lionax.lion(1e-3), "b": lionax.sgd(1e-2, 0.9)},
                                       lionax.labels({"bias": "a"}, default="b")),
    "optax": lambda: lionax.chain(optax.adam(1e-2)),
}


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))


def compiled(optimizer, **arguments):
    model = network()
    model.compile(optimizer, loss="mse", **arguments)
    return model


def weights(model):
    return {variable.path: np.asarray(variable.value) for variable in model.variables}


def rate(model):
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def by_hand(tx, batches):
    """Plain steps over raw arrays."""
    model = network()
    trainable = {v.path: v.value for v in model.trainable_variables}
    paths = list(trainable)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            y_pred, _ = model.stateless_call([params[path] for path in paths], [], x)
            return jnp.mean((y_pred - y) ** 2)
        return tx.step(params, state, jax.grad(loss)(params))

    state = tx.init(trainable)
    for i in range(batches):
        trainable, state = step(trainable, state, X[4 * i:4 * i + 4], Y[4 * i:4 * i + 4])
    return trainable, state


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["lion", "accumulated"])
def test_fit_is_step_on_arrays(name, run_eagerly):
    model = compiled(Optimizer(TXS[name]()), run_eagerly=run_eagerly)
    model.fit(X, Y, **IN_ORDER)
    params, state = by_hand(TXS[name](), 20)
    cases.assert_close(weights(model), params)
    cases.assert_close(model.optimizer.state, lionax.set_hyperparams(state, learning_rate=1e-2))
    assert int(model.optimizer.iterations) == 20


@pytest.mark.parametrize("arguments", [
    {}, {"weight_decay": 0.1, "clipnorm": 0.7},
    {"weight_decay": 0.1, "gradient_accumulation_steps": 2}], ids=str)
def test_the_trajectory_of_keras_lion(arguments):
    ours = compiled(Optimizer(keras3.Lion(1e-2, **arguments)))
    theirs = compiled(keras.optimizers.Lion(1e-2, **arguments))
    for model in (ours, theirs):
        model.fit(X, Y, **IN_ORDER)
    cases.assert_close(weights(ours), weights(theirs))


def test_the_average_of_keras_lion():
    arguments = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3}
    ours = compiled(Optimizer(keras3.Lion(1e-2, **arguments)))
    theirs = compiled(keras.optimizers.Lion(1e-2, **arguments))
    for model in (ours, theirs):
        model.fit(X, Y, **IN_ORDER)
    # Keras ends with the averages as weights.
    cases.assert_close(lionax.averaged_params(ours.optimizer.state), weights(theirs))


@pytest.mark.parametrize("name", TXS)
def test_a_saved_model_goes_on_as_if_uninterrupted(name, tmp_path):
    model = compiled(Optimizer(TXS[name]()))
    model.fit(X, Y, **IN_ORDER)
    if name == "optax":
        with pytest.raises(TypeError, match="wrap only lionax's own transformations"):
            model.save(tmp_path / "model.keras")
        return
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.tx == model.optimizer.tx
    cases.assert_equal(loaded.optimizer.state, model.optimizer.state)
    for each in (model, loaded):
        each.fit(X, Y, **IN_ORDER)
    cases.assert_equal(weights(loaded), weights(model))
    assert loaded.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)


def test_an_assigned_rate_is_saved(tmp_path):
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.optimizer.learning_rate = 0.5
    model.fit(X, Y, **IN_ORDER)
    model.save(tmp_path / "model.keras")
    assert rate(keras.saving.load_model(tmp_path / "model.keras")) == 0.5


def test_an_unnamed_schedule_is_refused_at_save_and_the_file_stays(tmp_path):
    path = tmp_path / "model.keras"
    compiled(Optimizer(lionax.lion(1e-2))).save(path)
    before = path.read_bytes()
    schedule = lambda step: 0.1 / (1 + step)
    model = compiled(Optimizer(lionax.sgd(schedule)))
    model.fit(X, Y, **IN_ORDER)
    with pytest.raises(TypeError, match=r"lionax\.register_schedule"):
        model.save(path)
    assert path.read_bytes() == before
    lionax.register_schedule("falling", schedule)
    model.save(path)
    assert keras.saving.load_model(path).optimizer.tx == model.optimizer.tx


@pytest.mark.parametrize(("change", "message"), [
    (lambda saved: saved.pop("7"), r"variable 7 \(optimizer\w*/rules_0_mu_hidden_kernel\) has "
                                   r"shape \(4, 8\), in the file None"),
    (lambda saved: saved.update({"5": np.zeros(3), "6": np.zeros(3)}),
     r"variable 5 \(optimizer\w*/rules_0_mu_head_kernel\) .* in the file \(3,\)"),
    (lambda saved: saved.update({"8": np.zeros(3)}), r"variable 8 \(none\)")])
def test_other_saved_variables_are_refused(change, message):
    optimizer = Optimizer(lionax.lion(1e-2))
    optimizer.build(network().trainable_variables)
    store = {}
    optimizer.save_own_variables(store)
    change(store)
    with pytest.raises(ValueError, match=message):
        optimizer.load_own_variables(store)


def test_weights_of_another_transformation_are_refused_by_load_model(tmp_path):
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.fit(X, Y, **IN_ORDER)
    model.save(tmp_path / "model.keras")
    original = Optimizer.from_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "from_config",
                      classmethod(lambda cls, config: original({
                          **config, "transformation": lionax.to_config(lionax.sgd(1e-2))})))
        with pytest.raises(ValueError, match=r"variable 4 \(none\) has shape None, in the file"):
            keras.saving.load_model(tmp_path / "model.keras")


class Callback(keras.callbacks.Callback):
    """Calls a function of the model and the batch at the end of each batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function(self.model, batch)


def test_reduce_on_plateau_and_a_scheduler():
    model = compiled(Optimizer(lionax.lion(1e-2)))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)
    history = model.fit(X, Y, epochs=3, callbacks=[plateau], **IN_ORDER).history
    np.testing.assert_allclose(history["learning_rate"], [1e-2, 1e-2, 5e-3], rtol=1e-6)
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model.fit(X, Y, epochs=2, callbacks=[halved], **IN_ORDER)
    np.testing.assert_allclose(rate(model), 2.5e-3 / 4, rtol=1e-6)
    hyperparameters = lionax.get_hyperparams(model.optimizer.state)
    np.testing.assert_allclose(float(hyperparameters["learning_rate"]), rate(model))


@pytest.mark.parametrize("assign", [
    lambda optimizer: setattr(optimizer, "learning_rate", 0.0),
    lambda optimizer: optimizer.learning_rate.assign(0.0),
    lambda optimizer: setattr(optimizer, "state", lionax.set_hyperparams(optimizer.state,
                                                                        learning_rate=0.0))],
    ids=["learning_rate", "assign", "set_hyperparams"])
def test_a_rate_assigned_after_a_batch_acts_on_the_next(assign):
    model, seen = compiled(Optimizer(lionax.lion(1e-2))), []

    def stop(model, batch):
        seen.append(weights(model))
        if batch == 3:
            assign(model.optimizer)

    model.fit(X, Y, callbacks=[Callback(stop)], **IN_ORDER)
    changed = [not np.array_equal(a["head/kernel"], b["head/kernel"])
               for a, b in itertools.pairwise(seen)]
    assert changed == [True] * 3 + [False] * 16


def test_a_rate_assigned_past_the_callback_is_refused():
    optimizer = Optimizer(lionax.lion(1e-2))
    model = compiled(optimizer)
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(optimizer, "learning_rate", 0.0))
    with pytest.raises(RuntimeError, match=r"take the optimizer from self.model"):
        model.fit(X, Y, callbacks=[callback], **IN_ORDER)


@pytest.mark.parametrize(("value", "message"), [(-1.0, "at least 0"), ("a", "'a'"), (None, "None")])
def test_what_is_no_rate_is_refused(value, message):
    optimizer = Optimizer(lionax.lion(1e-2))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.learning_rate = value


def test_a_rate_over_a_schedule_is_refused():
    model = compiled(Optimizer(lionax.lion(cases.SCHEDULE)))
    assert rate(model) == pytest.approx(0.05)
    model.fit(X[:40], Y[:40], **IN_ORDER)
    assert rate(model) == pytest.approx(float(cases.SCHEDULE(9)))
    with pytest.raises(TypeError, match=r"learning_rate=0.1 cannot be assigned over .*schedule"):
        model.optimizer.learning_rate = 0.1


def test_rates_of_groups_are_assigned_by_name():
    model = compiled(Optimizer(TXS["groups"]()))
    with pytest.raises(ValueError, match=r"has the learning rates \[0.001, 0.01\]"):
        rate(model)
    model.fit(X, Y, **IN_ORDER)
    optimizer = model.optimizer
    optimizer.state = lionax.set_hyperparams(optimizer.state, **{"a/learning_rate": 0.5})
    model.fit(X, Y, **IN_ORDER)
    rates = lionax.get_hyperparams(optimizer.state)
    assert {name: round(float(value), 6) for name, value in rates.items()} == {
        "a/learning_rate": 0.5, "b/learning_rate": 0.01}


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["jit", "eager"])
def test_layers_frozen_after_compile_stay_bit_for_bit(run_eagerly):
    tx = lionax.lion(1e-2, weight_decay=0.5)
    model = compiled(Optimizer(tx), run_eagerly=run_eagerly)
    model.fit(X, Y, **IN_ORDER)
    before, mu = weights(model), np.asarray(model.optimizer.state.rules[0].mu["hidden/kernel"])
    model.get_layer("hidden").trainable = False
    model.fit(X, Y, **IN_ORDER)
    after = weights(model)
    for path in before:
        assert np.array_equal(before[path], after[path]) == path.startswith("hidden"), path
    assert np.array_equal(model.optimizer.state.rules[0].mu["hidden/kernel"], mu)
    model.get_layer("hidden").trainable = True
    model.fit(X, Y, **IN_ORDER)
    assert not np.array_equal(weights(model)["hidden/kernel"], after["hidden/kernel"])


@pytest.mark.parametrize("call", [
    lambda model: model.fit(X, Y, **IN_ORDER), lambda model: model.train_on_batch(X, Y),
    lambda model: model.optimizer.apply([jnp.ones(v.shape) for v in model.trainable_variables],
                                        model.trainable_variables)], ids=["fit", "batch", "apply"])
def test_a_variable_that_build_never_saw_is_refused_by_path(call):
    model = network()
    model.get_layer("head").trainable = False
    model.compile(Optimizer(lionax.lion(1e-2)), loss="mse")
    model.fit(X, Y, **IN_ORDER)
    model.get_layer("head").trainable = True
    before = weights(model)
    with pytest.raises(ValueError, match="never saw the variable 'head/kernel'; compile again"):
        call(model)
    cases.assert_equal(weights(model), before)


def test_another_model_is_refused():
    optimizer = Optimizer(lionax.lion(1e-2))
    compiled(optimizer).fit(X, Y, **IN_ORDER)
    with pytest.raises(ValueError, match="never saw the variable 'hidden/kernel'"):
        compiled(optimizer).fit(X, Y, **IN_ORDER)


def test_arrays_of_other_variables_are_refused():
    optimizer, model = Optimizer(lionax.lion(1e-2)), network()
    optimizer.build(model.trainable_variables)
    arrays = [v.value for v in model.trainable_variables]
    with pytest.raises(ValueError, match=r"of the model's 3 trainable variables build saw \["):
        optimizer.stateless_apply([v.value for v in optimizer.variables], arrays[1:], arrays[1:])


def test_a_model_saved_before_training_loads(tmp_path):
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.optimizer.learning_rate = 0.5
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert rate(loaded) == 0.5
    loaded.fit(X, Y, **IN_ORDER)
    assert int(loaded.optimizer.state.count) == 20


def test_after_an_exception_in_a_callback_training_goes_on(tmp_path):
    model = compiled(Optimizer(lionax.lion(1e-2)))

    def fail(model, batch):
        if batch == 4:
            raise KeyError("a callback")

    with pytest.raises(KeyError):
        model.fit(X, Y, callbacks=[Callback(fail)], **IN_ORDER)
    assert int(model.optimizer.state.count) == 5
    assert rate(model) == pytest.approx(1e-2)
    model.optimizer.learning_rate = 5e-3
    model.save(tmp_path / "model.keras")
    model.fit(X, Y, **IN_ORDER)
    assert int(model.optimizer.state.count) == 25
    assert int(keras.saving.load_model(tmp_path / "model.keras").optimizer.iterations) == 5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_mixed_precision(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(Optimizer(lionax.lion(1e-2)))
        first = model.evaluate(X, Y, verbose=0)
        model.fit(X, Y, epochs=3, **IN_ORDER)
        model.optimizer.learning_rate = 5e-3
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.evaluate(X, Y, verbose=0) < 0.9 * first
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    for each in (model, loaded):
        assert rate(each) == pytest.approx(5e-3)
        each.fit(X, Y, **IN_ORDER)
    cases.assert_equal(weights(loaded), weights(model))


def test_a_loss_scale_changes_nothing_and_an_infinite_gradient_no_weight():
    plain = compiled(Optimizer(lionax.sgd(1e-2)))
    scaled = compiled(Optimizer(lionax.sgd(1e-2), loss_scale_factor=64.0))
    dynamic = compiled(keras.optimizers.LossScaleOptimizer(Optimizer(lionax.sgd(1e-2))))
    for model in (plain, scaled, dynamic):
        model.fit(X, Y, **IN_ORDER)
    cases.assert_close(weights(scaled), weights(plain))
    cases.assert_close(weights(dynamic), weights(plain))
    before = weights(dynamic)
    dynamic.fit(np.full_like(X, np.inf), Y, **IN_ORDER)
    cases.assert_equal(weights(dynamic), before)


REFUSED = {
    "learning_rate": (1e-3, "lionax.lion"), "decay": (0.1, "lionax.lion"),
    "weight_decay": (0.1, "mask="), "clipnorm": (1.0, "lionax.clip_by_norm"),
    "clipvalue": (1.0, r"lionax.clip\("), "global_clipnorm": (1.0, "lionax.clip_by_global_norm"),
    "use_ema": (True, "lionax.params_ema"), "ema_momentum": (0.5, "lionax.params_ema"),
    "ema_overwrite_frequency": (5, "overwrite_every"),
    "gradient_accumulation_steps": (4, "lionax.accumulate"),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_arguments_of_keras_are_refused_and_name_lionax_own(argument):
    value, own = REFUSED[argument]
    with pytest.raises(ValueError, match=f"{argument}={value} is not accepted; .*{own}"):
        Optimizer(lionax.lion(1e-2), **{argument: value})
    if argument not in ("learning_rate", "decay"):
        with pytest.raises(ValueError, match=own):
            setattr(Optimizer(lionax.lion(1e-2)), argument, value)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Optimizer(optax.adam(1e-3)), r"as lionax.chain\(tx\)"),
    (lambda: Optimizer(lionax.lion(1e-3), momentum=0.9), "no argument 'momentum'"),
    (lambda: Optimizer(lionax.dynamic_loss_scale(lionax.lion(1e-3))), "LossScaleOptimizer"),
    (lambda: Optimizer(keras3.Lion(1e-3, loss_scale_factor=8.0)), "loss_scale_factor="),
    (lambda: Optimizer(lionax.lion(1e-3)).exclude_from_weight_decay(var_names=["bias"]),
     r"mask=lionax.not_matching\('bias'\)"),
    (lambda: Optimizer(lionax.lion(1e-3)).state, "before build"),
    (lambda: Optimizer(lionax.lion(1e-3)).build([keras.Variable(1.0, name="w")] * 2 + [
        keras.Variable(1.0, name="w")]), "two variables have the path 'w'")])
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_variable_that_its_gradient_overwrites_is_never_stepped():
    variables = [keras.Variable(np.ones(2), name=name) for name in ("w", "scale")]
    variables[1].overwrite_with_gradient = True
    optimizer = Optimizer(lionax.lion(0.5, weight_decay=0.5))
    optimizer.apply([jnp.full(2, 3.0)] * 2, variables)
    assert variables[1].value.tolist() == [3.0, 3.0]
    assert variables[0].value.tolist() == [0.25, 0.25]
    assert list(optimizer.state.rules[0].mu) == ["w"]


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


def test_another_backend_is_refused_by_name():
    code = "import lionax, lionax.frameworks.keras as k; k.Optimizer(lionax.lion(1e-3))"
    assert "the backend 'numpy' is not accepted" in run(code, KERAS_BACKEND="numpy").stderr


def test_without_keras_the_extra_is_named():
    code = "import sys; sys.modules['keras'] = None; import lionax.frameworks.keras"
    assert 'pip install "lionax[keras]"' in run(code).stderr


def test_fit_donates_the_state():
    held = []
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.fit(X, Y, callbacks=[Callback(lambda model, _: held.append(
        jax.tree.leaves(model.optimizer.state)))], **IN_ORDER)
    assert all(leaf.is_deleted() for leaf in held[0])
