"""One pass over memory: the numbers of the function, and each array read and written as often as it must be."""

import math
import re

import cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lionax
from benchmarks import trees
from lionax import kernels
from lionax.kernels import cpu, passes

# More than a chunk with a part of a block, a part of a block alone, one row, one element.
SHAPES = {"chunks": (701, 101), "block": (37, 41), "row": (1, 17), "one": (1,), "scalar": ()}
TXS = {
    "lion": lambda: lionax.lion(optax.linear_schedule(0.05, 0.01, 30), weight_decay=0.1),
    "lion_bfloat16": lambda: lionax.lion(0.01, mu_dtype="bfloat16"),
    "sgd": lambda: lionax.sgd(0.01, 0.9),
    "nesterov": lambda: lionax.sgd(0.01, 0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: lionax.chain(lionax.scale_by_adam(), lionax.add_decayed_weights(0.1), lionax.scale_by_learning_rate(0.01)),
    "average": lambda: lionax.chain(lionax.lion(0.01), lionax.params_ema(0.9)),
    "masked": lambda: lionax.lion(0.01, weight_decay=0.1, mask=lionax.not_matching("block")),
    "lamb": lambda: lionax.lamb(0.01, weight_decay=0.1),
    "clip": lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01)),
    "accumulate": lambda: lionax.accumulate(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01)), 2),
}


def tree(seed=0):
    return {name: cases.normal(*shape, seed=seed) for name, shape in SHAPES.items()}


def both(tx, params, gradients):
    """Parameters and state after some steps: in one pass, and as the function makes them."""
    ends = []
    for step in (kernels.one_pass(tx.step), tx.step):
        carry = params, tx.init(params)
        run = jax.jit(step)
        for grads in gradients:
            carry = run(*carry, grads)
        ends.append(carry)
    return ends


def assert_equal(new, old, rtol=0.0):
    cases.assert_equal(new, old, rtol)
    assert jax.tree.map(lambda x: x.weak_type, new) == jax.tree.map(lambda x: x.weak_type, old)


@pytest.mark.parametrize("name", ["lion", "lion_bfloat16", "sgd", "nesterov", "adam", "average", "masked", "accumulate"])
def test_no_bit_differs(name):
    assert_equal(*both(TXS[name](), tree(), [tree(i) for i in range(1, 6)]))


@pytest.mark.parametrize("name", ["lamb", "clip"])
def test_behind_a_norm_a_rounding_may_differ(name):
    assert_equal(*both(TXS[name](), tree(), [tree(i) for i in range(1, 6)]), rtol=1e-6)


@pytest.mark.parametrize(("case", "leaves"), [
    pytest.param(case, leaves, marks=() if leaves == "nested" else pytest.mark.slow)
    for case in cases.CASES for leaves in cases.TREES])
def test_every_transformation(case, leaves):
    tx, params = cases.CASES[case].make(), cases.TREES[leaves]()
    gradients = [cases.gradients(params, i) for i in range(4)]
    # In bfloat16 the compiler leaves roundings out that lie between two operations in float32.
    assert_equal(*both(tx, params, gradients), rtol=1e-2 if leaves in cases.LOW_PRECISION else 5e-6)


def test_bfloat16_parameters_are_written_where_they_lie():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(1))
    for tx in (lionax.lion(0.01), lionax.chain(lionax.lion(0.01), lionax.params_ema(0.9))):
        assert_equal(*both(tx, params, [grads] * 3))


