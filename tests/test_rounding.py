"""Stochastic rounding, and the random bits by which it rounds."""

import contextlib
import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lionax
from lionax.core import rounding
from lionax.core.rounding import as_uniform, folded, is_low_precision

random_bits = jax.jit(rounding.random_bits)
rounded = jax.jit(rounding.rounded, static_argnums=1)
P = PartitionSpec
DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
OF_EACH_DTYPE = pytest.mark.parametrize("dtype", cases.but_for_slow(
    DTYPES, ["float16", "float8_e5m2"]))
NORMAL = float(jnp.finfo(jnp.float32).tiny)
KEY = np.uint32(7)
MANY = 4096


@functools.cache
def finite_values(dtype):
    """All finite numbers of a dtype, in order, in float64; without -0."""
    bits = 8 * jnp.dtype(dtype).itemsize
    with np.errstate(invalid="ignore"):  # signaling NaNs
        every = np.arange(2**bits).astype(f"uint{bits}").view(jnp.dtype(dtype)).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def neighbours(value, dtype):
    """The largest number of a dtype that is not above a value, and the smallest not below."""
    numbers = finite_values(dtype)
    inside = np.clip(np.float64(value), numbers[0], numbers[-1])
    below = numbers[np.searchsorted(numbers, inside, "right") - 1]
    return below, numbers[np.searchsorted(numbers, inside, "left")]


@functools.partial(jax.jit, static_argnums=1)
def draws(value, dtype):
    """A value, rounded with many random bits."""
    many = jnp.full(MANY, value)
    return rounded(many, jnp.dtype(dtype), random_bits(KEY, many))


def test_floats_of_at_most_16_bits_are_low_precision():
    assert all(map(is_low_precision, DTYPES))
    assert not any(map(is_low_precision, ("float32", "float64", "int8", "int16", "complex64")))


