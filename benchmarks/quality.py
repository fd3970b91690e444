"""Trains small models with low-precision state: ``python -m benchmarks.quality``.

Every format trains from the same seeds with each rate of a sweep. Its best rate is compared with
float32's best. A task that is run replaces its results in the folder; the others stay.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lionax
from benchmarks import codes, quality_report, report
from benchmarks.tasks import TASKS, Task
from lionax.core.quantized import format_of, is_quantized
from lionax.core.storage import StorageLike

__all__ = ["FORMATS", "Format", "has_codes", "main", "results"]


@dataclasses.dataclass(frozen=True)
class Format:
    """How the moments are stored."""

    dtype: StorageLike = None  # for lionax
    round_trip: codes.RoundTrip | None = None  # applied to float32 moments after each step


FORMATS = {
    "float32": Format(),
    "bfloat16": Format("bfloat16"),
    "int8": Format("int8"),
    "int4": Format("int4"),
    "linear int8, nearest": Format(round_trip=codes.linear),
    "bfloat16, nearest": Format(lionax.Storage("bfloat16", rounding="nearest")),
    "dynamic 8-bit, nearest": Format(round_trip=codes.dynamic),
    "softsign 8-bit, nearest": Format(round_trip=codes.softsign),
}


def has_codes(shape: tuple[int, ...]) -> bool:
    """Whether lionax stores a leaf of this shape as codes; the other codes are for the same."""
    return format_of(8, shape, False) is not None


def _in_codes(tree: Any) -> list[jax.Array]:
    """The leaves that codes are for, in float32."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return [(leaf.decode() if is_quantized(leaf) else leaf.astype(jnp.float32))
            for leaf in leaves if has_codes(leaf.shape)]


def _share(each: list[jax.Array]) -> jax.Array:
    return sum(jnp.sum(one) for one in each) / sum(one.size for one in each)


def _rounded(state: Any, round_trip: codes.RoundTrip) -> Any:
    """A state whose moments went through other codes."""
    first, *others = state.rules

    def one(leaf: jax.Array, is_nonnegative: bool) -> jax.Array:
        return round_trip(leaf, is_nonnegative) if has_codes(leaf.shape) else leaf

    moments = {name: jax.tree.map(lambda leaf, name=name: one(leaf, name == "nu"),
                                  getattr(first, name))
               for name in ("mu", "nu") if name in first._fields}
    return state._replace(rules=(first._replace(**moments), *others))


