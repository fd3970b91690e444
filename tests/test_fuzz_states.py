"""Hostile values in states, weights and checkpoints: refused in words, or taken."""

import contextlib
import functools
import logging
import os
import shutil

import cases
import fuzz
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.compat import keras2, keras3, keras_schedules, tf_models
from lionax.compat.weights import _Form
from lionax.core.inspection import kind_of
from lionax.core.quantized import is_quantized
from lionax.demo.checkpoints import Checkpoints

INDEX = st.integers(0, 10**6)
SMALL = {"w": jnp.linspace(-1.0, 1.0, 6, dtype=jnp.float32).reshape(2, 3), "b": jnp.ones(3)}
LARGE = {"w": jnp.ones((64, 64)), "b": jnp.ones(3)}  # large enough for codes
HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SMALL)
FUZZED = {
    "lion": (SMALL, lambda: lionax.lion(0.1)),
    "lion_int8": (LARGE, lambda: lionax.lion(0.1, mu_dtype="int8")),
    "lamb": (SMALL, lambda: lionax.lamb(lionax.inject(0.1))),
    "lamb_int4": (LARGE, lambda: lionax.lamb(0.1, mu_dtype="int4", nu_dtype="int8")),
    "sgd": (SMALL, lambda: lionax.sgd(0.1, 0.9, True)),
    "ema": (SMALL, lambda: lionax.chain(lionax.ema(0.9), lionax.scale(-0.1))),
    "params_ema": (SMALL, lambda: lionax.chain(lionax.sgd(0.1), lionax.params_ema(0.9, 3, True))),
    "accumulate": (SMALL, lambda: lionax.accumulate(lionax.lion(0.1), 3)),
    "skip": (SMALL, lambda: lionax.skip_nonfinite(lionax.sgd(0.1), 3)),
    "loss_scale": (SMALL, lambda: lionax.dynamic_loss_scale(lionax.lion(0.1))),
    "master": (HALF, lambda: lionax.master_weights(lionax.adam(0.1), "int8")),
    "monitor": (SMALL, lambda: lionax.monitor(
        lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)), every=2)),
    "partition": (SMALL, lambda: lionax.partition(
        {"a": lionax.lion(0.1), "b": lionax.set_to_zero()}, lionax.labels({"w": "a"}, "b"))),
    "named": (SMALL, lambda: lionax.named_chain(
        ("x", lionax.scale_by_lion()), ("y", lionax.scale_by_learning_rate(
            lambda step: 0.1 / (1 + jnp.asarray(step, jnp.float32)))))),
    "foreign": (SMALL, lambda: lionax.chain(optax.trace(0.9), lionax.scale(-0.1))),
}


@functools.cache
def made(name):
    """Parameters, transformation, state and the places in it."""
    params, make = FUZZED[name]
    tx = make()
    state = tx.init(params)
    places = [path for path in fuzz.places(state)
              if not {"accepted", "format"}.intersection(path)]  # those no checkpoint holds
    return params, tx, state, places


def leaf_changes():
    """What a leaf or a node is changed to, of what it was."""
    like = [lambda x: np.asarray(x), lambda x: jnp.full_like(x, -1),
            lambda x: jnp.full(np.shape(x), jnp.nan), lambda x: jnp.full(np.shape(x), jnp.inf),
            lambda x: jnp.full(np.shape(x), 2**31 - 1, jnp.int32),
            lambda x: jnp.full(np.shape(x), -2**31, jnp.int32),
            *(lambda x, dtype=dtype: jnp.asarray(x).astype(dtype)
              for dtype in (jnp.bfloat16, jnp.int32, bool, jnp.complex64)),
            lambda x: {**x, "more": jnp.zeros(())}, lambda x: (*x, x), lambda x: tuple(x)[:-1],
            lambda x: dict(list(x.items())[1:]), lambda x: [x], list]
    values = [*fuzz.NUMBERS, *fuzz.STRINGS[:3], *fuzz.ARRAYS, *fuzz.OBJECTS,
              *fuzz.device_values(), *(made(name)[2] for name in ("lion", "lamb")),
              made("lion_int8")[2].rules[0].mu["w"]]
    return [*like * 3, *(lambda x, value=value: value for value in values)]


def kind(array):
    return kind_of(array if isinstance(array, jax.Array) else np.asarray(array))


def stepped(tx, params, state):
    """A step gives parameters like the parameters, and a state like this one or like a good one."""
    new, after = tx.step(params, state, jax.tree.map(jnp.ones_like, params))
    cases.assert_equal(*(jax.tree.map(jnp.zeros_like, tree) for tree in (new, params)))
    like = tx.init(params)
    same = [tree for tree in (state, like) if jax.tree.structure(tree) == jax.tree.structure(after)]
    assert same
    for leaf, *others in zip(*map(jax.tree.leaves, (after, *same)), strict=True):
        assert kind(leaf) in map(kind, others)


def updated(tx, params, state):
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    cases.assert_equal(*(jax.tree.map(jnp.zeros_like, tree) for tree in (updates, params)))


