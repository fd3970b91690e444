"""The tables, the JSON and the picture of `benchmarks.quality`."""

import json
import math
import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["loss", "verdict", "write"]

HEAD = """# Quality of low-precision optimizer state

```
python -m benchmarks.quality --out docs/benchmarks
```

{machine}. [quality.json](quality.json) holds
each seed's loss and each rate of the sweeps.

Each format trains to the end from the same seeds, with each of three rates; a row shows the best
rate. float32, bfloat16, int8 and int4 are lionax's, rounded stochastically. The others are written
in `benchmarks/codes.py` and rounded to the nearest: linear codes and the dynamic code of
bitsandbytes in blocks of 256, FlashOptim's companding in blocks of 32, their scales in float32.
All codes are for the same leaves: those that lionax stores as codes.

- loss: of the validation data at the end, mean ± standard deviation over the seeds.
- from float32: the difference of the means, in standard deviations of float32. A format is within
  the spread if it is at most 1.
- by seed: the difference of the losses from float32's with the same seed, mean ± standard error.
- signs: the share of signs of Lion that differ from those of a float32 momentum fed the same
  gradients, over elements and steps.
- stalled: the share of elements of the first moment that stay as stored though their exact new
  value differs, over elements and steps. Rounded stochastically, their expected value moves. Where
  the scale of a block changes, all its elements do.

LAMB's table is of `--tasks digits_lamb --seeds 10`: with 5 seeds the standard errors are as large
as the differences. Under `vmap` all seeds round with the same random bits. The rates are chosen by
the loss that is shown, for all formats alike.
"""


def loss(result: dict[str, Any]) -> str:
    """The mean and the standard deviation."""
    if result["mean"] is None:
        return "not finite"
    return f"{result['mean']:.4f} ± {result['deviation']:.4f}"


def verdict(result: dict[str, Any], reference: dict[str, Any]) -> tuple[float, str]:
    """The difference from float32 in its standard deviations, and what it says."""
    if result["mean"] is None:
        return math.inf, "diverged"
    distance = (result["mean"] - reference["mean"]) / reference["deviation"]
    return distance, "within" if distance <= 1 else "above"


def _by_seed(result: dict[str, Any], reference: dict[str, Any]) -> str:
    if result["mean"] is None:
        return "–"
    difference = np.subtract(result["losses"], reference["losses"])
    error = difference.std(ddof=1) / math.sqrt(difference.size)
    return f"{difference.mean():+.4f} ± {error:.4f}"


def _table(task: dict[str, Any]) -> str:
    share = task["in_codes"] / task["elements"]
    lines = [f"\n## {task['title'][0].upper()}{task['title'][1:]}\n",
             f"{task['steps']} steps, {task['seeds']} seeds, {task['elements']:,} parameters, "
             f"{share:.0%} of them in leaves with codes; {task['seconds']} s.\n",
             "| format | loss | from float32 | by seed | rate | signs | stalled | spread |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    reference = task["formats"]["float32"]
    for name, result in task["formats"].items():
        distance, word = verdict(result, reference)
        signs = "–" if result["signs"] is None else f"{result['signs']:.2%}"
        apart = f"{distance:+.1f}" if math.isfinite(distance) else "–"
        lines.append(f"| {name} | {loss(result)} | {apart} | {_by_seed(result, reference)} | "
                     f"{result['rate']:g} | {signs} | {result['stalled']:.1%} | "
                     f"{'' if name == 'float32' else word} |")
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    return (f"{machine['date']}: {machine['cores']} cores, Python {machine['python']}, "
            f"JAX {versions['jax']}, lionax {versions['lionax']}")


def write(record: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes quality.md, quality.json and quality.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    pages = [HEAD.format(machine=_machine(record["machine"])),
             *map(_table, record["tasks"].values()),
             "\n![Loss of each format against float32's spread](quality.png)\n"]
    (folder / "quality.md").write_text("".join(pages))
    _draw(record["tasks"], folder / "quality.png")


def _draw(tasks: dict[str, Any], path: pathlib.Path) -> None:
    figure, all_axes = plt.subplots(len(tasks), 1, figsize=(8, 2.6 * len(tasks)), squeeze=False,
                                    layout="constrained")
    for axes, task in zip(all_axes[:, 0], tasks.values(), strict=True):
        reference, names = task["formats"]["float32"], list(task["formats"])
        mean, deviation = reference["mean"], reference["deviation"]
        axes.axvspan(mean - deviation, mean + deviation, color="0.88")
        for at, name in enumerate(names):
            result = task["formats"][name]
            if result["mean"] is not None:
                is_within = verdict(result, reference)[1] == "within"
                axes.errorbar(result["mean"], at, xerr=result["deviation"], fmt="o", capsize=3,
                              color="tab:blue" if is_within else "tab:red")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(task["title"], fontsize=9)
        axes.set_xlabel("validation loss; gray: float32's mean ± standard deviation", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