LARGEST = float(jnp.finfo(jnp.float32).max)
values = st.floats(NORMAL, LARGEST, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@OF_EACH_DTYPE
@given(value=values | st.floats(-1000, 1000, width=32, allow_subnormal=False))
def test_a_value_becomes_one_of_its_neighbours_and_is_their_mean(dtype, value):
    got = np.asarray(draws(np.float32(value), dtype), np.float64)
    below, above = neighbours(value, dtype)
    assert np.isin(got, (below, above)).all()
    inside = np.clip(value, *finite_values(dtype)[[0, -1]])
    # The share of draws that go up is binomial; a probability is a multiple of 2**-24.
    error = 6 * (above - below) * (0.5 / math.sqrt(MANY))
    assert abs(got.mean() - inside) <= error


@OF_EACH_DTYPE
def test_the_probability_is_the_distance_over_all_of_16_random_bits(dtype):
    """With each pattern of the upper 16 bits once, the mean is exact to 2**-16 of an ulp."""
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16
    for value in (1.1, -1.1, 3.14159, 0.007, -200.3):
        many = jnp.full(bits.shape, value, jnp.float32)
        got = np.asarray(rounded(many, jnp.dtype(dtype), bits), np.float64)
        below, above = neighbours(np.float32(value), dtype)
        assert abs(got.mean() - np.float64(np.float32(value))) <= 2.0**-15 * (above - below)


@OF_EACH_DTYPE
@pytest.mark.parametrize("bits", cases.but_for_fast([0, 2**31, 2**32 - 1], 2**32 - 1))
def test_numbers_of_the_dtype_stay_bit_for_bit(dtype, bits):
    size = 8 * jnp.dtype(dtype).itemsize
    every = jnp.asarray(np.arange(2**size).astype(f"uint{size}").view(jnp.dtype(dtype)))
    wide = every.astype(jnp.float32)
    got = np.asarray(rounded(wide, every.dtype, jnp.full(every.shape, bits, jnp.uint32)))
    is_nan = np.isnan(np.asarray(wide))
    whole = f"uint{size}"
    np.testing.assert_array_equal(got.view(whole)[~is_nan],
                                  np.asarray(every).view(whole)[~is_nan])
    assert np.isnan(got.astype(np.float32)[is_nan]).all()


@OF_EACH_DTYPE
@pytest.mark.parametrize("bits", cases.but_for_fast([0, 2**31, 2**32 - 1], 2**32 - 1))
def test_infinite_numbers_stay_and_finite_ones_stay_finite(dtype, bits):
    largest = float(jnp.finfo(dtype).max)
    values = np.float32([3.4028235e38, largest, np.nextafter(np.float32(largest), np.inf), np.inf])
    both = jnp.asarray(np.concatenate([values, -values, [np.nan]]))
    got = np.asarray(rounded(both, jnp.dtype(dtype), jnp.full(9, bits, jnp.uint32)), np.float32)
    np.testing.assert_array_equal(got[:3], largest)
    np.testing.assert_array_equal(got[4:7], -largest)
    assert np.isnan(got[8])
    # float8_e4m3fn has no infinite number; its cast gives NaN, as JAX's does.
    np.testing.assert_array_equal(got[[3, 7]], np.asarray(both[jnp.array([3, 7])].astype(
        dtype).astype(jnp.float32)))


@OF_EACH_DTYPE
def test_zero_stays_and_no_sign_changes(dtype):
    values = jnp.asarray([0.0, -0.0, 1e-7, -1e-7, 2e-30, -2e-30, 0.3, -0.3], jnp.float32)
    for bits in (0, 2**20, 2**31, 2**32 - 1):
        got = np.asarray(rounded(values, jnp.dtype(dtype), jnp.full(8, bits, jnp.uint32)),
                         np.float32)
        assert np.signbit(got[:2]).tolist() == [False, True]
        assert (got[:2] == 0).all()
        assert (got * np.asarray(values) >= 0).all()


def test_subnormal_float32_numbers_become_neighbours_in_bfloat16_and_may_become_0_elsewhere():
    """XLA takes them for 0 in arithmetic; bfloat16, which has them, too, needs none."""
    values = np.float32([1e-39, -1e-39, 3e-45, 1.1e-38])
    bits = random_bits(KEY, jnp.zeros((64, 4)))
    for dtype in DTYPES:
        got = np.asarray(rounded(jnp.broadcast_to(values, (64, 4)), jnp.dtype(dtype), bits))
        for value, column in zip(values, got.T.astype(np.float64), strict=True):
            allowed = neighbours(value, dtype) if dtype == "bfloat16" else (
                0, *neighbours(value, dtype))
            assert np.isin(column, allowed).all(), (dtype, value)


def uniform(key, shape):
    return np.asarray(as_uniform(random_bits(np.uint32(key), jnp.zeros(shape))), np.float64)


def correlation(a, b):
    """In standard errors: a normal number, if there is none."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return np.corrcoef(a, b)[0, 1] * math.sqrt(a.size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("key", [0, 1, 2**31, 12345])
def test_the_upper_bits_are_uniform(bits, key):
    shape = (256, 512)
    found = np.asarray(random_bits(np.uint32(key), jnp.zeros(shape))) >> (32 - bits)
    counts = np.bincount(found.ravel(), minlength=2**bits)
    expected = found.size / 2**bits
    freedom = 2**bits - 1
    chi_square = ((counts - expected)**2 / expected).sum()
    assert abs(chi_square - freedom) <= 5 * math.sqrt(2 * freedom)


def test_uniform_numbers_are_in_the_half_open_interval():
    ends = as_uniform(jnp.asarray([0, 2**32 - 1], jnp.uint32))
    assert ends.tolist() == [0.0, 1 - 2.0**-24]


@pytest.mark.parametrize("shape", [(256, 256), (33, 1001), (16, 16, 256), (65536,)])
def test_neighbours_along_each_axis_do_not_correlate(shape):
    for key in range(4):
        u = uniform(key, shape)
        for axis in range(len(shape)):
            for distance in (1, 2, 8):
                first, second = (np.moveaxis(u, axis, 0)[cut] for cut in (
                    slice(None, -distance), slice(distance, None)))
                assert abs(correlation(first, second)) < 5


@pytest.mark.slow
def test_keys_folded_with_neighbouring_numbers_do_not_correlate():
    for key in (0, 1, 2**32 - 1):
        of_number = [uniform(folded(jnp.uint32(key), number), (64, 512)) for number in range(6)]
        for i, first in enumerate(of_number):
            for second in of_number[:i]:
                assert abs(correlation(first, second)) < 5
                assert (first != second).mean() > 0.99
            # nor as the same numbers at other places
            assert not np.isin(first[0], of_number[i - 1][:, 0]).any()


def test_keys_are_permuted_by_a_number():
    keys = jnp.arange(2**16, dtype=jnp.uint32)
    assert len(np.unique(np.asarray(folded(keys, 3)))) == 2**16


def test_elements_that_are_2_to_the_32_apart_have_other_bits():
    def some(key):
        bits = random_bits(key, jnp.zeros((2**16 + 3, 2**16)))  # 17 GB, which XLA does not make
        return jax.lax.slice(bits, (0, 0), (3, 64)), jax.lax.slice(bits, (2**16, 0), bits.shape)[
            :, :64]

    compiled = jax.jit(some).lower(KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    near, far = map(np.asarray, compiled(KEY))
    assert (near != far).mean() > 0.99
    assert abs(correlation(near, far)) < 5


@functools.cache
def rounding_errors(leaves=3, steps=4, **storage):
    """Whether elements of Lion's momenta in bfloat16 were rounded up: [step][leaf]."""
    tx = lionax.lion(0.0, b2=0.5, mu_dtype=lionax.Storage("bfloat16", **storage))
    # The exact momentum of each step is in the middle of two numbers.
    params = [jnp.zeros((64, 128))] * leaves
    found, step = [], jax.jit(tx.step)
    state = tx.init(params)
    for _ in range(steps):
        old = [np.asarray(mu, np.float64) for mu in jax.tree.leaves(state.rules[0].mu)]
        grads = [jnp.asarray(2 * (1 + 2.0**-7 * 0.5) - mu, jnp.float32) for mu in old]
        _, state = step(params, state, grads)
        found.append([np.asarray(mu, np.float64) > 1 for mu in jax.tree.leaves(
            state.rules[0].mu)])
    return found


def test_rounding_errors_of_leaves_and_steps_do_not_correlate():
    found = rounding_errors()
    every = [leaf for step in found for leaf in step]
    for i, first in enumerate(every):
        assert abs(first.mean() - 0.5) < 5 * 0.5 / math.sqrt(first.size)
        for second in every[:i]:
            assert abs(correlation(first, second)) < 5


def test_other_seeds_round_otherwise_and_the_same_seed_alike():
    first, second = rounding_errors(1, 1), rounding_errors(1, 1, seed=1)
    assert abs(correlation(first[0][0], second[0][0])) < 5
    again = rounding_errors.__wrapped__(1, 1)
    np.testing.assert_array_equal(again[0][0], first[0][0])


def test_rounding_errors_of_slots_of_one_rule_do_not_correlate():
    tx = lionax.scale_by_adam(0.5, 0.75, mu_dtype="bfloat16", nu_dtype="bfloat16")
    param = jnp.zeros((64, 256))
    _, state = tx.update(jnp.full(param.shape, 2 * (1 + 2.0**-8)), tx.init(param))
    mu, nu = (np.asarray(x, np.float64) for x in state.rules[:2])
    assert len(np.unique(mu)) == len(np.unique(nu)) == 2
    assert abs(correlation(mu, nu)) < 5


def test_rounding_errors_of_the_members_of_a_partition_do_not_correlate():
    lion = functools.partial(lionax.lion, 0.0, b2=0.5, mu_dtype="bfloat16")
    tx = lionax.partition({"a": lion(), "b": lion(b1=0.5)}, {"x": "a", "y": "b"})
    params = {"x": jnp.zeros((64, 256)), "y": jnp.zeros((64, 256))}
    half_way = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2 * (1 + 2.0**-8)), params)
    _, state = tx.update(half_way, tx.init(params), params)
    first, second = [np.asarray(x, np.float64) for x in jax.tree.leaves(
        state.rules) if x.dtype == jnp.bfloat16]
    assert len(np.unique(first)) == len(np.unique(second)) == 2
    assert abs(correlation(first, second)) < 5


