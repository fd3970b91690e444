"""Transformations as JSON, and back. No code runs from a dict.

A definition is data, so its config is its fields: ``{"type": "ScaleByLion", "b1": 0.9, ...}``,
nested where definitions nest. Only what is in the table of types, and schedules registered by name,
can be named in a dict.
"""

import dataclasses
import json
import math
import types
import typing
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lionax.compat import keras3, keras_parts, keras_schedules, tf_models
from lionax.core import hyperparameters
from lionax.core.counting import LARGEST_COUNT
from lionax.core.definition import Foreign, Sharded
from lionax.core.hyperparameters import Injected
from lionax.core.masks import PathLabels, PathMask, PathTree
from lionax.core.patterns import check_bounded
from lionax.core.rule import Definition, Rule
from lionax.core.storage import Storage, StorageByPath
from lionax.core.table import shown
from lionax.core.transformation import Transformation
from lionax.transforms import (
    accumulation,
    adaptive,
    averaging,
    clipping,
    combining,
    conditional,
    decay,
    low_precision,
    majority_vote,
    measuring,
    momentum,
    scaling,
    sign_momentum,
)

__all__ = ["from_config", "register_rule", "register_schedule", "to_config"]

DEEPEST = 32  # how far definitions may be nested in a dict

_TYPES: dict[str, type] = {cls.__name__: cls for cls in (
    accumulation.Accumulate, adaptive.ScaleByAdam, adaptive.ScaleByTrustRatio, averaging.ParamsEma,
    clipping.Clip, clipping.ClipByGlobalNorm, clipping.ClipByNorm, combining.Chain,
    combining.Identity, combining.Masked, combining.NamedChain, combining.Partition,
    combining.SetToZero, conditional.DynamicLossScale, conditional.SkipIf, conditional.Unscale,
    decay.AddDecayedWeights, low_precision.MasterWeights, majority_vote.CountVotes,
    majority_vote.MajorityVoteLion, measuring.Monitor, momentum.Ema, momentum.Trace,
    scaling.Scale, scaling.ScaleByLearningRate, sign_momentum.ScaleByLion, Sharded, Storage,
    StorageByPath, tf_models.ZeroNorm, Injected, hyperparameters.Interval, PathLabels, PathMask,
    PathTree, keras_parts.Decayed, keras_parts.EveryWindow, keras_parts.FirstCopies,
    keras_parts.KerasAverage, keras3.Shrunk, tf_models.InverseTime, keras_schedules.CosineDecay,
    keras_schedules.ExponentialDecay, keras_schedules.InverseTimeDecay,
    keras_schedules.PiecewiseConstantDecay, keras_schedules.PolynomialDecay)}
_SCHEDULES = (keras_schedules.Schedule, keras_parts.EveryWindow, keras_parts.FirstCopies,
              keras3.Shrunk, tf_models.InverseTime)
_registered: dict[str, Callable[[Any], Any]] = {}


def register_rule(cls: type[Rule]) -> type[Rule]:
    """Lets configs name a rule of one's own, by the name of its class. Works as a decorator.

    Args:
      cls: a frozen dataclass derived from `Rule`. Registered again, as a notebook cell that runs
        twice does, the new class replaces the old one.

    Returns:
      The class.

    Raises:
      TypeError: for what is not such a class.
      ValueError: for a name that one of lionax's own rules has.

    >>> import dataclasses, lionax
    >>> @lionax.register_rule
    ... @dataclasses.dataclass(frozen=True)
    ... class Negate(lionax.Rule):
    ...     def apply(self, update, slots, param, step):
    ...         return -update, slots
    >>> lionax.to_config(lionax.Transformation.of(Negate()))["type"]
    'Negate'
    """
    is_rule = isinstance(cls, type) and issubclass(cls, Rule) and dataclasses.is_dataclass(cls)
    if not is_rule or "__dataclass_params__" not in vars(cls):
        raise TypeError(f"register_rule: {cls!r} is not a frozen dataclass derived from "
                        "lionax.Rule; write @dataclasses.dataclass(frozen=True) above the class")
    known = _TYPES.get(cls.__name__)
    if known is not None and known.__module__.startswith("lionax."):
        raise ValueError(f"register_rule: {cls.__name__} is the name of a rule of lionax; give the "
                         "class another name")
    _TYPES[cls.__name__] = cls
    return cls


def register_schedule(name: str, schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Gives a schedule a name by which configs know it.

    Args:
      name: what stands in the dict.
      schedule: a function of the step. Registered again under the same name, it replaces the old
        one.

    Returns:
      The schedule.

    Raises:
      TypeError: for what is not a function or a name that is not a string.

    >>> import lionax, optax
    >>> rate = lionax.register_schedule("warm_up", optax.linear_schedule(0.0, 1e-3, 100))
    >>> lionax.from_config(lionax.to_config(lionax.lion(rate))) == lionax.lion(rate)
    True
    """
    if not isinstance(name, str) or not callable(schedule):
        raise TypeError(f"register_schedule: {name!r}, {schedule!r} are not a name and a function "
                        "of the step")
    _registered[name] = schedule
    return schedule


def to_config(tx: Transformation) -> dict[str, Any]:
    """A dict, fit for JSON, from which `from_config` builds an equal transformation.

    Args:
      tx: made of lionax's own parts. Masks that are functions and Optax's transformations have no
        config.

    Raises:
      TypeError: for what has none; the message tells where it is and the remedy.

    >>> import lionax
    >>> config = lionax.to_config(lionax.clip(1.0))
    >>> config["type"], config["max_delta"], config["call"][0]
    ('Clip', 1.0, 'clip(max_delta=1.0)')
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"to_config: {tx!r} is not a lionax transformation")
    config = _encode(tx.definition, "$")
    return {**config, "call": [repr(tx), _checksum(config)]}


