"""Calls outside of ``jit``. Operation by operation, most of their time would go into dispatch; so they are compiled, once for each
definition, and with the compiler kept from fusing, which would round products otherwise than operation by operation.

What a user can see must stay: schedules and masks that are Python functions may do anything, and are not frozen in a trace. A
schedule is called at every call, outside of the compiled program; whatever else is not data runs operation by operation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from lionax import engine
from lionax.hyperparameters import Injected, value_at
from lionax.layout import Gate, TreeWide
from lionax.masks import PathMask, PathTree
from lionax.rule import Definition

__all__ = ["Program", "compiled"]


@dataclasses.dataclass(frozen=True)
class _Hole:
    """Stands in a definition for what a schedule gives."""

    index: int

    def __call__(self, step: Any) -> Any:
        raise NotImplementedError  # it is callable since a schedule is


class Program:
    """A definition, ready to be called outside of ``jit``."""

    def __init__(self, definition: Definition):
        self._definition = definition
        self.data: Any = None  # the definition with holes where schedules were, or None if that is not all data
        self._schedules: list[tuple[str, Any]] = []
        try:
            data = self._without_schedules(definition)
            hash(data)
            self.data = data
        except (_NotData, TypeError):
            pass

    def __call__(self, updates: Any, state: engine.State, params: Any, extra: dict[str, Any], write: bool) -> tuple[Any, engine.State]:
        """As `engine.run`."""
        if self.data is None or not isinstance(state, engine.State) or not _are_concrete((updates, state, params), extra):
            return engine.run(self._definition, updates, state, params, extra, write)
        values = [value_at(schedule, state.count, owner) for owner, schedule in self._schedules]
        on_cpu = next(iter(state.count.devices())).platform == "cpu"
        return compiled(self.data, write, on_cpu)(values, updates, state, params, extra)

    def _without_schedules(self, value: Any) -> Any:
        """The definition as data; its schedules are set aside."""
        if isinstance(value, TreeWide) and (not isinstance(value, Gate) or Program(value.part)._schedules):
            raise _NotData  # schedules behind a gate are called by a compiled program, with a count of its own
        if isinstance(value, Definition) and type(value).__module__.split(".")[0] == "lionax":
            return _rebuilt(value, lambda field, held: self._hole(value, held) if "scalar" in field.metadata else
                            self._without_schedules(held))
        if isinstance(value, tuple):
            return tuple(map(self._without_schedules, value))
        if isinstance(value, Tracer | Definition) or (callable(value) and not isinstance(value, PathMask | PathTree)):
            raise _NotData
        return value

    def _hole(self, rule: Any, value: Any) -> Any:
        if isinstance(value.value if isinstance(value, Injected) else value, Tracer):
            raise _NotData
        if not callable(value) or _is_data(value):
            return value
        self._schedules.append((rule.name, value))
        return _Hole(len(self._schedules) - 1)


class _NotData(Exception):
    """A part of a definition is a Python function, or not lionax's own."""


def _is_data(schedule: Any) -> bool:
    """Whether a schedule is a dataclass of lionax, and no Python function is in it."""
    if not dataclasses.is_dataclass(schedule) or type(schedule).__module__.split(".")[0] != "lionax":
        return False
    parts = [getattr(schedule, field.name) for field in dataclasses.fields(schedule)]
    return all(not callable(part) or _is_data(part) for part in parts)


def _are_concrete(arrays: Any, extra: Any) -> bool:
    """Whether all leaves can be handed to a compiled program; others are looked at, and refused, by the engine."""
    return (all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays))
            and all(isinstance(leaf, jax.Array | bool | int | float) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(extra)))


def _rebuilt(definition: Any, change: Callable[[dataclasses.Field, Any], Any]) -> Any:
    """A definition with other fields."""
    fields = dataclasses.fields(definition)
    return dataclasses.replace(definition, **{field.name: change(field, getattr(definition, field.name)) for field in fields})


def _filled(value: Any, values: list[Any]) -> Any:
    """A definition with numbers in its holes."""
    if isinstance(value, _Hole):
        return values[value.index]
    if isinstance(value, Definition):
        return _rebuilt(value, lambda field, held: _filled(held, values))
    return tuple(_filled(item, values) for item in value) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=256)
def compiled(data: Definition, write: bool, on_cpu: bool) -> Any:
    """The compiled `engine.run` of a definition with holes."""

    def run(values, updates, state, params, extra):
        return engine.run(_filled(data, values), updates, state, params, extra, write)

    return jax.jit(run, compiler_options={"xla_disable_hlo_passes": "fusion"} if on_cpu else None)