def meshes(axis_type):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)


AXIS_TYPES = pytest.mark.parametrize("axis_type", cases.but_for_fast(
    [AxisType.Auto, AxisType.Explicit], AxisType.Explicit))
SHARDINGS = [P("x", "y"), P(None, ("x", "y")), P(("y", "x"))]


@AXIS_TYPES
def test_random_bits_are_the_same_on_each_mesh(axis_type):
    like = jnp.zeros((16, 24))
    expected = np.asarray(rounding.random_bits(KEY, like))
    mesh = meshes(axis_type)
    with jax.set_mesh(mesh):
        for spec in SHARDINGS:
            placed = jax.device_put(like, NamedSharding(mesh, spec))
            got = random_bits(KEY, placed)
            np.testing.assert_array_equal(got, expected)
            if axis_type is AxisType.Explicit:
                assert got.sharding.is_equivalent_to(placed.sharding, 2)


@AXIS_TYPES
def test_a_run_rounds_alike_on_each_mesh(axis_type):
    tx = lionax.lion(0.01, mu_dtype="bfloat16")
    step = jax.jit(tx.step)

    def run(params, grads):
        carry = params, tx.init(params)
        for _ in range(3):
            carry = step(*carry, grads)
        return jax.device_get(carry)

    expected = run(cases.normal(16, 24), cases.normal(16, 24, seed=1))
    mesh = meshes(axis_type)
    with jax.set_mesh(mesh):
        for spec in SHARDINGS[:2]:
            placed = jax.device_put((cases.normal(16, 24), cases.normal(16, 24, seed=1)),
                                    NamedSharding(mesh, spec))
            params, state = run(*placed)
            cases.assert_equal(state, expected[1])
            cases.assert_close(params, expected[0])  # XLA may fuse its float32 sums otherwise


