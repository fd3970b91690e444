"""What goes wrong in Optax 0.2.8, and what lionax does instead: a test for each such case.

`docs/differences.md` has a row of the same name. A test shows what lionax does first, and then
that Optax still differs.
"""

import pickle

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest
from jax import P
from jax.sharding import NamedSharding
from probes import norm_of, run, scanned, shapes, then_optax, update, wide

import lionax
from lionax.core.norms import joint_norm

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.promise(
    "Pitfalls", "What goes wrong in Optax 0.2.8 goes right, and still goes wrong there")]
HALF = jnp.full(4, 2.0, jnp.bfloat16)
FLOAT32, BFLOAT16 = jnp.dtype("float32"), HALF.dtype
ONES, MASK = {"w": jnp.ones(2), "b": jnp.ones(2)}, {"w": True, "b": False}
many_leaves = pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])


@many_leaves
def test_norm_of_many_bfloat16_leaves(count):
    leaves = [jnp.full(64, 0.05, jnp.bfloat16)] * count
    assert float(joint_norm(leaves)) == pytest.approx(norm_of(leaves), rel=1e-6)
    then_optax()
    assert float(optax.tree.norm(leaves)) == {50: 2.796875, 2000: 8.0}[count]


@many_leaves
def test_clip_of_many_bfloat16_leaves(count):
    leaves, zeros = [jnp.full(64, 0.05, jnp.bfloat16)] * count, [jnp.zeros(64)] * count
    ours, theirs = lionax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    assert norm_of(ours.step(zeros, ours.init(zeros), leaves)[0]) == pytest.approx(1.0, rel=1e-6)
    assert norm_of(ours.update(leaves, ours.init(leaves))[0]) <= 1.003  # rounded to bfloat16
    then_optax()
    left = norm_of(theirs.update(leaves, theirs.init(leaves))[0])
    assert left == pytest.approx({50: 1.015, 2000: 2.238}[count], rel=1e-3)


@pytest.mark.parametrize("x", [jnp.full(4, 300.0, jnp.float16), jnp.array([1e25, 1.0])])
def test_norm_out_of_range(x):
    clipped = update(lionax.clip_by_global_norm(1.0), x, x)
    assert (clipped.dtype, norm_of(clipped)) == (x.dtype, pytest.approx(1.0, rel=1e-3))
    then_optax()
    assert not jnp.any(update(optax.clip_by_global_norm(1.0), x, x))


def test_gradient_that_is_not_finite():
    """A clip makes NaN and zeros of it, as Optax's; `monitor` and `skip_nonfinite` see it."""
    infinite, nan = (jnp.array([x, 1.0, 1.0]) for x in (jnp.inf, jnp.nan))
    left = {"infinite": [np.nan, 0.0, 0.0], "nan": [np.nan] * 3}
    clip, tx = lionax.clip_by_global_norm(1.0), lionax.skip_nonfinite(lionax.lion(0.1), 3)
    np.testing.assert_array_equal(update(clip, nan, infinite), left["infinite"])
    np.testing.assert_array_equal(update(clip, nan, nan), left["nan"])
    assert lionax.metrics(run(lionax.monitor(lionax.sgd(0.1)), nan, nan)[1])["nonfinite"] == 1
    params, state = scanned(tx, jnp.ones(3), infinite, 1)
    cases.assert_equal((params, state.rules.inner), (jnp.ones(3), tx.init(params).rules.inner))
    then_optax()
    clip = optax.clip_by_global_norm(1.0)
    np.testing.assert_array_equal(update(clip, nan, infinite), left["infinite"])
    np.testing.assert_array_equal(update(clip, nan, nan), left["nan"])


@pytest.mark.parametrize(("limit", "x64"), [(jnp.float32(1.0), False), (np.float64(1.0), True)])
def test_limit_that_is_no_python_number(limit, x64):
    with jax.enable_x64(x64):
        grads = jnp.ones(2, FLOAT32 if x64 else BFLOAT16)
        assert update(lionax.clip_by_global_norm(limit), grads, grads).dtype == grads.dtype
        then_optax()
        with pytest.raises(TypeError):
            update(optax.clip_by_global_norm(limit), grads, grads)


