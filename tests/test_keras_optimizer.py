"""lionax.frameworks.keras: what `Model.fit`, `save` and callbacks ask of an optimizer."""

import itertools
import pathlib
import runpy

import cases
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import lionax
from lionax.compat import keras3, keras_schedules
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


@pytest.mark.parametrize(("name", "run_eagerly"), [
    ("lion", False), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("accumulated", False), ("lion", True), ("accumulated", True)))])
def test_fit_is_step_on_arrays(name, run_eagerly):
    model = compiled(Optimizer(TXS[name]()), run_eagerly=run_eagerly)
    model.fit(X, Y, **IN_ORDER)
    params, state = by_hand(TXS[name](), 20)
    cases.assert_close(weights(model), params)
    cases.assert_close(model.optimizer.state, lionax.set_hyperparams(state, learning_rate=1e-2))
    assert int(model.optimizer.iterations) == 20


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    {"weight_decay": 0.1, "gradient_accumulation_steps": 2}, *(
        pytest.param(each, marks=pytest.mark.slow) for each in (
            {}, {"weight_decay": 0.1, "clipnorm": 0.7}))], ids=str)
def test_the_trajectory_of_keras_lion(arguments):
    ours = compiled(Optimizer(keras3.Lion(1e-2, **arguments)))
    theirs = compiled(keras.optimizers.Lion(1e-2, **arguments))
    for model in (ours, theirs):
        model.fit(X, Y, **IN_ORDER)
    cases.assert_close(weights(ours), weights(theirs))


@pytest.mark.slow
def test_the_average_of_keras_lion():
    arguments = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3}
    ours = compiled(Optimizer(keras3.Lion(1e-2, **arguments)))
    theirs = compiled(keras.optimizers.Lion(1e-2, **arguments))
    for model in (ours, theirs):
        model.fit(X, Y, **IN_ORDER)
    # Keras ends with the averages as weights.
    cases.assert_close(lionax.averaged_params(ours.optimizer.state), weights(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.but_for_fast(
    ["lion", "accumulated", "lamb", "bfloat16", "groups"], "lion"))
def test_a_saved_model_goes_on_as_if_uninterrupted(name, tmp_path):
    model = compiled(Optimizer(TXS[name]()))
    model.fit(X, Y, **IN_ORDER)
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


def test_optax_trains_and_is_refused_where_it_cannot_go_on(tmp_path):
    model = compiled(Optimizer(lionax.chain(optax.adam(1e-2))))
    first = model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, **IN_ORDER)
    assert model.evaluate(X, Y, verbose=0) < first
    with pytest.raises(TypeError, match="wrap only lionax's own transformations"):
        model.save(tmp_path / "model.keras")
    model.get_layer("hidden").trainable = False
    with pytest.raises(ValueError, match="'hidden/kernel' was frozen after compile, and Optax's"):
        model.fit(X, Y, **IN_ORDER)


class Callback(keras.callbacks.Callback):
    """Calls a function of the model and the batch at the end of each batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function(self.model, batch)


@pytest.mark.slow
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


@pytest.mark.parametrize("run_eagerly", cases.but_for_fast([False, True], False),
                         ids=["jit", "eager"])
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


@pytest.mark.slow
def test_momenta_are_those_of_their_weights_where_loading_gives_other_paths(tmp_path):
    first = keras.layers.Dense(3, name="embed")
    first.build((None, 3))  # its path lacks the model's name until it is loaded
    model = keras.Sequential([first, keras.layers.Dense(3, name="attn")])
    model.build((None, 3))
    model.compile(Optimizer(lionax.lion(0.1)), loss="mse")
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for old, new in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        mu = [m.optimizer.state.rules[0].mu[v.path] for m, v in ((model, old), (loaded, new))]
        cases.assert_equal(*mu)


def test_a_model_saved_before_training_loads(tmp_path):
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.optimizer.learning_rate = 0.5
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert rate(loaded) == 0.5
    loaded.fit(X, Y, **IN_ORDER)
    assert int(loaded.optimizer.state.count) == 20


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("policy", cases.but_for_fast(
    ["mixed_float16", "mixed_bfloat16", "bfloat16"], "mixed_float16"))
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


@pytest.mark.slow
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


def test_a_variable_that_its_gradient_overwrites_is_never_stepped():
    variables = [keras.Variable(np.ones(2), name=name) for name in ("w", "scale")]
    variables[1].overwrite_with_gradient = True
    optimizer = Optimizer(lionax.lion(0.5, weight_decay=0.5))
    optimizer.apply([jnp.full(2, 3.0)] * 2, variables)
    assert variables[1].value.tolist() == [3.0, 3.0]
    assert variables[0].value.tolist() == [0.25, 0.25]
    assert list(optimizer.state.rules[0].mu) == ["w"]


def test_fit_donates_the_state():
    held = []
    model = compiled(Optimizer(lionax.lion(1e-2)))
    model.fit(X, Y, callbacks=[Callback(lambda model, _: held.append(
        jax.tree.leaves(model.optimizer.state)))], **IN_ORDER)
    assert all(leaf.is_deleted() for leaf in held[0])


@pytest.mark.slow
def test_slots_are_laid_out_as_the_parameters():
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), jax.devices("cpu"))
    layout = keras.distribution.LayoutMap(mesh)
    layout["hidden/kernel"] = (None, "model")
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        model = compiled(Optimizer(TXS["lion"]()))
        model.fit(X, Y, **IN_ORDER)
        mu = model.optimizer.state.rules[0].mu["hidden/kernel"]
    assert mu.sharding == model.get_layer("hidden").kernel.value.sharding
    assert mu.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    single = compiled(Optimizer(TXS["lion"]()))
    single.fit(X, Y, **IN_ORDER)
    cases.assert_close(weights(model), weights(single))


@pytest.mark.slow
def test_the_example_reaches_what_it_should(capsys):
    example = pathlib.Path(__file__).parent.parent / "examples" / "keras_fit.py"
    runpy.run_path(str(example), run_name="__main__")
    accuracies = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()
                  if "accuracy" in line]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.95
