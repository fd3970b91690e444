"""The table and the picture."""

import pathlib

import matplotlib

from lionax.demo.training import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

__all__ = ["draw", "table"]


def table(runs: list[Run], milliseconds: dict[str, float], bigram_entropy: float) -> Table:
    """A row for each optimizer, and one for what a table of character pairs could reach."""
    rows = Table(title="Validation loss on the last tenth of Python's help topics",
                 caption="bits per character · ms of the optimizer's step alone · bytes of its "
                         "state per parameter")
    for column in ("optimizer", "validation", "at step", "ms per step", "state bytes"):
        rows.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for run in runs:
        time = f"{milliseconds[run.name]:.2f}" if run.name in milliseconds else "–"
        rows.add_row(run.name, f"{run.validation[-1]:.3f}", str(run.steps[-1]), time,
                     f"{run.state_bytes / run.parameters:.2f}")
    rows.add_section()
    rows.add_row("(bigram entropy)", f"{bigram_entropy:.3f}", "", "", "")
    return rows


def draw(runs: list[Run], bigram_entropy: float, path: pathlib.Path) -> None:
    """Validation over steps, as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        label = f"{run.name}: {run.validation[-1]:.2f}"
        axes.plot(run.steps, run.validation, marker=".", label=label)
    label = f"bigram entropy of the text: {bigram_entropy:.2f}"
    axes.axhline(bigram_entropy, color="gray", linestyle="--", label=label)
    axes.set(xlabel="training step", ylabel="validation loss (bits per character)",
             title="A small transformer learns English")
    axes.set_ylim(top=min(axes.get_ylim()[1], 6.0))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
