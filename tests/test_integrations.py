"""lionax in the training steps of Flax and Equinox, with real models."""

import cases
import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lionax

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
Y = jnp.sin(X.sum(axis=1, keepdims=True))
TXS = {
    "lion": lambda: lionax.lion(3e-3, mask=lionax.not_matching("bias")),
    "lamb": lambda: lionax.chain(lionax.clip_by_global_norm(1.0),
                                 lionax.lamb(1e-2, trust_mask=lionax.matching("kernel"))),
    "sgd": lambda: lionax.sgd(cases.SCHEDULE, 0.9, True),
}


@pytest.mark.parametrize("name", cases.but_for_fast(TXS, "lion"))
def test_linen_train_state(name):
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=TXS[name]())

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    first = float(loss(state.params))
    for _ in range(40):
        state = step(state)
    assert float(loss(state.params)) < 0.6 * first
    assert int(state.opt_state.count) == 40


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 16, rngs=rngs)
        self.second = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def nnx_run(tx, compiled, steps=20):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    train = nnx.jit(train) if compiled else train
    losses = [float(train(model, optimizer)) for _ in range(steps)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("compiled", [
    pytest.param(True, id="nnx.jit"), pytest.param(False, id="eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", cases.but_for_fast(TXS, "lion"))
def test_nnx_optimizer(name, compiled):
    losses, _ = nnx_run(TXS[name](), compiled)
    assert losses[-1] < 0.8 * losses[0]


def test_nnx_optimizer_is_optax():
    _, ours = nnx_run(lionax.lion(1e-2, weight_decay=0.1), True)
    _, theirs = nnx_run(optax.lion(1e-2, weight_decay=0.1), True)
    cases.assert_equal(ours, theirs)


@pytest.mark.parametrize("name", cases.but_for_fast(["lion", "sgd"], "lion"))
def test_equinox(name):
    model = eqx.nn.MLP(4, 1, 16, 1, key=jax.random.key(0))
    tx = TXS[name]()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train(model, state):
        loss_of = lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2)
        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(30):
        model, state, loss = train(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_equinox_modules_with_functions_in_them_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"not an array; keep only arrays in the tree .with "
                                        r"Equinox: eqx.filter"):
        lionax.lion(1e-3).init(eqx.nn.MLP(4, 1, 16, 1, key=jax.random.key(0)))


def test_orbax_checkpoint_goes_on_where_it_stopped(tmp_path):
    params = {"dense": {"kernel": cases.normal(4, 3), "bias": jnp.zeros(3)}}
    tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(cases.SCHEDULE),
                      lionax.params_ema(0.9))
    step = jax.jit(tx.step)
    carry = params, tx.init(params)
    for t in range(3):
        carry = step(*carry, cases.gradients(params, t))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state",
                                        jax.eval_shape(lambda: (params, tx.init(params))))
    cases.assert_equal(restored, carry)
    cases.assert_equal(step(*restored, cases.gradients(params, 3)),
                       step(*carry, cases.gradients(params, 3)))
