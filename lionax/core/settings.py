"""The hyperparameters of a definition in one step: fixed, from schedules, or from the state."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionax.core.hyperparameters import Hyperparameter, Injected, value_at
from lionax.core.layout import Stage
from lionax.core.rule import Rule

__all__ = ["Settings", "StaticRule"]


@dataclasses.dataclass(frozen=True)
class StaticRule:
    """A rule as a static argument of ``jit``: equal by value and by type, as 2 == 2.0 == True."""

    rule: Rule  # with None in place of every scalar that is an operand
    dtype: np.dtype  # of the arithmetic
    types: Any  # of the fields

    @classmethod
    def of(cls, rule: Rule, dtype: np.dtype, operands: Sequence[str]) -> "StaticRule":
        """The rule without these scalars."""
        without = _replaced(rule, dict.fromkeys(operands))
        return cls(without, dtype, _types(without))

    def with_values(self, operands: dict[str, jax.Array]) -> Rule:
        """The rule with its scalars as numbers."""
        return _replaced(self.rule, operands)


def _replaced(rule: Rule, fields: dict[str, Any]) -> Rule:
    new = object.__new__(type(rule))  # past the constructor, which makes numbers of arrays
    new.__dict__.update(rule.__dict__, **fields)
    return new


def _types(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_types, value))
    if dataclasses.is_dataclass(value):
        return type(value), *(_types(getattr(value, f.name)) for f in dataclasses.fields(value))
    return type(value)


class Settings:
    """The values of all hyperparameters in one step."""

    def __init__(self, stages: Sequence[Stage], count: jax.Array,
                 held: dict[str, Hyperparameter] | None):
        self._names, self._held = _held_names(stages), held
        if held is not None and set(held) != set(self._names.values()):
            raise ValueError(f"the state holds the hyperparameters {sorted(held)}, the "
                             f"transformation has {sorted(self._names.values())}: the state was "
                             "made by another transformation")
        self._given = {(stage.index, field): value
                       for stage in stages for field, value in _scalars(stage)}
        self._values = {key: value_at(value, count, stages[key[0]].rule.name)
                        for key, value in self._given.items()}

    def operands(self, stage: Stage, dtype: np.dtype) -> dict[str, jax.Array]:
        """The scalars of a stage's rule that are arrays: held in the state, scheduled or traced."""
        keys = {field: (stage.index, field) for field, _ in _scalars(stage)}
        return {field: self._array(key, dtype) for field, key in keys.items()
                if key in self._names or not isinstance(self._given[key], float)}

    def _array(self, key: tuple[int, str], dtype: np.dtype) -> jax.Array:
        name = self._names.get(key)
        if name is None or self._held is None:
            return jnp.asarray(self._values[key]).astype(dtype)
        held = self._held[name]
        if not isinstance(held, Hyperparameter):
            raise TypeError(f"the hyperparameter {name!r} in the state is {held!r}; assign it with "
                            "lionax.set_hyperparams(state, ...)")
        if isinstance(self._given[key], Injected):
            return held.value.astype(dtype)
        given = jnp.asarray(self._values[key]).astype(dtype)
        return jnp.where(held.overridden, held.value.astype(dtype), given)

    def record(self) -> dict[str, Hyperparameter]:
        """What the state holds after this step or, without a state, at first."""
        new = {}
        for key, name in self._names.items():
            # A copy: a schedule may return the caller's array, which must not be donated.
            value = jnp.array(self._array(key, jnp.dtype(jnp.float32)), copy=True)
            is_injected = jnp.asarray(isinstance(self._given[key], Injected))
            held = is_injected if self._held is None else self._held[name].overridden
            new[name] = Hyperparameter(value, held)
        return new


def _scalars(stage: Stage) -> list[tuple[str, Any]]:
    """The scalar fields of a stage's rule that were given."""
    fields = () if stage.is_tree_wide else dataclasses.fields(stage.rule)
    values = [(f.name, getattr(stage.rule, f.name)) for f in fields if "scalar" in f.metadata]
    return [(name, value) for name, value in values if value is not None]


def _held_names(stages: Sequence[Stage]) -> dict[tuple[int, str], str]:
    """The names of the (stage, field) that the state holds: qualified where a field has several."""
    always = {(stage.index, f.name) for stage in stages if not stage.is_tree_wide
              for f in dataclasses.fields(stage.rule) if f.metadata.get("recorded")}
    held = [(stage, field) for stage in stages for field, value in _scalars(stage)
            if (stage.index, field) in always or isinstance(value, Injected)]
    names = [field for _, field in held]
    for prefix in (lambda stage: stage.key, lambda stage: (*stage.key, stage.rule.name)):
        times = Counter(names)
        names = ["/".join((*prefix(stage), field)) if times[name] > 1 else name
                 for name, (stage, field) in zip(names, held, strict=True)]
    times = Counter(names)
    numbered = [f"{name}_{names[:i].count(name)}" if times[name] > 1 else name
                for i, name in enumerate(names)]
    return {(stage.index, field): name for (stage, field), name in zip(held, numbered, strict=True)}
