"""`lionax.frameworks.linen.TrainState` against `Transformation.step` on the raw trees."""

from typing import Any

import cases
import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training import train_state

import lionax
from lionax.frameworks.linen import TrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = cases.normal(16, 16)
OWG = "_overwrite_with_gradient"


class Net(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, train=False):
        x = self.dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return self.dense(16)(nn.tanh(x))


class WithStatistics(TrainState):
    batch_stats: Any


def begun(tx, cls=TrainState):
    variables = Net().init(jax.random.key(0), X)
    fields = {"batch_stats": variables["batch_stats"]} if cls is WithStatistics else {}
    return cls.create(apply_fn=Net().apply, params=variables["params"], tx=tx, **fields)


TXS = {
    "lion": lambda: lionax.lion(cases.SCHEDULE, mask=lionax.not_matching("bias", "scale")),
    "lamb": lambda: lionax.chain(lionax.clip_by_global_norm(0.1), lionax.lamb(0.01),
                                 lionax.params_ema(0.9)),
    "optax": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
}


@pytest.mark.parametrize("name", cases.but_for_fast(TXS, "lion"))
def test_a_donated_update_is_a_step(name):
    tx = lionax.chain(TXS[name]())
    state = begun(TXS[name]())
    assert isinstance(state, train_state.TrainState)
    params = jax.tree.map(jnp.copy, state.params)
    opt_state, step = tx.init(params), jax.jit(tx.step)
    update = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    for t in range(3):
        grads = cases.gradients(params, t)
        state = update(state, grads)
        params, opt_state = step(params, opt_state, grads)
        cases.assert_close(state.params, params)
    cases.assert_close(state.opt_state, opt_state)
    assert int(state.step) == 3


@pytest.mark.slow
def test_a_donated_update_holds_no_temporary():
    params = {name: jnp.ones((512, 512)) for name in "abcd"}

    def temporaries(cls, tx):
        state = cls.create(apply_fn=None, params=params, tx=tx)
        update = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0,
                         compiler_options=lionax.compiler_options())
        return update.lower(state, params).compile().memory_analysis().temp_size_in_bytes

    for tx in (lionax.lion(0.01, mu_dtype="bfloat16"), lionax.accumulate(lionax.lion(0.01), 2)):
        assert temporaries(TrainState, tx) < 2 ** 12
    assert temporaries(train_state.TrainState, tx) > 2 ** 22  # of the size of the parameters


def test_fields_are_replaced_and_other_names_reach_the_step():
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=0))
    state = begun(plateau, WithStatistics)
    grads, statistics = state.params, jax.tree.map(jnp.ones_like, state.batch_stats)
    for value in (1.0, 2.0):
        state = state.apply_gradients(grads=grads, batch_stats=statistics,
                                      value=jnp.asarray(value))
    assert state.batch_stats is statistics
    assert float(optax.tree.get(state.opt_state, "scale")) == pytest.approx(0.1)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'step'"):
        state.apply_gradients(grads=grads, step=7, value=jnp.asarray(1.0))  # as in Flax


def test_a_name_that_is_neither_is_refused():
    state = begun(lionax.lion(0.01), WithStatistics)
    with pytest.raises(TypeError, match="takes the argument 'batch_stat'") as info:
        state.apply_gradients(grads=state.params, batch_stat={})
    assert "WithStatistics has no such field" in info.value.__notes__[0]


@pytest.mark.slow
def test_float8_scales_are_replaced_as_flax_does():
    model = Net(dense=lambda features: nn.Dense(features, dot_general_cls=nn.Fp8DirectDotGeneralOp))
    variables = model.init(jax.random.key(0), X)
    params = {"params": variables["params"], OWG: variables[OWG]}
    tx = lionax.chain(lionax.clip_by_global_norm(0.1), lionax.lion(0.01, weight_decay=0.1))

    def loss(params):
        out = model.apply({**params, "batch_stats": variables["batch_stats"]}, X)
        return jnp.mean((out - 1.0) ** 2)

    grads = jax.grad(loss)(params)
    ours, theirs = (cls.create(apply_fn=model.apply, params=params, tx=tx)
                    for cls in (TrainState, train_state.TrainState))
    cases.assert_equal(ours.opt_state, tx.init(variables["params"]))
    ours, theirs = (state.apply_gradients(grads=grads) for state in (ours, theirs))
    assert jax.tree.leaves(grads[OWG])
    cases.assert_equal(ours.params[OWG], grads[OWG])
    cases.assert_close(ours.params, theirs.params)
    expected = tx.step(params["params"], tx.init(params["params"]), grads["params"])
    cases.assert_close((ours.params["params"], ours.opt_state), expected)


@pytest.mark.parametrize("freeze", [dict, flax.core.freeze])
def test_the_containers_of_the_parameters_stay(freeze):
    params = freeze({"params": {"w": jnp.ones(2)}, OWG: {"scale": jnp.ones(1)}})
    state = TrainState.create(apply_fn=None, params=params, tx=lionax.sgd(0.5))
    new = state.apply_gradients(grads=freeze({"params": {"w": jnp.ones(2)},
                                              OWG: {"scale": jnp.full(1, 3.0)}}))
    cases.assert_equal(new.params, freeze({"params": {"w": jnp.full(2, 0.5)},
                                           OWG: {"scale": jnp.full(1, 3.0)}}))


def test_parameters_may_be_one_array():
    state = TrainState.create(apply_fn=None, params=jnp.ones(2), tx=lionax.sgd(0.5))
    assert state.apply_gradients(grads=jnp.ones(2)).params.tolist() == [0.5, 0.5]


def test_a_scan_carries_the_state():
    state = begun(lionax.lion(0.01))
    state = state.replace(step=jnp.asarray(0))
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves),
                         *(cases.gradients(state.params, t) for t in range(3)))
    last, _ = jax.lax.scan(lambda state, grads: (state.apply_gradients(grads=grads), None),
                           state, grads)
    assert int(last.step) == int(last.opt_state.count) == 3


@pytest.mark.parametrize("how", [None, "int8"])
def test_bytes_of_flax_serialization_go_on_where_they_stopped(how, monkeypatch):
    monkeypatch.setattr(lionax.core.quantized, "SMALLEST", 1)
    tx = lionax.lion(0.01, mu_dtype=how)
    state = begun(tx).apply_gradients(grads=begun(tx).params)
    restored = flax.serialization.from_bytes(begun(tx), flax.serialization.to_bytes(state))
    cases.assert_equal(jax.tree.map(jnp.asarray, restored.opt_state), state.opt_state)
    after, expected = (each.apply_gradients(grads=state.params) for each in (restored, state))
    cases.assert_equal(after.params, expected.params)


def test_no_state_shares_a_buffer_with_the_parameters():
    anchored = optax.GradientTransformation(lambda params: (params, params),
                                            lambda grads, state, params: (grads, state))
    update = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    with pytest.raises(Exception, match="donate the same buffer twice"):
        update(train_state.TrainState.create(apply_fn=None, params=params, tx=anchored), grads)
    state = update(TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=anchored), grads)
    assert state.params["w"].tolist() == [2.0, 2.0]


def test_what_takes_the_train_state_of_flax_takes_ours():
    state = begun(lionax.lion(0.01))
    assert flax.serialization.to_state_dict(state).keys() == {"step", "params", "opt_state"}
    assert set(jax.tree.leaves(flax.jax_utils.replicate(state).params)[0].devices()) == set(
        jax.local_devices())
    cases.assert_equal(flax.jax_utils.unreplicate(flax.jax_utils.replicate(state)).params,
                       state.params)
