"""The machinery of `test_sweep.py`: modes, dtypes and trees, and what a case makes of them.

A `Row` is one combination. `check` runs the rows that it is given, those of a mode in one program.
"""

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

import cases
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import probes
from flax import nnx
from jax import P, lax
from jax.sharding import NamedSharding

import lionax

STEPS = 3
SHAPES = {"two": ((8, 3), (3,)), "scalar": ((),), "zero": ((0, 3), (3,)), "none": (),
          "thousand": ((3,),) * 1000}


class Module(eqx.Module):
    """A tree with a static field."""

    left: Any
    right: Any
    name: str = eqx.field(static=True, default="static")


# A tree: the key of its leaves in `SHAPES`, and a function of these. Containers of the same leaves
# have them in the same order, so that they make the same program.
TREES = {
    "dict": ("two", lambda a, b: {"a": a, "b": b}),
    "named_tuple": ("two", cases.Pair),
    "dataclass": ("two", cases.Block),
    "nnx": ("two", lambda a, b: nnx.State({"a": nnx.Param(a), "b": nnx.Param(b)})),
    "equinox": ("two", Module),
    "none_leaves": ("two", lambda a, b: {"a": a, "b": [b, None], "c": None}),
    "empty": ("none", dict),
    "scalar": ("scalar", lambda a: a),
    "zero_size": ("zero", lambda a, b: {"a": a, "b": b}),
    "thousand": ("thousand", lambda *leaves: {f"{i:03}": leaf for i, leaf in enumerate(leaves)}),
}
SMALL = tuple(name for name in TREES if name != "thousand")

# The dtypes of the leaves in turn.
DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "float16": ("float16",),
          "float64": ("float64",), "complex64": ("complex64",), "mixed": ("bfloat16", "float32")}
# Of a leaf's largest element, for each step. Parameters and slots are rounded once in a step: to
# the nearest, by half an ulp, or stochastically, by less than one. Of float32 it is the arithmetic.
BOUNDS = {"float32": 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 1e-14,
          "complex64": 2e-6, "mixed": 2.0**-7}


# What complex leaves are refused with.
NO_IMAGINARY_PART = r"'a': a slot of dtype bfloat16 loses the imaginary part .*a complex dtype"
NOT_COMPLEX = r"clip: .*'a' has dtype complex64; .*optax\.contrib\.split_real_and_imaginary"
REFUSALS = {"lion_mu_bfloat16": NO_IMAGINARY_PART, "lamb_trust_mask": NO_IMAGINARY_PART,
            "sgd_accumulator": NO_IMAGINARY_PART, "clip": NOT_COMPLEX, "chain": NOT_COMPLEX,
            "chain_foreign": NOT_COMPLEX}


# 1 - 0.999 has five digits in float32; lionax corrects the bias there with Optax's numbers.
FIVE_DIGITS = ("scale_by_adam", "scale_by_adam_nesterov")


# An Optax schedule of a count in int32 is in float32; here its values are below 0.1.
SCHEDULED = ("lion_schedule", "lion_decay_schedule", "lion_decoupled", "lamb_decay_mask",
             "adamw_schedule", "sgd_nesterov", "scale_by_schedule")


def bound(row):
    """Of the error of a step, of the largest element."""
    if row.dtype == "float64":
        return 1e-8 if row.case in SCHEDULED else BOUNDS[row.dtype]
    return max(BOUNDS[row.dtype], 1e-5 * (row.case in FIVE_DIGITS))


class Row(NamedTuple):
    """One combination."""

    case: str
    mode: str
    dtype: str
    tree: str


def is_accepted(row):
    """Whether a row runs. What is rounded stochastically is not smooth: its derivative is 0."""
    is_rounded = row.case == "master_weights" and row.dtype in ("bfloat16", "float16", "mixed")
    return not ((row.dtype == "complex64" and row.case in REFUSALS)
                or (row.mode == "grad" and is_rounded))


class Program(NamedTuple):
    """What a mode runs: trees are dicts by row."""

    init: Any
    step: Any
    rows: list[Row]


def values(seed, shape, dtype):
    """Odd multiples of 1/64 below 1, which every dtype holds, away from 0 and each limit."""
    rng = np.random.default_rng([seed, *shape])
    draw = lambda: (2 * rng.integers(9, 32, shape) + 1) / 64 * rng.choice([-1, 1], shape)
    return jnp.asarray(draw() + 1j * draw() if dtype.startswith("complex") else draw(), dtype)


def tree_of(row, seed):
    """The parameters of a row for the seed 0, and the gradients of step s for s + 1."""
    kind, build = TREES[row.tree]
    dtypes = DTYPES[row.dtype]
    return build(*(values(1000 * seed + i, shape, dtypes[i % len(dtypes)])
                   for i, shape in enumerate(SHAPES[kind])))


@functools.cache
def transformation(case):
    return cases.CASES[case].make()