def moved(tx, params, state):
    like = tx.init(params)
    after = lionax.cast_state(state, like)
    cases.assert_equal(*(jax.tree.map(jnp.zeros_like, tree) for tree in (after, like)))


OPERATIONS = [
    stepped, stepped, stepped, updated, moved, moved,
    lambda tx, params, state: lionax.cast_state(tx.init(params), state),
    lambda tx, params, state: lionax.get_hyperparams(state),
    lambda tx, params, state: lionax.set_hyperparams(state, learning_rate=0.5),
    lambda tx, params, state: lionax.metrics(state),
    lambda tx, params, state: lionax.core.inspection.described(state),
    lambda tx, params, state: lionax.averaged_params(state),
    lambda tx, params, state: lionax.compat.to_optax(state, optax.lion(0.1).init(params)),
    lambda tx, params, state: lionax.compat.from_optax(state, lionax.lion(0.1).init(params))]


@pytest.fixture
def quiet():
    """Without the lines of `cast_state` and Orbax."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "A state with hostile values steps, or is refused in "
                     "words with the place.")
def test_states(figure, quiet):
    changes = leaf_changes()
    with fuzz.watched(figure) as watch:
        @fuzz.each(250, 6_000, st.sampled_from(sorted(FUZZED)), INDEX, INDEX,
                   st.sampled_from(OPERATIONS))
        def _(name, where, which, operation):
            params, tx, state, places = made(name)
            with contextlib.suppress(TypeError, ValueError, AttributeError, OverflowError):
                change = changes[which % len(changes)]
                state = fuzz.put(state, places[where % len(places)], change)
            watch.run(operation, tx, params, state)


# Weights

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
KERAS = {"lion": keras3.Lion(0.5), "sgd": keras3.SGD(0.5, momentum=0.5), "plain": keras3.SGD(0.5),
         "lamb": keras3.Lamb(0.5, use_ema=True), "keras2": keras2.SGD(0.5, momentum=0.5),
         "window": keras3.Lion(0.5, gradient_accumulation_steps=2), "models": tf_models.LAMB(0.5),
         "schedule": keras3.SGD(keras_schedules.CosineDecay(0.1, 10), momentum=0.9)}
OTHERS = {"lion": (optax.lion, lionax.lion), "lamb": (optax.lamb, lionax.lamb),
          "sgd": (lambda rate: optax.sgd(rate, 0.9), lambda rate: lionax.sgd(rate, 0.9))}
KEYS = ["x", "0", "1", "00", "9" * 5000, "vars/1", 5, None, b"a", "iteration:0", "a/b" * 20_000,
        "opt/" * 1000 + "1", "/.ATTRIBUTES/VARIABLE_VALUE", "iteration"]
VARIABLES = [["b", "a"], ["a"], ["a", "a"], "ab", 5, {"a": "x", "b": "y"}, {"a": 5, "b": None},
             [["a"], "b"], ("a", "b"), [0, 1]]
COUNTS = [0, 3, -1, 2**31, 1.5, "x", 2**70, float("nan"), True]


def weights_of(name, named):
    """The weights of a Keras optimizer as a list, or by name."""
    tx = KERAS[name]
    listed = list(map(np.asarray, lionax.compat.to_weights(tx, tx.init(PARAMS), ["a", "b"])))
    if not named:
        return listed
    form = _Form.of(tx, "weights")
    names = ["iteration", *["learning_rate"] * form.rate,
             *(f"opt/{form.spelled(*entry)[0]}" for entry in form.entries(["a", "b"]))]
    return dict(zip(names, listed, strict=True))


def spoiled(weights, where, value, how):
    """Weights of which one is another, missing, more or elsewhere."""
    if isinstance(weights, dict):
        key = list(weights)[where % len(weights)] if weights else "x"
        if how % 5 < 3:
            return {**weights, key: value}
        if how % 5 == 3:
            return {name: weight for name, weight in weights.items() if name != key}
        return {**weights, KEYS[where % len(KEYS)]: value}
    place = where % (len(weights) + 1)
    choices = [[*weights[:place], value, *weights[place + 1:]],
               [*weights[:place], value, *weights[place + 1:]],
               weights[:place] + weights[place + 1:], [*weights[:place], value, *weights[place:]],
               weights[::-1], value]
    return choices[how % len(choices)]


def carried(name, weights, variables, count):
    """From weights and back: nothing is lost."""
    tx = KERAS[name]
    state = lionax.compat.from_weights(tx, PARAMS, weights, variables, count=count)
    back = lionax.compat.to_weights(tx, state, ["a", "b"])
    if isinstance(weights, list) and variables == ["a", "b"]:
        for ours, theirs in zip(back, weights, strict=True):
            np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32),
                                       rtol=1e-6)


def carried_from_optax(name, value, where, other, count):
    """From a state of Optax and back."""
    state = OTHERS[other][0](0.1).init(PARAMS)
    leaves, treedef = jax.tree.flatten(state)
    leaves[where % len(leaves)] = value
    into = OTHERS[name][1](0.1).init(PARAMS)
    ours = lionax.compat.from_optax(treedef.unflatten(leaves), into, count=count)
    lionax.compat.to_optax(ours, OTHERS[name][0](0.1).init(PARAMS))


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "Weights of Keras and states of Optax are carried over "
                     "whole, or refused in words.")
def test_weights(figure):
    hostile = [*fuzz.NUMBERS, *fuzz.STRINGS, *fuzz.ARRAYS, *fuzz.OBJECTS, *fuzz.device_values()]
    with fuzz.watched(figure) as watch:
        @fuzz.each(400, 11_000, st.sampled_from(sorted(KERAS)), INDEX, INDEX, INDEX,
                   st.sampled_from(sorted(OTHERS)), st.sampled_from(sorted(OTHERS)))
        def _(keras, where, which, how, name, other):
            value = hostile[which % len(hostile)]
            count = COUNTS[which % len(COUNTS)] if how % 7 == 0 else None
            if how % 4 == 0:
                other = other if how % 3 == 0 else name
                watch.run(carried_from_optax, name, value, where, other, count)
                return
            weights = spoiled(weights_of(keras, how % 2), where, value, how // 8)
            variables = VARIABLES[where % len(VARIABLES)] if how % 9 == 0 else ["a", "b"]
            watch.run(carried, keras, weights, variables, count)


# Checkpoints

SETTINGS = {"steps": 3, "seed": 0}
FILES = [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"NaN",
         b'{"settings":null,"record":null}', b'{"settings":{"steps":3,"seed":0},"record":[]}',
         b'{"settings":{"steps":3,"seed":0}}', b"\xff\xfe", fuzz.pickle.dumps(fuzz.Pickled())]
NAMES = ["7", "-1", "x", "99999999999999999999", "1e5", "0003", "2.orbax-checkpoint-tmp"]


def damage(root, where, how, which):
    """Damages one file or folder of a checkpoint."""
    paths = sorted(root.rglob("*"))
    path = paths[where % len(paths)]
    other = paths[which % len(paths)]
    if path.is_dir():
        target = path.with_name(NAMES[which % len(NAMES)])
        if how % 4 == 0 and not target.exists():
            path.rename(target)
            return
        shutil.rmtree(path)
        if how % 4 == 1:
            path.write_bytes(b"x")
        elif how % 4 == 2:
            path.mkdir()
        elif how % 8 == 3:
            path.symlink_to("/etc")
        return
    data, replaced = path.read_bytes(), FILES[which % len(FILES)]
    bit = which % (8 * len(data) + 1)
    flipped = bytearray(data)
    if bit < 8 * len(data):
        flipped[bit // 8] ^= 1 << bit % 8
    huge = data.replace(b"[4,3]", b"[4000000000,3000]").replace(b"[4, 3]", b"[4000000000, 3000]")
    above = data.replace(b"arrays", b"../../x").replace(b"'w'", b"'../../w'").replace(
        b'"w"', b'"../../w"')
    swapped = other.read_bytes() if other.is_file() else b""
    written = [data[:which % (len(data) + 1)], flipped, flipped, replaced, huge, above, swapped]
    path.unlink()
    if how % 9 < len(written):
        path.write_bytes(bytes(written[how % 9]))
    elif how % 9 == 7:
        path.symlink_to(["/dev/zero", "/etc/passwd", path.name, "../../../x"][which % 4])
    else:
        path.mkdir()


def restored(root, like):
    """What a run goes on from is like what it needs."""
    found = Checkpoints(root, "lion", SETTINGS).latest(like)
    if found is not None:
        arrays, record = found
        cases.assert_equal(*(jax.tree.map(jnp.zeros_like, tree) for tree in (arrays, like)))
        assert isinstance(record, dict)


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "A damaged checkpoint restores or is refused in words; "
                     "nothing outside of its folder changes.")
def test_checkpoints(figure, quiet, tmp_path, capfd):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    like = params, lionax.lion(0.1).init(params)
    checkpoints = Checkpoints(tmp_path / "good", "lion", SETTINGS)
    for step in range(2):
        checkpoints.save(step, like, {"name": "lion", "steps": [step]})
    with fuzz.watched(figure, tmp_path / "run") as watch:
        @fuzz.each(60, 1_500, INDEX, INDEX, INDEX)
        def _(where, how, which):
            root = tmp_path / "run"
            shutil.copytree(tmp_path / "good", root, symlinks=True)
            try:
                damage(root, where, how, which)
                watch.run(restored, root, like)
            finally:
                shutil.rmtree(root)
    assert not os.path.exists(fuzz.CANARY)


def test_codes_that_do_not_fit_are_refused():
    tx = lionax.lion(0.1, mu_dtype="int8")
    state = tx.init(LARGE)
    mu = state.rules[0].mu["w"]
    assert is_quantized(mu)
    scales = lionax.QuantizedArray(mu.codes, mu.scales[:, :0], mu.format)
    spoiled = state._replace(rules=(state.rules[0]._replace(mu={**state.rules[0].mu, "w": scales}),
                                    *state.rules[1:]))
    with pytest.raises(ValueError, match=r"(?s)QuantizedArray of 8 bits .* The first difference: "
                                         r".*scales.*lionax\.cast_state"):
        tx.step(LARGE, spoiled, LARGE)
