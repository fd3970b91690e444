"""The one sum: exact, safe from overflow, and the same on a mesh."""

import functools

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lionax
from lionax.core.norms import by_axes, in_three_sums, in_two_branches, joint_norm, norm_of_each


def norm(*arrays):
    return float(jax.jit(lambda *xs: joint_norm(xs))(*map(jnp.asarray, arrays)))


EXTREME = {
    "ones": [1.0] * 7,
    "zeros": [0.0] * 3,
    "large": [1e25, 1.0],
    "largest": [3e38, 3e38],
    "small": [1e-30, 2e-30],
    "subnormal": [1e-40],
    "both": [1e25, 1e-25],
    "edges": [2.0**50, 2.0**-30],
    "large_and_plain": [1e18, 1e17],
    "single": [-3.0],
}


compiled = functools.cache(jax.jit)


@pytest.mark.parametrize("form", [
    pytest.param(in_two_branches, marks=pytest.mark.slow), in_three_sums,
    lambda groups: (joint_norm(groups[0][()]),)], ids=["branches", "sums", "public"])
@pytest.mark.parametrize("name", EXTREME)
def test_every_magnitude(name, form):
    """Both forms, the CPU's and the other platforms', on this platform."""
    exact = np.linalg.norm(np.array(EXTREME[name]))
    finite = min(exact, float(np.finfo(np.float32).max))
    x = np.zeros(8, np.float32)  # each layout is compiled once for all magnitudes
    x[-len(EXTREME[name]):] = EXTREME[name]
    zeros = np.zeros(1 << 15, np.float32)
    for arrays in ((x,), (x[:7], x[7:]), (np.append(zeros, x),), (x, zeros),
                   (np.append(zeros, x[:7]), x[7:])):
        (one,) = compiled(form)((by_axes(map(jnp.asarray, arrays)),))
        # XLA on the CPU flushes subnormal numbers to zero.
        assert float(one) == pytest.approx(finite, rel=1e-6, abs=1.2e-38)


@pytest.mark.slow
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([3, 5000, 1 << 14]), st.integers(-36, 36)), min_size=1,
             max_size=3))
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_mixture_of_sizes_and_magnitudes(parts):
    """What is summed in float64, and what is tried in float32 first, come to one norm."""
    arrays = [cases.normal(size, seed=i) * np.float32(10.0)**power
              for i, (size, power) in enumerate(parts)]
    exact = [np.asarray(array, np.float64) for array in arrays]
    assert norm(*arrays) == pytest.approx(np.linalg.norm(np.concatenate(exact)), rel=1e-6)
    np.testing.assert_allclose(
        jax.jit(norm_of_each)(arrays), [np.linalg.norm(array) for array in exact], rtol=1e-6)


@pytest.mark.parametrize("form", [in_two_branches, in_three_sums])
def test_groups_of_any_lengths(form):
    large, small = jnp.ones(1 << 14), jnp.full(3, 2.0)
    groups = (((small, small), (large,)), ((small, large), ()), ((large,), (small,)),
              ((), (small,)), ())
    norms = [list(map(float, form(tuple(map(by_axes, each))))) for each in groups]
    np.testing.assert_allclose(norms[0], [np.sqrt(24), 128], rtol=1e-6)
    np.testing.assert_allclose(norms[1], [np.sqrt(12 + 2**14), 0], rtol=1e-6)
    np.testing.assert_allclose(norms[2], [128, np.sqrt(12)], rtol=1e-6)
    np.testing.assert_allclose(norms[3], [0, np.sqrt(12)], rtol=1e-6)
    assert norms[4] == []


def test_no_arrays_and_empty_arrays():
    assert float(joint_norm([])) == 0.0
    assert norm(jnp.zeros((0, 3))) == 0.0
    assert norm(jnp.zeros((0, 3)), jnp.array([3.0, 4.0])) == 5.0


