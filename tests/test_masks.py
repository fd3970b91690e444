"""Paths and masks by path, over every kind of container."""

import cases
import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import lionax


class Model(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.layers = nnx.List([nnx.LayerNorm(3, rngs=nnx.Rngs(0))])


def equinox_model():
    return eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)


CONTAINERS = {
    "dict": (lambda: {"dense": {"kernel": 1.0, "bias": 1.0}}, ["dense/bias", "dense/kernel"]),
    "namedtuple": (lambda: cases.Pair(1.0, 2.0), ["left", "right"]),
    "dataclass": (lambda: {"block": cases.Block(1.0, 2.0)}, ["block/kernel", "block/bias"]),
    "list": (lambda: [1.0, {"a": (2.0, 3.0)}], ["0", "1/a/0", "1/a/1"]),
    "array": (lambda: 1.0, [""]),
    "empty": (lambda: {}, []),
    "placeholders": (lambda: {"a": None, "b": optax.MaskedNode(), "c": 1.0}, ["c"]),
    "nnx_state": (lambda: nnx.state(Model(), nnx.Param),
                  ["dense/bias", "dense/kernel", "layers/0/bias", "layers/0/scale"]),
    "nnx_pure_dict": (lambda: nnx.to_pure_dict(nnx.state(Model(), nnx.Param)),
                      ["dense/bias", "dense/kernel", "layers/0/bias", "layers/0/scale"]),
    "linen_boxes": (lambda: {"kernel": nn.Partitioned(jnp.ones(2), ("x",)), "bias": jnp.ones(2)},
                    ["bias", "kernel"]),
    "equinox": (equinox_model,
                ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_paths(name):
    make, expected = CONTAINERS[name]
    assert lionax.paths(make()) == expected


@pytest.mark.parametrize(
    "name",
    [n for n, (_, expected) in CONTAINERS.items() if any("bias" in path for path in expected)])
def test_masks_by_path_act_on_every_container(name):
    params = jax.tree.map(lambda p: jnp.ones_like(p) * 1.0, CONTAINERS[name][0]())
    for mask, biased in ((lionax.matching("bias"), True), (lionax.not_matching("bias"), False)):
        tx = lionax.add_decayed_weights(0.5, mask)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for path, leaf in zip(lionax.paths(updates), jax.tree.leaves(updates), strict=True):
            np.testing.assert_array_equal(leaf, 0.5 if ("bias" in path) == biased else 0.0)


def test_a_mask_is_a_function_of_the_parameters_for_optax_too():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    tx = optax.masked(optax.scale(0.0), lionax.matching("bias"))
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["bias"].sum()) == 0.0
    assert float(updates["kernel"].sum()) == 2.0


def test_regular_expressions():
    params = {"dense_1": {"kernel": 1.0, "bias": 1.0}, "bias_gate": {"w": 1.0}}
    assert lionax.matching("bias")(params) == {
        "dense_1": {"kernel": False, "bias": True}, "bias_gate": {"w": True}
    }
    assert lionax.matching(r"(^|/)bias$")(params) == {
        "dense_1": {"kernel": False, "bias": True}, "bias_gate": {"w": False}
    }
    assert lionax.matching(r"dense_\d+/k", "gate")(params) == {
        "dense_1": {"kernel": True, "bias": False}, "bias_gate": {"w": True}
    }


def test_a_pattern_without_a_match_names_the_nearest_paths():
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    tx = lionax.lion(1e-3, mask=lionax.not_matching("bais"))
    with pytest.raises(ValueError, match=r"add_decayed_weights: the regular expression 'bais' "
                                         r".*nearest paths: 'dense/bias'"):
        tx.init(params)
    with pytest.raises(ValueError, match="bais"):
        jax.jit(lionax.masked(lionax.scale(1.0), lionax.matching("bais")).init)(params)


def test_a_leaf_without_gradient_still_matches():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    tx = lionax.lion(1e-3, mask=lionax.not_matching("bias"))
    updates, _ = tx.update({"kernel": jnp.ones(2), "bias": None}, tx.init(params), params)
    assert updates["bias"] is None


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((), ValueError, "at least one"),
    ((3,), TypeError, "not a regular expression"),
    (("(",), ValueError, "not a regular expression"),
])
def test_bad_patterns(arguments, error, message):
    for make in (lionax.matching, lionax.not_matching):
        with pytest.raises(error, match=message):
            make(*arguments)


def test_masks_are_values():
    assert lionax.matching("a", "b") == lionax.matching("a", "b") != lionax.not_matching("a", "b")
    assert hash(lionax.matching("a")) == hash(lionax.matching("a"))
    assert repr(lionax.not_matching("a", "b")) == "not_matching('a', 'b')"


PARAMS = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "scale": jnp.ones(2)}


