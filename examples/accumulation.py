"""Accumulation over uneven micro-batches, in float16 with a loss scale, on scikit-learn's digits.

A micro-batch is padded to one size, and its true number of examples is its weight. So the sum over
a window is that of the whole batch. An overflow drops the window and lowers the loss scale.
"""

import functools
import json

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax

MICRO_BATCH, WINDOW, STEPS = 32, 4, 100


def loss_of(params, graph, x, y, is_real):
    """The mean cross-entropy of the examples that are real, in float16."""
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    logits = nnx.merge(graph, half)(x.astype(jnp.float16)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(losses * is_real) / jnp.maximum(jnp.sum(is_real), 1)


def make_step(tx, graph):
    """A compiled function of one micro-batch."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    def step(params, state, x, y, is_real):
        scale = optax.tree.get(state, "loss_scale")
        grads = jax.grad(lambda p: scale * loss_of(p, graph, x, y, is_real))(params)
        return tx.step(params, state, grads, weight=jnp.sum(is_real))

    return step


def main() -> None:
    """Trains, and prints what was measured."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train_set, test_set = order[:1400], order[1400:]
    model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu,
                           nnx.Linear(128, 10, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model)
    inner = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3, weight_decay=0.1))
    tx = lionax.monitor(lionax.dynamic_loss_scale(
        lionax.accumulate(inner, every=WINDOW), initial_scale=2.0**24, growth_interval=50))
    state, step, rng = tx.init(params), make_step(tx, graph), np.random.default_rng(1)

    for window in range(STEPS):
        for _ in range(WINDOW):
            size = rng.integers(1, MICRO_BATCH + 1)  # how many examples came
            chosen = rng.choice(train_set, MICRO_BATCH, replace=False)
            is_real = (np.arange(MICRO_BATCH) < size).astype(np.float32)
            params, state = step(params, state, x[chosen], y[chosen], is_real)
        if (window + 1) % 25 == 0:
            found = jax.device_get(lionax.metrics(state))  # waits for the device: do it seldom
            shown = ("accumulated_gradient_norm", "clip_factor", "update_norm")
            print(json.dumps({name: round(float(found[name]), 5) for name in shown}))

    print(f"loss scale at the end: {optax.tree.get(state, 'loss_scale'):.0f}")
    predicted = jnp.argmax(nnx.merge(graph, params)(x[test_set]), axis=-1)
    print(f"accuracy on {len(test_set)} digits left out: {np.mean(predicted == y[test_set]):.3f}")


if __name__ == "__main__":
    main()