def test_infinities_and_nan_are_not_hidden():
    assert norm([np.inf, 1.0]) == np.inf
    assert np.isnan(norm([np.nan, 1.0]))
    assert np.isnan(norm([1.0, 2.0], [np.nan]))
    assert norm(jnp.ones(1 << 17).at[7].set(-np.inf)) == np.inf
    assert np.isnan(norm(jnp.ones(1 << 17).at[7].set(np.nan)))


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=1000))
        assert norm(x) == pytest.approx(np.linalg.norm(x), rel=1e-14)
        assert norm(x * 1e200) == pytest.approx(np.linalg.norm(x) * 1e200, rel=1e-14)


@pytest.mark.parametrize("x", [[3.0, 4.0], [3e25, 4e25], [3e-25, 4e-25]])
def test_derivative(x):
    x = jnp.array(x)
    slope = jax.grad(lambda x: joint_norm([x]))(x)
    np.testing.assert_allclose(slope, [0.6, 0.8], rtol=1e-6)
    assert jax.jvp(lambda x: joint_norm([x]), (x,),
                   (x,))[1] == pytest.approx(float(joint_norm([x])), rel=1e-6)


@pytest.mark.parametrize("name", EXTREME)
def test_each_by_itself_at_every_magnitude(name):
    x = jnp.array(EXTREME[name], jnp.float32)
    for each in (norm_of_each, jax.jit(norm_of_each)):
        for norm_of_one, array in zip(each((x, x[::-1] * 0.5)), (x, x[::-1] * 0.5), strict=True):
            assert float(norm_of_one) == pytest.approx(norm(array), rel=1e-6, abs=1.2e-38)


@pytest.mark.parametrize("shapes", [((), ()), ((0,), (0,)),
                                    ((33,), (33,)), ((63, 65), (63, 65)), ((64, 64), (64, 64)),
                                    ((3,), (4,)), ((3, 4), (4, 3)), ((5,), (5,), (5,)),
                                    ((300, 300), (300, 300))])
def test_each_by_itself(shapes):
    """Alike and small arrays share a loop on the CPU; that is not to be seen."""
    arrays = [jnp.asarray(cases.normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    exact = [np.linalg.norm(np.asarray(x, np.float64)) for x in arrays]
    np.testing.assert_allclose(jax.jit(norm_of_each)(arrays), exact, rtol=2e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            jax.jit(norm_of_each)([x.astype(jnp.float64) for x in arrays]), exact, rtol=1e-14)


def test_each_by_itself_does_not_spread_nan():
    nan, two = jax.jit(norm_of_each)((jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 2.0])))
    assert np.isnan(nan)
    assert two == 2.0


def test_derivative_and_vmap_of_each_by_itself():
    x, y = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    rows = jax.jacobian(lambda x, y: jnp.stack(norm_of_each((x, y))), (0, 1))(x, y)
    np.testing.assert_allclose(rows, [[[0.6, 0.8], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]],
                               rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(lambda x: jnp.stack(norm_of_each((x, y))))(jnp.stack([x, y])),
        [[5.0, 2.0], [2.0, 2.0]], rtol=1e-6)


@pytest.mark.slow
def test_derivatives_at_zero_are_finite():
    first = jax.grad(lambda x: joint_norm([x]))
    np.testing.assert_array_equal(first(jnp.zeros(3)), 0.0)
    assert np.all(np.isfinite(jax.jacobian(first)(jnp.zeros(3))))


def test_second_derivative():
    x = jnp.array([3.0, 4.0])
    exact = (np.eye(2) - np.outer([0.6, 0.8], [0.6, 0.8])) / 5.0
    hessian = jax.jacobian(jax.grad(lambda x: joint_norm([x])))(x)
    np.testing.assert_allclose(hessian, exact, atol=1e-6)


@pytest.mark.parametrize("make", [lionax.clip_by_norm, lionax.clip_by_global_norm])
def test_the_derivative_of_a_clip_is_one_below_the_limit(make):
    tx = make(1.0)
    for g in (jnp.zeros(2), jnp.array([0.1, 0.2])):
        slope = jax.jacobian(lambda g: tx.update(g, tx.init(g))[0])(g)
        np.testing.assert_allclose(slope, np.eye(2), atol=1e-6)


