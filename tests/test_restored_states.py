"""Checkpoints that were restored without their structure, as dicts and lists."""

import json
import warnings

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import lionax
from lionax.core.quantized import is_quantized
from lionax.frameworks import linen
from lionax.frameworks.nnx import Optimizer

WITHOUT = pytest.mark.promise(
    "Interrupted runs", "A state restored without a template (dicts, lists, string keys) is "
    "refused by `step` with the remedy, `cast_state(state, like)`, which takes it.")
LOW = {"w": jnp.ones((64, 128)), "b": jnp.ones(3)}
NOISE = optax.add_noise(0.1, 0.1, 0)  # with a random key in its state
CASES = {name: (case.make(), "nested") for name, case in cases.CASES.items()}
CASES |= {f"{name} on {tree}": (cases.CASES[name].make(), tree) for tree in (
    "array", "scalar", "none_leaves", "bfloat16") for name in ("lion", "accumulate", "masked",
                                                                "master_weights_int8")}


def numbered(state):
    """The state with other numbers, which a fresh one does not have."""
    counter = iter(range(1, 10_000))

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(next(counter))
        return jnp.full(leaf.shape, next(counter) % 100, leaf.dtype)

    return jax.tree.map(one, state)


def without_keys(tree):
    """Random keys as numbers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(
        x.dtype, jax.dtypes.prng_key) else x, tree)


# Without a structure

def plain(node, has_lists, leaf):
    """A tree of dicts with string keys and, if it has lists, of lists."""
    if jax.tree_util.all_leaves([node]):
        return leaf(node)
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    inner = {jax.tree_util.keystr(keys, simple=True): None if x is None else plain(
        x, has_lists, leaf) for keys, x in pairs}
    if has_lists and isinstance(node, list | tuple) and not hasattr(node, "_fields"):
        return list(inner.values())
    return inner or (None if has_lists else {})


def like_orbax(state):
    return plain(state, True, lambda x: x)


def like_msgpack(state):
    return plain(state, False, np.asarray)


def through_json(state):
    return json.loads(json.dumps(plain(state, True, lambda x: np.asarray(x).tolist())))


@WITHOUT
@pytest.mark.parametrize("form", cases.but_for_fast([like_orbax, like_msgpack, through_json],
                                                    like_orbax))
def test_a_state_without_its_structure_is_refused_with_the_remedy_which_takes_it(form, figure):
    for tx, tree in CASES.values():
        params = cases.TREES[tree]()
        like = tx.init(params)
        state = numbered(like)
        restored = form(state)
        if jax.tree.leaves(state):
            for use in (lambda: tx.step(params, restored, params),  # noqa: B023
                        lambda: tx.update(params, restored, params)):  # noqa: B023
                with pytest.raises(TypeError, match=r"a dict, not a lionax State, and has the keys "
                                   r"\['count'.*lionax\.cast_state\(state, tx\.init\(params"):
                    use()
        cases.assert_equal(lionax.cast_state(restored, like), state)
        figure("states", 1)


@WITHOUT
@pytest.mark.slow
def test_orbax_and_flax_restore_without_a_structure_what_cast_state_takes(figure, tmp_path):
    likes = {name: tx.init(cases.TREES[tree]()) for name, (tx, tree) in CASES.items()}
    likes |= {"int8": lionax.lamb(0.1, mu_dtype="int8", nu_dtype="int4").init(LOW),
              "noise": lionax.chain(NOISE, lionax.lion(0.1)).init(LOW),
              "optax": optax.chain(optax.clip(1.0), lionax.lion(0.1)).init(LOW)}
    likes = {name: like for name, like in likes.items() if jax.tree.leaves(like)}
    states = {name: numbered(like) for name, like in likes.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", states)
        checkpointer.wait_until_finished()
        with warnings.catch_warnings(action="ignore"):  # Orbax: the topology may be another
            restored = checkpointer.restore(tmp_path / "saved")
    for name, like in likes.items():
        moved = lionax.cast_state(restored[name], like)
        cases.assert_equal(*map(without_keys, (moved, states[name])))
        figure("states", 1)
    for tx, _ in CASES.values():
        like = tx.init({"w": jnp.ones((2, 3)), "blocks": [jnp.ones(2), {"b": jnp.ones(())}]})
        state = numbered(like)
        restored = serialization.msgpack_restore(serialization.to_bytes(state))
        cases.assert_equal(lionax.cast_state(restored, like), state)
        figure("states", 1)


@WITHOUT
@pytest.mark.slow
def test_a_model_and_its_state_get_their_structure_back():
    tx, params = lionax.lion(0.1), {"w": jnp.ones(2)}
    old = linen.TrainState.create(apply_fn=None, params=params, tx=tx).apply_gradients(grads=params)
    new = linen.TrainState.create(apply_fn=None, params=params, tx=tx)
    moved = lionax.cast_state(serialization.msgpack_restore(serialization.to_bytes(old)), new)
    cases.assert_equal((moved.params, moved.opt_state), (old.params, old.opt_state))
    optimizer = Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    saved = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    moved = lionax.cast_state(numbered(saved), optimizer.opt_state)
    assert jax.tree.structure(moved) == jax.tree.structure(optimizer.opt_state)
    low = Optimizer(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), lionax.lion(0.1, mu_dtype="int8"),
                    wrt=nnx.Param)
    saved_low = jax.tree.map(
        lambda node: {"codes": node.codes, "scales": node.scales} if is_quantized(node) else node,
        nnx.to_pure_dict(nnx.state(low))["opt_state"], is_leaf=is_quantized)
    cases.assert_equal(lionax.cast_state(saved_low, low.opt_state), low.opt_state)
    with pytest.raises(TypeError, match=r"lionax\.cast_state\(state, tx\.init\(params\)\)"):
        linen.TrainState.apply_gradients(new.replace(opt_state=saved), grads=params)


@WITHOUT
@pytest.mark.slow
def test_without_a_structure_float32_moments_become_codes_and_other_dtypes():
    plain_, low = lionax.lamb(0.1), lionax.lamb(0.1, mu_dtype="int8", nu_dtype="bfloat16")
    state = numbered(plain_.init(LOW))
    moved = lionax.cast_state(like_orbax(state), low.init(LOW))
    cases.assert_equal(moved, lionax.cast_state(state, low.init(LOW)))


ADAM = lionax.chain(NOISE, lionax.lamb(0.1, mu_dtype="int8", nu_dtype="int4"))
WRONG = {
    "count": lambda saved: saved.pop("count"),
    "count ": lambda saved: saved.update(count=1.5),
    "count  ": lambda saved: saved.update(count=2**40),
    "count   ": lambda saved: saved.update(count="3"),
    "count    ": lambda saved: saved.update(count={"n": 3}),
    "rules/0/rng_key": lambda saved: saved["rules"][0].update(rng_key=jnp.ones(2)),
    "rules/0": lambda saved: saved["rules"].__setitem__(0, 3.0),
    "rules/0/count": lambda saved: saved["rules"].insert(0, None),
    "rules/1/mu/b": lambda saved: saved["rules"][1]["mu"].update(b=jnp.ones(4)),
    "rules/1/mu/b ": lambda saved: saved["rules"][1]["mu"].update(b=[1.0, [2.0]]),
    "rules/1/mu/b  ": lambda saved: saved["rules"][1]["mu"].update(b=jnp.ones(3, jnp.complex64)),
    "rules/1/mu/w/codes": lambda saved: saved["rules"][1]["mu"]["w"].pop("codes"),
    "rules/1/nu/w/codes": lambda saved: saved["rules"][1]["nu"].update(
        saved["rules"][1]["mu"]),
    "rules/1/mu/other": lambda saved: saved["rules"][1]["mu"].update(other=jnp.ones(3)),
    "rules/5": lambda saved: saved["rules"].append(jnp.ones(3)),
}


@WITHOUT
@pytest.mark.parametrize("path", WRONG)
def test_what_does_not_fit_is_refused_with_its_path(path):
    like = ADAM.init(LOW)
    saved = like_orbax(like)
    WRONG[path](saved)
    with pytest.raises(ValueError, match=f"cast_state: at '{path.strip()}.*' the state, restored "
                                         r"without its structure, has .*, `like` has .*tx\.init"):
        lionax.cast_state(saved, like)


@WITHOUT
@pytest.mark.parametrize(("before", "after"), [
    (lambda: lionax.lion(0.1), lambda: lionax.lamb(0.1)),
    (lambda: lionax.lion(0.1), lambda: lionax.accumulate(lionax.lion(0.1), 2)),
    (lambda: lionax.lion(0.1, mu_dtype="int8"), lambda: lionax.lion(0.1)),
    (lambda: lionax.lion(0.1, mu_dtype="int8"), lambda: lionax.lion(0.1, mu_dtype="int4")),
    (lambda: optax.lion(0.1), lambda: lionax.lion(0.1))])
def test_another_definition_is_refused_where_nothing_says_what_an_array_is(before, after):
    with pytest.raises(ValueError, match="of the definition that saved it"):
        lionax.cast_state(like_orbax(before().init(LOW)), after().init(LOW))
