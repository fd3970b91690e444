"""`lionax.frameworks.nnx.Optimizer` against `Transformation.step` on the raw trees."""

import time

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


@pytest.mark.parametrize("name", TXS)
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


def test_what_the_optimizer_of_flax_costs():
    """It makes the updates, casts them and adds them; in one compiled step all that is fused."""
    ours, theirs = (compiled(c, lionax.lion(0.01)) for c in (Optimizer, nnx.Optimizer))
    print(ours.temp_size_in_bytes, theirs.temp_size_in_bytes)
    print(ours.peak_memory_in_bytes, theirs.peak_memory_in_bytes)
