"""What the constructors of the Keras family share: exclusions, clips, averages and checks."""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lionax.core.hyperparameters import Scalar, check_count
from lionax.core.rule import Applied, Step
from lionax.core.transformation import Transformation
from lionax.core.tree import PathMask
from lionax.transforms.averaging import ParamsEma, ParamsEmaState
from lionax.transforms.clipping import clip, clip_by_global_norm, clip_by_norm
from lionax.transforms.combining import identity

__all__ = ["Decayed", "EveryWindow", "FirstCopies", "KerasAverage", "check_ema", "check_rate",
           "clipping", "decayed"]


@dataclasses.dataclass(frozen=True)
class Decayed(PathMask):
    """A mask of the leaves that are not excluded. As in Keras, a pattern may match nothing."""

    patterns: tuple[str, ...] = ()  # excluded: regular expressions, searched for in the name
    inverted: bool = True  # whether the excluded are left out, or are the ones that are meant
    paths: tuple[str, ...] = ()  # excluded: whole paths
    named: Literal["path", "path:0", "last"] = "path"  # what the reference calls a leaf

    def __post_init__(self):
        for pattern in self.patterns:
            re.compile(pattern)

    def _excludes(self, path: str) -> bool:
        name = {"path": path, "path:0": f"{path}:0", "last": path.rpartition("/")[2]}[self.named]
        return path in self.paths or any(re.search(pattern, name) for pattern in self.patterns)

    def select(self, names: Sequence[str], present: Sequence[bool], owner: str) -> tuple[bool, ...]:
        return tuple(self._excludes(name) != self.inverted for name in names)

    def opposite(self) -> "Decayed":
        """The mask of the excluded leaves."""
        return dataclasses.replace(self, inverted=not self.inverted)


def decayed(excluded: Mapping[str, Sequence[str]] | None, named: Literal["path", "path:0", "last"],
            owner: str) -> Decayed:
    """The mask from ``{"var_names": [...], "var_list": [...]}``."""
    excluded = {} if excluded is None else excluded
    if not isinstance(excluded, Mapping) or not set(excluded) <= {"var_names", "var_list"}:
        raise ValueError(f"{owner}: exclude_from_weight_decay={excluded!r} is not accepted; give a "
                         "dict with 'var_names' (regular expressions) and 'var_list' (paths of "
                         "leaves)")
    values = {key: excluded.get(key) or () for key in ("var_names", "var_list")}
    for key, value in values.items():
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{owner}: exclude_from_weight_decay[{key!r}]={value!r} is not a list "
                            "of strings")
    return Decayed(tuple(values["var_names"]), True, tuple(values["var_list"]), named)


def check_rate(rate: Scalar, owner: str) -> Scalar:
    """Refuses a function of no arguments: it could not live in a compiled step."""
    if callable(rate) and not isinstance(rate, jax.Array):
        try:
            inspect.signature(rate).bind(0)
        except TypeError:
            raise TypeError(f"{owner}: learning_rate={rate!r} takes no step; a compiled step would "
                            "call it only once. Give a schedule, a function of the step, or assign "
                            "with lionax.set_hyperparams(state, learning_rate=...)") from None
        except ValueError:  # no signature to be had
            pass
    return rate


def check_ema(use_ema: bool, momentum: float, frequency: int | None, owner: str) -> None:
    """The checks of the average's arguments, which Keras makes if ``use_ema``."""
    if not use_ema:
        return
    if not 0 <= momentum <= 1:
        raise ValueError(f"{owner}: ema_momentum={momentum!r} is not accepted; give a number in "
                         "[0, 1]")
    if frequency:
        check_count(frequency, owner, "ema_overwrite_frequency", "steps, at least 1, or None")


def clipping(clipnorm: float | None, global_clipnorm: float | None,
             clipvalue: float | None) -> Transformation:
    """One of the three, the first that is above 0, as Keras chooses."""
    for limit, make in ((clipnorm, clip_by_norm), (global_clipnorm, clip_by_global_norm),
                        (clipvalue, clip)):
        if limit and limit > 0:
            return make(limit)
    return identity()


@dataclasses.dataclass(frozen=True)
class FirstCopies:
    """The momentum of an average that is a copy of the parameters until the first step is done."""

    momentum: float
    calls: int  # in a step

    def __call__(self, call: Any) -> jax.Array:
        return jnp.where(call < self.calls, 0.0, self.momentum)


@dataclasses.dataclass(frozen=True)
class EveryWindow:
    """A schedule of calls, by windows: Keras looks a rate up at the last call of a window."""

    schedule: Any
    calls: int  # in a window

    def __call__(self, step: Any) -> Any:
        return self.schedule((step + 1) * self.calls - 1)


@dataclasses.dataclass(frozen=True)
class KerasAverage(ParamsEma):
    """The average of Keras 3, which moves for parameters without a gradient, too."""

    calls: int = 1  # that ``overwrite_every`` counts as one step

    def apply(self, update: Any, slots: ParamsEmaState, param: Any, step: Step) -> Applied:
        step = dataclasses.replace(step, count=step.count // self.calls)
        given = jnp.zeros_like(param) if update is None else update
        new, slots = super().apply(given, slots, param, step)
        return (None if update is None and self.overwrite_every is None else new), slots
