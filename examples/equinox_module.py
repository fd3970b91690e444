"""Equinox: a classifier with a frozen input scaling on scikit-learn's digits."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax
from lionax.frameworks import equinox

BATCH, STEPS = 64, 400
rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 40, STEPS)
tx = lionax.chain(lionax.clip_by_global_norm(1.0),
                  lionax.lion(rate, weight_decay=0.1, mask=lionax.not_matching("bias")))


class Classifier(eqx.Module):
    """A perceptron over inputs of mean 0 and variance 1."""

    mean: jax.Array
    deviation: jax.Array
    layers: eqx.nn.MLP

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of one digit."""
        return self.layers((x - self.mean) / self.deviation)


def trained(model: Classifier) -> Any:
    """The module with True where an array is trained: not in the scaling."""
    spec = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda spec: (spec.mean, spec.deviation), spec, (False, False))


@eqx.filter_jit(donate="all-except-first", compiler_options=lionax.compiler_options())
def train(batch: Any, model: Classifier, state: Any) -> tuple[Classifier, Any, jax.Array]:
    """One step: the new model, the new state and the loss."""
    part, frozen = eqx.partition(model, trained(model))

    @eqx.filter_value_and_grad
    def loss_of(part: Classifier) -> jax.Array:
        logits = jax.vmap(eqx.combine(part, frozen))(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    loss, grads = loss_of(part)
    model, state = equinox.step(tx, model, state, grads)
    return model, state, loss


def main() -> None:
    """Trains, and prints the accuracy on the digits left out."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train_set, test_set = order[:1400], order[1400:]

    layers = eqx.nn.MLP(64, 10, 128, 1, key=jax.random.key(0))
    deviation = jnp.asarray(x[train_set].std(axis=0) + 1.0)
    model = Classifier(jnp.asarray(x[train_set].mean(axis=0)), deviation, layers)
    state = equinox.init(tx, eqx.filter(model, trained(model)))

    batches = np.random.default_rng(1)
    for step in range(STEPS):
        batch = batches.choice(train_set, BATCH, replace=False)
        arrays = jnp.asarray(x[batch]), jnp.asarray(y[batch])
        model, state, loss = train(arrays, model, state)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.4f}")

    predicted = jnp.argmax(jax.vmap(model)(jnp.asarray(x[test_set])), axis=-1)
    print(f"accuracy on {len(test_set)} digits left out: {np.mean(predicted == y[test_set]):.3f}")


if __name__ == "__main__":
    main()