@pytest.mark.parametrize("mask", [
    {"dense": {"kernel": True, "bias": False}, "scale": True},
    {"dense": {"kernel": np.True_, "bias": np.False_}, "scale": jnp.array(True)},
    lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params),
    lionax.not_matching("bias"),
])
def test_forms_of_a_mask(mask):
    tx = lionax.masked(lionax.set_to_zero(), mask)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert {
        path: float(leaf.sum())
        for path, leaf in zip(lionax.paths(updates), jax.tree.leaves(updates), strict=True)
    } == {"dense/bias": 2.0, "dense/kernel": 0.0, "scale": 0.0}


def test_a_prefix_is_a_mask():
    tx = lionax.masked(lionax.set_to_zero(), {"dense": True, "scale": False})
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert float(updates["dense"]["kernel"].sum()) == 0.0
    assert float(updates["scale"].sum()) == 2.0
    everything = lionax.masked(lionax.set_to_zero(), True)
    updates, _ = everything.update(PARAMS, everything.init(PARAMS))
    assert all(float(leaf.sum()) == 0 for leaf in jax.tree.leaves(updates))


def test_masks_match_by_path_whatever_the_container():
    model = Model()
    state = nnx.state(model, nnx.Param)
    mask = {"dense": True, "layers": {0: {"bias": False, "scale": False}}}
    tx = lionax.masked(lionax.set_to_zero(), mask)
    updates, _ = tx.update(state, tx.init(state), state)
    assert float(updates["dense"]["kernel"][...].sum()) == 0.0
    assert float(updates["layers"][0]["scale"][...].sum()) == 3.0


def test_a_mask_from_the_gradients_or_parameters_is_the_same():
    """A function is given the parameters, also by `update`."""
    seen = []

    def mask(tree):
        seen.append(float(tree["w"][0]))
        return {"w": True}

    params, grads = {"w": jnp.array([5.0])}, {"w": jnp.array([7.0])}
    tx = lionax.masked(lionax.scale(1.0), mask)
    tx.update(grads, tx.init(params), params)
    assert set(seen) == {5.0}
    tx.update(grads, tx.init(params))
    assert seen[-1] == 7.0


@pytest.mark.parametrize(("mask", "error", "message"), [
    ("bias", TypeError, r"masked: mask must be a tree of bool.*lionax\.matching.* to choose leaves "
                        r"by path; .*'bias'"),
    ({"dense": "bias", "scale": True}, TypeError, "at 'dense' it has 'bias'"),
    ({"dense": 1, "scale": True}, TypeError, "at 'dense' it has 1"),
    ({"dense": True}, ValueError, "no entry for the leaf 'scale'"),
    ({"dense": True, "scale": True, "scales": True}, ValueError,
     r"an entry at 'scales', where .*nearest paths: 'scale'"),
    ({"dense": {"kernel": True}, "scale": True}, ValueError, "no entry for the leaf 'dense/bias'"),
    (jnp.array([True, False]), TypeError, "one bool per leaf"),
])
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        lionax.masked(lionax.scale(1.0), mask).init(PARAMS)
    with pytest.raises(error, match=message.replace("masked", "add_decayed_weights")):
        lionax.lion(1e-3, mask=mask).init(PARAMS)


def test_a_function_that_returns_no_mask():
    with pytest.raises(TypeError, match="must return a tree of bool"):
        lionax.masked(lionax.scale(1.0), lambda params: max).init(PARAMS)


def test_bad_labels():
    make = lambda labels: lionax.partition({"a": lionax.scale(1.0), "b": lionax.scale(2.0)}, labels
                                           )
    with pytest.raises(ValueError, match=r"the leaf 'scale' has the label 'c', for which there is "
                                         r"no .*\['a', 'b'\]"):
        make({"dense": "a", "scale": "c"}).init(PARAMS)
    with pytest.raises(TypeError, match=r"at 'scale' it has \{1\}"):
        make({"dense": "a", "scale": {1}}).init(PARAMS)
    with pytest.raises(ValueError, match="no entry for the leaf 'scale'"):
        make({"dense": "a"}).init(PARAMS)
    with pytest.raises(TypeError, match="is not a mapping"):
        lionax.partition([lionax.scale(1.0)], "a")


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=4, unique=True))
def test_matching_and_not_matching_are_opposites(names):
    tree = dict.fromkeys(names, 1.0)
    chosen, others = (mask("a|b")(tree) for mask in (lionax.matching, lionax.not_matching))
    assert all(chosen[name] != others[name] for name in names)


def test_a_field_called_value_keeps_its_name():
    class Attention(eqx.Module):
        query: object
        value: object

    assert lionax.paths(Attention(1.0, 2.0)) == ["query", "value"]


def test_a_partial_is_a_function_of_the_parameters():
    mask = jax.tree_util.Partial(lambda params: jax.tree.map(lambda p: p.ndim == 2, params))
    updates, _ = (tx := lionax.masked(lionax.set_to_zero(),
                                      mask)).update(PARAMS, tx.init(PARAMS), PARAMS)
    assert float(updates["dense"]["kernel"].sum()) == 0.0
    assert float(updates["scale"].sum()) == 2.0