def in_shards(function, spec, out_spec):
    return jax.jit(jax.shard_map(function, mesh=meshes(AxisType.Auto), in_specs=spec,
                                 out_specs=out_spec))


def test_shards_have_other_bits_and_replicas_the_same():
    def bits(like):
        return random_bits(KEY, like)[None]

    everywhere = in_shards(bits, P("x"), P("x"))(jnp.zeros((16, 32)))
    assert everywhere.shape == (2, 8, 32)
    assert (np.asarray(everywhere[0]) != np.asarray(everywhere[1])).mean() > 0.99
    each = in_shards(bits, P("x", "y"), P(("x", "y")))(jnp.zeros((16, 128)))
    each = np.asarray(each).reshape(8, -1)
    assert len(np.unique(each, axis=0)) == 8
    assert max(abs(correlation(each[i], each[j])) for i in range(8) for j in range(i)) < 5


def test_replicas_stay_equal_bit_for_bit_inside_of_shard_map():
    tx = lionax.lion(0.001, mu_dtype="bfloat16")

    def run(params, grads):
        def one(carry, _):
            return tx.step(*carry, jax.lax.pmean(grads * (1 + carry[0]), ("x", "y"))), None

        (params, state), _ = jax.lax.scan(one, (params, tx.init(params)), None, length=100)
        replicas = jax.lax.pcast((params, state.rules[0].mu), ("x", "y"), to="varying")
        return jax.tree.map(lambda leaf: leaf[None], replicas)

    found = in_shards(run, (P(), P(("x", "y"))), P(("x", "y")))(
        cases.normal(16, 32), cases.normal(128, 32, seed=1))
    for leaf in map(np.asarray, found):
        assert leaf.shape == (8, 16, 32)
        assert (leaf == leaf[:1]).all()


@pytest.mark.parametrize(("rounding", "error"), [
    ("nearest", contextlib.nullcontext()),
    ("stochastic", pytest.raises(ValueError, match="say it with lionax"))])
def test_without_the_check_of_what_varies_it_is_refused(rounding, error):
    tx = lionax.scale_by_lion(mu_dtype=lionax.Storage("bfloat16", rounding=rounding))
    state = tx.init(jnp.zeros((16, 32)))
    specs = jax.tree.map(lambda leaf: P("x") if leaf.ndim else P(), state)
    update = jax.shard_map(tx.update, mesh=meshes(AxisType.Auto), in_specs=(P("x"), specs),
                           out_specs=(P("x"), specs), check_vma=False)
    with error:
        update(jnp.ones((16, 32)), state)


def test_members_of_a_vmap_share_their_bits():
    many = jnp.zeros((3, 8, 16))
    np.testing.assert_array_equal(jax.vmap(functools.partial(random_bits, KEY))(many),
                                  jnp.broadcast_to(random_bits(KEY, many[0]), many.shape))
    tx = lionax.lion(0.1, mu_dtype="bfloat16")
    states = jax.vmap(tx.init)(many)
    _, states = jax.jit(jax.vmap(tx.step))(many, states, jnp.broadcast_to(
        cases.normal(8, 16), many.shape))
    mu = np.asarray(states.rules[0].mu)
    assert (mu == mu[:1]).all()


@pytest.mark.parametrize("dtype", cases.but_for_fast(DTYPES, "bfloat16"))
def test_a_compiled_call_rounds_as_an_eager_one(dtype):
    values = cases.normal(64, 128) * 100

    eager = rounding.rounded(values, jnp.dtype(dtype), rounding.random_bits(KEY, values))
    compiled = rounded(values, jnp.dtype(dtype), random_bits(KEY, values))
    np.testing.assert_array_equal(compiled, eager)


@pytest.mark.slow
def test_a_compiled_step_rounds_as_an_eager_one():
    params, grads = cases.normal(64, 128), cases.normal(64, 128, seed=1)
    tx = lionax.lion(0.1, mu_dtype="bfloat16")
    state = tx.init(params)
    cases.assert_equal(jax.jit(tx.step)(params, state, grads)[1], tx.step(params, state, grads)[1])
