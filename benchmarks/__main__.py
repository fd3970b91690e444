"""Runs every table: ``python -m benchmarks``."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from benchmarks import measure, peers, report, trees

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small trees and few repeats")
    parser.add_argument("--trees", default=",".join(trees.TREES), help=f"some of {','.join(trees.TREES)}")
    parser.add_argument("--cases", default=None, help=f"some of {'; '.join(peers.CASES)}, with semicolons between")
    parser.add_argument("--steps-only", action="store_true", help="without compiling, eager calls, small leaves and growth")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"),
                        help="the folder for the JSON and the pictures")
    options = parser.parse_args(arguments)
    chosen, cases = options.trees.split(","), list(peers.CASES) if options.cases is None else options.cases.split(";")
    for kind, names, known in (("--trees", chosen, trees.TREES), ("--cases", cases, peers.CASES)):
        if not set(names) <= set(known):
            parser.error(f"{kind}: {', '.join(names)}: give some of {'; '.join(known)}")
    console, rows = Console(), []
    console.width = max(console.width, 120)  # for the table's sake also where it goes to a file
    shapes = {name: (trees.QUICK if options.quick else trees.TREES)[name]() for name in chosen}
    best = measure.bandwidth(max(map(trees.elements, shapes.values())))
    jobs = [] if options.steps_only else list(_others(options.quick))
    jobs = [(f"{case}, {tree}", lambda case=case, tree=tree: measure.step_rows(case, tree, shapes[tree], best, 5 if options.quick else 15))
            for tree in chosen for case in cases] + jobs
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
    console.print(f"The limit is the fewest bytes a step can move at {best / 1e9:.1f} GB/s, the best triad in this run:")
    for case in cases:
        if peers.CASES[case].fewest_bytes:
            console.print(f"  {case}: {peers.CASES[case].fewest_bytes} bytes per parameter; it {peers.CASES[case].why}", highlight=False)
    paths = report.draw(rows, options.out)
    record = {"machine": report.machine(), "triad_bytes_per_second": best, "rows": [dataclasses.asdict(row) for row in rows]}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print("Written: " + ", ".join(map(str, [*paths, options.out / "results.json"])), highlight=False, soft_wrap=True)


def _others(quick: bool) -> Iterator[tuple[str, Callable[[], Iterator[measure.Row]]]]:
    yield "many small leaves", lambda: measure.many_small_row(100 if quick else 2000, 20)
    for width in (64, 256):
        yield f"compiling, width {width}", lambda width=width: measure.compile_rows(20 if quick else 300, width, 1 if quick else 5)
    yield "eager", lambda: measure.eager_row(20)
    sizes = [10**4, 10**6] if quick else [10**5, 10**6, 10**7, 10**8]
    yield "growth", lambda: measure.growth(sizes, [1, 30] if quick else [1, 10, 100, 1000], 5)


if __name__ == "__main__":
    main()
