"""What `monitor` measures of slots of low precision, against the states before and after a step."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lionax

NEAREST = lionax.Storage("bfloat16", rounding="nearest")
PARAMS = {"bias": cases.normal(64), "kernel": cases.normal(64, 128)}
GRADS = [{"bias": cases.normal(64, seed=t), "kernel": jnp.where(
    jnp.abs(noise := cases.normal(64, 128, seed=t)) < 0.5, 0.0, noise)} for t in range(1, 7)]
STORAGES = ("bfloat16", "float16", "int8", "int4", NEAREST)


def decoded(slot):
    return np.asarray(slot.decode() if isinstance(slot, lionax.QuantizedArray) else
                      slot.astype(jnp.float32))


def is_low(slot):
    return isinstance(slot, lionax.QuantizedArray) or slot.dtype.itemsize <= 2


@jax.jit
def averaged(old, new, decay):
    return (1.0 - decay) * new + decay * old


def stalled(before, after, exact):
    """The share of elements of low-precision slots that are the same, but would not be exactly."""
    pairs = [(decoded(old), decoded(new), np.asarray(value)) for old, new, value in zip(
        before, after, exact, strict=True) if is_low(old)]
    return (sum(np.sum((new == old) & (value != old)) for old, new, value in pairs)
            / sum(old.size for old, _, _ in pairs))


def slots(state, name="mu"):
    """The slots of `PARAMS` with this name."""
    found = optax.tree.get(state, name)
    return [found[key] for key in PARAMS]


def steps(tx, number, jitted=True, params=PARAMS):
    """For each step, the states before and after it."""
    step, state, found = jax.jit(tx.step) if jitted else tx.step, tx.init(params), []
    for grads in GRADS[:number]:
        before, (params, state) = state, step(params, state, grads)
        found.append((before, state))
    return found


def metric(state, name="stalled"):
    return float(lionax.metrics(state)[name])


# A sum that is fused otherwise may differ in its last bit, and then also its rounding.
close = functools.partial(pytest.approx, rel=0, abs=4 / PARAMS["kernel"].size)


@pytest.mark.parametrize("jitted", cases.but_for_fast([True, False], True))
@pytest.mark.parametrize("storage", cases.but_for_fast(STORAGES, "bfloat16"))
def test_the_stalled_share_is_that_of_the_states(storage, jitted):
    tx = lionax.monitor(lionax.lion(0.1, b2=0.995, mu_dtype=storage))
    every = []
    for grads, (before, after) in zip(GRADS, steps(tx, 4, jitted), strict=False):
        exact = [averaged(decoded(mu), grads[key], 0.995)
                 for key, mu in zip(PARAMS, slots(before), strict=True)]
        every.append(metric(after))
        assert every[-1] == close(stalled(slots(before), slots(after), exact))
    # Where momentum and gradient are 0 nothing stalls: a third of the elements in the first step.
    assert every[0] < 0.2 < 0.3 < np.mean(np.asarray(GRADS[0]["kernel"]) == 0)
    assert every[-1] > 0


@pytest.mark.parametrize("storage", cases.but_for_fast(STORAGES, "int4"))
def test_the_sign_disagreement_is_that_of_the_new_momentum_stored_and_exact(storage):
    tx = lionax.monitor(lionax.lion(0.1, b1=0.9, b2=0.99, mu_dtype=storage))
    every = []
    for grads, (before, after) in zip(GRADS, steps(tx, 4), strict=False):
        number = size = 0
        for key, old, new in zip(PARAMS, slots(before), slots(after), strict=True):
            exact = averaged(decoded(old), grads[key], 0.99)
            signs = [np.sign(averaged(mu, grads[key], 0.9)) for mu in (decoded(new), exact)]
            number, size = number + np.sum(signs[0] != signs[1]), size + is_low(old) * old.size
        every.append(metric(after, "sign_disagreement"))
        assert every[-1] == close(number / size)
    assert storage != "int4" or every[-1] > 0.001


@pytest.mark.slow
def test_momentum_and_second_moment_count_together_where_they_have_low_precision():
    tx = lionax.monitor(lionax.adam(0.1, b2=0.999, mu_dtype={"kernel": "bfloat16"},
                                    nu_dtype="bfloat16"))
    for grads, (before, after) in zip(GRADS, steps(tx, 3), strict=False):
        old, new = ([*slots(state, "mu"), *slots(state, "nu")] for state in (before, after))
        targets = [*grads.values(), *map(jnp.square, grads.values())]
        exact = [averaged(decoded(slot), target, decay) for slot, target, decay in zip(
            old, targets, (0.9, 0.9, 0.999, 0.999), strict=True)]
        assert metric(after) == close(stalled(old, new, exact))
    assert 0 < metric(after) < 1
    assert "sign_disagreement" not in lionax.metrics(after)


def test_they_are_measured_where_slots_have_low_precision_only():
    def measured(tx, params=PARAMS):
        return {"stalled", "sign_disagreement"} & set(lionax.metrics(lionax.monitor(tx).init(
            params)))

    both = {"stalled", "sign_disagreement"}
    assert measured(lionax.lion(0.1)) == measured(lionax.lion(0.1, mu_dtype="float32")) == set()
    assert measured(lionax.sgd(0.1)) == measured(lionax.identity()) == set()
    assert measured(lionax.lion(0.1, mu_dtype={"bias": "bfloat16"})) == both
    assert measured(lionax.sgd(0.1, 0.9, accumulator_dtype="int8")) == {"stalled"}
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert measured(lionax.lion(0.1), halves) == both
    assert measured(lionax.partition({"a": lionax.lion(0.1), "b": lionax.adam(
        0.1, nu_dtype="bfloat16")}, {"kernel": "a", "bias": "b"})) == {"stalled"}


@pytest.mark.slow
def test_rounded_to_the_nearest_an_average_stalls_and_rounded_stochastically_it_moves():
    def last(storage):
        tx = lionax.monitor(lionax.scale_by_lion(b2=0.999, mu_dtype=storage))
        grads = jnp.full(4096, 0.1)
        return metric(jax.jit(lambda: jax.lax.fori_loop(
            0, 400, lambda _, state: tx.update(grads, state)[1], tx.init(grads)))())

    assert last(NEAREST) == 1.0
    assert 0.5 < last("bfloat16") < 0.95


@pytest.mark.parametrize("every", cases.but_for_fast([1, 3], 1))
@pytest.mark.parametrize("make", [
    functools.partial(lionax.lion, 0.1, mu_dtype="bfloat16"),
    pytest.param(functools.partial(lionax.lion, 0.1, mu_dtype="int4"), marks=pytest.mark.slow),
    pytest.param(functools.partial(lionax.adam, 0.1, mu_dtype="int8", nu_dtype="int8"),
                 marks=pytest.mark.slow),
    pytest.param(functools.partial(lionax.lamb, 0.1, mu_dtype="float16", nu_dtype="float16"),
                 marks=pytest.mark.slow)])
def test_a_monitored_step_stores_the_same(make, every):
    _, plain = steps(make(), 4)[-1]
    _, watched = steps(lionax.monitor(make(), every=every), 4)[-1]
    cases.assert_equal(slots(watched), slots(plain))


@pytest.mark.slow
def test_groups_and_rare_measurements():
    make = functools.partial(lionax.lion, 0.1, b2=0.995, mu_dtype={"kernel": "int8"})
    groups = {"kernel": "large", "bias": "small"}
    often = steps(lionax.monitor(make(), groups), 5)
    rare = steps(lionax.monitor(make(), groups, every=3), 5)
    for name in ("stalled", "sign_disagreement"):
        found = lionax.metrics(often[2][1])
        assert float(found[f"large/{name}"]) == float(found[name])  # no other slot counts
        assert float(found[f"small/{name}"]) == 0.0
        assert metric(rare[2][1], name) == metric(rare[4][1], name) == close(
            metric(often[2][1], name))
    assert metric(often[2][1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [
    lambda tx: lionax.accumulate(tx, 2),
    pytest.param(lambda tx: lionax.dynamic_loss_scale(lionax.accumulate(tx, 2), 1.0),
                 marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.chain(lionax.clip(9.0), lionax.skip_nonfinite(tx, 3)),
                 marks=pytest.mark.slow)])
def test_inside_of_conditionals(wrap):
    tx = lionax.monitor(wrap(lionax.lion(0.1, mu_dtype="bfloat16")))
    found = steps(tx, 4)
    first, last = found[0][1], found[3][1]
    before, after = ([mu.astype(jnp.float32) for mu in slots(state)] for state in (
        found[3][0], last))
    same = sum(np.sum(np.asarray(a == b)) for a, b in zip(before, after, strict=True))
    is_due = not any(np.array_equal(a, b) for a, b in zip(slots(first), slots(tx.init(PARAMS)),
                                                          strict=True))
    assert is_due != np.isnan(metric(first))
    unmoved = np.sum([np.sum((np.asarray(a) == 0) & (np.asarray(b) == 0)) for a, b in zip(
        before, after, strict=True)])
    assert metric(last) == close((same - unmoved) / sum(a.size for a in before))


@pytest.mark.slow
def test_in_a_scan_and_under_vmap():
    tx = lionax.monitor(lionax.lion(0.1, mu_dtype="bfloat16"))
    grads = jax.tree.map(lambda *each: jnp.stack(each), *GRADS[:4])

    def body(carry, grads):
        carry = tx.step(*carry, grads)
        return carry, lionax.metrics(carry[1])["stalled"]

    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), grads)[1]

    expected = [metric(after) for _, after in steps(tx, 4)]
    assert jax.jit(run)(PARAMS).tolist() == close(expected)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    assert jax.jit(jax.vmap(run))(many)[1].tolist() == close(expected)


@pytest.mark.slow
@pytest.mark.parametrize("storage", cases.but_for_fast(["bfloat16", "int4"], "bfloat16"))
def test_on_a_mesh_they_are_those_of_one_device_and_in_shards_those_of_their_states(storage):
    tx = lionax.monitor(lionax.lion(0.1, b2=0.999, mu_dtype=storage))
    mesh, specs = Mesh(jax.devices()[:8], ("x",)), {"bias": P(), "kernel": P("x")}
    params, *grads = ({"bias": 0.2**t * cases.normal(64, seed=t),
                       "kernel": 0.2**t * cases.normal(256, 128, seed=t)} for t in range(4))

    def run(params, *grads):
        state, found = tx.init(params), []
        for g in grads:
            params, state = tx.step(params, state, g)
            found.append([mu.decode() if isinstance(mu, lionax.QuantizedArray) else
                          mu.astype(jnp.float32) for mu in slots(state)])
        names = ("stalled", "sign_disagreement")
        return {name: lionax.metrics(state)[name] for name in names}, found[-2:]

    alone, _ = jax.jit(run)(params, *grads)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    spread, _ = jax.jit(run)(*[jax.device_put(tree, shardings) for tree in (params, *grads)])
    for name, value in alone.items():
        assert float(spread[name]) == close(float(value))
    out = {name: P() for name in alone}, [list(specs.values())] * 2
    inside, (before, after) = jax.jit(jax.shard_map(
        run, mesh=mesh, in_specs=(specs,) * 4, out_specs=out))(params, *grads)
    exact = [averaged(mu, g, 0.999) for mu, g in zip(before, grads[2].values(), strict=True)]
    low = slice(0 if storage == "bfloat16" else 1, None)  # a bias of 64 elements is not quantized
    same = sum(np.sum((a == b) & (b != c)) for a, b, c in zip(
        *jax.device_get((after[low], before[low], exact[low])), strict=True))
    assert float(inside["stalled"]) == close(same / sum(a.size for a in after[low]))
    assert same > 100


LARGE = {f"{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(6)}
LARGEST = 4 * 512 * 512


@pytest.mark.slow
@pytest.mark.parametrize("every", cases.but_for_fast([1, 3], 1))
@pytest.mark.parametrize("make", [
    functools.partial(lionax.lion, 0.1, mu_dtype="bfloat16"),
    pytest.param(functools.partial(lionax.adam, 0.1, mu_dtype="bfloat16", nu_dtype="bfloat16"),
                 marks=pytest.mark.slow),
    pytest.param(functools.partial(lionax.lion, 0.1, mu_dtype="int8"), marks=pytest.mark.slow)])
def test_measuring_copies_no_buffer(make, every):
    tx = lionax.monitor(make(), every=every)
    step = jax.jit(tx.step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    compiled = step.lower(LARGE, jax.eval_shape(tx.init, LARGE), LARGE).compile()
    assert not re.findall(r"\[512,\d+\]\S* copy\(", compiled.as_text())
    if make.func is lionax.lion and make.keywords["mu_dtype"] == "bfloat16":
        assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * LARGEST


@pytest.mark.slow
def test_more_elements_are_counted_than_float32_has_whole_numbers():
    params = jnp.zeros((2**13, 2**12 + 3))
    tx = lionax.monitor(lionax.lion(0.1, b2=0.999, mu_dtype=NEAREST))
    state = tx.init(params)
    full = jax.tree.map(lambda x: jnp.ones_like(x) if x.dtype == jnp.bfloat16 else x, state)
    _, state = jax.jit(tx.step)(params, full, jnp.full_like(params, 1.1))
    assert metric(state) == 1.0