def moved(tx, params):
    """Bytes that the calls of the kernel read and write, per parameter; all other large loops and copies; temporary bytes."""
    step = jax.jit(kernels.one_pass(tx.step), donate_argnums=(0, 1))
    program = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    text = re.sub(r"metadata=\{[^}]*\}|/\*.*?\*/", "", program.as_text())
    total, loops = 0, []
    sizes = {}
    for line in text[text.index("ENTRY"):].splitlines()[1:]:
        name, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
        operation = re.search(r"\s([\w-]+)\(", right)
        if not operation:
            continue
        shape, inside = right[: operation.start()], right[operation.end():].split(")")[0]
        sizes[name] = sum(math.prod(map(int, dims.split(","))) * {"f32": 4, "bf16": 2}[kind]
                          for kind, dims in re.findall(r"(f32|bf16)\[([\d,]+)\]", shape))
        if operation[1] == "custom-call":
            total += sizes[name] + sum(sizes[operand] for operand in inside.split(", "))
        elif operation[1] not in ("parameter", "get-tuple-element", "tuple", "bitcast") and sizes[name]:
            loops.append(line)
    return total / sum(leaf.size for leaf in jax.tree.leaves(params)), loops, program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("name", "nbytes"), [("lion", 20), ("lion_bfloat16", 16), ("sgd", 20), ("adam", 28), ("lamb", 40), ("clip", 24),
                                              ("average", 28)])
def test_each_array_is_read_and_written_once(name, nbytes):
    params = {f"leaf_{i}": cases.normal(100 + i, 300) for i in range(4)}
    total, loops, temporary = moved(TXS[name](), params)
    assert total == nbytes
    assert loops == []
    assert temporary < 4096


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nbytes"), [("lion", 20), ("lion_bfloat16", 16), ("sgd", 20), ("lamb", 40), ("clip", 24)])
def test_of_a_large_tree_nothing_is_copied(name, nbytes):
    total, loops, temporary = moved(TXS[name](), trees.arrays(trees.gpt2()))
    assert total == nbytes
    assert loops == []
    assert temporary < 1 << 20


def test_what_cannot_be_made_again_is_kept():
    # The moments are stored rounded, so that the update no longer follows from them; the old ones are overwritten.
    tx, params = lionax.lamb(0.01, mu_dtype="bfloat16"), {"w": cases.normal(100, 300)}
    total, loops, temporary = moved(tx, params)
    assert total == 36  # 4 to write the update and 4 to read it
    assert loops == []
    assert params["w"].nbytes <= temporary < params["w"].nbytes + 4096
    assert_equal(*both(tx, params, [{"w": cases.normal(100, 300, seed=1)}] * 3), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 0.0, np.inf, np.nan])
def test_norms_out_of_range(scale):
    params, grads = tree(), jax.tree.map(lambda x: x * np.float32(scale), tree(1))
    for name in ("lamb", "clip"):
        assert_equal(*both(TXS[name](), params, [grads] * 2), rtol=1e-6)


OPERATIONS = {"add": jnp.add, "subtract": jnp.subtract, "multiply": jnp.multiply, "maximum": jnp.maximum, "minimum": jnp.minimum,
              "negative": lambda x, y: -x, "abs": lambda x, y: jnp.abs(x), "sign": lambda x, y: jnp.sign(x),
              "square": lambda x, y: jnp.square(x), "where": lambda x, y: jnp.where(x.ravel()[0] > 0, x, y),
              "bfloat16": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32), "norm": lambda x, y: y + jnp.sum(jnp.sign(x)),
              "zero": lambda x, y: x + 0.0, "constant": lambda x, y: jnp.full_like(x, 2.0) * y}


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99)), max_size=14),
                  st.lists(st.integers(0, 99), min_size=3, max_size=3), st.sampled_from([(7,), (5, 3), (1100,)]))
def test_any_elementwise_function(operations, chosen, shape):
    # Of integers no sum of a product is rounded, so that it does not matter how they are fused.
    def function(a, b, c):
        values = [a, b, c, jnp.float32(2.0) * a]
        for name, i, j in operations:
            new = OPERATIONS[name](values[i % len(values)], values[j % len(values)])
            values.append(jnp.clip(new, -100, 100))
        return tuple(values[i % len(values)] for i in chosen)

    arrays = [jnp.asarray(np.random.default_rng(i).integers(-3, 4, shape), jnp.float32) for i in range(3)]
    expected = jax.jit(function)(*arrays)
    assert_equal(jax.jit(kernels.one_pass(function), donate_argnums=(0, 1, 2))(*map(jnp.copy, arrays)), expected)


