"""The command line: ``lionax demo`` and ``lionax info``."""

import argparse
import contextlib
import importlib.metadata
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["main", "run"]

INTERRUPTED = 130  # the exit status of a command that was stopped by Ctrl-C
TERMINATED = 143  # and by SIGTERM
_received: set[int] = set()  # signals: an interrupt inside of a callback of C++ raises nothing
CHOICES = ("lion", "lamb", "sgd", "adamw")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CHOICES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: give some of "
                                         f"{','.join(CHOICES)}")
    return list(dict.fromkeys(names))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, at least 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    description = "Composable gradient transformations for JAX."
    parser = argparse.ArgumentParser(prog="lionax", description=description)
    version = importlib.metadata.version("lionax")
    parser.add_argument("--version", action="version", version=f"lionax {version}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions, devices, compiler options and extras")
    demo = commands.add_parser("demo", help="train a small transformer with several optimizers",
                               description="Trains a small causal transformer on the text of "
                                           "Python's help topics, once with each optimizer, from "
                                           "the same weights and on the same batches. Needs no "
                                           "network.",
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument("--optimizers", type=_names, default="lion,adamw", metavar="NAMES",
                      help=f"comma-separated, out of {','.join(CHOICES)} (adamw is Optax's)")
    demo.add_argument("--steps", type=_positive, default=800,
                      help="training steps with each optimizer")
    demo.add_argument("--seed", type=_natural, default=0, help="of the weights and the batches")
    demo.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lionax-demo.png"),
                      help="where to save the curves, as a PNG")
    demo.add_argument("--resume", type=pathlib.Path, metavar="DIR",
                      help="save the runs in this folder, and go on with what is there; on "
                           "SIGTERM the step is finished and saved")
    demo.add_argument("--list", action="store_true",
                      help="show the optimizers and their learning rates, and end")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        return _run(_parser().parse_args(arguments))
    except BrokenPipeError:  # such as `lionax info | head -2`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, frame: Any) -> None:
    _received.add(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _finishing_on_sigterm() -> Iterator[None]:
    """Inside of it SIGTERM is noted, so that a step is finished and saved."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: _received.add(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _received.clear()


def run() -> None:
    """Runs the command line and ends the process."""
    signal.signal(signal.SIGINT, _interrupt)
    status = main()
    if status == INTERRUPTED:
        # Python's own end may crash (jaxlib 0.10.2) if the interrupt came while JAX compiled.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run(options: argparse.Namespace) -> int:
    if options.command == "info":
        from lionax.demo.information import describe

        for line in describe():
            print(line)
        return 0
    if not options.out.parent.is_dir():
        sys.exit(f"lionax demo: --out {options.out}: the folder {options.out.parent} does not "
                 "exist")
    if options.out.is_dir() or options.out.suffix != ".png":
        sys.exit(f"lionax demo: --out {options.out}: not the name of a PNG; give one such as "
                 "curves.png")
    if options.resume is not None and options.resume.exists() and not options.resume.is_dir():
        sys.exit(f"lionax demo: --resume {options.resume}: is not a folder")
    try:
        import flax  # noqa: F401
        import matplotlib  # noqa: F401
        import orbax.checkpoint  # noqa: F401
        import rich  # noqa: F401
    except ImportError as missing:
        sys.exit(f"lionax demo needs {missing.name}: pip install 'lionax[demo]'")
    if options.list:
        return _list()
    from lionax.demo.checkpoints import CheckpointError, locked

    folder = options.resume
    lock = locked(folder) if folder else contextlib.nullcontext()
    try:
        with lock, _finishing_on_sigterm():
            return _demo(options)
    except CheckpointError as error:
        sys.exit(f"lionax demo: --resume {folder}: {error}")


def _list() -> int:
    """Prints the optimizers that the demo knows."""
    import optax

    import lionax
    from lionax.demo import training

    for name, make in training.OPTIMIZERS.items():
        peak = training.best_rate(name)
        tx = make(optax.constant_schedule(peak))
        kind = "lionax" if isinstance(tx, lionax.Transformation) else "Optax"
        print(f"{name:<6} {kind}'s, with a peak learning rate of {peak}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from lionax.demo import report, text, training

    console = Console()
    corpus = text.load()
    txs = {name: training.optimizer(name, options.steps) for name in options.optimizers}
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    runs, milliseconds, status = [], {}, 0
    try:
        with Progress(*columns, console=console) as progress:
            tasks = {name: progress.add_task(name, total=options.steps, loss="") for name in txs}
            for name, tx in txs.items():
                if signal.SIGTERM not in _received:
                    for run in training.train(name, tx, corpus, options.steps, options.seed,
                                              options.resume, lambda: signal.SIGTERM in _received):
                        _show(run, runs, progress, tasks[name])
            if signal.SIGTERM not in _received:
                milliseconds = training.optimizer_milliseconds(txs, corpus)
    except KeyboardInterrupt:
        console.print("Interrupted: what was reached so far.")
        status = INTERRUPTED
    if signal.SIGTERM in _received:
        console.print("Terminated: " + (f"saved in {options.resume}; the same command goes on."
                                        if options.resume else "what was reached so far."),
                      soft_wrap=True)
        status = TERMINATED
    if runs:
        console.print(report.table(runs, milliseconds, corpus.bigram_entropy))
        try:
            report.draw(runs, corpus.bigram_entropy, options.out)
        except OSError as error:
            sys.exit(f"lionax demo: --out {options.out}: cannot be written ({error})")
        console.print(f"Curves: {options.out}")
    return status


def _show(run: Any, runs: list[Any], progress: Any, task: Any) -> None:
    """Shows what a run reached, and keeps it for the table."""
    if run not in runs:
        runs.append(run)
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    progress.update(task, completed=run.steps[-1],
                    loss=f"{run.validation[-1]:.3f} bits per character")
