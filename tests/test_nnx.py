"""`lionax.frameworks.nnx.Optimizer` against `Transformation.step` on the raw trees."""

import cProfile
import inspect
import pstats
import time

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lionax
from lionax.frameworks.nnx import Optimizer

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = cases.normal(8, 4)


class Block(nnx.Module):
    """A layer with statistics and random numbers."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, x=X):
    return jnp.mean((model(x) - 1.0) ** 2)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train(model, optimizer, x=X):
    optimizer.update(model, nnx.grad(loss_of)(model, x))


@nnx.jit
def gradients(model, x=X):
    return nnx.grad(loss_of)(model, x)


def arrays(tree):
    return jax.tree.map(jnp.copy, nnx.as_pure(tree))


def params_of(model):
    return arrays(nnx.state(model, nnx.Param))


def state_of(optimizer):
    return arrays(optimizer.opt_state)


TXS = {
    "lion": lambda: lionax.lion(0.01, mask=lionax.not_matching("bias", "norm/scale")),
    "lamb": lambda: lionax.chain(lionax.clip_by_global_norm(0.1), lionax.lamb(0.01),
                                 lionax.params_ema(0.9)),
    "low precision": lambda: lionax.lion(cases.SCHEDULE, mu_dtype="bfloat16"),
    "partition": lambda: lionax.partition(
        {"train": lionax.sgd(0.1, 0.9), "freeze": lionax.set_to_zero()},
        lionax.labels({r"blocks/1/.*kernel": "train"}, default="freeze")),
    "accumulate": lambda: lionax.accumulate(lionax.sgd(0.1, 0.9), 2),
    "optax": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
}


@pytest.mark.parametrize("name", cases.but_for_fast(TXS, "lion"))
def test_a_compiled_donated_update_is_a_step(name):
    tx, model, twin = TXS[name](), Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    plain = lionax.chain(tx)
    params = params_of(twin)
    state = plain.init(params)
    step = jax.jit(plain.step)
    for _ in range(3):
        grads = nnx.as_pure(gradients(twin))
        train(model, optimizer)
        params, state = step(params, state, grads)
        nnx.update(twin, params)
        cases.assert_close(params_of(model), params, 2e-6)
    cases.assert_close(state_of(optimizer), state, 2e-5)
    # Statistics and random numbers have moved with the calls of the model, and no further.
    cases.assert_close(arrays(nnx.state(model, (nnx.BatchStat, nnx.RngCount))),
                       arrays(nnx.state(twin, (nnx.BatchStat, nnx.RngCount))), 2e-6)
    assert int(optimizer.step[...]) == 3


def test_an_update_outside_of_jit_returns_nothing():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, lionax.lion(0.01), wrt=nnx.Param)
    assert isinstance(optimizer, nnx.Optimizer)
    grads, before = gradients(model), params_of(model)
    state = optimizer.tx.init(before)
    assert optimizer.update(model, grads) is None
    after, state = optimizer.tx.step(before, state, nnx.as_pure(grads))
    cases.assert_equal(params_of(model), after)
    cases.assert_equal(state_of(optimizer), state)


@pytest.mark.slow
def test_a_scan_carries_model_and_optimizer():
    tx = lionax.sgd(0.1, 0.9)
    model, twin = nnx.Linear(4, 1, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer, other = (Optimizer(each, tx, wrt=nnx.Param) for each in (model, twin))
    batches = cases.normal(3, 8, 4)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def steps(carry, x):
        carry[1].update(carry[0], nnx.grad(loss_of)(carry[0], x))
        return carry

    steps((model, optimizer), batches)
    for batch in batches:
        train(twin, other, batch)
    cases.assert_close(params_of(model), params_of(twin))
    cases.assert_close(state_of(optimizer), state_of(other))


def compiled(optimizer_class, tx):
    """The donated step of a split model of 4 MB, compiled with the options."""
    model = nnx.List([nnx.Linear(512, 512, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(4)])
    optimizer = optimizer_class(model, tx, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state, grads):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    step = jax.jit(step, donate_argnums=0, compiler_options=lionax.compiler_options())
    return step.lower(state, nnx.state(model, nnx.Param)).compile().memory_analysis()


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_a_split_step_holds_no_temporary(mu_dtype):
    memory = compiled(Optimizer, lionax.lion(0.01, mu_dtype=mu_dtype))
    assert memory.temp_size_in_bytes < 2 ** 20 / 8  # a leaf has 2 ** 20 bytes
    assert memory.alias_size_in_bytes > memory.output_size_in_bytes - 2 ** 12


@pytest.mark.parametrize(("make", "share"), [
    pytest.param(lambda: lionax.lion(0.01), 0, id="lion"),
    pytest.param(lambda: lionax.accumulate(lionax.lion(0.01), 2), 1, id="accumulate")])
def test_what_the_optimizer_of_flax_costs(make, share):
    """Updates in memory where a condition makes them; XLA fuses them away elsewhere."""
    ours, theirs = compiled(Optimizer, make()), compiled(nnx.Optimizer, make())
    assert ours.temp_size_in_bytes < 2 ** 12
    assert 0 <= theirs.temp_size_in_bytes - share * 2 ** 22 < 2 ** 12
    assert ours.peak_memory_in_bytes <= theirs.peak_memory_in_bytes


def test_the_optimizer_of_flax_works_too():
    model, twin = nnx.Linear(4, 1, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    tx = lionax.lion(0.01)
    for _ in range(2):
        ours, theirs = Optimizer(model, tx, wrt=nnx.Param), nnx.Optimizer(twin, tx, wrt=nnx.Param)
        train(model, ours)
        train(twin, theirs)
    cases.assert_close(params_of(model), params_of(twin))
    cases.assert_close(arrays(nnx.state(ours)), arrays(nnx.state(theirs)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.out.kernel = self.embed.kernel

    def __call__(self, x):
        return self.out(jnp.tanh(self.embed(x)))


def test_a_shared_weight_has_one_slot_and_one_step():
    model, tx = Tied(nnx.Rngs(0)), lionax.lion(0.01)
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    before, grads = params_of(model), nnx.as_pure(gradients(model))
    train(model, optimizer)
    assert model.out.kernel is model.embed.kernel
    assert lionax.paths(state_of(optimizer).rules) == ["0/mu/embed/kernel"]
    cases.assert_close(params_of(model), tx.step(before, tx.init(before), grads)[0])


@pytest.mark.slow
@pytest.mark.skipif("graph" not in inspect.signature(nnx.Optimizer.__init__).parameters,
                    reason="this Flax has graphs only")
def test_without_a_graph_a_gradient_is_a_module():
    model, twin = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, lionax.sgd(0.1), wrt=nnx.Param, graph=False)
    other = Optimizer(twin, lionax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.grad(loss_of, graph=False)(model)
    assert isinstance(grads, nnx.BatchNorm)
    optimizer.update(model, grads)
    other.update(twin, gradients(twin))
    cases.assert_close(params_of(model), params_of(twin))


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


@pytest.mark.slow
def test_adapters_alone_have_state_and_move():
    model = Adapted(nnx.Rngs(0))
    optimizer = Optimizer(model, lionax.lion(0.01, weight_decay=0.1), wrt=nnx.LoRAParam)
    assert lionax.paths(state_of(optimizer).rules) == [f"0/mu/dense/lora/lora_{x}" for x in "ab"]
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before = arrays(nnx.state(model, frozen))
    grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    cases.assert_equal(arrays(nnx.state(model, frozen)), before)
    with pytest.raises(ValueError, match=r"gradients also have 'dense/bias'.*argnums=nnx.DiffSt"):
        optimizer.update(model, gradients(model))


@pytest.mark.slow
@pytest.mark.parametrize("tx", [lionax.lion(0.01), lionax.sgd(0.1)], ids=["lion", "sgd"])
def test_other_parameters_are_refused_by_path(tx):
    model = Net(nnx.Rngs(0))
    optimizer = Optimizer(model, tx, wrt=(nnx.Param, nnx.BatchStat))
    with pytest.raises(ValueError, match="gradients lack 'blocks/0/norm/mean'"):
        optimizer.update(model, gradients(model))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    model.tail = nnx.Linear(1, 1, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"parameters also have 'tail/bias'.*cast_state"):
        optimizer.update(model, gradients(model))
    del model.tail, model.head
    with pytest.raises(ValueError, match="parameters lack 'head/bias'"):
        optimizer.update(model, nnx.state(model, nnx.Param))


def test_extra_arguments_reach_the_step():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=0))
    optimizer = Optimizer(model, plateau, wrt=nnx.Param)
    for value in (1.0, 2.0):
        optimizer.update(model, gradients(model), value=jnp.asarray(value))
    scales = [float(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(
        state_of(optimizer)) if "scale" in jax.tree_util.keystr(path)]
    assert scales == [pytest.approx(0.1)]
    with pytest.raises(TypeError, match="no part of the transformation takes the argument 'valu'"):
        Optimizer(model, lionax.sgd(0.1), wrt=nnx.Param).update(model, gradients(model), valu=1.0)


def test_a_state_never_shares_a_buffer_with_the_parameters():
    """Some of Optax's ``init`` return the parameters."""
    anchored = optax.GradientTransformation(lambda params: (params, params),
                                            lambda grads, state, params: (grads, state))
    for transformation in (anchored, lionax.params_ema(0.9), lionax.lamb(0.01)):
        model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
        train(model, Optimizer(model, transformation, wrt=nnx.Param))
    with pytest.raises(Exception, match="donate the same buffer twice"):
        train(model, nnx.Optimizer(model, anchored, wrt=nnx.Param))


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_it_stopped(tmp_path):
    tx = lionax.lion(cases.SCHEDULE, mu_dtype="bfloat16", mask=lionax.not_matching("bias"))
    model = Net(nnx.Rngs(0))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    train(model, optimizer)
    restored = Net(nnx.Rngs(1))
    other = Optimizer(restored, tx, wrt=nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        for name, saved, target in (("model", model, restored), ("optimizer", optimizer, other)):
            checkpointer.save(tmp_path / name, nnx.state(saved))
            checkpointer.wait_until_finished()
            nnx.update(target, checkpointer.restore(tmp_path / name, nnx.state(target)))
    cases.assert_equal(state_of(other), state_of(optimizer))
    train(model, optimizer)
    train(restored, other)
    cases.assert_equal(params_of(restored), params_of(model))
    cases.assert_equal(state_of(other), state_of(optimizer))


@pytest.mark.slow
def test_layers_stacked_by_vmap_and_run_by_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    model = stack(jax.random.split(jax.random.key(0), 3))

    @nnx.jit
    def gradients(model):
        def loss(model):
            run = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0),
                           out_axes=nnx.Carry)
            return jnp.sum(run(X, model) ** 2)

        return nnx.grad(loss)(model)

    tx = lionax.lamb(0.01, weight_decay=0.1)
    optimizer, before, grads = Optimizer(model, tx, wrt=nnx.Param), params_of(model), gradients(
        model)
    optimizer.update(model, grads)
    assert before["kernel"].shape == (3, 4, 4)
    cases.assert_close(params_of(model), tx.step(before, tx.init(before), nnx.as_pure(grads))[0])


