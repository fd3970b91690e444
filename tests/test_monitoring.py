"""The plan of a run."""

import jax
import jax.numpy as jnp

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


def test_prints_as_a_table():
    assert str(lionax.plan(lionax.sgd(0.1), {})).splitlines() == ["sweep 1: add_decayed_weights, scale_by_learning_rate", "state: 9 bytes"]
