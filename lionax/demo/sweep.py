"""Tries learning rates for the demo's optimizers: ``python -m lionax.demo.sweep``.

It writes ``sweep.json`` beside this file.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform

from lionax.demo import text, training

__all__: list[str] = []

GRID = {
    "lion": (3e-4, 1e-3, 2e-3, 4e-3), "adamw": (1e-3, 3e-3, 6e-3, 1e-2),
    "lamb": (3e-3, 1e-2, 2e-2, 4e-2), "sgd": (0.1, 0.3, 1.0, 3.0)
}


def main() -> None:
    """Trains with every rate of the grid; the demo takes the one with the lowest loss."""
    parser = argparse.ArgumentParser(prog="python -m lionax.demo.sweep", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1,
                        help="not the demo's, so that its run is not the one tuned on")
    options = parser.parse_args()
    corpus, reached = text.load(), {}
    for name, rates in GRID.items():
        reached[name] = {}
        for rate in rates:
            *_, run = training.train(name, training.optimizer(name, options.steps, rate), corpus,
                                     options.steps, options.seed)
            reached[name][str(rate)] = round(run.validation[-1], 4)
            print(name, rate, reached[name][str(rate)], flush=True)
    record = {
        "command": f"python -m lionax.demo.sweep --steps {options.steps} --seed "
        f"{options.seed}", "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"), "bits_per_character": reached
    }
    (pathlib.Path(__file__).parent / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
