"""The benchmarks run."""

import json

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import measure, peers, trees

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_trees_have_the_sizes_that_are_told():
    assert trees.elements(trees.gpt2()) == pytest.approx(98.1e6, rel=1e-3)
    assert len(jax.tree.leaves(trees.gpt2(), is_leaf=lambda node: isinstance(node, tuple))) == 148
    assert trees.elements(trees.vit()) == pytest.approx(22e6, rel=0.02)
    assert trees.elements(trees.mlp()) == pytest.approx(33.6e6, rel=1e-2)


def test_turns():
    calls = []
    times = measure.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert [set(calls[i:i + 2])
            for i in range(0, 8, 2)] == [{"a", "b"}] * 4  # in any order, but each once in a round
    assert len(calls) == 8
    assert set(times) == {"a", "b"}


def test_the_limit_is_that_of_the_best_triad():
    rows = [
        measure.Row("step", "lion", "mlp", "lionax", 1000, 2.0, of_limit=0.5),
        measure.Row("eager", "lion", "mlp", "lionax", 1000, 2.0),
        measure.Row("step", "lion", "mlp", "triad", 1000, 1.0, of_limit=2.0)
    ]
    scaled, best = measure.to_best_triad(rows, 6e6)
    assert best == 12e6  # 12 bytes for each of 1000 elements in a millisecond
    assert [row.of_limit for row in scaled] == [0.25, None, 1.0]
    assert measure.to_best_triad(rows, 24e6) == (rows, 24e6)


@pytest.mark.slow
def test_the_command_writes_a_table_pictures_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(trees.QUICK, "mlp", lambda: trees.mlp(1, 64))
    command.main([
        "--quick", "--trees", "mlp", "--cases", "lion;lamb", "--steps-only", "--out",
        str(tmp_path)
    ])
    record = json.loads((tmp_path / "results.json").read_text())
    assert {(row["case"], row["contender"]) for row in record["rows"]} >= {
        (case, name) for case in ("lion", "lamb") for name in ("lionax", "Optax", "Keras 3")}
    assert all(row["milliseconds"] > 0 for row in record["rows"])
    assert record["machine"]["versions"]["jax"] == jax.__version__
    for picture in ("step.png", "limit.png", "memory.png"):
        assert (tmp_path / picture).stat().st_size > 1000
    assert "lionax" in capsys.readouterr().out


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        command.main(["--trees", "oak"])
    assert "--trees: oak: give some of gpt2" in capsys.readouterr().err


def test_cases_are_complete():
    assert {
        "lion", "clip_by_global_norm, lion", "lion, mu_dtype=bfloat16", "lamb", "sgd, "
        "momentum"
    } <= set(peers.CASES)
    for case in peers.CASES.values():
        assert {"lionax", "Optax"} <= set(case.available())
