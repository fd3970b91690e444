"""What a long process keeps: arrays, objects, programs and memory."""

import ast
import ctypes
import gc
import os
import pathlib

import cases
import jax
import jax.numpy as jnp
import optax
import pytest
from probes import sized

import lionax
from lionax.core import norms, one_leaf, storage
from lionax.core.programs import Kept

PARAMS = {"w": cases.normal(2, 3), "v": cases.normal(3)}
KEPT = {"apply": one_leaf.apply, "prepare": one_leaf.prepare, "sum": storage._sum,
        "norms": norms._norms.fun}
DROPPED = pytest.mark.promise(
    "Long runs", "Of programs for other hyperparameters or shapes a function keeps at most 512, of "
    "norms 64; the memory of those before is used again.")
OF_LEAVES = pytest.mark.parametrize("names", [["apply", "prepare"]], ids=str)


@pytest.fixture
def few_programs(monkeypatch, names):
    """Of these functions three programs are kept, and none at first; `growth` counts in threes."""
    for name in names:
        monkeypatch.setattr(KEPT[name], "most", 3)
        KEPT[name].traces = 3


def sizes():
    """What the process holds, after a collection of garbage."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, would be noise
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return {"megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "objects":
            len(gc.get_objects()), "arrays": len(jax.live_arrays()),
            "programs": sum(function.traces for function in KEPT.values())}


def growth(call, count):
    """What the last three quarters of so many calls add."""
    for i in range(count // 4):
        call(i)
    before = sizes()
    for i in range(count // 4, count):
        call(i)
    after = sizes()
    return {name: after[name] - before[name] for name in after}


def check(growth, figure, megabytes=8.0):
    assert growth["arrays"] == 0
    assert growth["programs"] <= 0
    assert growth["objects"] <= 100
    assert growth["megabytes"] <= megabytes
    figure("largest growth in megabytes", max(growth["megabytes"], 0.0))


def made(library, rate, **options):
    return library.chain(library.clip_by_global_norm(1.0), library.lion(rate, **options))


@pytest.mark.slow
@pytest.mark.promise("Long runs", "Eager calls of one step leave nothing behind.")
def test_eager_calls(figure):
    count, params = sized(2_000, 100_000), {"w": jnp.ones(3)}
    tx = lionax.lion(1e-3)
    carry = [params, tx.init(params)]

    def call(_):
        carry[:] = tx.step(*carry, params)

    check(growth(call, count), figure)
    figure("calls", count)


@pytest.mark.slow
@pytest.mark.promise("Long runs", "Definitions with other learning rates and injected values leave "
                     "nothing behind, and compile nothing.")
def test_definitions(figure):
    count, params = sized(500, 10_000), {"w": jnp.ones(3)}

    def call(i):
        tx = made(lionax, 1e-6 * (i + 1), b1=lionax.inject(0.9 + 1e-6 * i))
        tx.step(params, tx.init(params), params)

    check(growth(call, count), figure)
    figure("definitions", count)


def tree_of(i):
    """A tree with names and a structure of its own, and leaves of two shapes."""
    tree = {f"{i}": [PARAMS] * (1 + i % 3)}
    for level in range(i % 5):
        tree = {f"{i}/{level}": tree}
    return tree


@pytest.mark.slow
@pytest.mark.promise("Long runs", "Trees of other structures leave nothing behind but programs of "
                     "norms, of which at most 64 are kept.")
@pytest.mark.parametrize("names", [["norms"]], ids=str)
def test_trees(figure, few_programs):
    count = sized(120, 1_000)

    def call(i, library=lionax):
        tx, tree = made(library, 1e-3), tree_of(i)
        tx.update(tree, tx.init(tree), tree)

    check(growth(call, count), figure)
    figure("trees", count)
    peer = growth(lambda i: call(i, optax), count)
    assert peer["objects"] <= 100  # what JAX keeps of a tree itself


@DROPPED
def test_programs_are_dropped(figure):
    function = Kept(lambda factor, x: x * factor + x, 1, most=4)
    check(growth(lambda i: function(float(i), jnp.ones(3)), 16), figure)
    assert function.traces == 4
    figure("programs", 16)
    assert [f.most for f in KEPT.values()] == [512, 512, 512, 64]


@pytest.mark.slow
@DROPPED
@OF_LEAVES
def test_programs_of_steps_are_dropped(figure, few_programs):
    count, params = sized(16, 200), jnp.ones(3)

    def call(i):
        tx = lionax.lion(1e-3, 0.5 + i / 1000)
        tx.step(params, tx.init(params), params)

    check(growth(call, count), figure)
    figure("programs", 2 * count)


@pytest.mark.slow
@pytest.mark.promise("Long runs", "A jitted step that is dropped leaves nothing behind.")
@OF_LEAVES
def test_jitted_steps_are_dropped(figure, few_programs):
    count, params = sized(12, 200), jnp.ones(3)

    def call(i):
        tx = lionax.lion(1e-3, 0.5 + i / 1000)
        jax.jit(tx.step)(params, tx.init(params), params)

    check(growth(call, count), figure)
    figure("programs", count)


def test_nothing_else_is_kept():
    """Each cache of the library, and what bounds it."""
    bounded = {
        "core/programs.py": 1,  # as many programs as it is told
        "core/quantized.py": 2,  # inside of a program, which is not kept apart
        "monitoring.py": 1, "frameworks/nnx.py": 1,  # for one call
        "demo/training.py": 3, "demo/information.py": 1,
    }
    root, found = pathlib.Path(lionax.__file__).parent, {}
    for path in sorted(root.rglob("*.py")):
        names = [node.attr for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Attribute) and node.attr in ("jit", "lru_cache", "cache")]
        if names:
            found[path.relative_to(root).as_posix()] = len(names)
    assert found == bounded
