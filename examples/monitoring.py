"""Monitoring: measure every tenth step, read seldom, write to TensorBoard and Weights & Biases.

`metrics` moves nothing to the host. One `jax.device_get` reads all of it, and waits for the step.
"""

import functools
import json
import time

import flax.nnx as nnx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax

STEPS, READ_EVERY = 300, 100


class Writer:
    """Has the calls of TensorBoard's ``SummaryWriter`` and of ``wandb``; use these in its place."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """As ``SummaryWriter.add_scalar``."""
        print(f"step {global_step}: {tag} = {value:.4g}")

    def log(self, data: dict[str, float], step: int) -> None:
        """As ``wandb.log``."""
        print(f"step {step}: {json.dumps(data)[:60]}...")


def main() -> None:
    """Trains, and writes what was measured."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    graph, params = nnx.split(nnx.Sequential(
        nnx.Linear(64, 256, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(256, 10, rngs=nnx.Rngs(1))))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 30, STEPS)
    tx = lionax.monitor(
        lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(rate, weight_decay=0.1)),
        groups={"layers/0": "first", "layers/2": "last"}, every=10)
    state, writer = tx.init(params), Writer()
    print(lionax.summary(tx, params))

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    def step(params, state, x, y):
        def loss_of(params):
            logits = nnx.merge(graph, params)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        params, state = tx.step(params, state, grads)
        return params, state, loss

    batches, reading = np.random.default_rng(0), 0.0
    start = time.perf_counter()
    for number in range(1, STEPS + 1):
        batch = batches.choice(len(x), 64)
        params, state, loss = step(params, state, x[batch], y[batch])
        if number % READ_EVERY == 0:
            began = time.perf_counter()
            found = jax.device_get(lionax.metrics(state) | {"loss": loss})
            reading += time.perf_counter() - began
            found = {name: float(value) for name, value in found.items()}
            for name in ("loss", "gradient_norm", "first/update_to_parameter", "sign_changes"):
                writer.add_scalar(name, found[name], number)
            writer.log(found, step=number)
    share = reading / (time.perf_counter() - start)
    print(f"reading {STEPS // READ_EVERY} times took {share:.1%} of the run")


if __name__ == "__main__":
    main()
