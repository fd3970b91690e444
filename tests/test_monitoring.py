"""Plans, which are the compiler's own count, and summaries."""

import io

import cases
import jax
import jax.numpy as jnp
import optax
import pytest
import rich.console

import lionax
from lionax.core.table import in_bytes

PARAMS = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
LION = ("scale_by_lion", "add_decayed_weights", "scale_by_learning_rate")


def test_sweeps_end_where_a_norm_over_the_tree_is_needed():
    assert lionax.plan(lionax.lion(1e-3), PARAMS).sweeps == (LION,)
    clipped = lionax.chain(lionax.clip(1.0), lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    assert lionax.plan(clipped, PARAMS).sweeps == (("clip",), ("clip_by_global_norm", *LION))
    assert len(lionax.plan(lionax.lamb(1e-3), PARAMS).sweeps) == 1  # norms of leaves


def test_state_bytes():
    for tx in (lionax.lion(1e-3, mu_dtype=jnp.bfloat16), lionax.lamb(1e-3), lionax.sgd(1e-3),
               lionax.chain(lionax.params_ema(0.9))):
        plan = lionax.plan(tx, PARAMS)
        assert plan.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(PARAMS)))
        assert plan.parameters == 16


def test_shapes_are_enough_and_nothing_is_allocated():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert lionax.plan(lionax.lamb(1e-3), shapes) == lionax.plan(lionax.lamb(1e-3), PARAMS)
    huge = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)}  # 4 TB
    assert lionax.plan(lionax.lion(1e-3), huge).parameters == 1 << 40


LARGE = {"a": (512, 520), "b": (640, 512), "c": (512, 513)}
LARGE = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LARGE.items()}
LARGEST = 4 * 640 * 512