def program(rows, txs=None):
    """Each row's transformation on its own parameters."""
    txs = txs or {row: transformation(row.case) for row in rows}

    def step(params, state, grads):
        both = {row: tx.step(params[row], state[row], grads[row]) for row, tx in txs.items()}
        return tuple({row: one[part] for row, one in both.items()} for part in (0, 1))

    return Program(lambda params: {row: tx.init(params[row]) for row, tx in txs.items()}, step,
                   rows)


def stack(*trees):
    """In NumPy, where nothing is compiled."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


# Modes: functions of a program, parameters and the gradients of the steps, which return the last
# parameters and, where it can leave the mode, the last state.


def outside_of_jit(run, params, grads):
    carry = params, run.init(params)
    for g in grads:
        carry = run.step(*carry, g)
    return carry


def in_jit(run, params, grads):
    return outside_of_jit(run._replace(step=jax.jit(run.step)), params, grads)


def train(run, params, grads):
    """A scan over gradients."""
    carry = params, run.init(params)
    return lax.scan(lambda carry, g: (run.step(*carry, g), None), carry, grads,
                    length=STEPS)[0]


def in_scan(run, params, grads):
    return jax.jit(functools.partial(train, run))(params, stack(*grads))


def in_while(run, params, grads):
    def body(at):
        t, carry = at
        return t + 1, run.step(*carry, jax.tree.map(lambda g: g[t], stacked))

    @jax.jit
    def train_while(params):
        at = jnp.int32(0), (params, run.init(params))
        return lax.while_loop(lambda at: at[0] < STEPS, body, at)[1]

    stacked = stack(*grads)
    return train_while(params)


def in_vmap(run, params, grads):
    """The first of two members, whose numbers differ."""
    half = lambda x: np.asarray(x) * np.asarray(0.5, x.dtype)
    twice = lambda tree: stack(tree, jax.tree.map(half, tree))
    mapped = jax.jit(jax.vmap(functools.partial(train, run), axis_size=2))
    return jax.tree.map(lambda x: np.asarray(x)[0], mapped(
        twice(params), jax.tree.map(lambda *each: jnp.asarray(np.stack(each, 1)),
                                    *map(twice, grads))))


def donated(run, params, grads):
    """The parameters that are given are gone."""
    step = jax.jit(run.step, donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, (params, run.init(params)))
    for g in grads:
        given, carry = carry, step(*carry, g)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]) if leaf.size)
    return carry


def specs_of(tree):
    return jax.tree.map(lambda x: P("x") if x.ndim == 2 and x.shape[0] else P(), tree)


def on_devices(run, params, grads):
    """Matrices are split over 8 devices."""
    mesh, specs = probes.mesh_of(8), specs_of(params)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    of_grads = jax.tree.map(lambda spec: NamedSharding(mesh, P(None, *spec)), specs)
    new, state = jax.jit(functools.partial(train, run), in_shardings=(shardings, of_grads))(
        params, stack(*grads))
    assert all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in zip(
        jax.tree.leaves(new), jax.tree.leaves(shardings), strict=True))
    return jax.device_get((new, state))


def in_shard_map(run, params, grads):
    """On 8 devices. Types of a state that leaves `shard_map` are the subject of other tests."""
    specs = specs_of(params)
    txs = {row: lionax.sharded(lionax.lamb(0.1) if row.case == "sharded" else
                               transformation(row.case), specs[row]) for row in run.rows}
    of_grads = jax.tree.map(lambda spec: P(None, *spec), specs)
    new = jax.jit(jax.shard_map(
        lambda params, grads: train(program(run.rows, txs), params, grads)[0],
        mesh=probes.mesh_of(8), in_specs=(specs, of_grads), out_specs=specs))(params, stack(*grads))
    return jax.device_get(new), None


MODES = {"outside of jit": outside_of_jit, "jit": in_jit, "scan": in_scan, "while": in_while,
         "vmap": in_vmap, "donation": donated, "8-device jit": on_devices,
         "shard_map": in_shard_map, "grad": None}


# The oracle: the same in float64.


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(
        np.complex128 if jnp.iscomplexobj(x) else np.float64)), tree)


def canonical(row):
    """The row whose wide run is this one's oracle."""
    same = {"two": "dict", "none": "empty", "zero": "zero_size"}
    kind = TREES[row.tree][0]
    dtype = "complex64" if row.dtype == "complex64" else "float64"
    return Row(row.case, "oracle", dtype, same.get(kind, kind))


