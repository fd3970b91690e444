"""Bad input is refused at construction or at the first call, with the remedy and the leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
NUMBERS_OUT_OF_RANGE = [
    (lionax.lion, {"learning_rate": 1e-3, "b1": 1.5}, r"scale_by_lion: b1=1.5 is not accepted; "
     r"give a number in \[0, 1\]"),
    (lionax.lion, {"learning_rate": 1e-3, "b2": -0.1}, "scale_by_lion: b2=-0.1"),
    (lionax.lion, {"learning_rate": 1e-3, "b2": np.nan}, "b2=nan"),
    (lionax.lion, {"learning_rate": -1e-3}, "scale_by_learning_rate: learning_rate=-0.001 .* at "
     "least 0 .*flip_sign=False"),
    (lionax.lion, {"learning_rate": 1e-3, "weight_decay": -1.0}, "add_decayed_weights: "
     "weight_decay=-1.0"),
    (lionax.lion, {"learning_rate": 1e-3, "base_learning_rate": 0}, "base_learning_rate=0.0 .* "
     "above 0"),
    (lionax.lion, {"learning_rate": 1e-3, "mu_dtype": jnp.int16},
     "scale_by_lion: mu_dtype=.*int16.* is not accepted"),
    (lionax.lion, {"learning_rate": 1e-3, "mu_dtype": "float99"}, "mu_dtype='float99'"),
    (lionax.lion, {"learning_rate": 1e-3, "mu_dtype": "float8_e8m0fnu"}, "e8m0fnu' is not accep"),
    (lionax.lamb, {"learning_rate": 1e-3, "b1": 1.0}, r"scale_by_adam: b1=1.0 is not accepted; "
     r"give a number in \[0, 1\)"),
    (lionax.lamb, {"learning_rate": 1e-3, "eps": -1e-6}, "scale_by_adam: eps=-1e-06"),
    (lionax.lamb, {"learning_rate": 1e-3, "eps_root": -1.0}, "eps_root"),
    (lionax.sgd, {"learning_rate": 1e-3, "momentum": 1.5}, "trace: decay=1.5"),
    (lionax.sgd, {"learning_rate": 1e-3, "nesterov": True}, "sgd: nesterov=True .* give "
     "momentum=0.9"),
    (lionax.sgd, {"learning_rate": 1e-3, "momentum": 0.9, "nesterov": True,
                  "dampening": 0.1}, "nesterov=True .* dampening=0.1"),
    (lionax.sgd, {"learning_rate": 1e-3, "momentum": 0.9, "dampening": 2.0}, "dampening=2.0"),
    (lionax.trace, {"decay": -0.5}, "trace: decay=-0.5"),
    (lionax.ema, {"decay": 2.0}, "ema: decay=2.0"),
    (lionax.ema, {"decay": 1.0}, "debias"),
    (lionax.params_ema, {"decay": 2.0}, "params_ema: decay=2.0"),
    (lionax.params_ema, {"decay": 0.9, "overwrite_every": 0}, "params_ema: overwrite_every=0 .* at "
     "least 1"),
    (lionax.params_ema, {"decay": 0.9, "overwrite_every": 2.5}, "overwrite_every=2.5"),
    (lionax.clip, {"max_delta": -1.0}, "clip: max_delta=-1.0"),
    (lionax.clip_by_norm, {"max_norm": -1.0}, "clip_by_norm: max_norm=-1.0"),
    (lionax.clip_by_global_norm, {"max_norm": -1.0}, "clip_by_global_norm: max_norm=-1.0"),
    (lionax.scale_by_trust_ratio, {"min_norm": -1.0}, "scale_by_trust_ratio: min_norm=-1.0"),
    (lionax.scale_by_trust_ratio, {"eps": -1.0}, "scale_by_trust_ratio: eps=-1.0"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), NUMBERS_OUT_OF_RANGE)
def test_numbers_out_of_range(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
    arrays = {
        name: np.float32(value) if isinstance(value, float) else value
        for name, value in arguments.items()
    }
    if "overwrite_every" not in arguments:
        with pytest.raises(ValueError):  # noqa: PT011
            make(**arrays)


@pytest.mark.parametrize(("make", "arguments", "message"), [
    (lionax.lion, {"learning_rate": "0.1"}, "learning_rate='0.1' is not accepted"),
    (lionax.lion, {"learning_rate": True}, "learning_rate=True is not accepted"),
    (lionax.lion, {"learning_rate": jnp.ones(2)}, "learning_rate"),
    (lionax.lion, {"learning_rate": 1j}, "learning_rate"),
    (lionax.lion, {"learning_rate": 1e-3, "b1": None}, "b1=None"),
    (lionax.lion, {"learning_rate": 1e-3, "b3": 0.9}, r"lion: got an unexpected keyword argument "
                                                      r"'b3'; the signature is lion\("),
    (lionax.lion, {}, "lion: missing a required argument: 'learning_rate'"),
    (lionax.scale_by_schedule, {"step_size_fn": 0.1}, "scale_by_schedule: step_size_fn=0.1 is not "
                                                      "a function"),
    (lionax.inject, {"value": optax.constant_schedule(0.1)}, "inject: value="),
])
def test_wrong_kinds(make, arguments, message):
    with pytest.raises(TypeError, match=message):
        make(**arguments)


@pytest.mark.parametrize("combine", [
    lionax.chain, lambda tx: lionax.masked(tx, True), lambda tx: lionax.named_chain(
        ("a", tx)), lambda tx: lionax.partition({"a": tx}, "a")
])
def test_what_is_not_a_transformation(combine):
    with pytest.raises(TypeError, match="is not a gradient transformation; give what a "
                                        "constructor"):
        combine(lionax.lion)


def test_named_chains():
    with pytest.raises(TypeError, match="is not a pair of a name and a transformation"):
        lionax.named_chain(lionax.scale(1.0))
    with pytest.raises(ValueError, match="the name 'a' is given twice"):
        lionax.named_chain(("a", lionax.scale(1.0)), ("a", lionax.scale(1.0)))


@pytest.mark.parametrize("run", [
    lambda tx, p, s, g: tx.update(g, s, p), lambda tx, p, s, g: tx.step(p, s, g),
    lambda tx, p, s, g: jax.jit(tx.step)(p, s, g)
])
def test_shape_and_structure(run):
    tx = lionax.lion(1e-3)
    state = tx.init(PARAMS)
    run = functools.partial(run, tx, PARAMS, state)
    with pytest.raises(ValueError, match=r"gradient of 'dense/kernel' has shape \(3, 1\), the "
                                         r"parameter has shape \(3, 2\)"):
        run({"dense": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(2)}})
    with pytest.raises(ValueError, match="there is no gradient for 'dense/bias'"):
        run({"dense": {"kernel": jnp.ones((3, 2))}})
    with pytest.raises(ValueError, match="there is no parameter for the gradient 'dense/scale'"):
        run({"dense": {**PARAMS["dense"], "scale": jnp.ones(2)}})
    with pytest.raises(ValueError, match="the containers differ"):
        tx.update([jnp.ones(2)], tx.init((jnp.ones(2),)), (jnp.ones(2),))
    with pytest.raises(TypeError, match=r"the leaf 'dense/kernel' is 'a', not an "
                                        r"array|grads\['dense'\]\['kernel'\]"):
        run({"dense": {"kernel": "a", "bias": jnp.ones(2)}})


def test_a_gradient_for_an_absent_parameter():
    tx = lionax.scale(1.0)
    with pytest.raises(ValueError, match=r"the gradient of 'a' has shape .* the parameter is None"):
        tx.update({"a": jnp.ones(2)}, tx.init({"a": None}), {"a": None})


def test_the_shape_of_the_state():
    tx = lionax.trace(0.9)
    with pytest.raises(ValueError, match=r"trace: the gradient of 'w' has shape \(2,\), its state "
                                         r".*\(3,\)"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match="trace: its state does not have the structure of the "
                                         "gradients"):
        tx.update({"v": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


def test_a_state_of_another_transformation():
    with pytest.raises(TypeError, match=r"the state is a tuple, not a lionax State; make it with "
                                        r"tx.init"):
        lionax.lion(1e-3).update(PARAMS, optax.lion(1e-3).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="it was made by another transformation"):
        lionax.lion(1e-3).update(PARAMS, lionax.lamb(1e-3).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="it was made by another transformation"):
        lionax.lion(1e-3).update(
            PARAMS,
            lionax.chain(lionax.clip(1.0), lionax.lion(lionax.inject(1e-3))).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="the state was made by another transformation"):
        lionax.lion(1e-3, b1=lionax.inject(0.9)).update(PARAMS,
                                                        lionax.lion(1e-3).init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "make", [lionax.lion, lionax.lamb, lionax.sgd, lambda rate: lionax.clip_by_global_norm(1.0)])
@pytest.mark.parametrize(("leaf", "remedy"),
                         [(jnp.array([1, 2]), "lionax.masked or lionax.partition"),
                          (jnp.array([True]), "lionax.masked")])
def test_leaves_that_are_not_floating_point(make, leaf, remedy):
    with pytest.raises(TypeError, match=rf"the parameter 'table' has dtype {leaf.dtype}.*{remedy}"):
        make(1e-3).init({"table": leaf})
    tx = make(1e-3)
    with pytest.raises(TypeError, match=f"'table' has dtype {leaf.dtype}"):
        tx.update({"table": leaf}, tx.init({"table": jnp.zeros(leaf.shape)}))


def test_integer_leaves_can_be_left_out():
    params = {"w": jnp.ones(2), "ids": jnp.arange(3)}
    mask = {"w": True, "ids": False}
    for tx in (lionax.masked(lionax.lion(1e-3), mask),
               lionax.partition({"train": lionax.lion(1e-3), "keep": lionax.set_to_zero()},
                                {"w": "train", "ids": "keep"})):
        state = tx.init(params)
        float0 = np.zeros(3, jax.dtypes.float0)  # what jax.grad(..., allow_int=True) gives
        new, _ = tx.step(params, state, {"w": jnp.ones(2), "ids": float0})
        assert new["ids"].tolist() == [0, 1, 2]
        assert new["ids"].dtype == jnp.int32
        assert float(new["w"][0]) < 1.0


@pytest.mark.parametrize("tx", [
    lionax.lion(1e-3),
    lionax.lamb(1e-3),
    lionax.add_decayed_weights(0.1),
    lionax.scale_by_trust_ratio(),
    lionax.params_ema(0.9),
    lionax.add_decayed_weights(optax.constant_schedule(0.0))
])
def test_missing_parameters(tx):
    with pytest.raises(ValueError, match=r": needs the parameters \(here 'dense/bias'\); call "
                                         r"update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_parameters_are_not_needed_without_decay():
    tx = lionax.lion(1e-3, weight_decay=0.0)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert float(updates["dense"]["bias"][0]) == pytest.approx(-1e-3)


def test_a_schedule_must_return_a_scalar():
    tx = lionax.sgd(lambda step: jnp.ones(2))
    with pytest.raises(ValueError, match=r"scale_by_learning_rate: a schedule must return a "
                                         r"scalar; .* shape \(2,\)"):
        tx.init(PARAMS)


def test_what_is_no_definition():
    with pytest.raises(TypeError, match="is not a definition"):
        lionax.Transformation.of(3).init(PARAMS)
    with pytest.raises(TypeError, match=r"plan: .* is not a lionax transformation"):
        lionax.plan(optax.sgd(0.1), PARAMS)
    with pytest.raises(KeyError, match="the state holds 0 averages"):
        lionax.averaged_params(lionax.lion(1e-3).init(PARAMS))


def test_step_needs_parameters():
    tx = lionax.sgd(0.1)
    with pytest.raises(ValueError, match="step needs the parameters"):
        tx.step(None, tx.init(PARAMS), PARAMS)


def test_a_hyperparameter_set_past_its_form():
    tx = lionax.sgd(0.1)
    state = optax.tree.set(tx.init(PARAMS), learning_rate=0.2)
    with pytest.raises(TypeError, match=r"assign it with lionax\.set_hyperparams"):
        tx.update(PARAMS, state)


def test_clip_refuses_complex_leaves():
    with pytest.raises(TypeError, match=r"clip: .*complex64.*optax\.contrib\.split_real"):
        lionax.clip(1.0).init(jnp.array([1j]))


def stepped(tx, **extra):
    return tx.step(PARAMS, tx.init(PARAMS), PARAMS, **extra)


WRONG_USES = {
    "a rate that is infinite": (lambda: lionax.lion(np.inf), r"learning_rate=inf .* a finite"),
    "a rate that is text": (lambda: lionax.lion("1e-3"), "learning_rate='1e-3' is not accepted"),
    "a schedule of nothing": (lambda: lionax.lion(lambda: 0.1), "with the step alone; .*schedule"),
    "a schedule of two": (lambda: lionax.lion(lambda step, x: 0.1), "with the step alone"),
    "a schedule that gives text": (lambda: stepped(lionax.lion(lambda step: "a")),
                                   "must return a scalar; .* gave 'a'"),
    "a schedule in NumPy": (lambda: jax.jit(lionax.lion(np.cos).step)(
        PARAMS, lionax.lion(0.1).init(PARAMS), PARAMS), r"the schedule .* jax\.numpy"),
    "another system's word": (lambda: lionax.lion(0.1, betas=(0.9, 0.99)),
                              r"unexpected .*'betas'; the signature is lion\(learning_rate, b1=0"),
    "a pair for a number": (lambda: lionax.lion(0.1, b1=(0.9, 0.99)), r"b1=\(0\.9, 0\.99\)"),
    "a keyword with a typo": (lambda: stepped(lionax.accumulate(lionax.lion(0.1), 2), weigth=2.0),
                              "step: .* 'weigth'; did you mean 'weight'"),
    "a keyword of nobody": (lambda: stepped(lionax.lion(0.1), value=2.0), "'value'; it takes none"),
    "an assigned attribute": (lambda: setattr(lionax.lion(0.1), "learning_rate", 0.2),
                              r"is a constant: .*lionax\.set_hyperparams"),
    "a mask of paths": (lambda: stepped(lionax.lion(0.1, mask=lambda path: "bias" in path)),
                        r"mask returned False; .* once, with the tree .*lionax\.matching"),
    "a mask of paths and leaves": (lambda: stepped(lionax.lion(0.1, mask=lambda path, leaf: True)),
                                   "mask failed .*once, with the tree"),
    "a mask of nothing": (lambda: stepped(lionax.lion(0.1, mask=lambda params: None)),
                          "mask returned None"),
    "a list of regular expressions": (lambda: lionax.matching(["bias"]), r"matching: \['bias'\]"),
    "labels in a list": (lambda: lionax.labels(["bias"]), r"labels: \['bias'\] is not a mapping"),
    "labels without a default": (
        lambda: stepped(lionax.partition({"a": lionax.lion(0.1)}, lionax.labels({"bias": "a"}))),
        "matches the leaf 'dense/kernel'; .* default"),
    "arguments in another order": (lambda: lionax.partition("a", {"a": lionax.lion(0.1)}),
                                   "transforms='a' is not a mapping"),
    "a chain of a list": (lambda: lionax.chain([lionax.clip(1.0), lionax.lion(0.1)]),
                          r"unpack it: chain\(\*transformations\)"),
    "a function that makes one": (lambda: lionax.chain(lionax.clip, lionax.lion(0.1)),
                                  "chain: <function clip .* what a constructor"),
    "half a micro-batch": (lambda: lionax.accumulate(lionax.lion(0.1), 2.5), r"every=2\.5"),
    "a weight for each example": (
        lambda: stepped(lionax.accumulate(lionax.lion(0.1), 2), weight=jnp.ones(3)),
        "weight=Array"),
    "a flush that is text": (lambda: stepped(lionax.accumulate(lionax.lion(0.1), 2), flush="no"),
                             "flush='no' .* give one bool"),
    "gradients before the state": (
        lambda: lionax.lion(0.1).step(PARAMS, PARAMS, lionax.lion(0.1).init(PARAMS)),
        r"the state is a dict, .*step\(params, state, grads\)"),
    "Optax's state": (lambda: lionax.lion(0.1).update(PARAMS, optax.lion(0.1).init(PARAMS), PARAMS),
                      r"the state is a tuple, .*lionax\.compat\.from_optax"),
    "a transformation for its state": (
        lambda: lionax.cast_state(lionax.lion(0.1), lionax.lion(0.1).init(PARAMS)),
        "cast_state: state is a transformation"),
    "a mode of nobody": (lambda: lionax.scale_by_lion(mode="soft"), "give 'hard', 'smooth'"),
    "axes as text": (lambda: lionax.scale_by_trust_ratio(batch_axes="0"), r"such as \(0,\)"),
}


@pytest.mark.parametrize("name", WRONG_USES)
def test_a_wrong_use_is_refused_in_words_that_help(name):
    use, message = WRONG_USES[name]
    with pytest.raises((TypeError, ValueError, AttributeError), match=f"(?s){message}") as caught:
        use()
    assert len(str(caught.value).splitlines()) <= 12
    assert len(str(caught.value)) <= 700


def test_update_ignores_an_unknown_keyword():
    tx = lionax.lion(0.1)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    optax.chain(tx).update(PARAMS, optax.chain(tx).init(PARAMS), PARAMS, value=1.0)


def test_what_takes_any_keyword_is_given_it():
    seen = []
    any_keyword = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, **extra: (seen.append(extra), (updates, state))[1])
    stepped(lionax.chain(any_keyword, lionax.sgd(0.1)), loss=1.0)
    assert seen == [{"loss": 1.0}]
