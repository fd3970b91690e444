"""Flax NNX: a classifier with batch normalization and dropout on scikit-learn's digits."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax
from lionax.frameworks.nnx import Optimizer

BATCH, STEPS = 64, 400


class Classifier(nnx.Module):
    """Two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits."""
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_of(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit(donate_argnames=("model", "optimizer"))
def train(model: Classifier, optimizer: Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step; it writes the model and the optimizer."""
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    """Trains, and prints the accuracy on the digits left out."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train_set, test_set = order[:1400], order[1400:]

    model = Classifier(nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 40, STEPS)
    decayed = lionax.not_matching("bias", "norm")
    tx = lionax.chain(lionax.clip_by_global_norm(1.0),
                      lionax.lion(rate, weight_decay=0.1, mask=decayed, mu_dtype="bfloat16"))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)

    batches = np.random.default_rng(1)
    for step in range(STEPS):
        batch = batches.choice(train_set, BATCH, replace=False)
        loss = train(model, optimizer, jnp.asarray(x[batch]), jnp.asarray(y[batch]))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.4f}")

    model.eval()
    predicted = jnp.argmax(model(jnp.asarray(x[test_set])), axis=-1)
    print(f"accuracy on {len(test_set)} digits left out: {np.mean(predicted == y[test_set]):.3f}")


if __name__ == "__main__":
    main()