@pytest.mark.slow
def test_an_ensemble_under_vmap_has_an_optimizer_each():
    @nnx.vmap(in_axes=0, out_axes=0)
    def ensemble(key):
        model = nnx.Linear(4, 1, rngs=nnx.Rngs(key))
        return model, Optimizer(model, lionax.lamb(0.01), wrt=nnx.Param)

    keys = jax.random.split(jax.random.key(0), 2)
    model, optimizer = ensemble(keys)
    nnx.vmap(lambda model, optimizer: optimizer.update(model, nnx.grad(loss_of)(model)))(
        model, optimizer)
    for member, key in enumerate(keys):
        alone = nnx.Linear(4, 1, rngs=nnx.Rngs(key))
        train(alone, Optimizer(alone, lionax.lamb(0.01), wrt=nnx.Param))
        cases.assert_close(jax.tree.map(lambda leaf: leaf[member], params_of(model)),  # noqa: B023
                           params_of(alone))


def timed(optimizer_class, tx):
    model = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(150)])
    optimizer = optimizer_class(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))

    @nnx.jit(donate_argnames=("model", "optimizer"))
    def update(model, optimizer, grads):
        optimizer.update(model, grads)

    def run():
        start = time.perf_counter()
        update(model, optimizer, grads)
        jax.block_until_ready(model[0].kernel[...])
        return time.perf_counter() - start

    run()
    return run


@pytest.mark.slow
def test_dispatch_of_300_parameters_takes_no_longer_than_with_flax():
    """The runs take turns; calls are counted, too, since other processes share the CPU."""
    ours, theirs = timed(Optimizer, lionax.lion(0.01)), timed(nnx.Optimizer, optax.lion(0.01))
    times = np.array([(ours(), theirs()) for _ in range(40)])
    calls = [calls_of(run) for run in (ours, theirs)]
    print("times", np.median(times, 0), "shortest", np.min(times, 0), "calls", calls)
    assert calls[0] < 1.02 * calls[1]
    assert np.min(times[:, 0]) < 1.15 * np.min(times[:, 1])


def calls_of(run):
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls
