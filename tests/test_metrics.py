"""What `monitor` measures, against NumPy."""

import itertools
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lionax

PARAMS = {"kernel": cases.normal(4, 3), "bias": jnp.full(3, 2.0)}
GRADS = [cases.gradients(PARAMS, t) for t in range(6)]


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree))))


def run(tx, steps=1, params=PARAMS, step=None):
    """The parameters before the last step, those after it, and the metrics."""
    step, state, before = jax.jit(tx.step) if step is None else step, tx.init(params), None
    for grads in GRADS[:steps]:
        before, (params, state) = params, step(params, state, grads)
    return before, params, {name: float(x) for name, x in lionax.metrics(state).items()}


@pytest.mark.parametrize("jitted", [True, False])
def test_norms_are_those_of_the_gradients_the_update_and_the_parameters(jitted):
    tx = lionax.monitor(lionax.lion(0.1, weight_decay=0.5))
    before, after, found = run(tx, 3, step=jax.jit(tx.step) if jitted else tx.step)
    update = jax.tree.map(lambda new, old: new - old, after, before)
    assert found["gradient_norm"] == pytest.approx(norm(GRADS[2]), rel=1e-6)
    assert found["parameter_norm"] == pytest.approx(norm(before), rel=1e-6)
    assert found["update_norm"] == pytest.approx(norm(update), rel=1e-5)
    assert found["update_to_parameter"] == pytest.approx(norm(update) / norm(before), rel=1e-5)
    assert found["learning_rate"] == pytest.approx(0.1)


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize(("case", "every"), cases.but_for_fast(list(itertools.product(
    ("lion", "lamb", "chain", "partition", "masked", "adamw_schedule", "accumulate",
     "skip_nonfinite", "dynamic_loss_scale"), (1, 3))), ("lion", 1)))
def test_a_monitored_run_takes_the_same_steps(case, every):
    tx = cases.CASES[case].make()
    _, plain, _ = run(lionax.monitor(tx, every=every), 6)
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        params, state = jax.jit(tx.step)(params, state, grads)
    cases.assert_close(plain, params, rtol=1e-6)


def test_what_a_clip_did():
    limit = norm(GRADS[0]) / 4
    found = run(lionax.monitor(lionax.chain(lionax.clip_by_global_norm(limit), lionax.sgd(1.0))))[2]
    assert (found["clipped"], found["clip_factor"]) == (1.0, pytest.approx(0.25, rel=1e-6))
    found = run(lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1e9), lionax.sgd(1.0))))[2]
    assert (found["clipped"], found["clip_factor"]) == (0.0, 1.0)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(GRADS[0])])
    found = run(lionax.monitor(lionax.clip(0.5)))[2]
    assert found["clipped"] == pytest.approx(np.mean(np.abs(values) > 0.5))


@pytest.mark.slow
def test_a_clip_of_a_zero_gradient_and_of_nan():
    tx = lionax.monitor(lionax.chain(lionax.clip(1.0), lionax.sgd(0.1)))
    params = {"w": jnp.ones(3), "b": jnp.ones(1)}
    step = jax.jit(tx.step)
    _, state = step(params, tx.init(params), {"w": jnp.array([1.0, -2.0, 0.0]), "b": jnp.zeros(1)})
    assert float(lionax.metrics(state)["clip_factor"]) == pytest.approx(0.4**0.5)
    _, state = step(params, tx.init(params), {"w": jnp.full(3, jnp.nan), "b": jnp.zeros(1)})
    assert float(lionax.metrics(state)["clipped"]) == 0.0


@pytest.mark.slow
def test_zeros_make_no_nan():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = lionax.monitor(lionax.chain(lionax.clip(1.0), lionax.lamb(0.1)), groups={"bias": "b"})
    with jax.debug_nans(True):
        _, state = jax.jit(tx.step)(params, jax.jit(tx.init)(params), params)
    assert float(lionax.metrics(state)["update_to_parameter"]) == 0.0


