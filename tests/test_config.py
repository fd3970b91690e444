"""Transformations as JSON, and back.

``PYTHONPATH=. python tests/test_config.py`` stores the configs of a new version, which later
versions must load. Those of a released version are never written again.
"""

import contextlib
import json
import pathlib
import re

import cases
import hypothesis.strategies as st
import jax.numpy as jnp
import optax
import pytest
import test_compat
from hypothesis import given

import lionax
from lionax.compat import keras2, keras3, keras_schedules, tf_models

lionax.register_schedule("cases", cases.SCHEDULE)
LABELS = {"w": "a", "b": "b"}
MORE = {
    "mask": lionax.lion(1e-3, mask=lionax.not_matching("bias"), mu_dtype=jnp.bfloat16),
    "tree_mask": lionax.lamb(1e-3, mask={"w": True, "b": {"c": False}}, trust_mask=True),
    "labels": lionax.partition({"a": lionax.sgd(0.1), "b": lionax.set_to_zero()}, LABELS),
    "injected": lionax.sgd(lionax.inject(0.1), momentum=lionax.inject(0.9)),
    "majority_vote": lionax.majority_vote_lion(1e-3, axis_name=("data", "model")),
    "storage": lionax.lion(1e-3, mu_dtype=lionax.Storage()),
    "infinite": lionax.clip(float("inf")),
    "keras2": keras2.Lion(keras_schedules.PiecewiseConstantDecay([5], [0.1, 0.01]),
                          weight_decay=0.1, use_ema=True,
                          exclude_from_weight_decay={"var_names": ["bias"], "var_list": ["w"]}),
    "keras3": keras3.Lamb(keras_schedules.CosineDecay(0.1, 10), weight_decay=0.1,
                          gradient_accumulation_steps=2, use_ema=True),
    "tf_models": tf_models.LAMB(0.1, decay=0.1, clipnorm=0.0, exclude_from_weight_decay=["bias"]),
}


def has_functions(text):
    """Whether there are functions that are not registered, or parts of Optax."""
    return "<function" in text.replace(repr(cases.SCHEDULE), "") or "GradientTransformation" in text


@pytest.mark.parametrize("name", [*cases.CASES, *MORE])
def test_there_and_back(name):
    tx = MORE[name] if name in MORE else cases.CASES[name].make()
    if has_functions(repr(tx.definition)):
        with pytest.raises(TypeError, match=r"to_config: \$.* has no config; "):
            lionax.to_config(tx)
        return
    config = lionax.to_config(tx)
    text = json.dumps(config, allow_nan=False)
    again = lionax.from_config(json.loads(text))
    assert again == tx
    assert lionax.to_config(again) == config
    assert repr(again) == repr(tx)


@pytest.mark.parametrize("name", test_compat.REPLAYED)
def test_every_constructor_of_another_system(name):
    tx = test_compat.make(test_compat.OURS[name])
    assert lionax.from_config(json.loads(json.dumps(lionax.to_config(tx), allow_nan=False))) == tx


def test_what_has_no_config():
    with pytest.raises(TypeError, match=r"\$.parts\[2\].learning_rate is <function "
                                        r".*register_schedule"):
        lionax.to_config(lionax.lion(optax.constant_schedule(0.1)))
    with pytest.raises(TypeError, match=r"wrap only lionax's own"):
        lionax.to_config(lionax.chain(optax.scale(1.0), lionax.clip(1.0)))
    with pytest.raises(TypeError, match="is not a lionax transformation"):
        lionax.to_config(optax.scale(1.0))


