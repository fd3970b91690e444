"""`lionax.frameworks.equinox` against `Transformation.step` on the filtered trees."""

from collections.abc import Callable

import cases
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import lionax
from lionax.frameworks import equinox

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = cases.normal(8, 4)
KEY = jax.random.key(0)


class Net(eqx.Module):
    """A module with everything that is not trained."""

    layers: list[eqx.nn.Linear]
    mean: jax.Array  # a float buffer
    calls: jax.Array  # an integer
    absent: None
    activation: Callable
    width: int = eqx.field(static=True)

    def __init__(self, key=KEY):
        keys = jax.random.split(key, 2)
        self.layers = [eqx.nn.Linear(4, 8, use_bias=False, key=keys[0]),
                       eqx.nn.Linear(8, 1, key=keys[1])]
        self.mean, self.calls, self.absent = jnp.full(4, 0.5), jnp.asarray(3), None
        self.activation, self.width = jax.nn.tanh, 8

    def __call__(self, x):
        x = self.activation(self.layers[0](x - self.mean))
        return self.layers[1](x)


def loss_of(model):
    return jnp.mean((jax.vmap(model)(X) - 1.0) ** 2)


def but_for_the_mean(model):
    spec = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda spec: spec.mean, spec, False)


TXS = {
    "lion": lambda: lionax.lion(0.01, weight_decay=0.1, mask=lionax.not_matching("bias")),
    "lamb": lambda: lionax.chain(lionax.clip_by_global_norm(0.1), lionax.lamb(0.01),
                                 lionax.params_ema(0.9, overwrite_every=2)),
    "accumulate": lambda: lionax.accumulate(lionax.sgd(0.1, 0.9), 2),
    "optax": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.but_for_fast(TXS, "lion"))
def test_a_step_of_a_whole_module_is_that_of_its_trained_part(name):
    tx, model = TXS[name](), Net()
    spec = but_for_the_mean(model)
    trained, frozen = eqx.partition(model, spec)
    plain = lionax.chain(tx)
    params, expected = trained, plain.init(trained)
    state = equinox.init(tx, trained)
    cases.assert_equal(state, expected)

    @eqx.filter_jit
    def grads_of(model):
        trained, frozen = eqx.partition(model, spec)
        return eqx.filter_grad(lambda part: loss_of(eqx.combine(part, frozen)))(trained)

    step, plain_step = eqx.filter_jit(equinox.step), jax.jit(plain.step)
    for _ in range(3):
        grads = grads_of(model)
        model, state = step(tx, model, state, grads)
        params, expected = plain_step(params, expected, grads)
        cases.assert_close(eqx.filter(model, spec), params)
        cases.assert_close(state, expected)
    cases.assert_equal(eqx.filter(model, eqx.is_array).mean, frozen.mean)
    assert (int(model.calls), model.width, model.activation) == (3, 8, jax.nn.tanh)


@pytest.mark.slow
def test_a_partitioned_module_gives_the_same():
    tx, model = lionax.lion(0.01, weight_decay=0.1), Net()
    trained, frozen = eqx.partition(model, but_for_the_mean(model))
    grads = eqx.filter_grad(lambda part: loss_of(eqx.combine(part, frozen)))(trained)
    state = equinox.init(tx, trained)
    part, part_state = equinox.step(tx, trained, state, grads)
    whole, whole_state = equinox.step(tx, model, state, grads)
    cases.assert_equal(eqx.filter(eqx.combine(part, frozen), eqx.is_array),
                       eqx.filter(whole, eqx.is_array))
    cases.assert_equal(part_state, whole_state)
    assert part.mean is None


def test_frozen_leaves_have_no_state():
    model = Net()
    state = equinox.init(lionax.lion(0.01), eqx.filter(model, but_for_the_mean(model)))
    assert lionax.paths(state.rules) == [f"0/mu/layers/{name}" for name in (
        "0/weight", "1/weight", "1/bias")]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.but_for_fast(
    [name for name in TXS if name != "optax"], "lion"))
def test_a_buffer_without_a_gradient_never_changes(name):
    """Although the state was made with the buffer in it."""
    model, tx = Net(), TXS[name]()
    state = equinox.init(tx, model)
    for _ in range(4):
        grads = eqx.tree_at(lambda grads: grads.mean, eqx.filter_grad(loss_of)(model), None)
        model, state = equinox.step(tx, model, state, grads)
    cases.assert_equal(model.mean, Net().mean)
    assert float(jnp.abs(model.layers[0].weight - Net().layers[0].weight).max()) > 0