def test_divisions_and_roots():
    def function(x, y):
        return jnp.sqrt(x) / (y + 2.0), jnp.maximum(x, y) - y / 3.0

    special = jnp.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, -1.0, 2.0] * 3)
    for divisor in (3.0, 0.0, 1e-39, np.inf):
        assert_equal(jax.jit(kernels.one_pass(lambda x, by=divisor: x / by))(special), jax.jit(lambda x, by=divisor: x / by)(special))
    for x, y in ((special, special[::-1]), (special, special)):
        assert_equal(jax.jit(kernels.one_pass(function))(x, y), jax.jit(function)(x, y))


def test_results_that_are_not_computed():
    def function(x, y):
        return y, x + 1.0, 3.0, None

    assert_equal(jax.jit(kernels.one_pass(function))(jnp.ones(3), jnp.zeros(3)), jax.jit(function)(jnp.ones(3), jnp.zeros(3)))


def test_what_the_function_closes_over():
    x, weights = jnp.arange(4.0), jnp.asarray([1.0, 2.0, 3.0, 4.0])

    def total(scale):
        return jnp.sum(kernels.one_pass(lambda y: y * scale + weights)(x))

    assert jax.jit(jax.grad(total))(2.0) == jax.grad(total)(2.0) == 6.0
    assert jax.jit(total)(2.0) == 22.0
    assert jax.jit(jax.jacfwd(total))(2.0) == 6.0
    np.testing.assert_array_equal(jax.jit(jax.vmap(total))(jnp.asarray([1.0, 2.0])), [16.0, 22.0])


@pytest.mark.parametrize("name", ["lion", "lamb"])
def test_a_step_that_is_traced_for_both(name):
    params = {f"leaf_{i}": cases.normal(160, 160, seed=i) for i in range(4)}
    tx = TXS[name]()

    def temporary(step):
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile().memory_analysis().temp_size_in_bytes

    once, both = jax.jit(tx.step), jax.jit(tx.step)
    alone = temporary(once)
    assert temporary(kernels.one_pass(once)) < 4096
    assert temporary(kernels.one_pass(both)) < 4096
    assert temporary(both) == alone


def test_numbers_everywhere_in_an_array():
    def function(x, s):
        zeros, ones = jnp.zeros_like(x), jnp.ones_like(x)
        return zeros + s, ones * s, zeros + 0.0, ones * 1.0, zeros + zeros, zeros + x, x * ones, zeros - x, x / (2.0 * ones)

    assert_equal(jax.jit(kernels.one_pass(function))(cases.normal(5), jnp.float32(3)), jax.jit(function)(cases.normal(5), jnp.float32(3)))


def test_a_division_by_a_scalar():
    x, s = cases.normal(3000), jnp.float32(3.7)
    assert_equal(jax.jit(kernels.one_pass(jnp.divide))(x, s), jax.jit(jnp.divide)(x, s))


