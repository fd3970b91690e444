"""The hyperparameters of a definition in one step: from schedules, from the state, or fixed."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionax.hyperparameters import Hyperparameter, Injected, value_at
from lionax.layout import Stage
from lionax.rule import Rule

__all__ = ["Settings"]


class Settings:
    """The values of all hyperparameters at one step, and the rules with these in place."""

    def __init__(self, program: Sequence[Stage], count: jax.Array, held: dict[str, Hyperparameter] | None):
        self._program, self._held = program, held
        self._names = _recorded(program)
        if held is not None and set(held) != set(self._names.values()):
            raise ValueError(f"the state holds the hyperparameters {sorted(held)}, the transformation has "
                             f"{sorted(self._names.values())}: the state was made by another transformation")
        self._values = {(i, field): value_at(value, count, stage.rule.name)
                        for i, stage in enumerate(program) for field, value in _scalars(stage)}

    def rule(self, i: int, dtype: np.dtype) -> Rule:
        """The rule of a stage with its scalars as numbers for arithmetic in ``dtype``."""
        rule = self._program[i].rule
        # Past the constructor: it checks what a user wrote, and would make Python numbers of these.
        resolved = object.__new__(type(rule))
        resolved.__dict__.update(rule.__dict__, **{f: self._value(i, f, dtype) for f, _ in _scalars(self._program[i])})
        return resolved

    def _value(self, i: int, field: str, dtype: np.dtype) -> Any:
        value = self._values[i, field]
        value = jnp.asarray(value).astype(dtype) if hasattr(value, "dtype") else value
        name = self._names.get((i, field))
        if name is None or self._held is None:
            return value
        held = self._held[name]
        if not isinstance(held, Hyperparameter):
            raise TypeError(f"the hyperparameter {name!r} in the state is {held!r}; assign it with lionax.set_hyperparams(state, ...)")
        return jnp.where(held.overridden, held.value.astype(dtype), jnp.asarray(value, dtype))

    def record(self) -> dict[str, Hyperparameter]:
        """What the state is to hold after this step, or, without a state, at the beginning."""
        new = {}
        for (i, field), name in self._names.items():
            # A copy: a schedule may return an array of the caller's, which a donated state must not take along.
            value = jnp.array(self._value(i, field, jnp.dtype(jnp.float32)), jnp.float32)
            if self._held is None:
                overridden = jnp.asarray(isinstance(getattr(self._program[i].rule, field), Injected))
            else:
                overridden = self._held[name].overridden
            new[name] = Hyperparameter(value, overridden)
        return new


def _scalars(stage: Stage) -> list[tuple[str, Any]]:
    """The scalar fields of a stage's rule that were given."""
    fields = () if stage.tree_wide else dataclasses.fields(stage.rule)
    return [(f.name, getattr(stage.rule, f.name)) for f in fields
            if "scalar" in f.metadata and getattr(stage.rule, f.name) is not None]


def _recorded(program: Sequence[Stage]) -> dict[tuple[int, str], str]:
    """Which (stage, field) the state holds, and under which name: the field's, qualified if several share it."""
    always = {(i, f.name) for i, stage in enumerate(program) if not stage.tree_wide
              for f in dataclasses.fields(stage.rule) if f.metadata.get("recorded")}
    held = [(i, field) for i, stage in enumerate(program) for field, value in _scalars(stage)
            if (i, field) in always or isinstance(value, Injected)]
    names = [field for _, field in held]
    for prefix in (lambda i: program[i].key, lambda i: (*program[i].key, program[i].rule.name)):
        times = Counter(names)
        names = ["/".join((*prefix(i), field)) if times[name] > 1 else name
                 for name, (i, field) in zip(names, held, strict=True)]
    times = Counter(names)
    numbered = [f"{name}_{names[:at].count(name)}" if times[name] > 1 else name for at, name in enumerate(names)]
    return dict(zip(held, numbered, strict=True))
