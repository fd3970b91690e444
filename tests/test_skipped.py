"""A step that is not taken changes no byte on any shard, and the run goes on as if without it."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import P
from jax.sharding import NamedSharding

import lionax

SPECS = {"rows": P("x"), "columns": P(None, "x"), "whole": P()}
SHAPES = {"rows": (64, 64), "columns": (8, 512), "whole": (3,)}  # the first two have codes
STORED = (None, "bfloat16", "int8", "int4")
HOSTILE = (np.nan, np.inf, -np.inf)


def inner(how, rate=0.01):
    return lionax.chain(lionax.clip_by_global_norm(1.0),
                        lionax.adamw(rate, weight_decay=0.1, mu_dtype=how, nu_dtype=how),
                        lionax.params_ema(0.9))


# A wrapper, how many calls are one step of its inner transformation, and what in its own state
# tells of a step that was not taken.
SKIPPED, SCALED, DROPPED = {"consecutive", "skipped"}, {"loss_scale", "skipped", "good_steps"}, {
    "windows", "dropped", "gradients"}
MEASURED = {"calls", "age", "gradient_norm", "nonfinite", "accepted_age"}
ABOVE = {"[1].rules.inner.count"}  # counts the calls of what is inside of another wrapper
WRAPPERS = {
    "skip_nonfinite": (lambda tx: lionax.skip_nonfinite(tx, 3), 1, SKIPPED),
    "dynamic_loss_scale": (lambda tx: lionax.dynamic_loss_scale(tx, 4.0, 100), 1, SCALED),
    "accumulate": (lambda tx: lionax.accumulate(tx, 2), 2, DROPPED),
    "scale_of_windows": (lambda tx: lionax.dynamic_loss_scale(lionax.accumulate(tx, 2), 4.0, 100),
                         1, SCALED),
    "skip_of_windows": (lambda tx: lionax.skip_nonfinite(lionax.accumulate(tx, 2), 3), 1, SKIPPED),
    "monitor": (lambda tx: lionax.monitor(lionax.skip_nonfinite(tx, 3)), 1,
                SKIPPED | MEASURED | ABOVE),
    "master_weights": (lambda tx: lionax.skip_nonfinite(lionax.master_weights(tx, "int8"), 3), 1,
                       SKIPPED),
    "around_a_skip": (lambda tx: lionax.master_weights(lionax.skip_nonfinite(tx, 3), "float32"), 1,
                      SKIPPED | {"calls"} | ABOVE),
    "around_a_skip_int8": (lambda tx: lionax.master_weights(lionax.skip_nonfinite(tx, 3), "int8"),
                           1, SKIPPED | {"calls"} | ABOVE),
}


@functools.cache
def mesh():
    return probes.mesh_of(8)


def placed(tree):
    return {name: jax.device_put(x, NamedSharding(mesh(), SPECS[name]))
            for name, x in tree.items()}


def values(seed, dtype=np.float32):
    return {name: np.asarray(cases.normal(*shape, seed=seed), dtype)
            for name, shape in SHAPES.items()}


@functools.cache
def prepared(wrapper, how, inside):
    """The first parameters and state on 8 devices, and a compiled step."""
    make, _, _ = WRAPPERS[wrapper]
    dtype = jnp.bfloat16 if wrapper in ("master_weights", "around_a_skip") else np.float32
    params, tx = placed(values(0, dtype)), make(inner(how))
    layout = lionax.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=layout)(params)
    shardings = jax.tree.map(lambda x: x.sharding, params), layout
    if inside:
        specs = SPECS, jax.tree.map(lambda x: x.spec, layout)
        step = jax.shard_map(lionax.sharded(tx, SPECS).step, mesh=mesh(),
                             in_specs=(*specs, SPECS), out_specs=specs)
        return params, state, jax.jit(step)
    return params, state, jax.jit(tx.step, out_shardings=shardings)


def bytes_of(tree):
    """The bytes of every shard of every leaf, by path."""
    return {jax.tree_util.keystr(path): [np.asarray(shard.data).tobytes()
                                         for shard in leaf.addressable_shards]
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def changed(one, other):
    """The paths of the leaves that differ in a byte of a shard."""
    one, other = map(bytes_of, (one, other))
    assert one.keys() == other.keys()
    return {path for path in one if one[path] != other[path]}


def may_change(path, names):
    """Whether a leaf belongs to what a wrapper keeps of its own."""
    return path in names | {"[1].count"} or any(
        f".{name}" in path or f"'{name}'" in path for name in names - ABOVE)


class Run:
    """Steps with gradients that a loss scale has multiplied, of which one may be hostile."""

    def __init__(self, wrapper, how, inside):
        params, state, self.step = prepared(wrapper, how, inside)
        self.carry = params, state

    def clean(self, seed):
        self.carry = self.step(*self.carry, placed(self._scaled(values(seed))))

    def hostile(self, seed, leaf, place, value):
        grads = self._scaled(values(seed))
        grads[leaf].flat[place % grads[leaf].size] = value
        self.carry = self.step(*self.carry, placed(grads))

    def _scaled(self, grads):
        scale = np.float32(getattr(self.carry[1].rules, "loss_scale", 1.0))
        return {name: np.array(x * scale) for name, x in grads.items()}


def check(wrapper, how, inside, leaf, place, value, at=0):
    """One hostile element in one micro-batch of one window."""
    _, calls, names = WRAPPERS[wrapper]
    found, expected = Run(wrapper, how, inside), Run(wrapper, how, inside)
    for seed in range(1, 5):
        found.clean(seed)
        expected.clean(seed)
    before = found.carry
    for call in range(calls):
        if call == at % calls:
            found.hostile(9, leaf, place, value)
        else:
            found.clean(9)
    bad = changed(found.carry, before)
    assert not {path for path in bad if not may_change(path, names)}
    assert any("skipped" in path or "dropped" in path for path in bad)
    for seed in range(5, 9):
        found.clean(seed)
        expected.clean(seed)
    after = changed(found.carry, expected.carry)
    assert not {path for path in after if not may_change(path, names - {"gradients"})}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(found.carry))
               if x.dtype == np.float32)
    return sum(len(shards) for shards in bytes_of(before).values())


COMBINATIONS = [("skip_nonfinite", "int8", True), ("skip_nonfinite", "int4", False),
                ("dynamic_loss_scale", "int4", True), ("dynamic_loss_scale", "bfloat16", False),
                ("accumulate", "int8", True), ("accumulate", None, False),
                ("scale_of_windows", "int8", False), ("skip_of_windows", None, True),
                ("monitor", None, True), ("master_weights", "bfloat16", False),
                ("around_a_skip", None, True), ("around_a_skip_int8", None, False)]


@pytest.mark.promise(
    "Hostile values", "A NaN or an infinity in one leaf of one shard in one micro-batch changes no "
    "byte of parameters, moments, counts and averages on any of 8 devices under skip_nonfinite, "
    "accumulate and dynamic_loss_scale, and the run goes on bit for bit as without it.")
@pytest.mark.parametrize(("wrapper", "how", "inside"), cases.but_for_fast(
    COMBINATIONS, COMBINATIONS[0]))
def test_a_hostile_element_of_one_shard(wrapper, how, inside, figure):
    rng = np.random.default_rng(len(wrapper))
    for i in range(probes.sized(2, 60)):
        leaf = ("columns", "rows", "whole")[i % 3]
        figure("shards compared", check(wrapper, how, inside, leaf, int(rng.integers(2**20)),
                                        HOSTILE[i % 2 if i < 2 else i % 3], at=i // 3))
        figure("hostile elements", 1)