def test_many_norms_one_after_the_other():
    def function(x):
        for _ in range(60):
            x = x * 0.5 + x / (1.0 + jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float64))).astype(jnp.float32)))
        return x

    with jax.enable_x64(True):
        x = cases.normal(1000)
        plan = passes._Plan(jax.make_jaxpr(function)(x).jaxpr)
        assert max(len(one.program) // 6 for _, one in plan.passes) < 50
        assert_equal(jax.jit(kernels.one_pass(function))(x), jax.jit(function)(x), rtol=1e-5)


def test_without_jit_and_with_checks():
    tx, params = lionax.sgd(0.1, 0.9), cases.normal(5, 4)
    with jax.disable_jit():
        new = kernels.one_pass(tx.step)(params, tx.init(params), params)
    assert_equal(new, tx.step(params, tx.init(params), params), rtol=1e-6)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        kernels.one_pass(lambda x: x / x)(jnp.zeros(3))


@pytest.mark.parametrize("seed", range(3))
def test_the_same_sums_on_any_number_of_threads(seed):
    x = cases.normal(500, 1000, seed=seed)
    one = jax.jit(kernels.one_pass(lionax.clip_by_global_norm(1.0).update))
    state = lionax.clip_by_global_norm(1.0).init(x)
    results = [np.asarray(one(x, state)[0]) for _ in range(20)]
    assert all(np.array_equal(result, results[0]) for result in results)


def calls_the_kernel(function, *args):
    return "lionax_one_pass" in jax.jit(function).lower(*args).as_text()


def test_on_a_mesh_it_is_the_function():
    tx, mesh = lionax.lamb(0.01), jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one, alone = kernels.one_pass(tx.step), [{"w": cases.normal(16, 100, seed=i)} for i in range(2)]
    params, grads = jax.device_put(alone, NamedSharding(mesh, P("data")))
    state = tx.init(params)
    assert calls_the_kernel(one, alone[0], tx.init(alone[0]), alone[1])
    assert not calls_the_kernel(one, params, state, grads)
    assert_equal(jax.jit(one)(params, state, grads), jax.jit(tx.step)(params, state, grads))

    def inside(step):
        specs = P("data"), jax.tree.map(lambda x: P("data") if x.ndim else P(), state), P("data")
        sharded = jax.shard_map(lambda *arrays: step(*arrays)[0], mesh=mesh, in_specs=specs, out_specs=P("data"))
        return jax.jit(sharded)(params, state, grads)

    assert_equal(inside(one), inside(tx.step))


def test_transformations_of_it_are_those_of_the_function():
    tx, params = lionax.sgd(0.1, 0.9), cases.normal(5, 4)
    one, state = kernels.one_pass(tx.step), tx.init(params)

    def batched(step):
        return jax.jit(jax.vmap(lambda grads: step(params, state, grads)[0]))(cases.normal(3, 5, 4))

    assert_equal(batched(one), batched(tx.step))
    assert_equal(jax.grad(lambda grads: jnp.sum(one(params, state, grads)[0]))(params),
                 jax.grad(lambda grads: jnp.sum(tx.step(params, state, grads)[0]))(params))
    scanned = [jax.lax.scan(lambda carry, grads, step=step: (step(*carry, grads), None), (params, state), cases.normal(3, 5, 4))[0]
               for step in (one, tx.step)]
    assert_equal(*scanned)
    assert_equal(one(params, state, params), jax.jit(tx.step)(params, state, params))  # not compiled by the caller


def test_effects_stay(capfd):
    def function(x):
        jax.debug.print("sum {}", jnp.sum(x))
        return x + 1

    jax.block_until_ready(jax.jit(kernels.one_pass(function))(jnp.ones(3)))
    jax.effects_barrier()
    assert "sum 3.0" in capfd.readouterr().out


def test_it_is_traced_once():
    traces = []

    def function(x):
        traces.append(x)
        return x + 1

    one = kernels.one_pass(function)
    for _ in range(3):
        one(jnp.ones(3))
    assert len(traces) == 1


def test_the_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cpu._built()
    assert library.parent == tmp_path / "lionax"
    before = library.stat().st_mtime_ns
    assert cpu._built() == library
    assert library.stat().st_mtime_ns == before
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"one_pass: found no C\+\+ compiler.*CXX"):
        cpu._built()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"could not be compiled[^$]*no such thing"):
        cpu._built()
    assert list((tmp_path / "lionax").iterdir()) == []


def test_the_kernel_knows_every_operation():
    text = cpu._SOURCE.read_text()
    names = re.search(r"enum Operation : int64_t \{([^}]*)\}", text)[1].replace("\n", "").split(",")
    spelled = [re.sub(r"(?<!^)(?=[A-Z])", "_", name.strip().removeprefix("k")).lower().replace("bf16", "bfloat16") for name in names]
    assert tuple(spelled) == passes.OPERATIONS
    for name in names:
        assert f"case {name.strip()}:" in text
