"""How many bytes a compiled step moves, told from its jaxpr.

The model is that of a compiler with one loop over memory for each array that is written and for each norm. A loop reads what its
array is computed from: inputs, and arrays that are written before it. An array of which a norm is taken and which is then used
is kept in between, if it would be expensive to compute twice.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Literal

__all__ = ["Traffic"]

_EXPENSIVE = {"div", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "log", "log1p", "expm1", "pow", "tanh", "logistic", "erf", "sin", "cos"}
_ORDER = "zero_once_written"  # reads one element


@dataclasses.dataclass(frozen=True, eq=False)
class _Array:
    """A value with more than one element."""

    nbytes: int
    operands: tuple["_Array", ...] = ()  # what it is computed from; nothing for an input
    expensive: bool = False  # whether the last operation is


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a program moves."""

    read: int
    written: int
    kept: tuple[int, ...]  # the sizes of arrays that are neither inputs nor outputs

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> "Traffic":
        """That of a function without branches over arrays; nothing is computed."""
        jaxpr, graph = jax.make_jaxpr(function)(*arguments).jaxpr, _Graph()
        results = graph.run(jaxpr, [_Array(var.aval.size * var.aval.dtype.itemsize) if var.aval.size > 1 else var for var in jaxpr.invars])
        outputs = {out for out in results if isinstance(out, _Array) and out.operands}
        needed = _cone(outputs)
        kept = {array for array in graph.summed if array in needed - outputs and any(part.expensive for part in _cone([array]))}
        loops = [array.operands for array in outputs | kept] + [(array,) for array in graph.summed]
        read = sum(source.nbytes for operands in loops for source in _sources(operands, outputs | kept))
        return cls(read, sum(array.nbytes for array in outputs | kept), tuple(array.nbytes for array in kept))


class _Graph:
    """The arrays of a jaxpr; equal computations are one."""

    def __init__(self):
        self._known: dict[Any, Any] = {}
        self.summed: list[_Array] = []  # one for each reduction

    def run(self, jaxpr: Any, values: Iterable[Any]) -> list[Any]:
        """The outputs of a jaxpr for these inputs: arrays, and whatever stands for a scalar."""
        env = dict(zip(jaxpr.invars, values, strict=True))

        def value(atom: Any) -> Any:
            return f"{atom.val}" if isinstance(atom, Literal) else env.get(atom, atom)

        for eqn in jaxpr.eqns:
            operands = [value(atom) for atom in eqn.invars]
            arrays = tuple(operand for operand in operands if isinstance(operand, _Array))
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if arrays and all(var.aval.size <= 1 for var in eqn.outvars):
                self.summed += arrays if eqn.primitive.name != _ORDER else ()
            elif inner is not None:
                env.update(zip(eqn.outvars, self.run(getattr(inner, "jaxpr", inner), operands), strict=True))
            else:
                key = (eqn.primitive.name, str(eqn.params), *operands)
                for i, var in enumerate(eqn.outvars):
                    new = var
                    if var.aval.size > 1:
                        new = _Array(var.aval.size * var.aval.dtype.itemsize, arrays, eqn.primitive.name in _EXPENSIVE)
                    env[var] = self._known.setdefault((*key, i), new)
        return [value(atom) for atom in jaxpr.outvars]


def _cone(arrays: Iterable[_Array]) -> set[_Array]:
    """Arrays and all that they are computed from."""
    found, todo = set(), list(arrays)
    while todo:
        array = todo.pop()
        if array not in found:
            found.add(array)
            todo += array.operands
    return found


def _sources(arrays: Iterable[_Array], there: set[_Array]) -> set[_Array]:
    """Which inputs, or arrays that are there already, these are computed from."""
    found, todo = set(), list(arrays)
    while todo:
        array = todo.pop()
        if array in there or not array.operands:
            found.add(array)
        else:
            todo += array.operands
    return found