def test_what_was_not_measured_yet_is_nan():
    tx = lionax.monitor(lionax.accumulate(lionax.sgd(0.1), 4))
    _, state = tx.step(PARAMS, tx.init(PARAMS), GRADS[0])
    found = lionax.metrics(state)
    assert np.isnan(float(found["accumulated_gradient_norm"]))
    assert float(found["gradient_norm"]) == pytest.approx(norm(GRADS[0]), rel=1e-6)
    moved = lionax.cast_state(lionax.sgd(0.1).init(PARAMS), lionax.monitor(lionax.sgd(0.1)).init(
        PARAMS))
    assert np.isnan(float(lionax.metrics(moved)["gradient_norm"]))


@pytest.mark.slow
def test_trust_ratios_are_those_of_the_leaves():
    params, tx = {"a": jnp.full(4, 3.0), "b": jnp.full(1, 8.0), "c": jnp.ones(9)}, lionax.monitor(
        lionax.chain(lionax.scale_by_trust_ratio(), lionax.scale_by_learning_rate(0.1)))
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(tx.step)(params, tx.init(params), grads)
    found = lionax.metrics(state)
    assert [round(float(found[f"trust_ratio_{x}"]), 4) for x in ("min", "median", "max")] == [
        1.0, 3.0, 8.0]


def test_signs_that_changed_since_the_last_step():
    tx = lionax.monitor(lionax.lion(0.1, b1=0.0))  # the direction is the gradient's sign
    params, state = jnp.zeros(4), tx.init(jnp.zeros(4))
    changes = []
    for grads in ([1.0, 1.0, -1.0, 0.0], [1.0, -1.0, -1.0, 0.0], [1.0, -1.0, 1.0, 2.0]):
        params, state = tx.step(params, state, jnp.array(grads))
        changes.append(float(lionax.metrics(state)["sign_changes"]))
    assert changes == [0.0, 0.25, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("jitted", cases.but_for_fast([True, False], False))
def test_every_third_step_compares_with_the_step_before_it(jitted):
    rare, often = (lionax.monitor(lionax.lion(0.1), every=n) for n in (3, 1))
    for steps in (3, 6):  # the steps in which both measure
        ours, theirs = (run(tx, steps, step=jax.jit(tx.step) if jitted else tx.step)[2]
                        for tx in (rare, often))
        assert ours == pytest.approx(theirs, rel=1e-6)
    held = run(rare, 5)[2]
    assert held == {**run(rare, 3)[2], "age": 2.0}


def test_nonfinite_elements_are_counted():
    tx = lionax.monitor(lionax.skip_nonfinite(lionax.sgd(1.0), 9))
    params, state = jnp.ones(5), tx.init(jnp.ones(5))
    params, state = tx.step(params, state, jnp.ones(5))
    bad = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0])
    _, state = jax.jit(tx.step)(params, state, bad)
    found = lionax.metrics(state)
    assert float(found["nonfinite"]) == 3.0
    assert float(found["accepted_gradient_norm"]) == pytest.approx(5**0.5)  # of the step before
    assert (int(found["age"]), int(found["accepted_age"])) == (0, 1)


def test_gradients_inside_of_conditionals_have_names_of_their_own():
    tx = lionax.monitor(lionax.dynamic_loss_scale(lionax.accumulate(lionax.sgd(0.5), 3), 8.0))
    step, params, state = jax.jit(tx.step), jnp.zeros(2), tx.init(jnp.zeros(2))
    ages = []
    for t in range(4):
        params, state = step(params, state, 8.0 * (1.0 + t) * jnp.array([3.0, 4.0]))
        ages.append(int(lionax.metrics(state)["accumulated_age"]))
    found = lionax.metrics(state)
    assert float(found["gradient_norm"]) == 160.0
    assert float(found["unscaled_gradient_norm"]) == 20.0
    assert float(found["accumulated_gradient_norm"]) == 10.0  # the mean of 5, 10 and 15
    assert float(found["update_norm"]) == 5.0
    assert ages == [-1, -1, 0, 1]


