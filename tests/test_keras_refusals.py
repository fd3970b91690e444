"""lionax.frameworks.keras: what is refused, and what stays as it was."""

import os
import subprocess
import sys

import cases
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import test_keras_optimizer
from test_keras_optimizer import IN_ORDER, X, Y, compiled, network, rate, weights

import lionax
from lionax.compat import keras3
from lionax.frameworks.keras import Optimizer

pytestmark = test_keras_optimizer.pytestmark


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
    (lambda saved: saved.pop("4"), r"variable 4 \(optimizer\w*/rules_0_mu_hidden_kernel\) has "
                                   r"shape \(4, 8\), in the file None"),
    (lambda saved: saved.update({"6": np.zeros(3), "7": np.zeros(3)}),
     r"variable 6 \(optimizer\w*/rules_0_mu_head_kernel\) .* in the file \(3,\)"),
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


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


@pytest.mark.slow
def test_another_backend_is_refused_by_name():
    code = "import lionax, lionax.frameworks.keras as k; k.Optimizer(lionax.lion(1e-3))"
    assert "the backend 'numpy' is not accepted" in run(code, KERAS_BACKEND="numpy").stderr


@pytest.mark.slow
def test_without_keras_the_extra_is_named():
    code = "import sys; sys.modules['keras'] = None; import lionax.frameworks.keras"
    assert 'pip install "lionax[keras]"' in run(code).stderr
