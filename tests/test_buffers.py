"""States share no buffers: what `init`, a restore and the helpers return can be donated at once."""

import dataclasses
import pickle
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import probes
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_restored_states import like_msgpack, like_orbax, without_keys

import lionax
from lionax.frameworks import equinox, linen
from lionax.frameworks.nnx import Optimizer

BUFFERS = pytest.mark.promise(
    "Interrupted runs", "No state that `init` or a restore returns shares a buffer with the "
    "parameters: the first donated step works, through every helper.")


class AnchorState(NamedTuple):
    """The state of `Anchor`."""

    anchor: Any


@dataclasses.dataclass(frozen=True)
class Anchor(lionax.Rule):
    """A rule whose slot is the parameter."""

    def init(self, param):
        return AnchorState(param)

    def apply(self, update, slots, param, step):
        return update, slots


ANCHORED = optax.GradientTransformation(lambda params: (params, params),
                                        lambda grads, state, params=None: (grads, state))
SHARING = {
    "optax": lambda: lionax.chain(ANCHORED, lionax.sgd(0.1)),
    "rule": lambda: lionax.chain(lionax.Transformation.of(Anchor()), lionax.sgd(0.1)),
    "masked": lambda: lionax.masked(ANCHORED, cases._matrices),
    "accumulate": lambda: lionax.accumulate(lionax.chain(ANCHORED, lionax.sgd(0.1)), 2),
    "master_weights": lambda: lionax.master_weights(lionax.chain(ANCHORED, lionax.sgd(0.1)),
                                                    "float32"),
    "monitor": lambda: lionax.monitor(lionax.chain(lionax.params_ema(0.9), ANCHORED)),
}
MADE = {name: case.make for name, case in cases.CASES.items()} | SHARING


def pointers(tree):
    return [(shard.device, shard.data.unsafe_buffer_pointer()) for leaf in jax.tree.leaves(
        without_keys(tree)) for shard in leaf.addressable_shards if leaf.size]


def check_own_buffers(*trees):
    """No two arrays share a buffer: what is donated twice is refused."""
    found = pointers(trees)
    assert len(set(found)) == len(found)
    return len(found)


def through_pickle(state, like, folder):
    return pickle.loads(pickle.dumps(state))


def through_cast(state, like, folder):
    return lionax.cast_state(state, like)


def through_dicts(state, like, folder):
    return lionax.cast_state(like_orbax(state), like)


def through_numpy(state, like, folder):
    return lionax.cast_state(like_msgpack(state), like)


def through_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, like)


def restored(name, how, tmp_path):
    """Parameters and the state that was restored for them."""
    tx, params = MADE[name](), cases.TREES["nested"]()
    state = tx.init(params)
    if not jax.tree.leaves(state):
        return tx, params, state
    return tx, params, how(state, tx.init(params), tmp_path / name)


RESTORED = [through_pickle, through_cast, through_dicts, through_numpy]


@BUFFERS
@pytest.mark.parametrize("how", cases.but_for_fast(RESTORED, through_dicts))
def test_no_two_arrays_of_parameters_and_state_share_a_buffer(how, figure, tmp_path):
    for name in MADE:
        tx, params, state = restored(name, how, tmp_path)
        figure("arrays", check_own_buffers(params, tx.init(params)))
        figure("arrays", check_own_buffers(params, state))


@BUFFERS
@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(cases.CASES)[::probes.sized(12, 1)], *SHARING])
def test_the_first_donated_step_works_after_init_and_after_a_restore(name, figure, tmp_path):
    tx, grads = MADE[name](), cases.gradients(cases.TREES["nested"](), 0)
    step = jax.jit(tx.step, donate_argnums=(0, 1))
    expected = step(cases.TREES["nested"](), tx.init(cases.TREES["nested"]()), grads)
    for how in [*RESTORED, through_orbax]:
        _, params, state = restored(name, how, tmp_path / how.__name__)
        cases.assert_equal(step(params, state, grads), expected)
        figure("first donated steps", 1)


