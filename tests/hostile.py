"""What a value that is not ordinary does: the words of `docs/guides/values.md`, as checks.

Each word of the page's tables is a function here. It looks at what a step made of the value, and is
false where the page lies.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
from jax import P

import lionax
from lionax.core import storage
from lionax.core.quantized import is_quantized
from lionax.core.rounding import key_of

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "values.md"
LARGEST = float(np.finfo(np.float32).max)
VALUES = {"NaN": (np.nan,), "±∞": (np.inf, -np.inf), "subnormal": (1e-40, -1e-40),
          "largest": (LARGEST, -LARGEST), "−0.0": (-0.0,), "1e30": (1e30, -1e30)}
COLUMNS = (*VALUES, "zeros", "one element")
RATE, STEPS = 0.125, 5


def sgd():
    return lionax.sgd(RATE, 0.5)


def lion():
    return lionax.lion(RATE, weight_decay=0.0)


TRANSFORMATIONS = {
    "lion": lion,
    "lamb": lambda: lionax.lamb(RATE),
    "adam": lambda: lionax.adam(RATE),
    "adamw": lambda: lionax.adamw(RATE, weight_decay=0.0),
    "sgd": sgd,
    "majority_vote_lion": lambda: lionax.majority_vote_lion(RATE, weight_decay=0.0, axis_name="x"),
    "trace": lambda: lionax.trace(0.5),
    "ema": lambda: lionax.ema(0.5),
    "scale_by_lion": lionax.scale_by_lion,
    "scale_by_adam": lionax.scale_by_adam,
    "scale_by_trust_ratio": lionax.scale_by_trust_ratio,
    "add_decayed_weights": lambda: lionax.add_decayed_weights(0.5),
    "clip": lambda: lionax.clip(1.0),
    "clip_by_norm": lambda: lionax.clip_by_norm(1.0),
    "clip_by_global_norm": lambda: lionax.clip_by_global_norm(1.0),
    "scale": lambda: lionax.scale(0.5),
    "scale_by_learning_rate": lambda: lionax.scale_by_learning_rate(0.5),
    "scale_by_schedule": lambda: lionax.scale_by_schedule(lambda step: 0.5),
    "unscale": lambda: lionax.unscale(2.0),
    "params_ema": lambda: lionax.params_ema(0.5),
    "identity": lionax.identity,
    "set_to_zero": lionax.set_to_zero,
    "skip_nonfinite": lambda: lionax.skip_nonfinite(sgd(), 5),
    "dynamic_loss_scale": lambda: lionax.dynamic_loss_scale(sgd(), 1.0, 100),
    "accumulate": lambda: lionax.accumulate(sgd(), 1),
    "skip_if": lambda: lionax.skip_if(lion(), _never),
    "chain": lambda: lionax.chain(lion()),
    "named_chain": lambda: lionax.named_chain(("lion", lion())),
    "masked": lambda: lionax.masked(lion(), {"a": True, "b": True}),
    "partition": lambda: lionax.partition({"l": lion()}, {"a": "l", "b": "l"}),
    "monitor": lambda: lionax.monitor(lion()),
    "sharded": lambda: lionax.sharded(lion(), P()),
    "master_weights": lambda: lionax.master_weights(lion()),
}
DOWNHILL = {"lion", "lamb", "adam", "adamw", "sgd", "scale_by_learning_rate", "skip_nonfinite",
            "dynamic_loss_scale", "accumulate"}


def _never(updates, params):
    return False


def eager(tx, grads, then, params):
    """The updates of a first step, those of steps with other gradients after it, and the state."""
    state = tx.init(params)
    first, state = tx.update(grads, state, params)
    later = []
    for _ in range(STEPS):
        updates, state = tx.update(then, state, params)
        later.append(updates)
    return first, jax.tree.map(lambda *each: jnp.stack(each), *later), state


@functools.partial(jax.jit, static_argnums=0)
def jitted(tx, grads, then, params):
    first, state = tx.update(grads, tx.init(params), params)
    state, later = jax.lax.scan(lambda state, _: tx.update(then, state, params)[::-1], state, None,
                                STEPS)
    return first, later, state


@functools.partial(jax.jit, static_argnums=0)
def voted(tx, grads, then, params):
    """Of three workers the first has these gradients, the others the later ones."""
    def one(grads, then, params):
        own = jax.tree.map(lambda x: x[0], grads)
        return jitted(tx, own, jax.lax.pcast(then, "x", to="varying"), params)[:2]

    workers = jax.tree.map(lambda *each: jnp.stack(each), grads, then, then)
    each = jax.shard_map(one, mesh=probes.mesh_of(3), in_specs=(P("x"), P(), P()), out_specs=P())
    return *each(workers, then, params), ()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is made of a value, the first element of the leaf "a" of a tree."""

    name: str
    how: Any  # `eager` or `jitted`
    given: Any

    def made(self, given):
        """What is made of a tree at first, in the later steps, and the last state."""
        raise NotImplementedError

    @functools.cached_property
    def all(self):
        return jax.tree.map(probes.wide, self.made(self.given))

    @property
    def first(self):
        return self.all[0]

    @property
    def last(self):
        return jax.tree.map(lambda x: x[-1], self.all[1])

    @property
    def lasts(self):
        """Whether what is made at the value stays, against opposite gradients."""
        return np.array_equal(self.at, self.last["a"][0], equal_nan=True)

    @property
    def is_lost(self):
        """Whether the state is not finite."""
        return not all(np.isfinite(x).all() for x in jax.tree.leaves(self.all[2]))

    @property
    def value(self):
        return probes.wide(self.given["a"])[0]

    @property
    def at(self):
        return self.first["a"][0]

    @property
    def beside(self):
        return self.first["a"][1:]

    @functools.cached_property
    def with_zero(self):
        """What is made at first with 0 in the place of the value."""
        given = {**self.given, "a": self.given["a"].at[0].set(0.0)}
        return jax.tree.map(probes.wide, self.made(given)[0])

    @functools.cached_property
    def exact(self):
        """What is made at first in float64."""
        with jax.enable_x64(True):
            given = jax.tree.map(lambda x: jnp.asarray(probes.wide(x)), self.given)
            return jax.tree.map(probes.wide, dataclasses.replace(self, how=jitted).made(given)[0])

    def is_signed(self, *sizes):
        """Whether the update at the value has its sign, or downhill the other, and a size."""
        sign = (self.value > 0) * 1.0 - (self.value < 0)
        sign = -sign if self.name in DOWNHILL else sign
        return bool(sign) and any(self.at == sign * size for size in sizes)

    def is_close(self, expected):
        rtol = 1e-5 if self.given["a"].dtype == jnp.float32 else 2e-2
        return all(np.allclose(a, b, rtol=rtol, atol=1e-37) and np.isfinite(a).all()
                   for a, b in zip(*map(jax.tree.leaves, (self.first, expected)), strict=True))


