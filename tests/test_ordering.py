"""Writes in order: nothing copied, no bit changed, nothing sent."""

import re

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_optax import optax_step

import lionax
from lionax.ordering import AT_ONCE, SMALLEST

PARAMS = {"large": cases.normal(160, 160), "other": cases.normal(256, 128, seed=1), "small": cases.normal(7),
          **{f"third_{i}": cases.normal(128, 160, seed=i) for i in range(2, 5)}}
WHOLE = sum(leaf.nbytes for leaf in PARAMS.values())
LARGEST = max(leaf.nbytes for leaf in PARAMS.values())
TXS = {
    "lion": lambda: lionax.lion(0.01, weight_decay=0.1),
    "clip": lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01)),
    "bfloat16": lambda: lionax.lion(0.01, mu_dtype=jnp.bfloat16),
    "decay_before": lambda: lionax.chain(lionax.add_decayed_weights(0.1), lionax.lion(0.01), lionax.params_ema(0.9)),
    "masked": lambda: lionax.partition({"a": lionax.lion(0.01), "b": lionax.sgd(0.01, 0.9)},
                                        {name: "b" if name in ("other", "third_3") else "a" for name in PARAMS}),
    "lamb": lambda: lionax.lamb(0.01, weight_decay=0.1),
    "clip_lamb": lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(0.01)),
    "average": lambda: lionax.chain(lionax.lion(0.01), lionax.params_ema(0.9)),
    "accumulate": lambda: lionax.accumulate(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01)), 2),
    "accumulate_average": lambda: lionax.chain(lionax.accumulate(lionax.lion(0.01), 2), lionax.params_ema(0.9)),
    "average_in_a_window": lambda: lionax.accumulate(lionax.chain(lionax.lion(0.01), lionax.params_ema(0.9)), 2),
    "skip": lambda: lionax.skip_nonfinite(lionax.lion(0.01), 3),
    "skip_before_a_window": lambda: lionax.skip_nonfinite(lionax.accumulate(lionax.lion(0.01), 2), 3),
    "decay_behind_a_window": lambda: lionax.chain(lionax.accumulate(lionax.lion(0.01), 2), lionax.add_decayed_weights(0.001),
                                                  lionax.scale(0.7)),
    "optax_in_a_window": lambda: lionax.accumulate(optax.sgd(0.01), 2),
    "loss_scale": lambda: lionax.dynamic_loss_scale(lionax.lion(0.01), 1.0),
    "sgd_bfloat16": lambda: lionax.sgd(0.01, 0.9, accumulator_dtype=jnp.bfloat16),
    "nesterov_bfloat16": lambda: lionax.sgd(0.01, 0.9, nesterov=True, accumulator_dtype=jnp.bfloat16),
    "adam_bfloat16": lambda: lionax.chain(lionax.scale_by_adam(mu_dtype=jnp.bfloat16), lionax.scale(-0.01)),
    "lamb_bfloat16": lambda: lionax.lamb(0.01, weight_decay=0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16),
    "behind_a_norm": lambda: lionax.chain(lionax.clip_by_norm(1.0), lionax.lion(0.01)),
}
assert PARAMS["large"].size >= SMALLEST > PARAMS["small"].size


def compiled(tx, params=PARAMS, **options):
    return jax.jit(tx.step, donate_argnums=(0, 1), **options).lower(params, tx.init(params), params).compile()


def compiled_optax(tx):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(optax_step(tx), donate_argnums=(0, 1)).lower(PARAMS, tx.init(PARAMS), PARAMS).compile()


@pytest.mark.parametrize("name", ["lion", "bfloat16", "masked", "clip", "average", "accumulate", "accumulate_average",
                                  "average_in_a_window", "skip", "skip_before_a_window", "loss_scale", "sgd_bfloat16",
                                  "nesterov_bfloat16", "adam_bfloat16"])
