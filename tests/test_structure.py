"""Facts read from compiled programs: temporaries, copies, loops, branches, all-reduces.

They hold with the compiler options; what XLA does without them is shown beside, so that the options
are dropped when it needs them no more.
"""

import re

import cases
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lionax
from benchmarks import trees
from benchmarks.peers import optax_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
SHAPES = {"large": (160, 160), "other": (256, 128), "small": (7,), "third": (128, 160)}
PARAMS = {name: cases.normal(*shape) for name, shape in SHAPES.items()}
WHOLE = sum(leaf.nbytes for leaf in PARAMS.values())
LARGEST = max(leaf.nbytes for leaf in PARAMS.values())
LABELS = {name: "b" if name == "other" else "a" for name in PARAMS}
TXS = {
    "lion": lambda: lionax.lion(0.01, weight_decay=0.1),
    "bfloat16": lambda: lionax.lion(0.01, mu_dtype=jnp.bfloat16),
    "clip": lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01)),
    "average": lambda: lionax.chain(lionax.lion(0.01), lionax.params_ema(0.9)),
    "partition": lambda: lionax.partition({"a": lionax.lion(0.01), "b": lionax.sgd(0.01, 0.9)},
                                          LABELS),
    "accumulate": lambda: lionax.accumulate(
        lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.01), lionax.params_ema(0.9)), 2
    ),
    "average_behind": lambda: lionax.chain(lionax.accumulate(lionax.lion(0.01), 2),
                                           lionax.params_ema(0.9)),
    "skip": lambda: lionax.skip_nonfinite(lionax.lion(0.01), 3),
    "loss_scale": lambda: lionax.dynamic_loss_scale(lionax.lion(0.01)),
    "skip_accumulate": lambda: lionax.skip_nonfinite(lionax.accumulate(lionax.lion(0.01), 2), 3),
    "scaled_accumulate": lambda: lionax.dynamic_loss_scale(lionax.accumulate(lionax.lion(0.01), 2)),
    "measure": lambda: lionax.monitor(lionax.lion(0.01), every=3),
    "sgd_bfloat16": lambda: lionax.sgd(0.01, 0.9, accumulator_dtype=jnp.bfloat16),
    "adam": lambda: lionax.chain(lionax.scale_by_adam(mu_dtype=jnp.bfloat16), lionax.scale(-0.01)),
}
CONDITIONALS = ("accumulate", "average_behind", "skip", "loss_scale", "skip_accumulate",
                "scaled_accumulate")


def compiled(step, params, state, options):
    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    return jitted.lower(params, state, params).compile()


def of(name, options, params=PARAMS):
    tx = TXS[name]()
    return compiled(tx.step, params, tx.init(params), options)


def copies(program):
    return re.findall(r"= f32\[\d+,\d+\]\S* copy(?:-start)?\(", program.as_text())


@pytest.mark.parametrize("name", TXS)
def test_a_step_keeps_nothing_and_copies_no_donated_buffer(name):
    program, state = of(name, lionax.compiler_options()), TXS[name]().init(PARAMS)
    memory = program.memory_analysis()
    kept = LARGEST if name == "measure" else 0  # one direction in the branch that measures
    assert memory.temp_size_in_bytes < 0.05 * WHOLE + kept
    assert memory.alias_size_in_bytes >= WHOLE + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert not copies(program)


@pytest.mark.parametrize("name", ["lion", "bfloat16", "clip", "accumulate"])
def test_without_the_options_there_are_copies(name):
    assert of(name, {}).memory_analysis().temp_size_in_bytes > 0.4 * WHOLE


def test_lamb_keeps_one_update():
    tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(0.01, weight_decay=0.1))
    program = compiled(tx.step, PARAMS, tx.init(PARAMS), lionax.compiler_options())
    assert program.memory_analysis().temp_size_in_bytes < LARGEST + 8192


@pytest.mark.parametrize(("name", "kept"), [("lion", 0), ("clip", 1)])
def test_of_bfloat16_arrays_at_most_one_has_a_float32_copy(name, kept):
    params = [cases.normal(256, 256, seed=seed, dtype=jnp.bfloat16) for seed in range(6)]
    memory = of(name, lionax.compiler_options(), params).memory_analysis()
    assert memory.temp_size_in_bytes < kept * 4 * 256 * 256 + 8192


@pytest.mark.parametrize("name", CONDITIONALS)
def test_the_inner_step_is_compiled_once_and_in_a_branch(name):
    program = of(name, lionax.compiler_options()).as_text()
    entry = program[program.index("\nENTRY"):]
    signs = re.findall(r" sign\(f32\[160,160\]|= f32\[160,160\]\S* sign\(", program)
    assert len(signs) == 1  # the direction of Lion on one leaf
    assert " conditional(" in entry
    assert not re.findall(r" sign\(", entry)