class InGradient(Seen):
    """The updates of a transformation for a gradient, and for opposite ones after it."""

    def made(self, given):
        how = voted if self.name == "majority_vote_lion" else self.how
        return how(TRANSFORMATIONS[self.name](), given, _opposite(self.given, given),
                   jax.tree.map(lambda p, g: jnp.asarray(p, g.dtype), PARAMS, given))

    @property
    def grads(self):
        return self.given

    @property
    def then(self):
        return _opposite(self.given, self.given)

    @functools.cached_property
    def without(self):
        """The last updates, if the first step were left out."""
        return jax.tree.map(lambda x: probes.wide(x)[-2], self.made(self.then)[1])


PARAMS = {"a": np.array([1.0, 2.0, -1.0, 3.0]), "b": np.array([4.0])}


def _opposite(grads, like):
    return jax.tree.map(lambda g, x: jnp.asarray(-np.copysign(1.0, probes.wide(g)), x.dtype),
                        grads, like)


PARAMETERS = {
    "add_decayed_weights": (lambda: lionax.add_decayed_weights(0.5), "update"),
    "scale_by_trust_ratio": (lionax.scale_by_trust_ratio, "update"),
    "params_ema": (lambda: lionax.params_ema(0.5), "average"),
    **{f"master_weights(tx, {kind!r})".replace("'", '"'): (
        lambda kind=kind: lionax.master_weights(lionax.sgd(RATE), kind), "step")
       for kind in (None, "int8", "bfloat16", "float32")},
    "step": (lambda: lionax.sgd(RATE), "step"),
}


