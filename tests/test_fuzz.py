"""Hostile arguments, configs and regular expressions: refused in words, or taken."""

import contextlib
import inspect
import json
import re

import cases
import fuzz
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
import test_compat
import test_config

import lionax
from lionax.core import patterns

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
INDEX = st.integers(0, 10**6)


def stepped(tx):
    """Two steps on a small tree; their parameters and state keep structure, shapes and dtypes."""
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = tx.step(params, state, PARAMS)
    cases.assert_equal(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, PARAMS))
    return state


# Constructors

def makers():
    """The public functions that make a transformation, with good arguments."""
    inner = lionax.sgd(0.1)
    good = {"learning_rate": 0.1, "tx": inner, "inner": inner, "every": 2, "max_consecutive": 2,
            "predicate": lambda updates, params: False, "max_delta": 1.0, "max_norm": 1.0,
            "step_size": 0.1, "step_size_fn": lambda step: 0.1, "decay": 0.9, "factor": 2.0,
            "transforms": {"a": inner}, "param_labels": "a", "mask": True, "axis_name": "x",
            "specs": None}
    modules = (lionax, lionax.compat.keras2, lionax.compat.keras3, lionax.compat.tf_models)
    for module in modules:
        for name in module.__all__:
            make = getattr(module, name)
            returns = inspect.signature(make).return_annotation if inspect.isfunction(make) else 0
            is_public = module is lionax or name[0].isupper()
            if returns is lionax.Transformation and is_public and name != "from_config":
                parameters = [p for p in inspect.signature(make).parameters.values()
                              if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                yield make, [p.name for p in parameters], {
                    p.name: good[p.name] for p in parameters if p.default is p.empty}


MAKERS = list(makers())


def values():
    """All hostile values."""
    return [*fuzz.NUMBERS, *fuzz.STRINGS, *fuzz.ARRAYS, *fuzz.OBJECTS, *fuzz.device_values(),
            lionax.inject(0.5), lionax.matching("w"), lionax.Storage("int8"), jnp.cos,
            {"w": True, "b": False}, {"w": "a"}, {"w": {"(": 1}}, lionax.labels({"w": "a"}, "b")]


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "A constructor refuses what it does not take, in "
                     "words, and what it takes survives two steps.")
def test_arguments(figure):
    hostile = values()
    with fuzz.watched(figure) as watch:
        @fuzz.each(600, 36_000, st.sampled_from(MAKERS), INDEX, INDEX, INDEX)
        def _(maker, where, which, others):
            make, names, arguments = maker
            for name, value in ((where, which), (others, others)) if others % 2 else (
                    (where, which),):
                if names:
                    arguments = arguments | {names[name % len(names)]: hostile[value %
                                                                               len(hostile)]}
            given = [] if names else [hostile[which % len(hostile)]]
            tx = watch.run(lambda: make(*given, **arguments))
            if tx is not None and others % 8 == 0:
                watch.run(stepped, tx)


@pytest.mark.promise("Hostile definitions", "A counter's limit beyond int32 is refused.")
@pytest.mark.parametrize("make", [
    lambda n: lionax.params_ema(0.0, overwrite_every=n),
    lambda n: lionax.accumulate(lionax.sgd(0.1), n),
    lambda n: lionax.skip_nonfinite(lionax.sgd(0.1), n),
    lambda n: lionax.monitor(lionax.sgd(0.1), every=n),
    lambda n: lionax.dynamic_loss_scale(lionax.sgd(0.1), growth_interval=n)])
def test_counts(make):
    for count in (2**31, 2**70, 10**5000):
        with pytest.raises(ValueError, match=r"is not accepted; give an int below 2\^31"):
            make(count)
    assert make(2**31 - 1).definition


# Configs