@pytest.mark.slow
def test_gradients_of_another_structure_are_refused_by_path():
    model, tx = Net(), lionax.lion(0.01)
    grads = eqx.filter_grad(loss_of)(model)
    state = equinox.init(tx, model)
    wrong = eqx.tree_at(lambda grads: grads.layers[1].bias, grads, jnp.ones(3))
    with pytest.raises(ValueError, match="gradient of 'layers/1/bias' has shape"):
        equinox.step(tx, model, state, wrong)
    wrong = eqx.tree_at(lambda grads: grads.calls, grads, jnp.ones(()), is_leaf=lambda x: x is None)
    with pytest.raises(ValueError, match="gradient of 'calls' has shape"):
        equinox.step(tx, model, state, wrong)
    wrong = eqx.tree_at(lambda grads: grads.layers, grads, grads.layers[:1])
    with pytest.raises(ValueError, match="there is no gradient for 'layers/1/weight'"):
        equinox.step(tx, model, state, wrong)


def test_extra_arguments_reach_the_step():
    model, tx = Net(), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=0))
    state, grads = equinox.init(tx, model), eqx.filter_grad(loss_of)(model)
    for value in (1.0, 2.0):
        model, state = equinox.step(tx, model, state, grads, value=jnp.asarray(value))
    assert float(optax.tree.get(state, "scale")) == pytest.approx(0.1)
    with pytest.raises(TypeError, match="takes the argument 'valu'"):
        equinox.step(lionax.sgd(0.1), model, equinox.init(lionax.sgd(0.1), model), grads, valu=1.0)


@pytest.mark.slow
def test_a_donated_step_works_at_once_and_holds_no_temporary():
    anchored = optax.GradientTransformation(lambda params: (params, params),
                                            lambda grads, state, params: (grads, state))
    step = eqx.filter_jit(
        lambda kept, model, state: equinox.step(kept[0], model, state, kept[1]),
        donate="all-except-first", compiler_options=lionax.compiler_options())
    for tx in (anchored, lionax.params_ema(0.9), lionax.lion(0.01)):
        model = eqx.nn.Linear(4, 1, key=KEY)
        step((tx, jax.tree.map(jnp.ones_like, model)), model, equinox.init(tx, model))
    large = eqx.nn.Linear(512, 512, key=KEY)
    program = step.lower((tx, large), large, equinox.init(tx, large)).compile()
    assert program.compiled.memory_analysis().temp_size_in_bytes < 2 ** 12


def test_shared_weights_make_one_step():
    class Pair(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

    pair = Pair(*(eqx.nn.Linear(4, 4, use_bias=False, key=KEY) for _ in "ab"))
    shared = eqx.nn.Shared(pair, lambda pair: pair.second.weight, lambda pair: pair.first.weight)

    def loss(shared):
        pair = shared()
        return jnp.sum(jax.vmap(lambda x: pair.second(pair.first(x)))(X))

    tx, grads = lionax.sgd(0.1), eqx.filter_grad(loss)(shared)
    new, _ = equinox.step(tx, shared, equinox.init(tx, shared), grads)
    assert len(jax.tree.leaves(eqx.filter(new, eqx.is_inexact_array))) == 1
    weight, grad = (jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))[0]
                    for tree in (shared, grads))
    cases.assert_close(new().first.weight, weight - 0.1 * grad)
    cases.assert_equal(new().first.weight, new().second.weight)


@pytest.mark.slow
def test_members_of_an_ensemble_under_vmap():
    tx, keys = lionax.lamb(0.01), jax.random.split(KEY, 2)
    members = eqx.filter_vmap(Net)(keys)
    grads = eqx.filter_vmap(eqx.filter_grad(loss_of))(members)
    states = eqx.filter_vmap(lambda model: equinox.init(tx, model))(members)
    new, _ = eqx.filter_vmap(lambda *args: equinox.step(tx, *args))(members, states, grads)
    alone = Net(keys[1])
    alone, _ = equinox.step(tx, alone, equinox.init(tx, alone), eqx.filter_grad(loss_of)(alone))
    cases.assert_close(new.layers[0].weight[1], alone.layers[0].weight)