def test_a_program_grows_with_the_conditionals_no_faster_than_they():
    sizes = []
    for groups in (1, 2, 4):
        params = {str(i): jnp.ones(3) for i in range(groups)}
        parts = dict.fromkeys(params, lionax.accumulate(lionax.sgd(0.1), 2))
        tx = lionax.partition(parts, {name: name for name in params})
        text = jax.jit(tx.step).lower(params, tx.init(params), params).as_text()
        sizes.append(len(text.splitlines()))
    assert sizes[2] - sizes[1] < 2.5 * (sizes[1] - sizes[0])


# On 8 devices.


def sharded(tx, kind, leaves=40, shape=(64, 32)):
    """The compiled step of a tree that is split over the devices, and what it keeps."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda x: jax.device_put(x, NamedSharding(mesh,
                                                      P("x") if x.ndim == 2 else P()))
    params = {f"leaf_{i}": place(jnp.ones(shape)) for i in range(leaves)}
    state = jax.tree.map(place, tx.init(params))
    program = compiled(tx.step, params, state, lionax.compiler_options())
    local = sum(leaf.nbytes for leaf in params.values()) / 8
    return program.as_text(), program.memory_analysis().temp_size_in_bytes / local


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.but_for_fast(
    [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], jax.sharding.AxisType.Auto))
@pytest.mark.parametrize(("make", "reductions"), [
    (lambda: lionax.lion(0.01), 0), (lambda: lionax.lamb(0.01, weight_decay=0.1), 1),
    (lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(0.01)), 2)])
def test_a_mesh_needs_one_all_reduce_for_the_norms_of_a_sweep(make, reductions, kind):
    text, kept = sharded(make(), kind)
    entry = text[text.index("\nENTRY"):]
    assert len(re.findall(r" all-reduce(?:-start)?\(", entry)) == reductions
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)
    assert kept < (0.1 if reductions == 0 else 1.6)


# The large trees of the benchmarks.


# Loops that write an array as large as the leaf: the parameter, the slots, and LAMB's update.
LOOPS = {
    "lion": (lambda: lionax.lion(1e-3), 2), "bfloat16": (TXS["bfloat16"], 2),
    "clip": (TXS["clip"], 2), "lamb": (lambda: lionax.lamb(1e-3), 4),
    "sgd": (lambda: lionax.sgd(1e-3, 0.9), 2)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_structure_of_the_compiled_step_of_a_large_tree(name):
    make, loops = LOOPS[name]
    tx, params = make(), trees.arrays(trees.gpt2())
    program = compiled(tx.step, params, jax.eval_shape(tx.init, params), lionax.compiler_options())
    memory, leaves = program.memory_analysis(), jax.tree.leaves(params)
    parameters = sum(leaf.size for leaf in leaves)
    largest = max(leaf.size for leaf in leaves)
    assert memory.temp_size_in_bytes <= (4 * largest + (1 << 20) if name == "lamb" else 0.04 *
                                         parameters)
    assert memory.alias_size_in_bytes >= 4 * parameters
    assert not copies(program)
    text = program.as_text()
    tokens = re.findall(r"= (?:f32|bf16)\[16000,768\]\S* (?:fusion|call)\(",
                        text[text.index("\nENTRY"):])
    assert len(tokens) == loops


@pytest.mark.slow
def test_optax_with_the_options_still_keeps_more():
    params = trees.arrays(trees.gpt2())
    for ours, theirs in ((lionax.lamb(1e-3), optax.lamb(1e-3)),):
        kept = []
        for step, init in ((ours.step, ours.init), (optax_step(theirs), theirs.init)):
            state = jax.eval_shape(init, params)
            program = compiled(step, params, state, lionax.compiler_options())
            kept.append(program.memory_analysis().temp_size_in_bytes)
        assert kept[0] < 0.6 * kept[1]


@pytest.mark.slow
def test_lines_of_lamb_over_many_leaves():
    params = {f"leaf_{i}": jnp.ones((4, 4 + i % 4)) for i in range(300)}
    ours, theirs = lionax.lamb(0.01), optax.lamb(0.01)
    lines = [
        len(
            jax.jit(step).lower(params, jax.eval_shape(init, params),
                                params).as_text().splitlines())
        for step, init in ((ours.step, ours.init), (optax_step(theirs), theirs.init))
    ]
    assert lines[0] < 0.5 * lines[1]