def configs():
    """The configs of the table of cases and of other systems' constructors."""
    makes = [*(case.make for case in cases.CASES.values()),
             *(lambda tx=tx: tx for tx in test_config.MORE.values()),
             *(lambda name=name: test_compat.make(test_compat.OURS[name])
               for name in test_compat.REPLAYED)]
    for make in makes:
        with contextlib.suppress(TypeError):
            yield json.loads(json.dumps(lionax.to_config(make())))


def nested(depth, wrap, core):
    for _ in range(depth):
        core = wrap(core)
    return core


PARTS = [
    nested(10_000, lambda node: {"type": "Chain", "parts": [node]}, {"type": "Identity"}),
    nested(10_000, lambda node: [node], []), list(range(100_000)),
    {"type": "Chain", "parts": [{"type": "Identity"}] * 1000},
    *({"type": name} for name in ("Identity", "__class__", "object", "Foreign", "State", "Rule")),
    {"type": "float", "value": "nan"}, {"type": "float", "value": "1e5"},
    {"type": "registered", "name": "cases"}, {"type": "registered", "name": "__init__"},
    {"type": "Injected", "value": 10**400}, {"type": "Injected", "value": "x"},
    {"type": "Interval", "low": 5, "high": -5}, {"type": "PathMask", "patterns": ["(a|a)*b"]},
    {"type": "PathMask", "patterns": ["w"]}, {"type": "Decayed", "patterns": ["("]},
    {"type": "StorageByPath", "rules": [["(a*)*", "int8"]]},
    {"type": "StorageByPath", "rules": [["w", "int8"]]},
    {"type": "PathLabels", "rules": [["(", "a"]]},
    {"type": "PiecewiseConstantDecay", "boundaries": [2**70], "values": [0.1, 0.2]},
    {"type": "CosineDecay", "initial_learning_rate": 0.1, "decay_steps": 2**70},
    {"type": "CosineDecay", "initial_learning_rate": 0.1, "decay_steps": 10},
    {"type": "ExponentialDecay", "initial_learning_rate": 10**400, "decay_steps": 10,
     "decay_rate": 2},
    {"type": "EveryWindow", "schedule": {"type": "registered", "name": "cases"}, "calls": 2**70},
    {"type": "EveryWindow", "schedule": 5, "calls": 2}, {"type": "Storage", "seed": 10**5000},
    [[["a"], True]], [["a", "b"]]]
NAMES = ["b1", "x", "__class__", "__init__", "type", 5, None, "mask", "calls", "call", "value"]


def mutated(config, where, which, how):
    """A config with a node replaced, dropped, or under another name."""
    hostile = [*PARTS, *fuzz.NUMBERS, *fuzz.STRINGS, b"x", object()]
    places = fuzz.places(config)
    path = places[where % len(places)]
    parent = path[:-1]
    if how % 5 == 3 and path and isinstance(path[-1], str):
        return fuzz.put(config, parent, lambda node: {
            key: value for key, value in node.items() if key != path[-1]})
    if how % 5 == 4 and path and isinstance(path[-1], str):
        return fuzz.put(config, parent, lambda node: {
            **node, NAMES[which % len(NAMES)]: node[path[-1]]})
    return fuzz.put(config, path, lambda node: hostile[which % len(hostile)])


def loaded(config, steps):
    """What a config gives goes there and back, and steps."""
    tx = lionax.from_config(config)
    again = lionax.from_config(lionax.to_config(tx))
    assert again == tx or "nan" in repr(tx.definition)
    hash(tx)
    if steps:
        stepped(tx)
    return tx


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "A config gives a transformation or is refused; "
                     "nothing in it runs.")
def test_configs(figure):
    good = list(configs())
    with fuzz.watched(figure) as watch:
        @fuzz.each(600, 26_000, st.sampled_from(good), INDEX, INDEX, INDEX, st.integers(1, 3))
        def _(config, where, which, how, times):
            if how % 3 == 0:
                config = {key: value for key, value in config.items() if key != "call"}
            for i in range(times):
                config = mutated(config, where + 7 * i, which + 11 * i, how + i)
            watch.run(loaded, config, how % 16 == 0)


# Regular expressions

