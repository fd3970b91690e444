"""Flax Linen: a classifier with batch normalization on scikit-learn's digits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax
from lionax.frameworks.linen import TrainState

BATCH, STEPS = 64, 400


class Classifier(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """The logits."""
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(128)(x))
        return nn.Dense(10)(nn.relu(x))


class State(TrainState):
    """A train state with the statistics of the batch normalization."""

    batch_stats: Any


def train(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
    """One step: the new state and the loss."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, x, training=True, mutable="batch_stats")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def main() -> None:
    """Trains, and prints the accuracy on the digits left out."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train_set, test_set = order[:1400], order[1400:]

    model = Classifier()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 64)), training=False)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 40, STEPS)
    tx = lionax.lamb(rate, weight_decay=0.1, mask=lionax.matching("kernel"))
    state = State.create(apply_fn=model.apply, tx=tx, **variables)
    step = jax.jit(train, donate_argnums=0, compiler_options=lionax.compiler_options())

    batches = np.random.default_rng(1)
    for i in range(STEPS):
        batch = batches.choice(train_set, BATCH, replace=False)
        state, loss = step(state, jnp.asarray(x[batch]), jnp.asarray(y[batch]))
        if (i + 1) % 100 == 0:
            print(f"step {i + 1}: loss {loss:.4f}")

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predicted = jnp.argmax(model.apply(variables, jnp.asarray(x[test_set]), training=False), -1)
    print(f"accuracy on {len(test_set)} digits left out: {np.mean(predicted == y[test_set]):.3f}")


if __name__ == "__main__":
    main()
