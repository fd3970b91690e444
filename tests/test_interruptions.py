"""The demo, killed at any moment and resumed."""

import contextlib
import json
import multiprocessing.connection
import os
import pathlib
import random
import re
import signal
import sys
import time

import flax.nnx as nnx
import jax
import numpy as np
import orbax.checkpoint as ocp
import probes
import pytest

from lionax.demo import command
from lionax.demo.checkpoints import HALF_WRITTEN

SECTION = "Interrupted runs"
KILLED = pytest.mark.promise(
    SECTION, "The demo, killed at random moments (also during a save) and resumed, ends with the "
    "parameters of an uninterrupted run, bit for bit. After any resume `count` is the number of "
    "updates made.")
LOCK = pytest.mark.promise(SECTION, "Two runs on one folder are refused.")
STEPS = 30


class Tiny(nnx.Module):
    """Predicts a character from the one before it."""

    def __init__(self, vocabulary, length, rngs, **_):
        self.tokens = nnx.Embed(vocabulary, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.tokens(tokens)))


def run_demo(folder, steps):
    """The demo in a process of its own, with a tiny model that is saved every second step."""
    output = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from lionax.demo import report, training

    training.Transformer, training.LENGTH, training.BATCH = Tiny, 8, 2
    training.EVALUATE_EVERY, training.EVALUATION_BATCHES = 2, 1
    training.optimizer_milliseconds = lambda txs, corpus: {}
    report.draw = lambda *arguments: None
    sys.argv = ["lionax", "demo", "--optimizers", "lion", "--steps", str(steps), "--resume",
                str(folder), "--out", f"{folder}.png"]
    command.run()


def processes():
    """Where children start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "lionax.demo.training", "lionax.demo.report", "rich.progress", __name__])
    return context


def started(folder, steps=STEPS):
    process = processes().Process(target=run_demo, args=(folder, steps))
    process.start()
    return process


def finished(folder):
    process = started(folder)
    process.join(120)
    log = pathlib.Path(f"{folder}.log").read_text()
    assert process.exitcode == 0, log
    return log


def steps_of(folder):
    return sorted(int(path.name) for path in (folder / "lion").glob("*") if path.name.isdecimal())


def restored(folder):
    """The number of the newest step, and its arrays."""
    newest = steps_of(folder)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        return newest, checkpointer.restore(folder / "lion" / str(newest) / "arrays")


def wait_for(condition, process):
    """Whether a condition came true before a process ended."""
    while not multiprocessing.connection.wait([process.sentinel], 0):
        if condition():
            return True
        time.sleep(0.001)
    return False


def is_saving(folder, since):
    """Whether a step is being written that was begun after a time; an older one is left over."""
    for half in (folder / "lion").glob(HALF_WRITTEN):
        with contextlib.suppress(FileNotFoundError):  # it is whole by now
            if half.stat().st_ctime > since:
                return True
    return False


def kill(process, number, folder, moments, since):
    """Sends a signal at a random moment; returns the exit status, and whether it hit a save."""
    moment = moments.choice(["start", "save", "save", "save", "between"])
    if moment == "start":
        time.sleep(moments.uniform(0, 2))
    elif wait_for(lambda: is_saving(folder, since), process):
        time.sleep(moments.uniform(0, 0.1 if moment == "save" else 0.5))
    during_save = is_saving(folder, since)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process.pid, number)
    process.join(120)
    return process.exitcode, during_save


def check_count(folder):
    """The newest checkpoint counts its updates."""
    if steps_of(folder):
        newest, (_, state) = restored(folder)
        assert int(state["count"]) == newest
        record = json.loads((folder / "lion" / str(newest) / "record" / "metadata").read_text())
        assert max(record["record"]["steps"]) <= newest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted run."""
    folder = tmp_path_factory.mktemp("demo") / "whole"
    finished(folder)
    assert restored(folder)[0] == STEPS
    return folder


@KILLED
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Orbax: the topology may be another
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(number, whole, figure):
    moments, kills, run = random.Random(int(number)), 0, 0
    folder = whole.parent / f"{signal.Signals(number).name} {run}"
    while kills < probes.sized(3, 50):
        since = time.time()
        status, during_save = kill(started(folder), number, folder, moments, since)
        check_count(folder)
        if status == 0:  # the run ended before it was killed
            check_final(folder, whole, figure)
            run += 1
            folder = whole.parent / f"{signal.Signals(number).name} {run}"
            continue
        # Before the demo began, SIGTERM ends it at once.
        assert status in ((143, -number) if number == signal.SIGTERM else (-number,))
        assert number == signal.SIGKILL or not list((folder / "lion").glob(HALF_WRITTEN))
        kills += 1
        figure("kills", 1)
        figure("kills during a save", int(during_save))
    finished(folder)
    check_final(folder, whole, figure)


def check_final(folder, whole, figure):
    check_count(folder)
    (newest, ours), (_, expected) = restored(folder), restored(whole)
    assert newest == STEPS
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert not list((folder / "lion").glob(HALF_WRITTEN))
    log = pathlib.Path(f"{folder}.log").read_text()
    assert "Traceback" not in log
    figure("resumed runs with equal bits", 1)


@KILLED
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Orbax: the topology may be another
def test_sigterm_finishes_the_step_saves_and_says_so(tmp_path):
    folder = tmp_path / "run"
    process = started(folder, 100_000)
    assert wait_for((folder / "lion" / "0").exists, process)
    with pytest.raises(SystemExit, match=f"--resume .*: process {process.pid} on .* trains in it; "
                                         "wait until that ends, stop it, or give another folder"):
        command.main(["demo", "--resume", str(folder), "--out", str(tmp_path / "curves.png")])
    status, _ = kill(process, signal.SIGTERM, folder, random.Random(0), time.time())
    assert status == 143
    check_count(folder)
    log = pathlib.Path(f"{folder}.log").read_text()
    assert f"Terminated: saved in {folder}; the same command goes on." in log
    assert re.search(r"│ lion +│ +[\d.]+ │", log)
    assert "Traceback" not in log