LETTERS = st.sampled_from(["a", "b", "/", ".", r"\w", r"\d", "[a-z]", "[^/]", "^", "$", "ab", "(",
                           "(?i)", r"\1", "(?P<n>a)", "(?=a)", "[\0-\U0010ffff]", "(?<=a)", r"\b",
                           ")"])
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{0,9}", "{3}", "{2,}", "{,999999}", "++",
                           "{99999999999999}", "*+"])
PATTERNS = st.recursive(LETTERS, lambda inner: st.one_of(
    st.builds("{}{}".format, inner, REPEATS), st.builds("({})".format, inner),
    st.builds("({}){}".format, inner, REPEATS), st.builds("({}|{})".format, inner, inner),
    st.builds("(?:{}|{}){}".format, inner, inner, REPEATS), st.builds("(?={})".format, inner),
    st.builds("{}{}".format, inner, inner), st.builds(lambda x, n: x * n, inner,
                                                      st.integers(1, 200))), max_leaves=10)
PATHS = ["a" * 60, "ab" * 30, "block/0/attention/query/kernel" * 3, "a/" * 40 + "b"]


def searched(pattern):
    """A mask out of a config, on long paths of one letter, which make `re` go back most often."""
    mask = {"type": "PathMask", "patterns": [pattern], "missing_ok": True}
    tx = lionax.from_config({"type": "Masked", "part": {"type": "Identity"}, "mask": mask})
    tx.definition.mask(dict.fromkeys(PATHS, 1.0))


@pytest.mark.slow
@pytest.mark.promise("Hostile definitions", "The search for a regular expression out of a config "
                     "ends, or it is refused.")
def test_regular_expressions(figure):
    with fuzz.watched(figure) as watch:
        @fuzz.each(400, 20_000, PATTERNS)
        def _(pattern):
            watch.run(searched, pattern)


ENDLESS = ["(a+)+b", "(a*)*", "(a|a)*b", "(a|ab)*c", "((a{2}){3})+", "(?:){1000000}", "(?:a?){9}b",
           r"(a)\1", "(?P<n>a)(?P=n)", "(a)?(?(1)b|c)", "[\0-\U0010ffff]", "a*a*a*a*b", "a?" * 30,
           "(?:aa|a)" * 20, "(a+)?+(b+)*"]


@pytest.mark.promise("Hostile definitions", "The search for a regular expression out of a config "
                     "ends, or it is refused.")
def test_bounded_patterns(figure):
    for pattern in ("(^|/)bias$", r"^encoder/.*/layer_\d+/.*bias$", "(bias|scale|norm)", "(?i)Bias",
                    r"block_\d+/(attn|mlp)/.*kernel$", "[^/]+/(layer_\\d+/)?w", "(?<!a)b", "a{3}"):
        patterns.check_bounded(pattern, "mask")
        figure("accepted", 1)
    for pattern in ENDLESS:
        with pytest.raises(ValueError, match=r"mask: .* accepted in a config.*lionax\.matching"):
            patterns.check_bounded(pattern, "mask")
        figure("refused", 1)
    for pattern in ("(", "a" * 1001, "(" * 500 + ")" * 500, "a{99999999999999}", 5):
        with pytest.raises(ValueError, match=r"mask: .*regular expression"):
            patterns.check_bounded(pattern, "mask")
    assert lionax.matching("(a+)+b")({"ab": 1.0})["ab"]  # Python code may give any


def test_what_is_used_of_the_parser_of_re_is_there():
    """`re._parser` is not public."""
    found = str(re._parser.parse(r"^(a|bc)[d-f]*(?=g)(?>h)i??").data)
    for name in ("AT", "BRANCH", "IN", "RANGE", "MAX_REPEAT", "MIN_REPEAT", "SUBPATTERN", "ASSERT",
                 "ATOMIC_GROUP", "LITERAL"):
        assert f"({name}, " in found
    assert re._parser.parse("a*").getwidth()[0] == 0
