"""The table, the JSON and the pictures."""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib

import lionax
from benchmarks.measure import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

__all__ = ["draw", "machine", "tables"]


def machine() -> dict[str, Any]:
    """Versions, processor and date."""
    versions = {"lionax": lionax.__version__}
    for name in ("jax", "jaxlib", "optax", "keras", "torch", "lion-pytorch", "flashoptim-jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.partition(":")[2].strip()
                      for line in info.read_text().splitlines()
                      if line.startswith("model name")), model)
    return {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(),
        "versions": versions, "processor": model, "cores": os.cpu_count(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    }


STYLES = {"lionax, options": "-", "Optax": "--", "Optax, options": ":"}
COLUMNS = ("tree", "case", "contender", "ms", "÷ Optax", "÷ Optax, options", "of the limit",
           "temporary MB", "page faults", "lines")
TITLES = {"step": "A step: jitted, donated, medians of runs in turns",
          "small leaves": "Many small leaves, dispatch included",
          "compile": "Lowering and compiling", "eager": "`update` outside of jit"}


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each kind of measurement but the growth, which is drawn."""
    made = []
    for kind, title in TITLES.items():
        chosen = [row for row in rows if row.table == kind]
        table = Table(title=title)
        for column in COLUMNS:
            is_name = column in ("tree", "case", "contender")
            table.add_column(column, justify="left" if is_name else "right")
        last = None
        for row in chosen:
            if last is not None and last != (row.tree, row.case):
                table.add_section()
            last = (row.tree, row.case)
            megabytes = row.temporary_bytes and row.temporary_bytes / 1e6
            table.add_row(row.tree, row.case, row.contender, f"{row.milliseconds:.2f}",
                          _number(row.to_optax), _number(row.to_optax_options),
                          _number(row.of_limit), _number(megabytes, 1), _number(row.page_faults, 0),
                          str(row.lines) if kind == "compile" else "")
        if chosen:
            made.append(table)
    return made


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def draw(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """Bars against the limit, time over size, memory: as PNGs in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [row for row in rows if row.table == "step"]
    trees = list(dict.fromkeys(row.tree for row in steps))
    paths = []
    if steps:
        first = [row for row in steps if row.tree == trees[0]]
        paths.append(_bars(first, folder / "step.png", "time ÷ Optax's time",
                           f"One optimizer step, {trees[0]}", lambda row: row.to_optax))
        paths.append(
            _bars(first, folder / "limit.png", "fewest bytes ÷ bandwidth ÷ time",
                  f"Fraction of the memory's limit, {trees[0]}", lambda row: row.of_limit))
        paths.append(
            _bars(
                first, folder / "memory.png", "temporary bytes ÷ bytes of parameters",
                f"Memory beside parameters, state and gradients, {trees[0]}", lambda row: None
                if row.temporary_bytes is None else row.temporary_bytes / (4 * row.parameters)))
    grown = [row for row in rows if row.table in ("parameters", "leaves")]
    if grown:
        paths.append(_lines(grown, folder / "growth.png"))
    return paths


def _bars(rows: Sequence[Row], path: pathlib.Path, label: str, title: str,
          value: Any) -> pathlib.Path:
    rows = [row for row in rows if value(row) is not None]
    names = dict.fromkeys(row.case for row in rows)
    groups = {case: [row for row in rows if row.case == case] for case in names}
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / max(map(len, groups.values()))
    for contender in dict.fromkeys(row.contender for row in rows):
        shown = [(at + (i - (len(group) - 1) / 2) * width, value(row))
                 for at, group in enumerate(groups.values())
                 for i, row in enumerate(group)
                 if row.contender == contender]
        axes.bar([at for at, _ in shown], [height for _, height in shown], width, label=contender)
    axes.set_xticks(range(len(groups)), [case.replace(", ", ",\n") for case in groups], fontsize=8)
    axes.axhline(1.0, color="gray", linestyle="--", linewidth=1)
    axes.set(ylabel=label, title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _lines(rows: Sequence[Row], path: pathlib.Path) -> pathlib.Path:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, table in zip(axes, ("parameters", "leaves"), strict=True):
        for case in dict.fromkeys(row.case for row in rows):
            for contender, style in STYLES.items():
                chosen = [
                    row for row in rows
                    if (row.table, row.case, row.contender) == (table, case, contender)
                ]
                at = [
                    row.parameters if table == "parameters" else int(row.tree.split()[0])
                    for row in chosen
                ]
                ax.plot(at, [row.milliseconds for row in chosen], style, marker=".",
                        label=f"{case}, {contender}")
        ax.set(xscale="log", yscale="log", xlabel=table, ylabel="ms per step",
               title="16 leaves" if table == "parameters" else "leaves of 64 elements")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