def test_no_donated_buffer_is_copied(name):
    tx = TXS[name]()
    memory = compiled(tx).memory_analysis()
    assert memory.temp_size_in_bytes < LARGEST
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves((PARAMS, tx.init(PARAMS))))
    assert compiled_optax(optax.lion(0.01)).memory_analysis().temp_size_in_bytes > 0.9 * WHOLE  # the row is kept honest


@pytest.mark.parametrize("name", ["lamb", "clip_lamb", "lamb_bfloat16"])
def test_one_update_is_kept_at_a_time(name):
    tx = TXS[name]()
    assert compiled(tx).memory_analysis().temp_size_in_bytes < LARGEST + 4096
    assert compiled_optax(optax.lamb(0.01)).memory_analysis().temp_size_in_bytes > 1.5 * WHOLE


@pytest.mark.parametrize(("name", "kept"), [("lion", 0), ("clip", 0), ("lamb", 1)])
def test_no_float32_copy_of_bfloat16_arrays(name, kept):
    params = [cases.normal(256, 256, seed=seed, dtype=jnp.bfloat16) for seed in range(6)]
    memory = compiled(TXS[name](), params).memory_analysis()
    assert memory.temp_size_in_bytes < kept * 4 * 256 * 256 + 8192  # LAMB keeps one update, in float32


def dependencies(program, results):
    """Of a compiled program: its results as names of instructions, and whether one of them is computed from another."""
    text = program.as_text()
    lines = re.findall(r"^ +(ROOT )?%(\S+) = (.*)$", text[text.index("\nENTRY"):], flags=re.MULTILINE)
    operands = {name: re.findall(r"%([\w.\-]+)", rest.split(", calls=")[0]) for _, name, rest in lines}
    (root,) = (name for is_root, name, _ in lines if is_root)

    def is_made_of(name, other):
        return name == other or any(is_made_of(operand, other) for operand in operands[name])

    return jax.tree.structure(results).unflatten(operands[root]), is_made_of


@pytest.mark.parametrize(("name", "at_once", "last"), [("lion", AT_ONCE, lambda p, s: s.rules[0].mu), ("sgd", AT_ONCE, lambda p, s: p),
                                                       ("lamb", 1, lambda p, s: p)])
def test_a_leaf_waits_for_one_before_it(name, at_once, last):
    tx = {**TXS, "sgd": lambda: lionax.sgd(0.01, 0.9)}[name]()
    params = [cases.normal(160, 160, seed=seed) for seed in range(6)]
    (new, state), is_made_of = dependencies(compiled(tx, params), (params, tx.init(params)))
    for leaf in range(6):
        waits_for = [other for other in range(leaf) if is_made_of(new[leaf], last(new, state)[other])]
        assert waits_for == list(range(leaf - at_once, -1, -at_once))[::-1]


def test_what_waits_is_not_written_for_a_later_part(monkeypatch):
    make = lambda: lionax.chain(lionax.scale_by_lion(), lionax.skip_nonfinite(lionax.scale(-0.01), 3))  # noqa: E731
    ordered = compiled(make()).cost_analysis()["bytes accessed"]
    monkeypatch.setattr("lionax.ordering.SMALLEST", 1 << 30)
    assert ordered < compiled(make()).cost_analysis()["bytes accessed"] + LARGEST


@pytest.mark.parametrize("name", TXS)
def test_no_bit_is_changed(name):
    tx = TXS[name]()
    a = b = PARAMS, tx.init(PARAMS)
    one, two = jax.jit(tx.step), jax.jit(optax_step(tx))
    for t in range(5):
        grads = cases.gradients(PARAMS, t)
        a, b = one(*a, grads), two(*b, grads)
        cases.assert_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lion", "lamb", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "bfloat16", "decay_before", "masked", "average", "clip_lamb", "lamb_bfloat16", "adam_bfloat16"))])
