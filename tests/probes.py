"""What lionax's and Optax's transformations do, asked of both in the same way."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from benchmarks.peers import optax_step


def then_optax():
    """Skips the rest of a test, which is about Optax, on another version than the table's."""
    if optax.__version__ != "0.2.8":
        pytest.skip(f"lionax is as said; the rest is about Optax 0.2.8, not {optax.__version__}")


def sized(short, long):
    """How many cases a test tries: few, or in the run that `docs/reliability.md` reports many."""
    return long if os.environ.get("LIONAX_LONG") else short


def step_of(tx):
    """The function that makes one training step."""
    return getattr(tx, "step", None) or optax_step(tx)


def run(tx, params, grads, steps=1):
    """The last update, and the state, of so many calls with the same parameters."""
    state, one = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = one(grads, state, params)
    return updates, state


def update(tx, params, grads):
    """The first update."""
    return run(tx, params, grads)[0]


def shapes(tx, params, grads):
    """The first update, and the state after it, without their numbers."""
    return jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)


def scanned(tx, params, grads, steps):
    """The parameters and the state after so many steps in one scan."""
    def body(carry, _):
        return step_of(tx)(*carry, grads), None

    return jax.jit(lambda carry: jax.lax.scan(body, carry, None, steps)[0])(
        (params, tx.init(params)))


def window(tx, values):
    """The parameters and the state after steps with gradients of these values."""
    step, carry = jax.jit(step_of(tx)), (jnp.ones(2), tx.init(jnp.ones(2)))
    for value in values:
        carry = step(*carry, jnp.full(2, value))
    return jax.block_until_ready(carry)


def moved(tx, params, grads, steps):
    """The largest change of a parameter in each step."""
    step, carry, changes = jax.jit(step_of(tx)), (params, tx.init(params)), []
    for _ in range(steps):
        old, carry = carry[0], step(*carry, grads)
        changes.append(max(float(jnp.abs(new - old[name]).max()) for name, new in carry[0].items()))
    return changes


def wide(array):
    """In float64."""
    return np.asarray(array).astype(np.float64)


def norm_of(tree):
    """The norm over a tree, in float64."""
    return np.sqrt(sum(np.sum(wide(leaf)**2) for leaf in jax.tree.leaves(tree)))


def decay_of_twos(lion, weight_decay):
    """What a decay of bfloat16 parameters adds to a step of 1, on average over learning rates."""
    params, rates = jnp.full(2, 2.0, jnp.bfloat16), np.linspace(1e-3, 2e-3, 400)

    def step(rate):
        tx = lion(rate, weight_decay=weight_decay)
        return tx.update(params, tx.init(params), params)[0][0]

    return np.mean(wide(jax.jit(jax.vmap(step))(jnp.float32(rates))) / -rates) - 1.0


def mean_less_one(accumulate, value):
    """What an inner transformation that subtracts 1 makes of the mean of 1 and a bfloat16 value."""
    tx, ones = accumulate(optax.add_decayed_weights(-1.0), 2), jnp.ones(2, jnp.bfloat16)
    one = jax.jit(tx.update)
    _, state = one(ones, tx.init(ones), ones)
    return float(one(ones * jnp.bfloat16(value), state, ones)[0][0])


def inner_runs(accumulate, every):
    """How often an inner transformation runs in one window."""
    calls = []

    def counted(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    inner = optax.GradientTransformation(optax.init_empty_state, counted)
    window(accumulate(inner, every), np.ones(every))
    jax.effects_barrier()
    return len(calls)


def given_to_a_mask(masked, inner, params, grads):
    """The first elements of the leaf "w" of the trees that a mask, a function, is called with."""
    seen = []
    tx = masked(inner, lambda tree: seen.append(float(tree["w"][0])) or {"w": True})
    tx.update(grads, tx.init(params), params)
    return set(seen)


def steps_of_assigned(tx, assign, value):
    """The sizes of two steps, before and after a value is assigned, and how often one is traced."""
    traces, sizes = [], []
    step = jax.jit(lambda *carry: traces.append(1) or tx.update(*carry))
    state = tx.init(jnp.ones(2))
    for change in (lambda state: state, lambda state: assign(state, value)):
        updates, state = step(jnp.ones(2), change(state))
        sizes.append(-float(updates[0]))
    return sizes, len(traces)


def traces(make, count):
    """How often a function is traced for so many equal transformations as static arguments."""
    seen = []
    step = jax.jit(lambda tx, grads: seen.append(tx) or tx.update(grads, tx.init(grads), grads),
                   static_argnums=0)
    for _ in range(count):
        step(make(), jnp.ones(2))
    return len(seen)


def lines(tx, params):
    """The lines of StableHLO of a step."""
    lowered = jax.jit(step_of(tx)).lower(params, jax.eval_shape(tx.init, params), params)
    return lowered.as_text().count("\n")


def reductions(tx, params):
    """The sums over arrays in a compiled update."""
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    return text.count("= f32[] reduce(")  # in a branch, in float64, they are taken again


def mesh_of(devices):
    """A mesh with one axis, x."""
    return jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))


def on_devices(function, devices, specs, out, tree, **options):
    """What a function makes of the shards of a tree, inside of `shard_map`."""
    return jax.jit(jax.shard_map(function, mesh=mesh_of(devices), in_specs=(specs,), out_specs=out,
                                 **options))(tree)


def compilations(tx, params, **options):
    """Whether ``jit(init)`` splits the momentum as its parameter; how often a step compiles."""
    carry = params, jax.jit(tx.init, **options)(params)
    is_split = optax.tree.get(carry[1], "mu").sharding == params.sharding
    step = jax.jit(step_of(tx))
    for _ in range(3):
        carry = step(*carry, params)
    return is_split, step._cache_size()


class Gate(eqx.Module):
    """A tree that may not be called."""

    weight: object
    bias: object

    def __call__(self, tree):
        raise AssertionError("a tree was called")
