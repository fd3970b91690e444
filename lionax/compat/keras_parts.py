"""What the constructors of the Keras family share: exclusions, clips, averages and checks."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lionax.core.counting import LARGEST_COUNT
from lionax.core.hyperparameters import Injected, Scalar, check_count
from lionax.core.internals import Tracer
from lionax.core.masks import PathMask, check_regexes
from lionax.core.rule import Applied, Step
from lionax.core.transformation import Transformation
from lionax.core.tree import Keys
from lionax.transforms.accumulation import accumulate
from lionax.transforms.averaging import ParamsEma, ParamsEmaState
from lionax.transforms.clipping import clip, clip_by_global_norm, clip_by_norm
from lionax.transforms.combining import chain, identity
from lionax.transforms.conditional import unscale

__all__ = ["Decayed", "EveryWindow", "FirstCopies", "Keras3Arguments", "KerasAverage", "check_ema",
           "check_rate", "clipping", "constant", "decayed"]


@dataclasses.dataclass(frozen=True)
class Decayed(PathMask):
    """A mask of the leaves that are not excluded. As in Keras, a pattern may match nothing."""

    patterns: tuple[str, ...] = ()  # excluded: regular expressions, searched for in the name
    inverted: bool = True  # whether the excluded are left out, or are the ones that are meant
    paths: tuple[str, ...] = ()  # excluded: whole paths
    named: Literal["path", "path:0", "last"] = "path"  # what the reference calls a leaf

    def __post_init__(self):
        check_regexes(self.patterns, "exclude_from_weight_decay")

    def _excludes(self, path: str) -> bool:
        name = {"path": path, "path:0": f"{path}:0", "last": path.rpartition("/")[2]}[self.named]
        return path in self.paths or any(re.search(pattern, name) for pattern in self.patterns)

    def select(self, keys: Sequence[Keys], present: Sequence[bool], owner: str) -> tuple[bool, ...]:
        return tuple(self._excludes("/".join(leaf)) != self.inverted for leaf in keys)

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
    return Decayed(tuple(values["var_names"]), paths=tuple(values["var_list"]), named=named)


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


def constant(value: Any, owner: str, argument: str) -> Any:
    """A number where Keras takes no schedule; as in Python, a bool is one."""
    if callable(value) or isinstance(value, Sequence | Mapping | complex):
        raise TypeError(f"{owner}: {argument}={value!r} is not accepted; give a number")
    return float(value) if isinstance(value, bool) else value


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

    def __post_init__(self):
        check_count(self.calls, "FirstCopies", "calls")

    def __call__(self, call: Any) -> jax.Array:
        return jnp.where(call < self.calls, 0.0, self.momentum)


@dataclasses.dataclass(frozen=True)
class EveryWindow:
    """A schedule of calls, by windows: Keras looks a rate up at the last call of a window."""

    schedule: Any
    calls: int  # in a window

    def __post_init__(self):
        check_count(self.calls, "EveryWindow", "calls")
        if not callable(self.schedule):
            raise ValueError(f"EveryWindow: schedule={self.schedule!r} is not accepted; give a "
                             "function of the number of calls")

    def __call__(self, step: Any) -> Any:
        last = jnp.minimum(step, LARGEST_COUNT // self.calls - 1)  # of int32
        return self.schedule((last + 1) * self.calls - 1)


@dataclasses.dataclass(frozen=True)
class KerasAverage(ParamsEma):
    """The average of Keras 3, which moves for parameters without a gradient, too."""

    calls: int = 1  # that ``overwrite_every`` counts as one step

    def __post_init__(self):
        super().__post_init__()
        check_count(self.calls, "KerasAverage", "calls")

    def apply(self, update: Any, slots: ParamsEmaState, param: Any, step: Step) -> Applied:
        step = dataclasses.replace(step, count=step.count // self.calls)
        given = jnp.zeros_like(param) if update is None else update
        new, slots = super().apply(given, slots, param, step)
        return (None if update is None and self.overwrite_every is None else new), slots


@dataclasses.dataclass(frozen=True)
class Keras3Arguments:
    """The arguments that all optimizers of Keras 3 share, checked, and what they do."""

    owner: str
    learning_rate: Scalar
    weight_decay: float | None
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    exclude_from_weight_decay: Mapping[str, Sequence[str]] | None
    name: str | None
    decay: Any

    def __post_init__(self):
        if self.decay is not None:
            warnings.warn("Argument `decay` is no longer supported and will be ignored.",
                          stacklevel=5)
        if self.name is not None and (not isinstance(self.name, str) or "/" in self.name):
            raise ValueError(f"{self.owner}: name={self.name!r} is not accepted; give a string "
                             "without '/', or None")
        rate = self.learning_rate
        if not (isinstance(rate, float | Injected | Tracer) or
                (callable(rate) and not isinstance(rate, jax.Array))):
            raise ValueError(f"{self.owner}: learning_rate={rate!r} is not accepted; give a float "
                             "(1.0, not 1), or a schedule")
        for argument in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm",
                         "loss_scale_factor"):
            number = constant(getattr(self, argument), self.owner, argument)
            object.__setattr__(self, argument, number)
        steps, frequency = self.gradient_accumulation_steps, self.ema_overwrite_frequency
        if isinstance(steps, np.integer):
            object.__setattr__(self, "gradient_accumulation_steps", int(steps))
        if isinstance(frequency, bool):
            object.__setattr__(self, "ema_overwrite_frequency", int(frequency))
        if steps and not steps >= 2:
            raise ValueError(f"{self.owner}: gradient_accumulation_steps={steps!r} is not "
                             "accepted; give a number of at least 2, or None")
        check_ema(self.use_ema, self.ema_momentum, self.ema_overwrite_frequency, self.owner)
        clips = {name: getattr(self, name) for name in ("clipnorm", "clipvalue", "global_clipnorm")}
        given = {name: value for name, value in clips.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{self.owner}: {given} exclude each other; give one of them")
        check_rate(self.learning_rate, self.owner)

    @property
    def calls(self) -> int:
        """How many calls make a step."""
        return self.gradient_accumulation_steps or 1

    @property
    def rate(self) -> Scalar:
        """The learning rate by the optimizer's steps; Keras looks schedules up by calls."""
        return EveryWindow(
            self.learning_rate,
            self.calls) if callable(self.learning_rate) and self.calls > 1 else self.learning_rate

    @property
    def mask(self) -> Decayed:
        """The leaves that decay."""
        return decayed(self.exclude_from_weight_decay, "last", self.owner)

    def around(self, own: Transformation) -> Transformation:
        """Unscaling, accumulation, clipping and the average, around the optimizer's own part."""
        step = chain(clipping(self.clipnorm, self.global_clipnorm, self.clipvalue), own)
        frequency = 1 if self.ema_overwrite_frequency == 0 else self.ema_overwrite_frequency
        average = KerasAverage(FirstCopies(self.ema_momentum, self.calls), frequency,
                               calls=self.calls)
        return chain(
            identity() if self.loss_scale_factor is None else unscale(self.loss_scale_factor),
            accumulate(step, self.calls) if self.calls > 1 else step,
            Transformation.of(average) if self.use_ema else identity())