def _schedule(peak: Any, steps: int) -> Callable[[Any], Any]:
    """A warm-up over a twentieth of the steps, times a cosine to 0."""
    warm_up = max(1, steps // 20)
    return lambda count: (peak * jnp.minimum(1.0, (count + 1) / warm_up)
                          * (0.5 + 0.5 * jnp.cos(jnp.pi * count / steps)))


def _train(task: Task, format: Format, steps: int, rate: Any, key: jax.Array) -> dict[str, Any]:
    """The end of one training, and the mean shares over its steps."""
    tx = task.optimizer(_schedule(rate, steps), format.dtype)
    params = task.init(key)
    twin = [jnp.zeros_like(leaf) for leaf in _in_codes(params)]

    def sign(moment: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.sign(task.weight * moment + (1 - task.weight) * grad)

    def advanced(moment: jax.Array, grad: jax.Array) -> jax.Array:
        return task.decay * moment + (1 - task.decay) * grad

    def step(carry: Any, count: jax.Array) -> Any:
        params, state, twin = carry
        grads = jax.grad(task.loss)(params, task.batch(jax.random.fold_in(key, count)))
        before, given = _in_codes(state.rules[0].mu), _in_codes(grads)
        params, state = tx.step(params, state, grads)
        if format.round_trip:
            state = _rounded(state, format.round_trip)
        after = _in_codes(state.rules[0].mu)
        shares = {"stalled": _share([(new == old) & (advanced(old, grad) != old)
                                     for new, old, grad in zip(after, before, given, strict=True)])}
        if task.weight is not None:
            shares["signs"] = _share([sign(old, grad) != sign(exact, grad)
                                      for old, exact, grad in
                                      zip(before, twin, given, strict=True)])
        return (params, state, list(map(advanced, twin, given))), shares

    (params, *_), shares = jax.lax.scan(step, (params, tx.init(params), twin), jnp.arange(steps))
    return {"loss": task.loss(params, task.validation), **jax.tree.map(jnp.mean, shares)}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def results(task: Task, format: Format, seeds: int, steps: int) -> dict[str, Any]:
    """What a format reaches at the best rate of the sweep.

    Returns:
      ``rate``; ``losses`` of the seeds, their ``mean`` and ``deviation``; the shares ``stalled``
      and ``signs``, None without Lion; the mean loss of each rate in ``sweep``. What is not finite
      is None.
    """
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    run = jax.jit(jax.vmap(lambda rate, key: _train(task, format, steps, rate, key), (None, 0)),
                  compiler_options=lionax.compiler_options())
    reached = {rate: jax.tree.map(np.asarray, run(jnp.float32(rate), keys)) for rate in task.rates}
    means = {rate: float(np.mean(one["loss"])) for rate, one in reached.items()}
    best = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
    losses = reached[best]["loss"]
    return {
        "rate": best, "losses": list(map(_finite, losses)), "mean": _finite(means[best]),
        "deviation": _finite(np.std(losses, ddof=1)),
        "signs": float(reached[best]["signs"].mean()) if "signs" in reached[best] else None,
        "stalled": float(reached[best]["stalled"].mean()),
        "sweep": {f"{rate:g}": _finite(mean) for rate, mean in means.items()}
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true",
                        help="the first task alone, 2 seeds, few steps and the first five formats")
    parser.add_argument("--tasks", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--formats",
                        help=f"some of {'; '.join(FORMATS)}, with semicolons between; float32 is "
                        "always run")
    parser.add_argument("--seeds", type=int, help="5, or 2 with --quick; at least 2")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"),
                        help="the folder for quality.md, quality.json and quality.png")
    options = parser.parse_args(arguments)
    everything = [next(iter(TASKS))] if options.quick else list(TASKS)
    options.tasks = everything if options.tasks is None else options.tasks.split(",")
    formats = list(FORMATS)[:5 if options.quick else None]
    options.formats = formats if options.formats is None else options.formats.split(";")
    for kind, known in (("tasks", TASKS), ("formats", FORMATS)):
        unknown = [name for name in getattr(options, kind) if name not in known]
        if unknown:
            parser.error(f"--{kind}: {', '.join(unknown)}: give some of {'; '.join(known)}")
    options.formats = list(dict.fromkeys(["float32", *options.formats]))
    options.seeds = options.seeds or (2 if options.quick else 5)
    if options.seeds < 2:
        parser.error(f"--seeds: {options.seeds}: give at least 2, for a spread")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options, console = _options(arguments), Console()
    path = options.out / "quality.json"
    record = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    for name in options.tasks:
        task, start, formats = TASKS[name](), time.perf_counter(), {}
        steps = task.steps // 20 if options.quick else task.steps
        params = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
        for format in options.formats:
            formats[format] = results(task, FORMATS[format], options.seeds, steps)
            console.print(f"{name}, {format}: {quality_report.loss(formats[format])}",
                          highlight=False)
        record["tasks"][name] = {
            "title": task.title, "steps": steps, "seeds": options.seeds,
            "elements": sum(leaf.size for leaf in params),
            "in_codes": sum(leaf.size for leaf in params if has_codes(leaf.shape)),
            "seconds": round(time.perf_counter() - start), "formats": formats
        }
        record["machine"] = report.machine()
        quality_report.write(record, options.out)  # after each task, so that a user may stop
    console.print(f"Written: quality.md, quality.json and quality.png in {options.out}",
                  highlight=False)


if __name__ == "__main__":
    main()