@pytest.mark.parametrize("make", [
    lambda of: of.clip_by_global_norm(-1.0), lambda of: of.lion(0.1, b1=1.5), lambda of:
    of.ema(2.0), lambda of: getattr(of, "accumulate", optax.MultiSteps)(of.sgd(0.1), 0)])
def test_argument_out_of_range(make):
    with pytest.raises(ValueError, match="is not accepted"):
        make(lionax)
    then_optax()
    make(optax)
    assert update(optax.clip_by_global_norm(-1.0), HALF, HALF)[0] < 0
    assert update(optax.lion(0.1, b1=1.5), HALF, HALF)[0] > 0  # up


def test_norms_of_a_trust_ratio():
    params = {f"layer{i}": jnp.ones((4, 4 + i)) for i in range(2)}
    assert probes.reductions(lionax.lamb(0.1), params) == 4
    then_optax()
    assert probes.reductions(optax.lamb(0.1), params) == 8


def test_zero_bias_under_lamb():
    """The paper's rule: a first step of lr, then steps in proportion to the small norm."""
    moves = lambda tx: probes.moved(tx, {"bias": jnp.zeros(4)}, {"bias": jnp.ones(4)}, 2)
    bounded = lionax.chain(lionax.scale_by_adam(), lionax.scale_by_trust_ratio(min_norm=1.0),
                           lionax.scale_by_learning_rate(0.01))
    collapse = pytest.approx([0.01, 1e-4], rel=1e-3)
    assert moves(lionax.lamb(0.01)) == collapse
    masked = lionax.lamb(0.01, trust_mask=lionax.not_matching("bias"))
    assert moves(masked) == pytest.approx([0.01, 0.01], rel=1e-3)
    assert moves(bounded)[1] > 4e-3
    then_optax()
    assert moves(optax.lamb(0.01)) == collapse


def test_norm_inside_of_shard_map():
    """On each of 4 devices one element of ``w`` and the whole of ``b``."""
    grads, specs = {"w": jnp.arange(1.5, 9, 2), "b": jnp.array([0.5])}, {"w": P("x"), "b": P()}
    clip = lambda grads: update(lionax.clip_by_global_norm(1.0), grads, grads)
    cases.assert_close(probes.on_devices(clip, 4, specs, specs, grads),
                       jax.tree.map(lambda g: g / norm_of(grads), grads))
    with pytest.raises(ValueError, match=r"lionax\.sharded"):
        probes.on_devices(clip, 4, specs, specs, grads, check_vma=False)
    then_optax()
    norms = probes.on_devices(lambda g: optax.tree.norm(g)[None], 4, specs, P("x"), grads)
    np.testing.assert_allclose(norms, [1.58, 3.54, 5.52, 7.52], atol=0.01)


def test_weight_decay_of_bfloat16_parameters():
    """Beside a sign of 1 a decay of 0.002 is below bfloat16's last digit. On average it shows."""
    assert probes.decay_of_twos(lionax.lion, 1e-3) == pytest.approx(2e-3, rel=0.2)
    then_optax()
    assert abs(probes.decay_of_twos(optax.lion, 1e-3)) < 4e-4


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_small_steps_of_bfloat16_parameters(rate):
    ones = jnp.ones(2048, jnp.bfloat16)
    for remainder in (None, "float32"):  # stochastic rounding, and what a parameter rounds off
        params, _ = scanned(lionax.master_weights(lionax.sgd(rate), remainder), ones, ones, 100)
        assert np.mean(wide(params)) == pytest.approx(1 - 100 * rate, abs=2e-3)
    then_optax()
    np.testing.assert_array_equal(scanned(optax.sgd(rate), ones, ones, 100)[0], ones)


@pytest.mark.parametrize(("b2", "of_optax"), [(0.99, 0.063), (0.999, 0.031), (0.9999, 0.0039)])
def test_momentum_in_bfloat16(b2, of_optax):
    def mean(lion):
        tx, grads = lion(0.0, b2=b2, mu_dtype=jnp.bfloat16), jnp.full(512, 0.1)
        _, state = scanned(tx, grads, grads, round(7 / (1 - b2)))
        return np.mean(wide(optax.tree.get(state, "mu")))

    assert mean(lionax.lion) == pytest.approx(0.1, rel=0.02)
    then_optax()
    assert mean(optax.lion) == pytest.approx(of_optax, rel=0.02)