def test_groups_by_path():
    tx = lionax.monitor(lionax.lamb(0.1), groups={"kernel": "large", "bias": "small"})
    found = run(tx)[2]
    for name, leaf in (("large", "kernel"), ("small", "bias")):
        assert found[f"{name}/gradient_norm"] == pytest.approx(norm(GRADS[0][leaf]), rel=1e-6)
        assert found[f"{name}/trust_ratio_max"] == found[f"{name}/trust_ratio_min"]
    both = found["large/gradient_norm"] ** 2 + found["small/gradient_norm"] ** 2
    assert found["gradient_norm"] ** 2 == pytest.approx(both, rel=1e-6)
    with pytest.raises(ValueError, match=r"monitor.*'kernal' .*matches no leaf.*'kernel'"):
        lionax.monitor(lionax.sgd(0.1), groups={"kernal": "x"}).init(PARAMS)
    with pytest.raises(TypeError, match=r"monitor: groups has 3 for 'kernel'"):
        lionax.monitor(lionax.sgd(0.1), groups={"kernel": 3})


def test_monitors_in_groups_are_told_apart():
    parts = {"a": lionax.monitor(lionax.lion(0.1)), "b": lionax.monitor(lionax.sgd(0.1))}
    found = run(lionax.partition(parts, {"kernel": "a", "bias": "b"}))[2]
    assert found["a/gradient_norm"] == pytest.approx(norm(GRADS[0]["kernel"]), rel=1e-6)
    assert found["b/gradient_norm"] == pytest.approx(norm(GRADS[0]["bias"]), rel=1e-6)
    assert "a/learning_rate" in found


def test_metrics_are_arrays_of_the_device_and_go_into_json():
    tx = lionax.monitor(lionax.lion(0.1))
    with jax.transfer_guard_device_to_host("disallow"):
        found = lionax.metrics(tx.init(PARAMS))
    assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())
    assert json.loads(json.dumps({name: float(x) for name, x in found.items()}))
    with pytest.raises(KeyError, match=r"lionax\.monitor\(tx\)"):
        lionax.metrics(lionax.lion(0.1).init(PARAMS))


def test_without_parameters_their_norm_is_not_known():
    tx = lionax.monitor(lionax.sgd(0.1))
    _, state = tx.update(GRADS[0], tx.init(PARAMS))
    found = lionax.metrics(state)
    assert np.isnan(float(found["parameter_norm"]))
    assert float(found["update_norm"]) == pytest.approx(0.1 * norm(GRADS[0]), rel=1e-6)


def test_a_mask_that_is_a_function_and_bfloat16_gradients():
    tx = lionax.monitor(lionax.lion(0.1, mask=lambda tree: {"kernel": True, "bias": False}))
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS[0])
    _, state = jax.jit(tx.step)(PARAMS, tx.init(PARAMS), half)
    assert float(lionax.metrics(state)["gradient_norm"]) == pytest.approx(norm(half), rel=1e-6)


@pytest.mark.slow
def test_on_a_mesh_the_numbers_are_those_of_one_device():
    params = {"a": cases.normal(16, 8), "b": cases.normal(8)}
    grads = [cases.gradients(params, t) for t in range(2)]
    tx = lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)))
    mesh = Mesh(jax.devices()[:8], ("x",))
    specs = {"a": P("x"), "b": P()}

    def two_steps(params, *grads):
        state = tx.init(params)
        for g in grads:
            params, state = tx.step(params, state, g)
        return lionax.metrics(state)

    alone = jax.jit(two_steps)(params, *grads)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    spread = [jax.device_put(tree, shardings) for tree in (params, *grads)]
    inside = jax.shard_map(two_steps, mesh=mesh, in_specs=(specs,) * 3, out_specs=P())
    for other in (jax.jit(two_steps)(*spread), jax.jit(inside)(*spread)):
        for name, value in alone.items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_measuring_rarely_is_a_branch():
    tx = lionax.monitor(lionax.lion(0.1), every=10)
    state = tx.init(PARAMS)
    text = jax.jit(tx.step).lower(PARAMS, state, PARAMS).as_text()
    assert "stablehlo.case" in text
    params = {f"{i}": jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(8)}
    largest, total = 4 * 256 * 256, 8 * 4 * 256 * 256
    plain, always = (lionax.plan(tx, params) for tx in (
        lionax.lion(0.1), lionax.monitor(lionax.lion(0.1))))
    assert plain.temporary_bytes < 1024
    assert always.read_bytes > plain.read_bytes + total  # norms and signs are loops of their own
    assert always.temporary_bytes < 1.5 * largest
    assert always.state_bytes < plain.state_bytes + total // 4 + 1024
