"""The main job, at a small size."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from matplotlib.image import imread

import lionax
from lionax.demo import command, text, training
from lionax.demo.checkpoints import Checkpoints

ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "120"}


def demo(*arguments):
    return [sys.executable, "-m", "lionax", "demo", *arguments]


def test_the_text_is_english_and_its_entropy_is_that_of_a_table_of_pairs():
    corpus = text.load()
    assert len(corpus.train) > 300_000
    assert "".join(corpus.vocabulary[i] for i in corpus.train[:2000]).count(" the ") > 3
    tiny = text.Text("ab", np.array([0, 1, 0, 1, 0, 1]), np.array([0, 1], np.int64))
    assert tiny.bigram_entropy == 0.0
    fair = np.random.default_rng(0).integers(0, 2, 200_000)
    assert text.Text("ab", fair[:-10], fair[-10:]).bigram_entropy == pytest.approx(1.0, abs=1e-3)


def test_batches_are_the_same_for_the_same_seed():
    corpus = text.load()
    one, two = (corpus.batch(corpus.train, 4, 16, (3, 0, 5)) for _ in range(2))
    assert one.shape == (4, 17)
    np.testing.assert_array_equal(one, two)


def test_learning_rates_come_from_the_recorded_sweep():
    record = training.recorded_sweep()
    assert record["command"].startswith("python -m lionax.demo.sweep")
    for name in command.CHOICES:
        tried = record["bits_per_character"][name]
        assert min(tried, key=tried.get) in list(tried)[1:-1], "the best rate lies within the grid"


@pytest.mark.parametrize(("names", "steps", "most"), [
    pytest.param("lion", 6, 8.0, marks=pytest.mark.slow),
    pytest.param("lion,lamb,sgd,adamw", 30, 6.0, marks=pytest.mark.slow)])
def test_demo(names, steps, most, tmp_path):
    out = tmp_path / "curves.png"
    result = subprocess.run(
        demo("--optimizers", names, "--steps", str(steps), "--out", str(out)),
        env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for name in names.split(","):
        row = rf"│ {name} +│ +([\d.]+) │ +(\d+) │ +([\d.]+) │ +([\d.]+) │"
        bits, step, _, state = re.search(row, result.stdout).groups()
        assert float(bits) < most
        assert step == str(steps)
        assert float(state) == pytest.approx({"lion": 4, "lamb": 8, "sgd": 4, "adamw": 8}[name],
                                             abs=0.1)
    assert "bigram entropy" in result.stdout
    assert imread(out).shape[0] > 300


@pytest.mark.slow
def test_an_interrupt_leaves_the_partial_table(tmp_path, monkeypatch, capsys):
    train = training.train

    def interrupted(name, *arguments):
        for run in train(name, *arguments):
            yield run
            if name == "adamw" and run.steps[-1] == 25:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    monkeypatch.setenv("COLUMNS", "120")
    with jax.numpy_dtype_promotion("standard"):
        status = command.main([
            "demo", "--optimizers", "sgd,adamw,lion", "--steps", "50", "--out",
            str(tmp_path / "curves.png")
        ])
    assert status == 130
    shown = capsys.readouterr().out
    assert "Interrupted" in shown
    assert re.search(r"│ sgd +│ +[\d.]+ │ +50 │", shown)
    assert re.search(r"│ adamw +│ +[\d.]+ │ +25 │", shown)
    assert "lion  " not in shown.partition("validation")[2]
    assert (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_an_interrupt_at_any_time_leaves_no_traceback(tmp_path):
    process = subprocess.Popen(demo("--steps", "100000", "--out",
                                    str(tmp_path / "curves.png")), env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(12)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Interrupted" in stdout + stderr
    assert "Traceback" not in stdout + stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--optimizers", "adam"], "adam: give some of lion,lamb,sgd,adamw"),
    (["--steps", "0"], "'0' is not a number of steps"),
    (["--seed", "-1"], "'-1' is not a number of at least 0"),
    (["--out", "no/such/folder.png"], "does not exist"), (["--out", "x.foo"], "curves.png"),
    (["--out", "tests"], "not the name of a PNG"),
    (["--resume", "README.md"], "is not a folder")])
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["demo", *arguments])
    assert message in (capsys.readouterr().err + str(exit_.value))


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--optimizers", "--steps", "--seed", "--out"))


def test_without_the_extra_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(SystemExit, match=r"pip install 'lionax\[demo\]'"):
        command.main(["demo"])


@pytest.mark.slow
def test_the_model_learns_more_than_pairs(tmp_path):
    arguments = demo("--steps", "300", "--out", str(tmp_path / "curves.png"))
    result = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    entropy = float(re.search(r"bigram entropy\) +│ +([\d.]+)", result.stdout).group(1))
    for name in ("lion", "adamw"):
        assert float(re.search(rf"│ {name} +│ +([\d.]+) ", result.stdout).group(1)) < entropy


def test_the_optimizers_are_listed(capsys):
    assert command.main(["demo", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(command.CHOICES)
    assert "Optax's" in lines[-1]
    assert str(training.best_rate("lion")) in lines[0]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--version"])
    assert capsys.readouterr().out == f"lionax {lionax.__version__}\n"


def test_info(capsys):
    assert command.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"lionax {lionax.__version__}, Python " in shown
    assert f"jax {jax.__version__}" in shown
    assert f"devices: {jax.device_count()} × cpu" in shown
    for name, value in lionax.compiler_options().items():
        assert f"{name}={value}: taken" in shown
    assert re.search(r"test: .*pytest \d", shown)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(tmp_path):
    corpus, weights = text.load(), []
    tx = training.optimizer("lion", 60)
    for name, stops in (("whole", []), ("parts", [25, 50])):
        for stop in [*stops, None]:
            for run in training.train("lion", tx, corpus, 60, 0, tmp_path / name):
                if run.steps[-1] == stop:
                    break
        _graph, params = training.initial(corpus, 0)
        manager = Checkpoints(tmp_path / name, "lion", {"steps": 60, "seed": 0})
        arrays, record = manager.latest((params, tx.init(params)))
        weights.append(arrays)
        assert record == dataclasses.asdict(run)
        assert run.steps == [0, 25, 50, 60]
    chex.assert_trees_all_equal(*weights)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_folder_with_another_run_is_refused(tmp_path):
    arguments = ["demo", "--optimizers", "lion", "--out", str(tmp_path / "curves.png"), "--resume",
                 str(tmp_path / "runs"), "--steps"]
    assert command.main([*arguments, "3"]) == 0
    with pytest.raises(SystemExit, match=r"holds a run with --steps 3 --seed 0; .* --steps 4"):
        command.main([*arguments, "4"])