def test_dtype_of_an_update():
    def dtypes(lion):
        return {shapes(lion(rate), HALF, HALF)[0].dtype for rate in (
            0.1, np.float32(0.1), np.float64(0.1), jnp.float32(0.1), lambda step: np.float32(0.1))}

    assert dtypes(lionax.lion) == {BFLOAT16}
    then_optax()
    assert dtypes(optax.lion) == {BFLOAT16, FLOAT32}


def test_dtype_of_a_state():
    """If a step returned other dtypes than `init`, no `scan` could carry the state."""
    for make in (lionax.lion, lionax.lamb, lionax.adamw, lambda rate: lionax.sgd(rate, 0.9)):
        scanned(make(lionax.inject(0.1)), HALF, HALF, 2)
    then_optax()
    integers = jnp.array([1, 2])
    before, after = optax.lion(0.1).init(integers), run(optax.lion(0.1), integers, integers)[1]
    assert (before[0].mu.dtype, after[0].mu.dtype) == (jnp.int32, FLOAT32)
    injected = optax.inject_hyperparams(optax.lion, hyperparam_dtype=jnp.float32)
    with pytest.raises(TypeError, match="carry"):
        scanned(injected(0.1), HALF, HALF, 2)


def test_integer_leaf():
    integers = {"w": jnp.array([1, 2])}
    with pytest.raises(TypeError, match=r"'w'.*dtype int32"):
        lionax.sgd(0.5).init(integers)
    then_optax()
    assert scanned(optax.sgd(0.5), integers, integers, 1)[0]["w"].tolist() == [0, 1]


def test_gradient_of_none():
    grads = {"w": jnp.ones(2), "b": None}
    for tx in (lionax.lion(0.1), lionax.lamb(0.1), lionax.sgd(0.1, 0.9), lionax.ema(0.9)):
        updates, state = shapes(tx, ONES, grads)
        assert (updates["b"], state) == (None, jax.eval_shape(tx.init, ONES))
    then_optax()
    for tx in (optax.lion(0.1), optax.lamb(0.1)):
        with pytest.raises(ValueError, match="pytree structure"):
            shapes(tx, ONES, grads)
    assert shapes(optax.sgd(0.1, 0.9), ONES, grads)[1][0].trace["b"] is None
    assert shapes(optax.ema(0.9), ONES, grads)[1].ema["b"] is None


def test_gradient_of_another_shape():
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.ones((3, 1))}
    with pytest.raises(ValueError, match="'w' has shape"):
        update(lionax.add_decayed_weights(0.1), params, grads)
    then_optax()
    assert update(optax.add_decayed_weights(0.1), params, grads)["w"].shape == (3, 2)


def test_lion_without_parameters():
    tx, ones = lionax.lion(0.1, weight_decay=0.0), jnp.ones(2)
    np.testing.assert_allclose(tx.update(ones, tx.init(ones))[0], -0.1)
    then_optax()
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        (tx := optax.lion(0.1, weight_decay=0.0)).update(ones, tx.init(ones))


def test_callable_mask():
    trees = {"w": jnp.array([5.0])}, {"w": jnp.array([7.0])}
    assert probes.given_to_a_mask(lionax.masked, lionax.scale(1.0), *trees) == {5.0}
    then_optax()
    assert probes.given_to_a_mask(optax.masked, optax.scale(1.0), *trees) == {5.0, 7.0}


def test_leaf_that_is_masked_out():
    """It keeps its raw gradient, as in Optax; `partition` with `set_to_zero` freezes it."""
    assert update(lionax.masked(lionax.lion(0.1), MASK), ONES, ONES)["b"].tolist() == [1.0, 1.0]
    frozen = lionax.partition({True: lionax.lion(0.1), False: lionax.set_to_zero()}, MASK)
    assert update(frozen, ONES, ONES)["b"].tolist() == [0.0, 0.0]
    strings = {"w": "on", "b": "off"}
    with pytest.raises(TypeError, match="at 'b' it has 'off'"):
        lionax.masked(lionax.lion(0.1), strings).init(ONES)
    then_optax()
    assert update(optax.masked(optax.lion(0.1), MASK), ONES, ONES)["b"].tolist() == [1.0, 1.0]
    assert update(optax.masked(optax.lion(0.1), strings), ONES, ONES)["b"][0] < 0  # a step


