"""Runs every table: ``python -m benchmarks``."""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from benchmarks import measure, peers, report, trees

__all__ = ["main"]

Job = tuple[str, Callable[[], Iterator[measure.Row]]]
"""What is measured, and how."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small tree and few repeats")
    parser.add_argument("--trees", help=f"some of {','.join(trees.TREES)}")
    parser.add_argument("--cases", default=";".join(peers.CASES),
                        help=f"some of {'; '.join(peers.CASES)}, with semicolons between")
    parser.add_argument("--steps-only", action="store_true",
                        help="without compiling, eager calls, small leaves, growth and meshes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"),
                        help="the folder for the JSON and the pictures")
    options = parser.parse_args(arguments)
    everything = ["gpt2"] if options.quick else list(trees.TREES)
    options.trees = everything if options.trees is None else options.trees.split(",")
    options.cases = options.cases.split(";")
    for kind, known in (("trees", trees.TREES), ("cases", peers.CASES)):
        unknown = [name for name in getattr(options, kind) if name not in known]
        if unknown:
            parser.error(f"--{kind}: {', '.join(unknown)}: give some of {'; '.join(known)}")
    return options


def _jobs(options: argparse.Namespace, best: float,
          shapes: dict[str, trees.Shapes]) -> Iterator[Job]:
    quick = options.quick
    for tree in options.trees:
        for case in options.cases:
            yield f"{case}, {tree}", lambda case=case, tree=tree: measure.step_rows(
                case, tree, shapes[tree], best, 5 if quick else 15)
    if options.steps_only:
        return
    yield "many small leaves", lambda: measure.many_small_row(50 if quick else 2000, 20)
    for width in (64,) if quick else (64, 256):
        yield f"compiling, width {width}", lambda width=width: measure.compile_rows(
            10 if quick else 300, width, 1 if quick else 3)
    yield "eager", lambda: measure.eager_row(20)
    sizes = [10**4, 10**5] if quick else [10**5, 10**6, 10**7]
    yield "growth", lambda: measure.growth(sizes, [1, 10] if quick else [1, 10, 100, 300], 5)


def _meshes(options: argparse.Namespace) -> None:
    """Counts on 8 virtual devices: in a process of its own, since here the CPU is one device."""
    command = [sys.executable, "-m", "benchmarks.meshes", "--out", str(options.out)]
    subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options, console, rows = _options(arguments), Console(), []
    console.width = max(console.width, 120)  # for the table's sake also where it goes to a file
    known = trees.QUICK if options.quick else trees.TREES
    shapes = {name: known[name]() for name in options.trees}
    best = measure.bandwidth(max(map(trees.elements, shapes.values())))
    jobs = list(_jobs(options, best, shapes))
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(jobs))
            for description, job in jobs:
                progress.update(bar, description=description)
                rows += job()
                progress.advance(bar)
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured so far:")
    rows, best = measure.to_best_triad(rows, best)
    for table in report.tables(rows):
        console.print(table)
    console.print(f"The limit is the fewest bytes a step can move at {best / 1e9:.1f} GB/s, the "
                  "best triad in this run:")
    for name in options.cases:
        case = peers.CASES[name]
        if case.fewest_bytes:
            console.print(f"  {name}: {case.fewest_bytes} bytes per parameter; it {case.why}",
                          highlight=False)
    paths = report.draw(rows, options.out)
    record = {"machine": report.machine(), "triad_bytes_per_second": best,
              "rows": [dataclasses.asdict(row) for row in rows]}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    if not options.steps_only:
        _meshes(options)
    console.print("Written: " + ", ".join(map(str, [*paths, options.out / "results.json"])),
                  highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