class InParameter(Seen):
    """What is made of parameters: updates, averages or new parameters, in steps of 1/8."""

    def made(self, given):
        make, what = PARAMETERS[self.name]
        tx, grads = make(), jax.tree.map(jnp.ones_like, given)
        state, found = tx.init(given), []
        for _ in range(STEPS):
            if what == "update":
                found.append(tx.update(grads, state, given)[0])
            elif what == "average":
                _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), state, given)
                found.append(lionax.averaged_params(state))
            else:
                given, state = tx.step(given, state, grads)
                found.append(given)
        stack = jax.tree.map(lambda *each: jnp.stack(each), *found)
        return found[0], stack, state


def equal(one, other):
    return all(np.array_equal(a, b, equal_nan=True)
               for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


WORDS = {
    "exact": lambda s: s.is_close(s.exact),
    "as 0": lambda s: equal(s.first, s.with_zero),
    "itself": lambda s: np.array_equal(s.at, s.value, equal_nan=True),
    "tiny": lambda s: abs(s.at) < 1e-37 and np.array_equal(s.beside, s.with_zero["a"][1:]),
    "0": lambda s: not s.first["a"].any(),
    "0 there": lambda s: s.at == 0 and s.beside.all(),
    "NaN there": lambda s: np.isnan(s.at) and np.isfinite(s.beside).all(),
    "NaN in the leaf": lambda s: np.isnan(s.first["a"]).all() and np.isfinite(s.first["b"]).all(),
    "NaN everywhere": lambda s: all(np.isnan(x).all() for x in s.first.values()),
    "∞ there": lambda s: s.is_signed(np.inf) and np.isfinite(s.beside).all(),
    "∞ in the leaf": lambda s: np.isinf(s.first["a"]).all() and np.isfinite(s.first["b"]).all(),
    "others 0": lambda s: not s.beside.any(),
    "all others 0": lambda s: not s.beside.any() and not s.first["b"].any(),
    "sign": lambda s: s.is_signed(1.0, RATE),
    "limit": lambda s: s.is_signed(1.0),
    "ratio 1": lambda s: np.array_equal(s.beside, probes.wide(s.grads["a"])[1:]),
    "outvoted": lambda s: s.at == -RATE * np.sign(probes.wide(s.then["a"])[0]),
    "not taken": lambda s: not any(x.any() for x in s.first.values()) and equal(
        s.last, s.without),
    "as inside": lambda s: equal(s.all[:2], dataclasses.replace(s, name="lion").all[:2]),
    "for long": lambda s: s.lasts and not s.is_lost,
    "for good": lambda s: s.lasts and s.is_lost,
    "then NaN": lambda s: np.isnan(s.last["a"][0]),
    "average NaN": lambda s: any(np.isnan(x).any() for x in jax.tree.leaves(s.all[2])),
}
LASTING = {"for good", "then NaN", "as inside", "average NaN"}


class Stored:
    """What is read back of a value in a slot of a storage format, beside ones."""

    def __init__(self, name, values):
        dtype, *of = name.split(", ")
        self.nonnegative = "second moment" in of
        how = lionax.Storage(dtype, rounding="nearest" if "nearest" in of else "stochastic")
        old = storage.zero_slot(values, how, nonnegative=self.nonnegative)
        key = None if "nearest" in of else key_of(0, 1)
        slot = storage.store(values, old, key, nonnegative=self.nonnegative)
        self.dtype, self.given, self.slot = jnp.dtype(dtype), probes.wide(values).ravel(), slot
        self.got = probes.wide(storage.load(slot, jnp.dtype("float32"))).ravel()
        block = slot.format.block if is_quantized(slot) else 1
        self.block, self.rest = self.got[1:block], self.got[block:]

    @property
    def at(self):
        return self.got[0]

    @property
    def value(self):
        return self.given[0]

    @property
    def largest(self):
        """The largest finite number of the format."""
        floats = self.dtype if jnp.issubdtype(self.dtype, jnp.floating) else jnp.bfloat16
        return float(jnp.finfo(floats).max)

    def is_near(self, rtol):
        return np.isfinite(self.at) and abs(self.at - self.value) <= rtol * abs(self.value)


STORED = {
    "itself": lambda s: np.array_equal(s.given, s.got),
    "0": lambda s: s.at == 0 and (s.value != 0 or not s.got.any()),
    "NaN there": lambda s: np.isnan(s.at) and np.isfinite(s.got[1:]).all(),
    "NaN in its block": lambda s: np.isnan(s.at) and np.isnan(s.block).all() and len(
        s.block) and np.isfinite(s.rest).all(),
    "∞ there": lambda s: s.at == s.value and np.isinf(s.at) and np.isfinite(s.got[1:]).all(),
    "overflows": lambda s: s.at == np.copysign(np.inf, s.value),
    "its largest": lambda s: s.at == np.copysign(s.largest, s.value),
    "tiny": lambda s: abs(s.at) < 1e-37,
    "near": lambda s: s.is_near(0.01),
    "others 0": lambda s: len(s.block) > 0 and not s.block.any(),
    "others larger": lambda s: len(s.block) > 0 and (s.block > 1).all(),
    "float32": lambda s: s.slot.dtype == jnp.float32 and s.value == s.at,
}


def stored(name, column):
    """What is seen of each value of a column in a storage format."""
    ones = jnp.ones((64, 64), jnp.float32)
    for value in VALUES.get(column, (None,)):
        if value is not None:
            value = abs(value) if "second moment" in name else value
            yield Stored(name, ones.at[0, 0].set(jnp.float32(value)))
        else:
            yield Stored(name, 0 * ones if column == "zeros" else ones[0, :1] * 0.5)


def rows(title):
    """The names and cells of the rows of a table of the page, which stands below this title."""
    lines = PAGE.read_text().split(f"## {title}\n")[1].split("\n##")[0].splitlines()
    for line in lines:
        if line.startswith("| `"):
            names, *cells = line.strip("| ").split(" | ")
            for name in re.findall("`(.+?)`", names):
                yield name, dict(zip(COLUMNS, cells, strict=True))


def seen(kind, name, column, dtype=jnp.float32, how=eager):
    """What is seen of each value of a column."""
    dtype = jnp.bfloat16 if name.startswith("master_weights(") else dtype
    a = jnp.asarray([0.75, 0.5, -2.0, 0.25], dtype)
    for value in VALUES.get(column, (None,)):
        held = 0 * a if column == "zeros" else a if value is None else a.at[0].set(
            jnp.asarray(_of(value, dtype), dtype))
        yield kind(name, how, {"a": held, "b": jnp.asarray([-1.0], dtype)})


def _of(value, dtype):
    """The value or, of the largest float32, the dtype's own."""
    return np.sign(value) * float(jnp.finfo(dtype).max) if abs(value) == LARGEST else value


def fails(cell, found):
    """The words of a cell that are not true of what was seen; also that a value lasts unsaid."""
    words = cell.split(", ")
    if isinstance(found, Stored):
        return [word for word in words if not STORED[word](found)]
    lies = [word for word in words if not WORDS[word](found)]
    if isinstance(found, InGradient) and not LASTING & set(words) and (found.is_lost or not all(
            np.isfinite(x).all() for x in found.last.values())):
        lies.append("lasts")
    return lies