def test_mask_of_another_container():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, state)
    pairs = (nnx.to_pure_dict(state), mask), (state, nnx.to_pure_dict(mask))
    for params, of_params in pairs:
        ones = jax.tree.map(jnp.ones_like, params)
        updates = update(lionax.masked(lionax.set_to_zero(), of_params), params, ones)
        assert [float(leaf.sum()) for leaf in jax.tree.leaves(updates)] == [3.0, 0.0]
    then_optax()
    for params, of_params in pairs:
        with pytest.raises(ValueError, match="pytree structure"):
            optax.masked(optax.set_to_zero(), of_params).init(params)


def test_callable_pytree():
    Gate, params = probes.Gate, probes.Gate(jnp.ones(2), jnp.ones(2))
    masked = lionax.masked(lionax.set_to_zero(), Gate(True, False))
    split = lionax.partition({"a": lionax.set_to_zero(), "b": lionax.identity()}, Gate("a", "b"))
    for tx in (masked, split):
        updates = update(tx, params, params)
        assert (updates.weight.tolist(), updates.bias.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    then_optax()
    with pytest.raises(AssertionError, match="was called"):
        optax.partition({"a": optax.sgd(1.0)}, Gate("a", "a")).init(params)


def test_dtype_of_a_scheduled_masked_decay():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}

    def dtypes(lion):
        tx = lion(1e-3, weight_decay=cases.SCHEDULE, mask=MASK)
        return {leaf.dtype for leaf in jax.tree.leaves(shapes(tx, params, params)[0])}

    assert dtypes(lionax.lion) == {BFLOAT16}
    then_optax()
    assert dtypes(optax.lion) == {BFLOAT16, FLOAT32}


def test_ema_in_bfloat16():
    average, _ = run(lionax.ema(0.999), HALF, HALF, 3000)
    assert float(average[0]) == pytest.approx(2.0, rel=0.01)
    then_optax()
    assert float(run(optax.ema(0.999), HALF, HALF, 3000)[1].ema[0]) < 1.1


def test_runs_of_an_accumulated_step():
    assert probes.inner_runs(lionax.accumulate, 8) == 1
    then_optax()
    assert probes.inner_runs(optax.MultiSteps, 8) == 8


def test_infinite_gradient_in_a_window():
    values = (1.0, np.inf, 1.0, 1.0)
    params, state = probes.window(lionax.accumulate(lionax.sgd(0.1), 2), values)
    np.testing.assert_allclose(params, 0.9)
    assert int(state.rules.dropped) == 1
    then_optax()
    assert np.isnan(probes.window(optax.MultiSteps(optax.lion(0.1), 2), values)[0]).all()


def test_mean_of_a_window_in_bfloat16():
    """The mean of 1 and 1 + 2**-7 is no number of bfloat16; less 1 it is."""
    assert probes.mean_less_one(lionax.accumulate, 1 + 2**-7) == 2**-8
    then_optax()
    assert probes.mean_less_one(optax.MultiSteps, 1 + 2**-7) == 0


def test_step_that_is_skipped():
    """Bfloat16 gradients of float32 parameters; past the limit; on 8 devices, one of them bad."""
    nan, grads = jnp.array([jnp.nan, 1.0]), jnp.ones(8).at[3].set(jnp.inf)

    def past_the_limit(tx):
        return jnp.isnan(optax.tree.get(run(tx, nan, nan, 3)[1], "mu")).any()

    def on_devices(tx):
        return probes.on_devices(lambda g: update(tx, g, g), 8, P("x"), P("x"), grads)

    update(lionax.skip_nonfinite(lionax.lion(0.1), 2), jnp.ones(4), HALF)
    assert not past_the_limit(lionax.skip_nonfinite(lionax.lion(0.1), 2))
    assert on_devices(lionax.skip_nonfinite(lionax.sgd(1.0), 3)).tolist() == [0.0] * 8
    then_optax()
    with pytest.raises(TypeError, match="cond branches"):
        update(optax.apply_if_finite(optax.lion(0.1), 2), jnp.ones(4), HALF)
    assert past_the_limit(optax.apply_if_finite(optax.lion(0.1), 2))
    assert on_devices(optax.apply_if_finite(optax.sgd(1.0), 3)).tolist() == [-1.0] * 3 + [
        0.0] + [-1.0] * 4