GOOD = lionax.to_config(
    lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3, mask=lionax.matching("w"))))


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.update(type="os.system"), r"\$.type is 'os.system'; known are"),
    (lambda c: c.update(type=["Chain"]), r"\$.type is"),
    (lambda c: c.pop("type"), r"\$.type is None"),
    (lambda c: c["parts"][1].update(b3=0.9), r"\$.parts\[1\].b3 is not a field of ScaleByLion"),
    (lambda c: c["parts"][1].update(b1="0.9"), r"\$.parts\[1\].b1='0.9' is not accepted"),
    (lambda c: c["parts"][1].update(b1=1.5), r"\$.parts\[1\]: scale_by_lion: b1=1.5"),
    (lambda c: c["parts"][1].update(b1={"type": "PathMask", "patterns": ["a"]}),
     r"\$.parts\[1\].b1"),
    (lambda c: c["parts"][1].update(mu_dtype="int32"), "floating-point"),
    (lambda c: c["parts"][0].pop("max_norm"), r"\$.parts\[0\]: .*max_norm"),
    (lambda c: c["parts"][3].update(flip_sign="yes"), r"\$.parts\[3\].flip_sign='yes'"),
    (lambda c: c["parts"][2].update(mask=[True]), r"\$.parts\[2\].mask"),
    (lambda c: c["parts"][2]["mask"].update(patterns=["("]), "regular expression"),
    (lambda c: c.update(parts={"a": 1}), r"\$.parts.type"),
    (lambda c: c.update(parts=[1]), r"\$.parts=\(1,\) is not accepted by Chain"),
    (lambda c: c["parts"][3].update(learning_rate={"type": "registered", "name": "none such"}),
     "no schedule is registered as"),
    (lambda c: c["parts"][3].update(learning_rate=object()), r"\$.parts\[3\].learning_rate is "
     r"<object"),
])
def test_what_is_refused(change, message):
    config = json.loads(json.dumps(GOOD))
    change(config)
    with pytest.raises(ValueError, match=message):
        lionax.from_config(config)


def test_nesting_has_a_limit():
    config = {"type": "Identity"}
    for _ in range(100):
        config = {"type": "Chain", "parts": [config]}
    with pytest.raises(ValueError, match="nested more than"):
        lionax.from_config(config)
    with pytest.raises(ValueError, match="not a transformation"):
        lionax.from_config({"type": "PathMask", "patterns": ["a"]})


LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(
    ["", "bfloat16", "(", "registered", "cases", "inf"])
NAMES = st.sampled_from([
    "type", "parts", "b1", "b2", "mask", "patterns", "learning_rate", "max_norm", "value", "name",
    "part", "every", "labels", "entries", "decay", "schedule", "mu_dtype"
])
TYPES = st.sampled_from([*lionax.config._TYPES, "float", "registered", "eval"])
CONFIGS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.builds(
        lambda kind, fields: {**fields, "type": kind}, TYPES,
        st.dictionaries(NAMES, inner, max_size=4)), max_leaves=12)


def built(config):
    """The transformation, or None if it is refused as it should be."""
    try:
        return lionax.from_config(config)
    except ValueError as error:
        if "from_config: $" not in str(error):
            raise
        return None


@given(CONFIGS)
def test_nothing_but_a_transformation_or_a_refusal_comes_of_any_dict(config):
    tx = built(config)
    assert tx is None or lionax.from_config(lionax.to_config(tx)) == tx or "nan" in json.dumps(
        lionax.to_config(tx))


@given(st.data())
def test_a_changed_value_is_refused_or_taken(data):
    config = json.loads(json.dumps(GOOD))
    part = data.draw(st.sampled_from(config["parts"]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(CONFIGS)
    assert isinstance(built(config), lionax.Transformation | None)


def test_an_edited_config_does_not_print_as_the_call_that_it_was():
    config = lionax.to_config(lionax.clip(1.0))
    edited = lionax.from_config({**config, "max_delta": 2.0})
    assert edited == lionax.clip(2.0)
    assert repr(edited) == "Transformation.of(Clip(max_delta=2.0))"
    assert lionax.from_config({"type": "Clip", "max_delta": 2.0}) == edited
    for call in ("x", [], ["x"], [1, 2], {"a": 1}, None):
        assert lionax.from_config({**config, "call": call}) == lionax.clip(1.0)


# Configs of earlier versions

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
STORED = sorted(path.parent.name for path in FIXTURES.glob("*/configs.json"))


def to_store():
    """The config of each case that has one, without the addresses in its ``call``."""
    for name, case in cases.CASES.items():
        with contextlib.suppress(TypeError):
            text = json.dumps(lionax.to_config(case.make()), allow_nan=False)
            yield name, re.sub(" at 0x[0-9a-f]+", "", text)


@pytest.mark.promise("Versions", "What an earlier version wrote as a config loads, equal, and is "
                     "written again as it was.")
@pytest.mark.parametrize("version", STORED)
def test_what_an_earlier_version_wrote_loads(version, figure):
    stored = json.loads((FIXTURES / version / "configs.json").read_text())
    for name, config in stored.items():
        tx = lionax.from_config(config)
        assert tx == cases.CASES[name].make(), name
        assert lionax.to_config(tx) == config, name
    figure("configs", len(stored))
    assert len(stored) >= 40


def test_this_version_has_stored_configs():
    assert lionax.__version__ in STORED


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(name)}: {config}" for name, config in to_store())
    (FIXTURES / lionax.__version__ / "configs.json").write_text(f"{{\n{lines}\n}}\n")
