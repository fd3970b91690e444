"""The hyperparameters of a definition in one step: fixed, from schedules, or from the state."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionax.core.hyperparameters import Held, Hyperparameters, Injected, flag, is_number, value_at
from lionax.core.layout import Stage, StateError
from lionax.core.rule import Rule
from lionax.core.table import shown

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

    def __init__(self, stages: Sequence[Stage], count: jax.Array, held: Hyperparameters | None):
        if held is not None and not (isinstance(held, Hyperparameters) and isinstance(
                held.values, dict) and isinstance(held.assigned, dict) and set(
                held.assigned) == set(map(flag, held.values))):
            raise StateError(f"the state holds {shown(held)} in place of hyperparameters")
        self._names, self._held = _held_names(stages), held
        if held is not None and set(held.values) != set(self._names.values()):
            # Optax's inject_hyperparams gives numbers where it is not jitted, else tracers: at
            # `init` and `update` one each.
            self._names = next((names for which in ("all", "none")
                                if set((names := _held_names(stages, which)).values())
                                == set(held.values)), self._names)
        if held is not None and set(held.values) != set(self._names.values()):
            raise StateError(f"the state holds the hyperparameters {sorted(held.values)}, the "
                             f"transformation has {sorted(self._names.values())}: the state was "
                             "made by another transformation")
        self._given = {(stage.index, field): value
                       for stage in stages for field, value in _scalars(stage)}
        self._accepted = {name: getattr(self._given.get(key), "accepted", None) or
                          stages[key[0]].rule.accepted(key[1])
                          for key, name in self._names.items()}
        self._values = {key: value_at(value, count, stages[key[0]].rule.name)
                        for key, value in self._given.items()}

    def operands(self, stage: Stage, dtype: np.dtype) -> dict[str, jax.Array]:
        """The scalars of a stage's rule that are arrays: held in the state, scheduled or traced."""
        keys = {field: (stage.index, field) for field, _ in _scalars(stage)}
        return {field: self._array(key, dtype) for field, key in keys.items()
                if key in self._names or not isinstance(self._given[key], float)}

    def _array(self, key: tuple[int, str], dtype: np.dtype) -> jax.Array:
        name = self._names.get(key)
        given = self._values[key]
        if name is None or self._held is None:
            return jnp.asarray(given).astype(dtype)
        held = self._held.values[name]
        if not hasattr(held, "astype") or not is_number(held):
            raise TypeError(f"the hyperparameter {name!r} in the state is {shown(held)}; assign it "
                            "with lionax.set_hyperparams(state, ...)")
        held = held.astype(dtype)
        if isinstance(self._given[key], Injected):
            return held
        assigned = self._held.assigned.get(flag(name))
        if not is_number(assigned):
            raise StateError(f"whether the hyperparameter {name!r} was assigned is "
                             f"{shown(assigned)} in the state, which is no number")
        is_assigned = assigned != 0
        return jnp.where(is_assigned, held, jnp.asarray(given).astype(dtype))

    def record(self) -> Hyperparameters:
        """What the state holds after this step or, without a state, at first."""
        # A copy: a schedule may return the caller's array, which must not be donated.
        values = {name: jnp.array(self._array(key, jnp.dtype(jnp.float32)), copy=True)
                  for key, name in self._names.items()}
        assigned = {flag(name): jnp.zeros((), jnp.int32) for name in self._names.values()}
        return Hyperparameters(values, assigned if self._held is None else self._held.assigned,
                               tuple(sorted(self._accepted.items())))


def _scalars(stage: Stage) -> list[tuple[str, Any]]:
    """The scalar fields of a stage's rule that were given."""
    fields = () if stage.is_tree_wide else dataclasses.fields(stage.rule)
    values = [(f.name, getattr(stage.rule, f.name)) for f in fields if "scalar" in f.metadata]
    return [(name, value) for name, value in values if value is not None]


def _held_names(stages: Sequence[Stage], rates: str = "known") -> dict[tuple[int, str], str]:
    """The names of the (stage, field) that the state holds, qualified by the groups they are in.

    Of the learning rates it holds those that are "known", not traced; "all"; or "none".
    """
    always = {(stage.index, f.name) for stage in stages if not stage.is_tree_wide
              for f in dataclasses.fields(stage.rule) if f.metadata.get("recorded")}
    held = [(stage, field, value) for stage in stages for field, value in _scalars(stage)
            if isinstance(value, Injected)
            or ((stage.index, field) in always and rates != "none"
                and (rates == "all" or not isinstance(value, Held)))]
    own = [(value.name if isinstance(value, Injected) else "") or field for _, field, value in held]
    names = ["/".join((*stage.key, name)) for name, (stage, *_) in zip(own, held, strict=True)]
    times = Counter(names)
    names = ["/".join((*stage.key, stage.rule.name, short)) if times[name] > 1 else name
             for name, short, (stage, *_) in zip(names, own, held, strict=True)]
    times = Counter(names)
    numbered = ["/".join((*stage.key, stage.rule.name, str(names[:i].count(name)), short))
                if times[name] > 1 else name
                for i, (name, short, (stage, *_)) in enumerate(zip(names, own, held, strict=True))]
    return {(stage.index, field): name
            for name, (stage, field, _) in zip(numbered, held, strict=True)}