# Bytes a parameter, counted by hand: gradient g, parameter p, momentum m, second moment v, update
# u.
COUNTED = {
    "lion": (lambda: lionax.lion(1e-3), 5 * 4, 2 * 4),  # gmp → p; gm → m
    "lion_bfloat16": (lambda: lionax.lion(1e-3, mu_dtype="bfloat16"), 16, 6),
    "clip_lion": (lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3)),
                  6 * 4, 2 * 4),  # g → norm
    "lion_ema": (lambda: lionax.chain(lionax.lion(1e-3), lionax.params_ema(0.9)), 7 * 4, 3 * 4),
    "lamb": (lambda: lionax.lamb(1e-3), 10 * 4, 4 * 4),  # gm → m; gv → v; mv → u; u, p; up → p
    "sgd": (lambda: lionax.sgd(1e-3), 2 * 4, 4),
    "sgd_momentum": (lambda: lionax.sgd(1e-3, 0.9), 4 * 4, 2 * 4),  # gm → m; mp → p
    "adam": (lambda: lionax.chain(lionax.scale_by_adam(), lionax.scale(-1.0)), 7 * 4, 3 * 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_is_what_was_counted_by_hand(name):
    make, read, written = COUNTED[name]
    plan = lionax.plan(make(), LARGE)
    norms = {"clip_lion": 1, "lamb": 2}.get(name, 0)
    again = 4 * norms  # in the branch that is taken if a sum is out of range
    assert plan.read_bytes / plan.parameters == pytest.approx(read + again, rel=2e-3)
    assert plan.written_bytes / plan.parameters == pytest.approx(written, rel=2e-3)
    assert plan.temporary_bytes == pytest.approx(LARGEST if name == "lamb" else 0, abs=4096)
    assert plan.aliased_bytes >= 4 * plan.parameters + plan.state_bytes - 64
    assert plan.flops > plan.parameters


def test_conditionals_and_parts_of_optax_have_a_plan():
    plan = lionax.plan(lionax.accumulate(lionax.lion(1e-3), 4), LARGE)
    assert plan.temporary_bytes < 4096
    assert plan.sweeps == (("accumulate",),)


def test_prints_as_a_table():
    lines = str(lionax.plan(lionax.sgd(0.1), PARAMS)).splitlines()
    names = ["sweep 1", "state", "read", "written", "aliased", "temporary", "flops"]
    assert [line[:9].strip() for line in lines] == names
    assert lines[1].split() == ["state", "12", "bytes", "0.75", "per", "parameter"]
    assert "per parameter" not in str(lionax.plan(lionax.sgd(0.1), {}))


def test_cases_have_plans():
    for case in ("named_chain", "partition", "skip_nonfinite", "chain_foreign"):
        with jax.numpy_dtype_promotion("standard"):
            assert lionax.plan(cases.CASES[case].make(), cases.TREES["nested"]()).written_bytes


def test_summary_has_a_row_for_each_leaf_with_masks_resolved():
    tx = lionax.accumulate(lionax.chain(
        lionax.clip_by_global_norm(1.0),
        lionax.lion(1e-3, mask=lionax.not_matching("bias"), mu_dtype="bfloat16")), 4)
    summary = lionax.summary(tx, jax.eval_shape(lambda: PARAMS))
    bias, kernel = summary.leaves
    assert (bias.path, bias.shape, bias.dtype) == ("bias", (4,), "float32")
    assert bias.rules == ("accumulate", "clip_by_global_norm", "scale_by_lion",
                          "scale_by_learning_rate")
    assert set(kernel.rules) - set(bias.rules) == {"add_decayed_weights"}
    assert "mu bfloat16" in kernel.state
    assert kernel.state_bytes == 12 * (4 + 2) + 4  # the sum, the momentum, whether the sum is live
    state = tx.init(PARAMS)
    assert summary.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    text = str(summary)
    assert "on every leaf: accumulate, clip_by_global_norm, scale_by_lion" in text
    (row,) = [line for line in text.splitlines() if line.startswith("kernel")]
    assert "add_decayed_weights" in row


@pytest.mark.parametrize("case", cases.CASES)
def test_every_summary_counts_all_bytes_and_every_state_has_a_short_repr(case):
    tx, params = cases.CASES[case].make(), {f"{i}": jnp.ones((2, 3)) for i in range(40)}
    state, summary = tx.init(params), lionax.summary(tx, params)
    assert summary.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert sum(leaf.state_bytes for leaf in summary.leaves) <= summary.state_bytes
    assert len(repr(state)) < 1500
    jax.eval_shape(lambda state: repr(state) and state, state)  # tracers have no values


def test_counters_belong_to_no_leaf_and_a_rule_may_act_twice():
    (row,) = lionax.summary(lionax.accumulate(lionax.sgd(0.1), 2), jnp.ones(3)).leaves
    assert row.state == ("live int32", "gradients float32")
    params = {"a": {"b/c": jnp.ones(2)}, "a/b": {"c": jnp.ones(3)}}
    found = lionax.summary(lionax.lion(0.1), params)
    assert sorted(leaf.state_bytes for leaf in found.leaves) == [8, 12]
    twice = lionax.chain(lionax.clip(1.0), lionax.masked(lionax.clip(2.0), lionax.matching("bias")))
    (row,) = [line for line in str(lionax.summary(twice, PARAMS)).splitlines() if "bias" in line]
    assert row.split()[3] == "clip"


def test_a_state_of_other_things_than_arrays_has_a_repr():
    tx = lionax.chain(optax.add_noise(0.1, 0.1, 0), lionax.lion(0.1))
    state = tx.init(PARAMS)
    for other in (state, jax.tree.map(lambda x: x.sharding, state),
                  jax.tree.map(lambda x: True, state)):
        assert "ScaleByLionState.mu" in repr(other)
        assert "ScaleByLionState" in other._repr_html_()


def test_plans_summaries_and_states_are_tables_in_a_notebook_and_in_rich():
    tx = lionax.lion(1e-3)
    for shown in (lionax.plan(tx, PARAMS), lionax.summary(tx, PARAMS)):
        assert "<table>" in shown._repr_html_()
        console = rich.console.Console(width=120, record=True, file=io.StringIO())
        console.print(shown)
        text = console.export_text()
        assert "float32" in text or "per parameter" in text
    assert "ScaleByLionState" in tx.init(PARAMS)._repr_html_()
    masked = lionax.summary(tx, {"<b>": jnp.ones(2)})
    assert "&lt;b&gt;" in masked._repr_html_()


@pytest.mark.parametrize(("number", "text"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (392_500_000, "392.5 MB"),
    (7e15, "7000.0 TB")])
def test_bytes_have_a_unit(number, text):
    assert in_bytes(number) == text
