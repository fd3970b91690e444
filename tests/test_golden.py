"""Recorded runs of the reference optimizers, replayed. `tests/golden/README.md` has the format."""

import functools
import json
import pathlib
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

pytestmark = pytest.mark.usefixtures("standard_promotion")
GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
ENTRIES = {f"{entry['system']}/{entry['config']}": entry for entry in CONFIG["entries"]}
SHAPES = {name: tuple(CONFIG["shapes"][name]) for name in CONFIG["param_order"]}


def split(flat: np.ndarray) -> dict[str, np.ndarray]:
    """A recorded row as a tree."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1]
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(SHAPES.items(), np.split(flat, ends), strict=True)
    }


def schedule_of(spec: Any) -> Any:
    """A schedule as the trace describes it, in Optax's words; numbers as they are."""
    if not isinstance(spec, dict):
        return spec
    spec = dict(spec)
    if "tensor" in spec:
        return jnp.float32(spec["tensor"])
    kind = spec.pop("schedule")
    if kind == "ExponentialDecay":
        return optax.exponential_decay(spec["initial_learning_rate"], spec["decay_steps"],
                                       spec["decay_rate"])
    if kind == "CosineDecay":
        return optax.warmup_cosine_decay_schedule(spec["initial_learning_rate"],
                                                  spec["warmup_target"], spec["warmup_steps"],
                                                  spec["warmup_steps"] + spec["decay_steps"],
                                                  spec["alpha"] * spec["warmup_target"])
    if kind == "PiecewiseConstantDecay":  # Keras keeps a value up to and including its boundary
        boundaries, values = jnp.array(spec["boundaries"]), jnp.array(spec["values"], jnp.float32)
        return lambda step: values[jnp.searchsorted(boundaries, step, side="left")]
    if kind == "piecewise_constant_schedule":
        spec["boundaries_and_scales"] = {
            int(k): v for k, v in spec["boundaries_and_scales"].items()
        }
    return getattr(optax, kind)(**spec)


def by_call(entry: dict) -> Any:
    """The learning rate that was assigned before each call, as a schedule."""
    rates = jnp.array(entry["lr_by_call"], jnp.float32)
    return lambda step: rates[step]


def mask_of(spec: Any) -> Any:
    """The leaves that decay, from the trace's description."""
    if isinstance(spec, list):
        return {name: name in spec for name in SHAPES}
    if "prefix" in spec:  # recorded on a nested tree, here the first part of the name
        return {name: spec["prefix"][name.split("/")[0]] for name in SHAPES}
    assert spec == {"callable": "ndim>=2"}
    return lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)


def from_optax(entry: dict) -> lionax.Transformation:
    args = {
        name: schedule_of(value) if name in ("learning_rate", "weight_decay") else value
        for name, value in entry["ctor"].items()
    }
    if "mask" in args:
        args["mask"] = mask_of(args["mask"])
    tx = lionax.lion(**args)
    wrapped = entry.get("wrapped_in", {})
    if "clip_by_block_rms" in wrapped:
        return lionax.chain(optax.clip_by_block_rms(wrapped["clip_by_block_rms"]), tx)
    if "MultiSteps" in wrapped:
        return optax.MultiSteps(tx, wrapped["MultiSteps"]).gradient_transformation()
    return tx


def from_lion_pytorch(entry: dict) -> lionax.Transformation:
    args = entry["ctor"]
    rate = args.get("lr", 1e-4)
    b1, b2 = args.get("betas", (0.9, 0.99))
    return lionax.lion(
        by_call(entry) if "lr_by_call" in entry else rate, b1, b2,
        weight_decay=args.get("weight_decay", 0.0),
        base_learning_rate=rate if args.get("decoupled_weight_decay") else None)


def from_torch_sgd(entry: dict) -> lionax.Transformation:
    args = entry["ctor"]
    undecayed = {
        name for group in entry.get("param_groups", []) if group["weight_decay"] == 0
        for name in group["params"]
    }
    rate = by_call(entry) if "lr_by_call" in entry else args.get("lr", 1e-3)
    tx = lionax.sgd(rate, args.get("momentum"), args.get("nesterov", False),
                    dampening=args.get("dampening",
                                       0.0), weight_decay=args.get("weight_decay", 0.0),
                    mask={name: name not in undecayed for name in SHAPES})
    clipped = entry.get("gradients_clipped_before_step", {})
    return lionax.chain(lionax.clip_by_global_norm(clipped["clip_grad_norm_"]),
                        tx) if clipped else tx


def from_keras3(entry: dict, optimizer: Any) -> lionax.Transformation:
    """Keras: decay times the rate, before the optimizer; then clipping; then the average."""
    args = {name: value for name, value in entry["ctor"].items() if value is not None}
    excluded = entry.get("exclude_from_weight_decay", {})
    keep = {
        path: not any(part in name for part in excluded.get("var_names", [])) and
        path not in excluded.get("var_list", []) for path, name in entry["variable_names"].items()
    }
    clips = [
        clip(args[name])
        for name, clip in (("clipnorm", lionax.clip_by_norm), ("clipvalue", lionax.clip),
                           ("global_clipnorm", lionax.clip_by_global_norm))
        if args.get(name)
    ]
    return lionax.chain(*clips, optimizer(args, keep))


