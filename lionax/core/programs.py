"""Compiled programs, of which a process keeps a bounded number.

``jax.jit`` keeps 4,096 programs of a function, of some megabytes each. Eager calls with ever other
hyperparameters or shapes would fill the memory with them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["Kept"]


class Kept:
    """``jax.jit`` of a function of positional arguments that forgets its programs at so many.

    The first arguments, ``static`` of them, are constants of a program.
    """

    def __init__(self, function: Callable[..., Any], static: int = 0, most: int = 512):
        functools.update_wrapper(self, function)
        self.most, self.traces = most, 0
        self._function, self._static = function, static
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by constants

    def __call__(self, *args: Any) -> Any:
        constants = args[: self._static]
        program = self._programs.get(constants)
        if program is None or self.traces >= self.most:
            program = self._new(constants)
        return program(*args[self._static :])

    def _new(self, constants: tuple[Any, ...]) -> Callable[..., Any]:
        """A function of its own, of whose programs JAX keeps none when it is gone."""

        @functools.wraps(self._function)
        def traced(*args: Any) -> Any:
            self.traces += 1
            return self._function(*constants, *args)

        if self.traces >= self.most:
            self._programs, self.traces = {}, 0
        return self._programs.setdefault(constants, jax.jit(traced))
