"""Times, taken in turns, and the best that the memory of the machine gives in the same run."""

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lionax
from benchmarks import peers, trees

__all__ = [
    "Row", "bandwidth", "compile_rows", "eager_row", "growth", "in_turns", "many_small_row",
    "step_rows", "to_best_triad"
]

_TRIAD = 12  # bytes that a triad moves for each element
PAIRS = {
    "lion": (lionax.lion(1e-3), optax.lion(1e-3)), "lamb": (lionax.lamb(1e-3), optax.lamb(1e-3))
}


@dataclasses.dataclass
class Row:
    """What was measured of one contender."""

    table: str
    case: str
    tree: str
    contender: str
    parameters: int
    milliseconds: float
    to_optax: float | None = None  # time ÷ Optax's time
    to_optax_options: float | None = None  # time ÷ that of Optax with the options
    of_limit: float | None = None  # fewest bytes ÷ bandwidth ÷ time
    temporary_bytes: int | None = None
    page_faults: int | None = None  # in one run: pages of memory that the system had to hand out
    seconds_to_compile: float | None = None
    lines: int | None = None  # of StableHLO


def in_turns(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median milliseconds of each. All take turns, so that what disturbs the machine disturbs
    all; each round in another order, since some leave threads behind that spin for a while.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    shuffle = random.Random(0)
    for _ in range(repeats):
        for name in shuffle.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def page_faults(run: Callable[[], None]) -> int | None:
    """How many pages the system hands out during a run; None where it does not tell."""
    with contextlib.suppress(ImportError):
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return None


def triad(size: int) -> Callable[[], None]:
    """``a ← b + 2·c`` over arrays of so many float32."""
    b, c = jnp.full(size, 1.0), jnp.full(size, 2.0)
    step = jax.jit(lambda a, b, c: b + 2.0 * c, donate_argnums=0, keep_unused=True)
    carry = [jnp.zeros(size)]

    def run() -> None:
        carry[0] = jax.block_until_ready(step(carry[0], b, c))

    return run


def bandwidth(size: int, repeats: int = 20) -> float:
    """The best bytes per second of a triad over arrays of so many float32."""
    run = triad(size)
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return _TRIAD * size / best


def to_best_triad(rows: list[Row], best: float) -> tuple[list[Row], float]:
    """The rows with their fractions of the limit at the best bandwidth of any triad, and that."""
    in_turns = [
        1e3 * _TRIAD * row.parameters / row.milliseconds for row in rows if row.contender == "triad"
    ]
    highest = max([best, *in_turns])
    return [
        dataclasses.replace(row, of_limit=row.of_limit and row.of_limit * best / highest)
        for row in rows
    ], highest


def _rows(table: str, case: str, tree: str, parameters: int, built: Mapping[str, peers.Contender],
          times: Mapping[str, float], limit_ms: float | None = None) -> Iterator[Row]:
    """What was measured of each contender."""
    for name, contender in built.items():
        ratios = [
            times[name] / times[peer] if peer in times else None
            for peer in ("Optax", peers.OPTAX_OPTIONS)
        ]
        yield Row(table, case, tree, name, parameters, times[name], *ratios, limit_ms and
                  limit_ms / times[name], contender.temporary_bytes,
                  page_faults(contender.run) if table == "step" else None,
                  contender.seconds_to_compile, contender.lines)


def _steps(built: Mapping[str, peers.Contender], repeats: int,
           **others: Callable[[], None]) -> dict[str, float]:
    return in_turns({name: one.run for name, one in built.items()} | others, repeats)


def step_rows(name: str, tree: str, shapes: Any, best: float, repeats: int) -> Iterator[Row]:
    """A case over a tree; where its limit is known a triad takes turns with the contenders."""
    case, parameters = peers.CASES[name], trees.elements(shapes)
    built = {contender: build(shapes) for contender, build in case.available().items()}
    byte_ms = 1e3 * parameters / best  # for one byte of each parameter
    if case.fewest_bytes is None:
        yield from _rows("step", name, tree, parameters, built, _steps(built, repeats))
        return
    times = _steps(built, repeats, triad=triad(parameters))
    yield from _rows("step", name, tree, parameters, built, times, case.fewest_bytes * byte_ms)
    yield Row("step", name, tree, "triad", parameters, times["triad"],
              of_limit=_TRIAD * byte_ms / times["triad"])


def many_small_row(leaves: int, repeats: int) -> Iterator[Row]:
    """A tree of many small leaves, dispatch included, beside a step that does nothing."""
    shapes, (ours, theirs) = trees.many_small(leaves), PAIRS["lion"]
    builds = peers.with_optax(ours, theirs) | {
        "nothing": peers.of_jax(lambda params, state, grads: (params, state), ours.init)}
    built = {name: build(shapes) for name, build in builds.items()}
    yield from _rows("small leaves", "lion", f"{leaves} leaves", trees.elements(shapes), built,
                     _steps(built, repeats))


def compile_rows(leaves: int, width: int, repeats: int) -> Iterator[Row]:
    """Tracing, lowering and compiling LAMB; all take turns, and nothing is kept between."""
    kinds = [(width, width), (width,), (2 * width, width), (width, 2 * width)]
    shapes = {f"leaf_{i}": kinds[i % 4] for i in range(leaves)}
    builds = peers.with_optax(lionax.lamb(1e-3, weight_decay=0.01),
                              optax.lamb(1e-3, weight_decay=0.01))
    built: dict[str, list[peers.Contender]] = {name: [] for name in builds}
    for _ in range(repeats):
        for name, build in builds.items():
            jax.clear_caches()
            built[name].append(build(shapes))
    medians = {name: statistics.median(one.seconds_to_compile or 0.0 for one in all_of)
               for name, all_of in built.items()}
    contenders = {name: dataclasses.replace(all_of[-1], seconds_to_compile=medians[name])
                  for name, all_of in built.items()}
    times = {name: 1e3 * median for name, median in medians.items()}
    yield from _rows("compile", "lamb", f"{leaves} leaves, width {width}", trees.elements(shapes),
                     contenders, times)


def eager_row(repeats: int) -> Iterator[Row]:
    """``update`` outside of jit, over a small tree."""
    shapes = trees.gpt2(1, 32, 64, 16)
    params, grads = trees.filled(shapes, 0.5), trees.filled(shapes, 1e-3)
    for case, pair in PAIRS.items():
        built = {
            name: peers.Contender(_eager(tx, params, grads))
            for name, tx in zip(("lionax", "Optax"), pair, strict=True)
        }
        yield from _rows("eager", case, "one block", trees.elements(shapes), built,
                         _steps(built, repeats))


def _eager(tx: Any, params: Any, grads: Any) -> Callable[[], None]:
    state = tx.init(params)
    return lambda: jax.block_until_ready(tx.update(grads, state, params)[0])


def growth(sizes: list[int], leaves: list[int], repeats: int) -> Iterator[Row]:
    """Lion and LAMB over more parameters, in 16 leaves, and over more leaves, of 64 elements."""
    for case, pair in PAIRS.items():
        for table, shapes in [*(("parameters", trees.of_size(size, 16)) for size in sizes),
                              *(("leaves", trees.many_small(count)) for count in leaves)]:
            built = {name: build(shapes) for name, build in peers.with_optax(*pair).items()}
            short = trees.elements(shapes) <= 10**6
            times = _steps(built, 20 * repeats if short else repeats)
            yield from _rows(table, case, f"{len(shapes)} leaves", trees.elements(shapes), built,
                             times)
