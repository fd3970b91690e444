"""The plan of a run."""

import jax
import jax.numpy as jnp
import pytest

import lionax

PARAMS = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}


def test_sweeps():
    assert lionax.plan(lionax.lion(1e-3), PARAMS).sweeps == (("scale_by_lion", "add_decayed_weights", "scale_by_learning_rate"),)
    clipped = lionax.chain(lionax.clip(1.0), lionax.clip_by_global_norm(1.0), lionax.lamb(1e-3))
    assert lionax.plan(clipped, PARAMS).sweeps == (
        ("clip",), ("clip_by_global_norm", "scale_by_adam", "add_decayed_weights"), ("scale_by_trust_ratio", "scale_by_learning_rate"))
    first = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    assert lionax.plan(first, PARAMS).sweeps == (
        ("clip_by_global_norm",), ("scale_by_lion", "add_decayed_weights", "scale_by_learning_rate"))
    assert len(lionax.plan(lionax.lamb(1e-3), PARAMS).sweeps) == 2


def test_state_bytes():
    for tx in (lionax.lion(1e-3, mu_dtype=jnp.bfloat16), lionax.lamb(1e-3), lionax.sgd(1e-3), lionax.chain(lionax.params_ema(0.9))):
        plan = lionax.plan(tx, PARAMS)
        assert plan.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(PARAMS)))
        assert plan.parameters == 16


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert lionax.plan(lionax.lamb(1e-3), shapes) == lionax.plan(lionax.lamb(1e-3), PARAMS)


LARGE = {"a": jnp.ones((512, 520)), "b": jnp.ones((640, 512)), "c": [jnp.ones((512, 513))]}
ELEMENTS = sum(leaf.size for leaf in jax.tree.leaves(LARGE))
LARGEST = max(leaf.nbytes for leaf in jax.tree.leaves(LARGE))


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.shape[0] == 512, params)


# What is read and written for each parameter, counted by hand: gradient g, parameter p, momentum m, second moment v, update u.
COUNTED = {
    "lion": (lambda: lionax.lion(1e-3), 5 * 4, 2 * 4),  # gmp → p; gm → m
    "lion_bfloat16": (lambda: lionax.lion(1e-3, mu_dtype="bfloat16"), 16, 6),
    "lion_partition": (lambda: lionax.partition({"all": lionax.lion(1e-3)}, "all"), 20, 8),
    "clip_lion": (lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3)), 6 * 4, 2 * 4),  # g → norm
    "lion_ema": (lambda: lionax.chain(lionax.lion(1e-3), lionax.params_ema(0.9)), 7 * 4, 3 * 4),  # e and the new p → e
    "lamb": (lambda: lionax.lamb(1e-3), 10 * 4, 4 * 4),  # gm → m; gv → v; new mv → u; u and p → norms; up → p
    "lamb_decay": (lambda: lionax.lamb(1e-3, weight_decay=0.1), 11 * 4, 4 * 4),  # p → u
    "lamb_bfloat16": (lambda: lionax.lamb(1e-3, mu_dtype="bfloat16", nu_dtype="bfloat16"), 36, 12),  # gmv → u; up → norms; up → p; gm; gv
    "sgd": (lambda: lionax.sgd(1e-3), 2 * 4, 4),
    "sgd_momentum": (lambda: lionax.sgd(1e-3, 0.9), 4 * 4, 2 * 4),  # gm → m; the new m and p → p
    "sgd_bfloat16": (lambda: lionax.sgd(1e-3, 0.9, accumulator_dtype="bfloat16"), 16, 6),  # gmp → p; gm → m
    "sgd_nesterov": (lambda: lionax.sgd(1e-3, 0.9, nesterov=True), 5 * 4, 2 * 4),
    "clip_by_norm": (lambda: lionax.chain(lionax.clip_by_norm(1.0), lionax.sgd(0.1)), 3 * 4, 4),
    "adam": (lambda: lionax.chain(lionax.scale_by_adam(), lionax.scale(-1.0)), 7 * 4, 3 * 4),
    "masked": (lambda: lionax.masked(lionax.clip(1.0), matrices), 2 * 4, 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_is_what_the_compiler_says(name):
    make, read, written = COUNTED[name]
    tx = make()
    plan = lionax.plan(tx, LARGE)
    assert (plan.bytes_read_per_param, plan.bytes_written_per_param) == (read, written)
    compiled = jax.jit(tx.step, donate_argnums=(0, 1)).lower(LARGE, tx.init(LARGE), LARGE).compile()
    cost = compiled.cost_analysis()["bytes accessed"] / ELEMENTS
    norms = {"clip_lion": 1, "lamb": 2, "lamb_decay": 2, "lamb_bfloat16": 2, "clip_by_norm": 1}.get(name, 0)
    second_sums = 4 * norms  # in a branch that is taken if the first is out of range
    assert cost == pytest.approx(read + written + second_sums, rel=2e-3)
    assert compiled.memory_analysis().temp_size_in_bytes == pytest.approx(plan.temporary_bytes, abs=4096)
    assert plan.temporary_bytes == (LARGEST if "lamb" in name else 0)
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * ELEMENTS + plan.state_bytes - 64


def test_what_is_not_known():
    plan = lionax.plan(lionax.accumulate(lionax.lion(1e-3), 4), LARGE)
    assert plan.bytes_read_per_param is plan.bytes_written_per_param is plan.temporary_bytes is None
    assert "read" not in str(plan)


def test_prints_as_a_table():
    lines = str(lionax.plan(lionax.sgd(0.1), {})).splitlines()
    assert lines == ["sweep 1   add_decayed_weights, scale_by_learning_rate", "state     9 bytes"]