HELPED = {"lion": lambda: lionax.lion(0.1, weight_decay=0.1), "average": lambda: lionax.chain(
    lionax.lamb(0.1, mu_dtype="bfloat16"), lionax.params_ema(0.9)),
    "master": lambda: lionax.master_weights(lionax.sgd(0.1, 0.9), "float32"),
    "optax": lambda: lionax.chain(ANCHORED, lionax.sgd(0.1)), "anchored": lambda: ANCHORED}
LINEAR = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def donated_linen(make, tx):
    state = linen.TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, LINEAR), tx=tx)
    check_own_buffers(state.params, state.opt_state)
    update = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    return update(state, LINEAR).params["bias"]


def donated_nnx(make, tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    check_own_buffers(nnx.state(model), nnx.state(optimizer))

    @nnx.jit(donate_argnames=("model", "optimizer"))
    def update(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    update(model, optimizer)
    return model.bias[...]


def donated_equinox(make, tx):
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    state = equinox.init(tx, model)
    check_own_buffers(eqx.filter(model, eqx.is_array), state)

    @eqx.filter_jit(donate="all")
    def update(model, state):
        grads = jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_inexact_array))
        return equinox.step(tx, model, state, grads)

    return update(model, state)[0].bias


def donated_mesh(make, tx):
    mesh, tx = probes.mesh_of(2), tx if hasattr(tx, "step") else lionax.chain(tx)
    params = jax.device_put(LINEAR, {"kernel": NamedSharding(mesh, PartitionSpec("x")),
                                     "bias": NamedSharding(mesh, PartitionSpec())})
    layout = lionax.state_sharding(tx, params)
    step = jax.jit(tx.step, donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init, out_shardings=layout),
                 lambda params: jax.device_put(tx.init(params), layout)):
        own = jax.tree.map(jnp.copy, params)
        state = init(own)
        check_own_buffers(own, state)
        new = step(own, state, params)[0]["bias"]
    return new


@BUFFERS
@pytest.mark.slow
@pytest.mark.parametrize("helper", [donated_linen, donated_nnx, donated_equinox, donated_mesh])
def test_the_first_donated_step_works_through_a_helper(helper, figure):
    for make in HELPED.values():
        assert jnp.all(jnp.isfinite(helper(make, make())))
        figure("first donated steps", 1)


@BUFFERS
@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_first_donated_step_works_in_keras(figure):
    import keras

    from lionax.frameworks.keras import Optimizer as KerasOptimizer

    for name in HELPED.keys() - {"anchored"}:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        optimizer = KerasOptimizer(HELPED[name]())
        model.compile(optimizer, loss="mse")
        optimizer.build(model.trainable_variables)
        check_own_buffers([v.value for v in model.variables + optimizer.variables])
        model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0)
        assert int(optimizer.state.count) == 1
        figure("first donated steps", 1)


@BUFFERS
def test_what_moves_a_state_gives_each_array_a_buffer():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    groups = lionax.partition({"x": lionax.sgd(0.1), "y": lionax.sgd(0.2)},
                              lionax.labels({"a": "x"}, default="y"))
    one = lionax.set_hyperparams(lionax.sgd(0.1).init(params), learning_rate=0.5)
    rate = jnp.float32(0.5)
    check_own_buffers(params, lionax.cast_state(one, groups.init(params)))
    check_own_buffers(params, rate, lionax.set_hyperparams(groups.init(params),
                                                           learning_rate=rate))
    own = lionax.lion(0.1)
    check_own_buffers(params, lionax.compat.from_optax(optax.lion(0.1).init(params),
                                                       own.init(params)))
    check_own_buffers(params, lionax.compat.to_optax(own.init(params),
                                                     optax.lion(0.1).init(params)))
    keras = lionax.compat.keras3.Lamb(0.5)
    weights = lionax.compat.to_weights(keras, keras.init(LINEAR), ["kernel", "bias"])
    check_own_buffers(LINEAR, lionax.compat.from_weights(keras, LINEAR, weights,
                                                         ["kernel", "bias"]))
