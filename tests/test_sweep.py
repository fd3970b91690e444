"""Every transformation in every mode, with every dtype and every container.

A compiled program depends on the leaves alone, not on their containers: `test_containers` traces
cases, dtypes and containers, and those of two leaves make letter by letter the same program. So
`test_cases` runs cases, modes and dtypes, each with a container in turn. In the short size it is a
sample of the four in which each pair of values occurs; in the long size it is all modes and dtypes
of all cases. Trees of 1,000 leaves are traced with some cases, and run with one.
"""

import functools
import itertools

import cases
import jax
import probes
import pytest
import sweep
from jax import P, lax
from sweep import Row

import lionax
from lionax.core import one_leaf

SAME = [name for name in sweep.SMALL if sweep.TREES[name][0] == "two"]
# Few compilations: each tree has a case of its own.
PLAIN = dict(zip(sweep.SMALL, (
    "sgd", "scale_by_lion", "add_decayed_weights", "scale", "ema_plain", "scale_by_learning_rate",
    "lamb", "lion", "sgd_momentum"), strict=True))

# The first case of each public function.
THOUSAND = list({case.public: name for name, case in reversed(cases.CASES.items())}.values())


def plain_rows():
    """Each pair of a mode, a dtype and a tree: a Latin square."""
    dtypes = list(sweep.DTYPES)
    return [Row(PLAIN[tree], mode, dtypes[(i + j) % len(dtypes)], tree)
            for i, mode in enumerate(sweep.MODES) for j, tree in enumerate(sweep.SMALL)]