def keras3_lion(args: dict, keep: dict) -> lionax.Transformation:
    return lionax.lion(schedule_of(args.get("learning_rate", 1e-3)), args.get("beta_1", 0.9),
                       args.get("beta_2", 0.99), weight_decay=args.get("weight_decay", 0.0),
                       mask=keep)


def keras3_sgd(args: dict, keep: dict) -> lionax.Transformation:
    # The decay acts on the parameter beside the momentum, as with SGDW, but times the whole
    # learning rate.
    return lionax.chain(
        lionax.trace(args["momentum"], args.get("nesterov", False))
        if args.get("momentum") else lionax.identity(),
        lionax.add_decayed_weights(args.get("weight_decay", 0.0), keep),
        lionax.scale_by_learning_rate(schedule_of(args.get("learning_rate", 0.01))))


def keras3_lamb(args: dict, keep: dict) -> lionax.Transformation:
    return lionax.chain(
        lionax.scale_by_adam(args.get("beta_1", 0.9), args.get("beta_2", 0.999),
                             args.get("epsilon", 1e-7)), lionax.scale_by_trust_ratio(),
        lionax.add_decayed_weights(args.get("weight_decay", 0.0), keep),
        lionax.scale_by_learning_rate(schedule_of(args.get("learning_rate", 1e-3))))


KERAS_SCHEDULES = ("PiecewiseConstantDecay", "ExponentialDecay", "CosineDecay")
SYSTEMS = {"optax_lion": from_optax, "lion_pytorch": from_lion_pytorch, "torch_sgd": from_torch_sgd,
           "keras3_lion": functools.partial(from_keras3, optimizer=keras3_lion),
           "keras3_sgd": functools.partial(from_keras3, optimizer=keras3_sgd),
           "keras3_lamb": functools.partial(from_keras3, optimizer=keras3_lamb)}


def needs_a_keras_constructor(entry: dict) -> bool:
    """Accumulation, averages, loss scales, late exclusions, norms of NaN: Keras has own rules."""
    args, rate = entry["ctor"], entry["ctor"].get("learning_rate")
    return entry["system"].startswith("keras3") and (
        any(
            args.get(name)
            for name in ("gradient_accumulation_steps", "use_ema", "loss_scale_factor")) or
        "exclude_after_build" in entry or bool(entry["non_finite"]) or
        (isinstance(rate, dict) and rate.get("schedule") not in KERAS_SCHEDULES))


REPLAYED = [
    name for name, entry in ENTRIES.items()
    if entry["system"] in SYSTEMS and entry["file"] and not needs_a_keras_constructor(entry)
]
REFUSED = [
    name for name, entry in ENTRIES.items()
    if entry["system"] in ("optax_lion", "torch_sgd") and not entry["file"]
]


@pytest.mark.one_in(2)
@pytest.mark.promise("Exact", "Recorded runs of Keras 3, PyTorch, lion-pytorch and Optax are "
                     "replayed")
@pytest.mark.parametrize(("name", "mode"), [
    pytest.param(name, mode, marks=() if mode == "jitted step" and i % 4 == 1 else pytest.mark.slow)
    for i, name in enumerate(REPLAYED)
    for mode in ("step", "jitted step", "update", "jitted update")
])
def test_replay(name, mode, figure):
    entry = ENTRIES[name]
    with np.load(GOLDEN / entry["file"]) as recorded:
        trace = {key: recorded[key] for key in recorded.files}
    tx = SYSTEMS[entry["system"]](entry)
    if mode.endswith("step") and not isinstance(tx, lionax.Transformation):
        tx = lionax.chain(tx)
    params = {
        k: jnp.asarray(v, entry.get("params_dtype", "float32"))
        for k, v in split(trace["init"]).items()
    }
    tolerance = 2e-5 if "lamb" in name else 2e-6
    if entry.get("params_dtype") == "bfloat16":
        tolerance = 2.0**-6  # two units in the last place: Optax rounds weight_decay·p, too

    def by_update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return lionax.apply_updates(params, updates), state

    step = tx.step if mode.endswith("step") else by_update
    step = jax.jit(step) if mode.startswith("jitted") else step
    state, error = tx.init(params), 0.0
    for call in range(CONFIG["steps"]):
        absent = entry.get("none_gradient", {}).get(str(call), [])
        grads = {
            k: None if k in absent else jnp.asarray(v)
            for k, v in split(trace["grad"][call]).items()
        }
        params, state = step(params, state, grads)
        for leaf, expected in split(trace["param"][call]).items():
            actual = np.asarray(params[leaf]).astype(np.float32)
            largest = np.max(np.abs(expected), initial=0.0)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest,
                                       err_msg=f"{leaf} after call {call}")
            error = max(error, cases.largest_error(actual, expected, largest))
    figure("calls", CONFIG["steps"])
    figure(f"largest error in {entry.get('params_dtype', 'float32')}", error)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reference_refuses_is_refused(name):
    entry = ENTRIES[name]
    with pytest.raises((ValueError, TypeError), match=r"momentum|learning_rate"):
        SYSTEMS[entry["system"]](entry)


def test_enough_traces_are_replayed():
    """Every trace of the three systems whose constructors lionax has, and most of Keras 3's."""
    for system in ("optax_lion", "torch_sgd", "lion_pytorch"):
        assert {n for n, e in ENTRIES.items()
                if e["system"] == system and e["file"]} <= set(REPLAYED)
    assert sum(name.startswith("keras3") for name in REPLAYED) >= 22
