"""Resume with Orbax: stop, go on with the same bits, then go on with another definition.

`cast_state` moves a saved state into the structure of a new transformation: here the run goes on
with a clip, with the momentum in bfloat16, and with the first layer frozen.
"""

import functools
import pathlib
import tempfile

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import lionax

DIGITS = load_digits()
X, Y = DIGITS.data.astype(np.float32) / 16, DIGITS.target.astype(np.int32)
GRAPH, PARAMS = nnx.split(nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu,
                                         nnx.Linear(64, 10, rngs=nnx.Rngs(1))))


def loss_of(params, x, y):
    """The mean cross-entropy."""
    logits = nnx.merge(GRAPH, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx, params, state, first, last):
    """Steps ``first`` to ``last``; a step's batch depends on its number alone."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    def step(params, state, x, y):
        return tx.step(params, state, jax.grad(loss_of)(params, x, y))

    for number in range(first, last):
        batch = np.random.default_rng(number).choice(len(X), 64)
        params, state = step(params, state, X[batch], Y[batch])
    return params, state


def main() -> None:
    """Shows both ways to go on."""
    copy = functools.partial(jax.tree.map, jnp.copy)  # `train` donates what it gets
    folder = pathlib.Path(tempfile.mkdtemp(), "checkpoint")
    tx = lionax.lion(1e-3, weight_decay=0.1)
    whole, _ = train(tx, copy(PARAMS), tx.init(PARAMS), 0, 100)

    half = train(tx, copy(PARAMS), tx.init(PARAMS), 0, 50)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, half)
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(folder, (PARAMS, tx.init(PARAMS)))
    resumed, _ = train(tx, copy(params), copy(state), int(state.count), 100)
    equal = all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, resumed)))
    print(f"resumed at step {int(state.count)}; the same bits at step 100: {equal}")

    parts = {"train": lionax.lion(5e-4, mu_dtype="bfloat16"), "freeze": lionax.set_to_zero()}
    by_path = lionax.labels({"layers/0": "freeze"}, default="train")
    other = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.partition(parts, by_path))
    state = lionax.cast_state(state, other.init(params))  # its logger tells what is gone
    params, state = train(other, params, state, int(state.count), 100)
    print(f"with another definition: step {int(state.count)}, loss {loss_of(params, X, Y):.4f}")


if __name__ == "__main__":
    main()
