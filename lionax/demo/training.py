"""The training loop: the part to copy."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lionax
from lionax.demo.checkpoints import Checkpoints
from lionax.demo.model import Transformer, bits_per_character
from lionax.demo.text import Text

__all__ = [
    "BATCH", "LENGTH", "OPTIMIZERS", "Run", "best_rate", "initial", "optimizer",
    "optimizer_milliseconds", "recorded_sweep", "train"
]

LENGTH, BATCH = 64, 32
EVALUATE_EVERY, EVALUATION_BATCHES = 25, 12
WARM_UP = 0.1  # fraction of the steps

NOT_DECAYED = lionax.not_matching("bias", "scale")
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "lion": lambda rate: lionax.lion(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=NOT_DECAYED
                                     ),  # a memory for a short run
    "lamb": lambda rate: lionax.lamb(rate, weight_decay=0.01, mask=NOT_DECAYED, trust_mask=
                                     NOT_DECAYED),
    "sgd": lambda rate: lionax.sgd(rate, momentum=0.9, nesterov=True),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.01, mask=NOT_DECAYED
                                      ),  # at home in a chain, too
}


def recorded_sweep() -> dict[str, Any]:
    """The learning rates that ``python -m lionax.demo.sweep`` tried, and what each reached."""
    return json.loads(resources.files("lionax.demo").joinpath("sweep.json").read_text())


def best_rate(name: str) -> float:
    """The learning rate with which an optimizer reached most in the sweep."""
    tried = recorded_sweep()["bits_per_character"][name]
    return float(min(tried, key=tried.get))


def optimizer(name: str, steps: int, peak: float | None = None) -> lionax.Transformation:
    """An optimizer with a warm-up to ``peak``, or the best rate of the sweep, and cosine decay."""
    peak = best_rate(name) if peak is None else peak
    warm_up = max(1, round(WARM_UP * steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, max(steps, warm_up + 1),
                                              0.05 * peak)
    return lionax.chain(lionax.clip_by_global_norm(1.0), OPTIMIZERS[name](rate))


@dataclasses.dataclass
class Run:
    """What came of training with one optimizer."""

    name: str
    parameters: int  # number of elements
    state_bytes: int  # of the optimizer
    steps: list[int] = dataclasses.field(default_factory=list)  # at which validation was made
    validation: list[float] = dataclasses.field(default_factory=list)  # bits per character


def initial(text: Text, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its initial weights."""
    model = Transformer(len(text.vocabulary), LENGTH, width=128, heads=4, layers=2,
                        rngs=nnx.Rngs(seed))
    return nnx.split(model)


def _compiled(tx: lionax.Transformation,
              graph: nnx.GraphDef) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A training step, and the loss over several batches."""

    def loss(params, batch):
        return bits_per_character(nnx.merge(graph, params), batch)

    # Donated, and with the options, parameters and state are written where they were read.
    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    def train_step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        return tx.step(params, state, grads)

    @jax.jit
    def validate(params, batches):
        return jax.lax.map(lambda batch: loss(params, batch), batches).mean()

    return train_step, validate


def train(name: str, tx: lionax.Transformation, text: Text, steps: int, seed: int,
          folder: pathlib.Path | None = None,
          must_stop: Callable[[], bool] = lambda: False) -> Iterator[Run]:
    """Trains; yields the growing record after every validation, so that a user may stop.

    With a folder it saves there before each yield, and goes on from what it finds there. When
    ``must_stop`` holds it finishes the step, saves and ends.
    """
    graph, params = initial(text, seed)
    state: Any = tx.init(params)
    run = Run(name, sum(leaf.size for leaf in jax.tree.leaves(params)),
              sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    settings = {"steps": steps, "seed": seed}
    checkpoints = None if folder is None else Checkpoints(folder, name, settings)
    saved = checkpoints and checkpoints.latest((params, state))
    if saved:
        (params, state), record = saved
        run = Run(**record)
        yield run
    first = int(state.count)

    train_step, validate = _compiled(tx, graph)
    held_out = jnp.stack([
        text.batch(text.validation, BATCH, LENGTH, (seed, 1, i)) for i in range(EVALUATION_BATCHES)
    ])
    for step in range(first, steps + 1):
        is_due = (step % EVALUATE_EVERY == 0 or step == steps) and step not in run.steps
        if is_due:
            # An interrupt in here leaves the record whole.
            reached = float(validate(params, held_out))
            run.steps.append(step)
            run.validation.append(reached)
        is_last = must_stop()
        if checkpoints and (is_due or (is_last and step > first)):
            checkpoints.save(step, (params, state), dataclasses.asdict(run))
        if is_due:
            yield run
        if is_last:
            return
        if step < steps:
            params, state = train_step(params, state,
                                       text.batch(text.train, BATCH, LENGTH, (seed, 0, step)))


def optimizer_milliseconds(txs: dict[str, lionax.Transformation], text: Text,
                           repeats: int = 40) -> dict[str, float]:
    """The median time of one optimizer step on the model's weights; the optimizers take turns."""
    _, params = initial(text, 0)
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    steps, carries, times = {}, {}, {name: [] for name in txs}
    for name, tx in txs.items():
        steps[name] = jax.jit(tx.step, donate_argnums=(0, 1),
                              compiler_options=lionax.compiler_options())
        carries[name] = steps[name](jax.tree.map(jnp.copy, params), tx.init(params), grads)
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(step(*carries[name], grads))
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}