def test_no_bit_depends_on_the_order(name, dtype, monkeypatch):
    tx, params = TXS[name](), jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    ordered = compiled(tx, params)
    monkeypatch.setattr("lionax.ordering.SMALLEST", 1 << 30)
    other = compiled(TXS[name](), params)  # of one transformation the trace would be reused
    assert ordered.as_text() != other.as_text()
    a = b = params, tx.init(params)
    for t in range(3):
        grads = cases.gradients(params, t)
        a, b = (step(*jax.tree.map(jnp.copy, before), grads) for step, before in ((ordered, a), (other, b)))
        cases.assert_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_element_spreads(bad):
    tx = lionax.lion(0.01)
    grads = {**PARAMS, "large": PARAMS["large"].at[0, 0].set(bad)}
    params, state = jax.jit(tx.step)(PARAMS, tx.init(PARAMS), grads)
    mu = state.rules[0].mu["large"]
    assert np.all(np.isfinite(mu.at[0, 0].set(0.0)))
    assert np.all(np.isfinite(params["large"].at[0, 0].set(0.0)))


@pytest.mark.parametrize("auto", [True, False])
def test_nothing_is_sent_on_a_mesh(auto):
    kind = jax.sharding.AxisType.Auto if auto else jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = TXS["lion"]()
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim == 2 else P())), tree)  # noqa: E731
    params, state, grads = place(PARAMS), place(tx.init(PARAMS)), place(cases.gradients(PARAMS, 0))
    step = jax.jit(tx.step).lower(params, state, grads).compile()
    assert not any(word in step.as_text() for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    whole = jax.jit(tx.step)(PARAMS, tx.init(PARAMS), cases.gradients(PARAMS, 0))
    cases.assert_equal(jax.device_get(step(params, state, grads)), jax.device_get(whole), rtol=1e-6)


def test_transformed():
    """Under shard_map, vmap, scan and a derivative the step is the same."""
    tx = TXS["lion"]()
    grads = cases.gradients(PARAMS, 0)
    state = tx.init(PARAMS)
    expected = jax.jit(tx.step)(PARAMS, state, grads)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = lambda tree: jax.tree.map(lambda x: P("x") if x.ndim == 2 else P(), tree)  # noqa: E731
    mapped = jax.jit(jax.shard_map(tx.step, mesh=mesh, in_specs=(specs(PARAMS), specs(state), specs(grads)),
                                   out_specs=(specs(PARAMS), specs(state))))
    cases.assert_equal(mapped(PARAMS, state, grads), expected, rtol=1e-6)
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
    batched = jax.jit(jax.vmap(tx.step))(stack(PARAMS), stack(state), stack(grads))
    cases.assert_equal(jax.tree.map(lambda x: x[1], batched), expected, rtol=1e-6)
    scanned, _ = jax.lax.scan(lambda carry, _: (tx.step(*carry, grads), None), (PARAMS, state), None, length=1)
    cases.assert_equal(scanned, expected, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda rate: lionax.lion(rate, weight_decay=0.0).step(PARAMS, state, grads)[0]["large"].sum()))(0.1)
    np.testing.assert_allclose(slope, -np.sum(np.sign(grads["large"])), rtol=1e-5)
    through_state = jax.jit(jax.grad(lambda g: jnp.sum(tx.step(PARAMS, state, {**grads, "large": g})[1].rules[0].mu["large"])))
    np.testing.assert_allclose(through_state(grads["large"]), 0.01, rtol=1e-4)


@pytest.mark.parametrize("name", ["lion", "clip", "lamb"])
def test_exported_for_any_size(name):
    tx = TXS[name]()
    shapes = {"any": jax.ShapeDtypeStruct(jax.export.symbolic_shape("n,"), jnp.float32), "five": jax.ShapeDtypeStruct((5,), jnp.float32)}
    exported = jax.export.export(jax.jit(tx.step))(shapes, jax.eval_shape(tx.init, shapes), shapes)
    params = {"any": cases.normal(3), "five": cases.normal(5)}
    cases.assert_equal(exported.call(params, tx.init(params), params), jax.jit(tx.step)(params, tx.init(params), params), rtol=1e-6)