def rows_of(case):
    """Of each case one row for each tree; over all cases each pair of values occurs."""
    number, dtypes, modes = list(cases.CASES).index(case), list(sweep.DTYPES), list(sweep.MODES)
    rows = [Row(case, modes[(number + i) % len(modes)],
                dtypes[(i + number // len(modes)) % len(dtypes)], tree)
            for i, tree in enumerate(sweep.SMALL)]
    return [row if sweep.is_accepted(row) else row._replace(dtype="float32") for row in rows]


def all_rows_of(case):
    """Of a case each mode and dtype, with a tree in turn."""
    number = list(cases.CASES).index(case)
    rows = [Row(case, *pair, sweep.SMALL[(number + i + i // 6) % len(sweep.SMALL)])
            for i, pair in enumerate(itertools.product(sweep.MODES, sweep.DTYPES))]
    return list(filter(sweep.is_accepted, rows))


def pairs(rows, factors):
    """The pairs of values of two of these factors that occur."""
    return {(row[a], row[b]) for row in rows for a, b in itertools.combinations(factors, 2)}


def test_each_pair_of_values_is_in_the_samples():
    product = list(filter(sweep.is_accepted, itertools.starmap(Row, itertools.product(
        cases.CASES, sweep.MODES, sweep.DTYPES, sweep.SMALL))))
    sample, whole = ([row for case in cases.CASES for row in rows(case)]
                     for rows in (rows_of, all_rows_of))
    assert pairs(plain_rows(), (1, 2, 3)) == pairs(product, (1, 2, 3))
    missing = pairs(product, range(4)) - pairs(sample, range(4))
    assert missing == set(), missing
    assert pairs(whole, range(4)) == pairs(product, range(4))
    assert {row[:3] for row in whole} == {row[:3] for row in product}


def run(rows, figure, oracle=None):
    with jax.enable_x64(True):
        errors = sweep.check(rows, oracle)
    figure("combinations", len(rows))
    for dtype, error in errors.items():
        figure(f"largest error in {dtype}, of its bound,", error)


@functools.cache
def plain_oracle():
    with jax.enable_x64(True):
        return sweep.Oracle(plain_rows())


@pytest.mark.promise("Contract", "Each mode takes each dtype in each container, and computes what "
                     "float64 computes (a sample: each pair of a mode, a dtype and a container).")
@pytest.mark.xdist_group("sweep")  # which has one oracle
@pytest.mark.parametrize("mode", sweep.MODES)
def test_a_sample(mode, figure):
    run([row for row in plain_rows() if row.mode == mode], figure, plain_oracle())


@pytest.mark.slow
@pytest.mark.promise("Contract", "Each transformation computes what it computes in float64, in "
                     "each mode and with each dtype, to a bound that the dtype sets.")
@pytest.mark.parametrize("case", cases.CASES)
def test_cases(case, figure):
    rows = probes.sized(rows_of, all_rows_of)(case)
    with sweep.context(case):
        run(rows, figure)


@pytest.mark.slow
@pytest.mark.promise("Contract", "No step changes a structure, a shape or a dtype, and containers "
                     "of equal leaves make the same program, letter by letter.")
@pytest.mark.parametrize("case", cases.CASES)
def test_containers(case, figure, monkeypatch):
    for function in (one_leaf.apply, one_leaf.prepare):  # which may not forget a program here
        monkeypatch.setattr(function, "most", 10**9)
    number, dtypes = list(cases.CASES).index(case), list(sweep.DTYPES)
    dtypes = probes.sized(dtypes[number % 6:][:1], dtypes)
    tried = list(filter(sweep.is_accepted, (
        Row(case, "trace", dtype, tree) for dtype in dtypes for tree in sweep.SMALL)))
    with jax.enable_x64(True), sweep.context(case):
        programs = {row: sweep.traced(row) for row in tried}
    for dtype in {row.dtype for row in tried}:
        assert len({programs[row] for row in tried if row.dtype == dtype and row.tree in SAME}) == 1
    figure("combinations", len(tried))


@pytest.mark.parametrize("case", sweep.REFUSALS)
def test_complex_leaves_that_would_lose_a_part_are_refused(case):
    tx, params = sweep.transformation(case), sweep.tree_of(Row(case, "", "complex64", "dict"), 0)
    with pytest.raises(TypeError, match=sweep.REFUSALS[case]):
        tx.init(params)


@pytest.mark.slow
@pytest.mark.promise("Contract", "A tree of 1,000 leaves keeps its form.")
@pytest.mark.parametrize("case", probes.sized(["lion", "lamb"], THOUSAND))
def test_a_thousand_leaves(case, figure):
    number, dtypes = list(cases.CASES).index(case), list(sweep.DTYPES)[:4]
    with jax.enable_x64(True), sweep.context(case):
        sweep.traced(Row(case, "trace", dtypes[number % 4], "thousand"))
    figure("combinations", 1)


@pytest.mark.slow
@pytest.mark.promise("Contract", "On 1,000 leaves, too, it computes what it computes in float64.")
def test_numbers_of_a_thousand_leaves(figure):
    run([Row("sgd", "outside of jit", "mixed", "thousand"),
         Row("sgd", "jit", "bfloat16", "thousand")], figure)


@pytest.mark.slow
@pytest.mark.promise("Contract", "A majority of equal votes is Lion, for each dtype and container.")
def test_a_majority_of_equal_votes_is_lion(figure):
    rows = [Row("lion", "shard_map", dtype, tree)
            for dtype in sweep.DTYPES for tree in ("dict", "scalar", "zero_size", "empty")
            if dtype != "complex64"]
    tx, errors = lionax.majority_vote_lion(0.01, axis_name="x"), {}
    lion = sweep.program(rows, dict.fromkeys(rows, tx))
    voting = lion._replace(step=lambda params, state, grads: lion.step(
        params, state, jax.tree.map(lambda g: lax.pcast(g, "x", to="varying"), grads)))
    with jax.enable_x64(True):
        oracle, params = sweep.Oracle(rows), {row: sweep.tree_of(row, 0) for row in rows}
        grads = sweep.stack(*({row: sweep.tree_of(row, seed) for row in rows}
                              for seed in range(1, sweep.STEPS + 1)))
        new = jax.jit(jax.shard_map(lambda *each: sweep.train(voting, *each)[0], in_specs=P(),
                                    out_specs=P(), mesh=probes.mesh_of(8)))(params, grads)
        assert sweep.form(new) == sweep.form(params)
        for row in rows:
            sweep.compare(row, new[row], oracle, errors)
    figure("combinations", len(rows))
    figure("largest error, of its bound,", max(errors.values()))