def _checksum(config: Any) -> int:
    """A number that differs where a config was edited, and the call that it tells is another."""
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"type": "float", "value": repr(value)}
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Storage) and value == Storage(value.dtype) != Storage():
        return _encode(value.dtype, where)
    if _TYPES.get(type(value).__name__) is type(value):
        fields = {
            f.name: _encode(getattr(value, f.name), f"{where}.{f.name}")
            for f in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, **fields}
    name = next((name for name, schedule in _registered.items() if schedule is value), None)
    if name is not None:
        return {"type": "registered", "name": name}
    remedy = ("wrap only lionax's own transformations" if isinstance(value, Foreign) else
              "name a schedule with lionax.register_schedule(name, schedule), and give masks as "
              "lionax.matching(...) or a tree of bools")
    raise TypeError(f"to_config: {where} is {value!r}, which has no config; {remedy}")


def from_config(config: dict[str, Any]) -> Transformation:
    """The transformation that a dict of `to_config` describes.

    Args:
      config: as `to_config` gives it, also after a passage through JSON. Nothing in it is executed.

    Raises:
      ValueError: for unknown types, unknown, missing or unfit fields, and nesting past a limit; the
        message tells where.

    >>> import json, lionax
    >>> tx = lionax.lion(1e-3, mask=lionax.not_matching("bias"))
    >>> lionax.from_config(json.loads(json.dumps(lionax.to_config(tx)))) == tx
    True
    """
    written, fields = None, config
    if isinstance(config, dict):
        written = config.get("call")
        fields = {key: value for key, value in config.items() if key != "call"}
    definition = _decode(fields, "$", 0)
    if not isinstance(definition, Definition):
        raise ValueError(f"from_config: $ is a {type(definition).__name__}, not a transformation")
    if isinstance(written, list) and [*map(type, written)] == [str, int] and (
            written[1] == _checksum(fields)):
        return Transformation.of(definition, written[0])
    return Transformation.of(definition)


def _decode(value: Any, where: str, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"from_config: {where} is nested more than {DEEPEST} deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_decode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    if not isinstance(value, dict):
        raise ValueError(f"from_config: {where} is {shown(value)}; a number, string, list or dict "
                         "is accepted")
    if not all(isinstance(name, str) for name in value):
        raise ValueError(f"from_config: {where} has the keys {shown(list(value))}; strings are "
                         "accepted")
    kind = value.get("type")
    fields = {name: item for name, item in value.items() if name != "type"}
    if kind == "float" and fields.get("value") in ("inf", "-inf", "nan"):
        return float(fields["value"])
    if kind == "registered" and isinstance(fields.get("name"), str):
        if fields["name"] not in _registered:
            raise ValueError(f"from_config: {where}: no schedule is registered as "
                             f"{shown(fields['name'])}; register it before, with "
                             "lionax.register_schedule")
        return _registered[fields["name"]]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"from_config: {where}.type is {shown(kind)}; known are "
                         f"{', '.join(sorted(_TYPES))}")
    return _build(_TYPES[kind], fields, where, depth)


def _build(cls: type, fields: dict[str, Any], where: str, depth: int) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            field = shown(name).strip("'")
            raise ValueError(f"from_config: {where}.{field} is not a field of {cls.__name__}; it "
                             f"has {', '.join(known)}")
    values = {name: _decode(item, f"{where}.{name}", depth + 1) for name, item in fields.items()}
    for name, item in values.items():
        if _is_number(item) and abs(item) > LARGEST_COUNT and name != "seed":
            values[name] = item = _as_float(item, f"{where}.{name}")  # JAX takes no such int
        if not _fits(item, known[name]):
            raise ValueError(f"from_config: {where}.{name}={shown(item)} is not accepted by "
                             f"{cls.__name__}")
    for pattern in _patterns(cls, values):
        check_bounded(pattern, f"from_config: {where}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"from_config: {where}: {error}") from None


def _as_float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"from_config: {where} is {shown(value)}, which no float can be") from None


def _patterns(cls: type, values: dict[str, Any]) -> Sequence[Any]:
    """The regular expressions in the fields of a mask, of labels or of a storage by path."""
    if issubclass(cls, PathMask):
        return values.get("patterns", ())
    is_by_path = issubclass(cls, PathLabels | StorageByPath)
    return [regex for regex, _ in values.get("rules", ())] if is_by_path else ()


def _fits(value: Any, field: dataclasses.Field) -> bool:
    """Whether a decoded value is of the field's kind; the constructor checks its range."""
    if field.name in ("mask", "labels"):
        return isinstance(value, PathMask | PathTree | PathLabels)
    if "scalar" in field.metadata or field.name in ("schedule", "rate"):
        is_registered = any(value is schedule for schedule in _registered.values())
        is_known = is_registered or isinstance(value, (Injected, *_SCHEDULES))
        return value is None or _is_number(value) or is_known
    if field.name.endswith("_dtype"):
        return isinstance(value, str | Storage | StorageByPath | None)
    return _is_a(value, field.type)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(value: Any, annotation: Any) -> bool:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, part) for part in parts)
    if origin is Callable:
        return callable(value)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_is_a(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(
            _is_a(item, part) for item, part in zip(value, parts, strict=True))
    if annotation is float:
        return _is_number(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is Any:
        return value is None or isinstance(value, bool | int | float | str | tuple | Storage)
    return isinstance(value, type(None) if annotation is None else annotation)