def test_vmap():
    rows = jnp.array([[3.0, 4.0], [3e25, 4e25], [0.0, 0.0]])
    np.testing.assert_allclose(
        jax.vmap(lambda row: joint_norm([row]))(rows), [5.0, 5e25, 0.0], rtol=1e-6)


# On a mesh.


AUTO = jax.sharding.AxisType.Auto
PARAMS = {
    "rows": cases.normal(16, 4), "columns": cases.normal(4, 8, seed=1),
    "whole": cases.normal(3, seed=2)
}
SPECS = {"rows": P("x", "y"), "columns": P(None, "y"), "whole": P()}


def state_specs(state):
    """A slot is laid out like its parameter, whose name ends its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: SPECS.get(getattr(path[-1], "key", None), P()), state)


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AUTO, AUTO))


def make():
    return lionax.chain(lionax.clip_by_global_norm(1.0), lionax.clip_by_norm(0.5),
                        lionax.lamb(0.1, weight_decay=0.1))


def reference(steps=3):
    tx = make()
    carry = PARAMS, tx.init(PARAMS)
    step = jax.jit(tx.step)
    for t in range(steps):
        carry = step(*carry, cases.gradients(PARAMS, t))
    return carry


@pytest.mark.slow
def test_shard_map_gives_the_global_norms():
    tx = make()
    state = tx.init(PARAMS)
    specs = state_specs(state)
    step = jax.jit(
        jax.shard_map(tx.step, mesh=mesh(), in_specs=(SPECS, specs, SPECS),
                      out_specs=(SPECS, specs)))
    carry = PARAMS, state
    for t in range(3):
        carry = step(*carry, cases.gradients(PARAMS, t))
    cases.assert_close(carry, reference(), rtol=1e-6)


def test_shard_map_counts_a_replicated_leaf_once():
    def norms(tree):
        of = lambda *names: joint_norm([tree[name] for name in names])
        return of(*tree), of("whole"), of("rows")

    together, whole, rows = jax.shard_map(norms, mesh=mesh(), in_specs=(SPECS,),
                                          out_specs=P())(PARAMS)
    assert float(whole) == pytest.approx(np.linalg.norm(PARAMS["whole"]), rel=1e-6)
    assert float(rows) == pytest.approx(np.linalg.norm(PARAMS["rows"]), rel=1e-6)
    assert float(together) == pytest.approx(
        np.sqrt(sum(float(jnp.sum(p * p)) for p in PARAMS.values())), rel=1e-6)


def test_shard_map_is_safe_from_overflow_on_one_shard():
    x = jnp.ones(8).at[5].set(1e25)
    total = jax.shard_map(lambda x: joint_norm([x]), mesh=mesh(), in_specs=P("x"), out_specs=P())(x)
    assert float(total) == pytest.approx(1e25, rel=1e-6)


@pytest.mark.slow
def test_jit_on_a_mesh_gives_the_same_update():
    tx = make()
    place = lambda tree, specs: jax.tree.map(lambda leaf, spec: jax.device_put(
        leaf, NamedSharding(mesh(), spec)), tree, specs)
    state = tx.init(PARAMS)
    carry = place(PARAMS, SPECS), place(state, state_specs(state))
    step = jax.jit(tx.step)
    for t in range(3):
        carry = step(*carry, place(cases.gradients(PARAMS, t), SPECS))
    cases.assert_close(carry, reference(), rtol=1e-6)
    assert carry[0]["rows"].sharding.spec == P("x", "y")


def test_clipping_to_zero_and_derivatives_through_a_ratio_of_zeros():
    for tx in (lionax.clip_by_global_norm(0.0), lionax.clip_by_norm(0.0)):
        for g in (jnp.zeros(2), jnp.ones(2)):
            assert tx.update(g, tx.init(g))[0].tolist() == [0.0, 0.0]
    tx = lionax.scale_by_trust_ratio()
    slope = jax.grad(lambda g: tx.update(g, tx.init(g), jnp.zeros(2))[0].sum())(jnp.zeros(2))
    assert slope.tolist() == [1.0, 1.0]