def test_injected_value_with_bfloat16_parameters():
    updates, state = run(lionax.adam(0.1, b2=lionax.inject(0.999)), HALF, HALF)
    assert float(lionax.get_hyperparams(state)["b2"]) == pytest.approx(0.999)
    np.testing.assert_allclose(wide(updates), -0.1, rtol=0.01)
    then_optax()
    updates, state = run(optax.inject_hyperparams(optax.adam)(0.1, b2=0.999), HALF, HALF)
    assert float(state.hyperparams["b2"]) == 1
    assert jnp.isnan(updates).all()


def test_assigned_value():
    """Before and after 0.25 is assigned, to a number and to a schedule."""
    ours = lambda state, rate: lionax.set_hyperparams(state, learning_rate=rate)
    for rate in (0.5, optax.constant_schedule(0.5)):
        assert probes.steps_of_assigned(lionax.sgd(rate), ours, 0.25) == ([0.5, 0.25], 1)
    then_optax()
    theirs = lambda state, rate: state._replace(hyperparams={"learning_rate": rate})
    injected = optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov"))
    for rate, sizes in ((0.5, [0.5, 0.25]), (optax.constant_schedule(0.5), [0.5, 0.5])):
        assert probes.steps_of_assigned(injected(rate), theirs, 0.25) == (sizes, 2)


def test_structure_of_a_monitored_state():
    scanned(lionax.monitor(lionax.lion(0.1)), HALF, HALF, 2)
    then_optax()
    with pytest.raises(TypeError, match="same pytree structure"):
        scanned(optax.monitor({"norm": optax.tree.norm}), HALF, HALF, 2)


def test_init_on_a_mesh():
    params = jax.device_put(jnp.ones((8, 8)), NamedSharding(probes.mesh_of(8), P("x")))
    shardings = lionax.state_sharding(lionax.lion(0.1), params)
    assert probes.compilations(lionax.lion(0.1), params, out_shardings=shardings) == (True, 1)
    then_optax()
    assert probes.compilations(optax.lion(0.1), params) == (False, 2)


def test_equal_definitions():
    tx = lionax.lion(1e-3)
    assert probes.traces(lambda: lionax.lion(1e-3), 3) == 1
    assert tx == lionax.lion(1e-3) == pickle.loads(pickle.dumps(tx))
    assert repr(tx) == "lion(learning_rate=0.001)"
    then_optax()
    assert probes.traces(lambda: optax.lion(1e-3), 3) == 3
    assert "<function" in repr(optax.lion(1e-3))
    with pytest.raises(AttributeError, match="pickle"):
        pickle.dumps(optax.lion(1e-3))


def test_state_of_a_changed_definition():
    def structures(lion):
        changed = lion(0.1), lion(cases.SCHEDULE), lion(0.1, mask=MASK)
        return {jax.tree.structure(tx.init(ONES)) for tx in changed}

    assert len(structures(lionax.lion)) == 1
    then_optax()
    assert len(structures(optax.lion)) == 3


def test_program_of_lamb():
    params = {str(i): jax.ShapeDtypeStruct((4, 4), jnp.float32) for i in range(50)}
    assert probes.lines(lionax.lamb(0.1), params) < 10 * len(params)
    then_optax()
    assert probes.lines(optax.lamb(0.1), params) > 70 * len(params)


def test_dtypes_of_moments():
    mu = lionax.lion(0.1, mu_dtype=jnp.bfloat16).init(HALF).rules[0].mu
    adam = lionax.lamb(0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16).init(HALF).rules[0]
    assert (mu.dtype, adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float16)
    then_optax()
    with pytest.raises(TypeError, match="mu_dtype"):
        optax.lamb(0.1, mu_dtype=jnp.bfloat16)
