"""The benchmarks run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import codes, measure, meshes, peers, quality, quality_report, tasks, trees
from lionax.core.quantized import format_of

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


PROGRAM = """
branch {
  %skipped = f32[99]{0} all-reduce(%x)
}

ENTRY main {
  %a = (f32[6,2]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y), channel_id=1
  %b = s8[8]{0} all-gather(%z), dimensions={0}
  %c = f32[] reduce-scatter(%z), dimensions={0}
  %d = pred[] copy(%w)
}
"""


def test_what_a_program_sends_in_a_ring():
    found, sent = meshes.sent(PROGRAM, 4)
    assert found == {"all-reduce": 1, "all-gather": 1, "reduce-scatter": 1}
    assert sent == 2 * 3 / 4 * (48 + 8) + 3 / 4 * 8 + 3 * 4
    assert meshes.sent(PROGRAM, 1)[1] == 0


@pytest.mark.parametrize(("case", "layout", "state", "sent"), [
    ("lion", "data", 1, 0), ("lion", "zero", 1 / 4, 3 / 4), ("lion", "fsdp", 1 / 4, 0),
    ("lamb", "zero", 2 / 4, 3 / 4),
    ("lion, with the gradient", "data", 1, 2 * 3 / 4),
    ("lion, with the gradient", "zero", 1 / 4, 3 * 3 / 4),
    ("lion, with the gradient", "fsdp", 1 / 4, 3 * 3 / 4)])
def test_counts_follow_the_formulas(case, layout, state, sent):
    count = meshes.count(case, layout, 4, 2, 64)
    whole = 4 * count.parameters
    assert count.parameter_bytes == whole * (1 / 4 if layout == "fsdp" else 1)
    assert 0 <= count.state_bytes - state * whole < 16  # of scalars
    assert 0 <= count.sent_bytes - sent * whole < 64  # of norms


PAGES = [pathlib.Path(__file__).parent.parent / "docs" / name
         for name in ("benchmarks/meshes.md", "guides/meshes.md")]


def test_the_pages_show_the_estimates_for_70_billion_parameters():
    assert trees.elements(trees.llama_2()) == pytest.approx(69.0e9, rel=1e-3)
    table = meshes.estimate_table(meshes.estimates(trees.llama_2()))
    for page in PAGES:
        assert table in page.read_text(), page


@pytest.mark.slow
def test_meshes_writes_a_page_and_json(tmp_path, capsys):
    meshes.main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "meshes.json").read_text())
    assert {row["layout"] for row in record["counts"]} == {"data", "zero", "fsdp"}
    assert (tmp_path / "meshes.md").read_text().strip() == capsys.readouterr().out.strip()


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


def test_the_dynamic_code_has_256_numbers_of_seven_decades():
    for is_nonnegative in (False, True):
        levels = codes.dynamic_levels(is_nonnegative)
        assert len(set(levels.tolist())) == 256
        assert levels.max() == 1
        assert levels.min() == (0 if is_nonnegative else pytest.approx(-1, abs=0.01))
        assert levels[levels > 0].min() == pytest.approx(3.25e-7 if is_nonnegative else 5.5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("is_nonnegative", [False, True])
@pytest.mark.parametrize("round_trip", [codes.linear, codes.dynamic, codes.softsign])
def test_codes_are_near_and_their_numbers_are_fixed_points(round_trip, is_nonnegative):
    values = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    values[0, 0] = values[2, 99] = 5  # the dynamic code has 1 but not -1
    values = values * values if is_nonnegative else values
    rounded = np.asarray(round_trip(jnp.asarray(values), is_nonnegative))
    assert rounded.shape == values.shape
    assert 0 < np.abs(rounded - values).max() < 0.02 * np.abs(values).max()
    assert len(np.unique(rounded / rounded.max())) < values.size
    np.testing.assert_allclose(round_trip(jnp.asarray(rounded), is_nonnegative), rounded, rtol=1e-6)
    assert not round_trip(jnp.zeros((2, 300)), is_nonnegative).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.TASKS)
def test_most_weights_of_a_task_are_in_codes(name):
    shapes = [leaf.shape for leaf in jax.tree.leaves(
        jax.eval_shape(tasks.TASKS[name]().init, jax.random.key(0)))]
    coded = [shape for shape in shapes if quality.has_codes(shape)]
    assert sum(map(np.prod, coded)) > 0.8 * sum(map(np.prod, shapes))
    assert coded == [shape for shape in shapes if format_of(4, shape, False)]


def test_verdicts():
    reference = {"mean": 2.0, "deviation": 0.5}
    assert quality_report.verdict({"mean": 2.5}, reference) == (1.0, "within")
    assert quality_report.verdict({"mean": 1.0}, reference) == (-2.0, "within")
    assert quality_report.verdict({"mean": 2.6}, reference)[1] == "above"
    assert quality_report.verdict({"mean": None}, reference)[1] == "diverged"


@pytest.mark.slow
def test_quality_writes_a_table_a_picture_and_json(tmp_path, capsys):
    quality.main(["--quick", "--formats", "int4;linear int8, nearest", "--out", str(tmp_path)])
    task = json.loads((tmp_path / "quality.json").read_text())["tasks"]["digits_full_batch"]
    assert task["seeds"] == 2
    results = task["formats"]
    assert list(results) == ["float32", "int4", "linear int8, nearest"]
    assert results["float32"]["signs"] == 0
    assert results["float32"]["stalled"] < 0.001
    assert results["linear int8, nearest"]["signs"] > results["int4"]["signs"] > 0
    assert all(1 < loss < 3 for result in results.values() for loss in result["losses"])
    assert "| int4 | " in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality.png").stat().st_size > 1000
    assert "int4: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quality.main(["--tasks", "oak"])
    assert "--tasks: oak: give some of digits_full_batch" in capsys.readouterr().err