class Oracle:
    """Float64 runs of some rows, in one program."""

    def __init__(self, rows):
        self.rows = list(dict.fromkeys(map(canonical, rows)))
        self.params, *self.grads = ({row: wide(tree_of(row, seed)) for row in self.rows}
                                    for seed in range(STEPS + 1))
        run = program(self.rows)
        self.step = jax.jit(run.step)
        self.carries = [(self.params, run.init(self.params))]
        for g in self.grads:
            self.carries.append(self.step(*self.carries[-1], g))

    def leaves(self, row):
        return jax.tree.leaves(self.carries[-1][0][canonical(row)])

    @functools.cached_property
    def slopes(self):
        """Differences of the second step along the third gradients, by row.

        A row has two: that of moved parameters and that of moved gradients.
        """
        state, length, of = self.carries[1][1], 1e-5, ([], [])
        for sign, which in itertools.product((1, -1), (0, 1)):
            at = lambda x, d, sign=sign: x + sign * length * d
            args = [self.params, self.grads[1]]
            args[which] = jax.tree.map(at, args[which], self.grads[2])
            of[which].append(summed(self.step(args[0], state, args[1])[0]))
        return {row: [(float(up[row]) - float(down[row])) / (2 * length) for up, down in of]
                for row in self.rows}


def summed(trees):
    """A real number of each row's parameters."""
    return {row: sum((jnp.sum(leaf.real.astype(jnp.float64)) for leaf in jax.tree.leaves(tree)),
                     jnp.float64(0)) for row, tree in trees.items()}


def slopes(run, params, grads):
    """For each row, the derivative of the second step along the third gradients, by `jax.grad`."""
    state = run.step(params, run.init(params), grads[0])[1]

    def total(params, grads):
        return sum(summed(run.step(params, state, grads)[0]).values())

    found = jax.jit(jax.grad(total, (0, 1)))(params, grads[1])
    return {row: [along(one[row], grads[2][row]) for one in found] for row in run.rows}


def along(gradient, direction):
    """A directional derivative, and the sum of the sizes of its terms.

    A term may itself be a difference: of a trust ratio the update and its norm nearly cancel.
    """
    terms = [np.real(np.asarray(x, np.complex128) * np.asarray(d, np.complex128))
             for x, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)]
    sizes = (np.sum(np.abs(x) + np.abs(np.asarray(d, np.complex128)))
             for x, d in zip(terms, jax.tree.leaves(direction), strict=True))
    return sum(map(np.sum, terms)), sum(sizes)


# A check.


def form(tree):
    """Containers, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, jnp.dtype(x.dtype), getattr(x, "weak_type", False))
                     for x in leaves]


def traced(row):
    """The program of `update` and of `step` on the leaves of a tree; nothing changes its form."""
    tx, params = transformation(row.case), tree_of(row, 0)
    leaves, treedef = jax.tree.flatten(params)

    def both(params, grads):
        params, grads = map(treedef.unflatten, (params, grads))
        state = tx.init(params)
        results = tx.update(grads, state, params), tx.step(params, state, grads)
        assert [form(one) for one in results] == [form((params, state))] * 2, row
        return jax.tree.leaves(results)

    return str(jax.make_jaxpr(both)(leaves, leaves))


def check(rows, oracle=None):
    """Runs rows, each mode's in one program; returns each dtype's largest error in its bound."""
    oracle, errors = oracle or Oracle(rows), {}
    for mode in dict.fromkeys(row.mode for row in rows):
        some = [row for row in rows if row.mode == mode]
        run = program(some)
        params, *grads = ({row: tree_of(row, seed) for row in some} for seed in range(STEPS + 1))
        if mode == "grad":
            compare_slopes(slopes(run, params, grads), oracle, errors)
            continue
        new, state = MODES[mode](run, params, grads)
        assert form(new) == form(params), mode
        if state is not None:
            assert form(state) == form(jax.eval_shape(run.init, params)), mode
        for row in some:
            assert all(np.isfinite(np.asarray(leaf, np.complex128)).all()
                       for leaf in jax.tree.leaves((new[row], state and state[row]))), row
            compare(row, new[row], oracle, errors)
    return errors


def compare(row, new, oracle, errors):
    """Of the last parameters each leaf with its oracle."""
    for leaf, expected in zip(jax.tree.leaves(new), oracle.leaves(row), strict=True):
        if leaf.size:
            error = np.max(np.abs(np.asarray(leaf, np.complex128) - np.asarray(expected)))
            note(errors, row, error, STEPS * bound(row) * np.max(np.abs(expected)))


def compare_slopes(found, oracle, errors):
    """Derivatives with differences, whose own error is below 1e-8."""
    for row, pairs in found.items():
        for (slope, size), expected in zip(pairs, oracle.slopes[canonical(row)], strict=True):
            note(errors, row, abs(slope - expected), bound(row) * size + 1e-8)


def note(errors, row, error, limit):
    """Refuses an error above its bound; keeps the largest of each dtype."""
    assert error <= limit, f"{row}: {error:.3g} is {error / limit:.3g} times its bound"
    errors[row.dtype] = max(errors.get(row.dtype, 0.0), float(error / limit))


def context(case):
    """Optax's own rules mix dtypes."""
    return jax.numpy_dtype_promotion("standard") if case == "chain_foreign" else (
        contextlib.nullcontext())
