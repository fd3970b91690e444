"""How a traced function is cut into passes over memory, each of which reads and writes every array at most once.

A **pass** is a program of elementwise operations over arrays of one shape. It may write many arrays and sum the squares of
many, where the CPU's compiler would make a loop of each. What is not of that kind, scalars among it, is left to the
compiler as it is. Operations are in one pass if they share an array and no sum has to be known between them: of LAMB's two, the
first writes the moments and takes the norms, the second writes the parameter.

What a pass needs of an earlier one is computed again if it follows from what is written in any case, as LAMB's update does from the
new moments, and is kept in an array otherwise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["OPERATIONS", "Pass", "evaluate"]

OPERATIONS = ("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "sqrt", "copy", "fma", "fms", "fnma", "average", "select",
              "from_bfloat16", "to_bfloat16", "sum_of_squares")
"""What a pass can do, in the order of ``Operation`` in cpu.cc."""


_MANY = 32  # arrays from which one is made that is rather kept than made again

_FLOAT, _HALF, _DOUBLE = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float64)
_ELEMENTWISE = {"add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "sqrt"}
_INLINED = {"jit", "pjit", "closed_call", "custom_jvp_call"}


@dataclasses.dataclass(eq=False)
class _Value:
    """An array or a scalar."""

    shape: tuple[int, ...]
    dtype: Any
    made_by: "_Operation" = dataclasses.field(default_factory=lambda: _ARGUMENT, repr=False)
    depth: int = 0  # how many passes must be over before it is known

    @functools.cached_property
    def is_wide(self) -> bool:
        """Whether it is an array that a pass can read or write."""
        return self.dtype in (_FLOAT, _HALF) and math.prod(self.shape) > 1

    @property
    def in_pass(self) -> bool:
        """Whether a pass makes it."""
        return self.made_by.bind is None


@dataclasses.dataclass(eq=False)
class _Operation:
    """Something done to values; NumPy scalars stand for literals."""

    name: str  # one of OPERATIONS if a pass does it, else a primitive's
    operands: tuple[Any, ...]
    results: tuple[_Value, ...]
    bind: Callable[..., Any] | None = None  # how the compiler is told to do it; None if a pass does it

    @functools.cached_property
    def values(self) -> list[_Value]:
        return [operand for operand in self.operands if isinstance(operand, _Value)]


_ARGUMENT = _Operation("argument", (), (), lambda: [])  # makes what is given


@dataclasses.dataclass(eq=False)
class Pass:
    """One pass over arrays of one shape, as cpu.cc is told of it."""

    arguments: list[_Value]  # wide ones and float32 scalars
    results: list[_Value]  # wide ones, then float64 sums
    constants: list[float]
    program: list[int]  # six numbers for each instruction
    registers: int
    aliases: dict[int, int]  # which result takes the place of which argument


class _Trace:
    """A function without inner functions: its operations in order, equal ones once."""

    def __init__(self):
        self.operations: list[_Operation] = []
        self.constants: dict[_Value, Any] = {}
        self._splats: dict[_Value, Any] = {}  # arrays that are a scalar everywhere
        self._known: dict[Any, _Value] = {}

    def inline(self, jaxpr: Any, arguments: Iterable[Any]) -> list[Any]:
        """Adds the operations of a jaxpr, given arguments and then constants; returns its results."""
        env = dict(zip((*jaxpr.invars, *jaxpr.constvars), arguments, strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            name, operands = eqn.primitive.name, [read(atom) for atom in eqn.invars]
            if name == "platform_index":
                env[eqn.outvars[0]] = None
                continue
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if name in _INLINED else None
            if eqn.params.get("branches_platforms"):
                operands = operands[1:]
                inner = next(branch for branch, names in zip(eqn.params["branches"], eqn.params["branches_platforms"], strict=True)
                             if names is None or "cpu" in names)
            if inner is None:
                results = self._add(eqn, operands)
            else:
                constants = [_Value(var.aval.shape, var.aval.dtype) for var in inner.jaxpr.constvars]
                self.constants.update(zip(constants, inner.consts, strict=True))
                results = self.inline(inner.jaxpr, [*operands, *constants])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _add(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        """Adds an operation, unless it changes nothing; returns its results."""
        name, results = eqn.primitive.name, tuple(_Value(var.aval.shape, var.aval.dtype) for var in eqn.outvars)
        if len(results) == 1 and (made := self._made_in_pass(name, eqn.params, operands, results[0])) is not None:
            return [made]
        operation = _Operation(name, tuple(operands), results, functools.partial(_bind, eqn))
        depth = max((value.depth + (value.is_wide and value.in_pass) for value in operation.values), default=0)
        for result in results:
            result.made_by, result.depth = operation, depth
        self.operations.append(operation)
        if name == "broadcast_in_dim" and operands[0].shape == ():
            self._splats[results[0]] = operands[0]
        return results

    def _made_in_pass(self, name: str, params: dict[str, Any], operands: list[Any], out: _Value) -> Any:
        """What a pass makes of an operation; None if it cannot."""
        if (summed := _squares_summed(name, operands, out)) is not None:
            loaded = summed if summed.dtype == _FLOAT else self._in_pass("from_bfloat16", [summed], _Value(summed.shape, _FLOAT))
            return self._in_pass("sum_of_squares", [loaded], out)
        if not out.is_wide:
            return None
        if name in ("copy", "convert_element_type") and operands[0].dtype == out.dtype:
            return operands[0]
        if name == "convert_element_type" and operands[0].is_wide:
            return self._in_pass("from_bfloat16" if out.dtype == _FLOAT else "to_bfloat16", operands, out)
        if out.dtype != _FLOAT:
            return None
        scalars = [self._splats.get(operand, operand) if isinstance(operand, _Value) else operand for operand in operands]
        if name in ("add", "mul"):
            for x, other in zip(operands, scalars[::-1], strict=True):
                if _is_literal(other, name == "mul") and x.shape == out.shape:  # adds 0, or multiplies by 1
                    return x
        if name in ("square", "integer_pow") and params.get("y", 2) == 2:
            return self._in_pass("mul", [operands[0], operands[0]], out)
        if name == "select_n" and len(operands) == 3 and operands[0].shape == () and _fit(scalars[1:], out):
            return self._in_pass("select", [self._scalar("as_float", lambda x: x.astype(_FLOAT), operands[0]), *scalars[1:]], out)
        if name not in _ELEMENTWISE or not _fit(scalars, out):
            return None
        if name == "div" and scalars[1].shape == ():  # the compiler, too, multiplies instead
            name, scalars = "mul", [scalars[0], self._scalar("reciprocal", lambda x: 1 / x, scalars[1])]
        if name == "mul":
            scalars.sort(key=lambda x: x.shape != ())  # a scalar first, see `_contracted`
        return self._in_pass(name, scalars, out)

    def _scalar(self, name: str, function: Callable[[Any], Any], x: Any) -> Any:
        """A float32 scalar that is made of another scalar."""
        if not isinstance(x, _Value):
            with np.errstate(all="ignore"):
                return function(x)
        if (name, x) not in self._known:
            number = self._known[name, x] = _Value((), _FLOAT, depth=x.depth)
            number.made_by = _Operation(name, (x,), (number,), lambda value: [function(value)])
            self.operations.append(number.made_by)
        return self._known[name, x]

    def _in_pass(self, name: str, operands: Sequence[Any], out: _Value) -> _Value:
        key = (name, *map(_key, operands))
        if key not in self._known:
            out.made_by = operation = _Operation(name, tuple(operands), (out,))
            out.depth = max(value.depth for value in operation.values) + (not out.is_wide)
            self.operations.append(operation)
            self._known[key] = out
        return self._known[key]


def _bind(eqn: Any, *operands: Any) -> Sequence[Any]:
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _key(x: Any) -> Any:
    """What tells a value or a literal from others: its bits, since 0 and -0 are not one, nor is NaN itself."""
    return x if isinstance(x, _Value) else x.tobytes()


def _is_literal(x: Any, number: float) -> bool:
    return not isinstance(x, _Value) and x.shape == () and x == number


def _fit(operands: Sequence[Any], out: _Value) -> bool:
    """Whether operands are float32 arrays of a result's shape, one at least, or float32 scalars."""
    wide = [isinstance(x, _Value) and x.shape == out.shape for x in operands]
    return any(wide) and all(x.dtype == _FLOAT and (here or x.shape == ()) for x, here in zip(operands, wide, strict=True))


def _squares_summed(name: str, operands: Sequence[Any], out: _Value) -> _Value | None:
    """The wide array of which an operation sums all squares in float64, if that is what it does."""
    if name != "reduce_sum" or out.shape != () or out.dtype != _DOUBLE:
        return None
    for made_by in ("square", "convert_element_type"):
        if not isinstance(operands[0], _Value) or operands[0].made_by.name != made_by:
            return None
        operands = list(operands[0].made_by.operands)
    return operands[0] if isinstance(operands[0], _Value) and operands[0].is_wide else None


class _Plan:
    """Which passes make the results of a function."""

    def __init__(self, jaxpr: Any):
        trace = _Trace()
        self.arguments = [_Value(var.aval.shape, var.aval.dtype) for var in (*jaxpr.invars, *jaxpr.constvars)]
        self.results = trace.inline(jaxpr, self.arguments)
        self.constants = trace.constants
        self.operations = _needed(trace.operations, self.results)
        self.order = {operation: i for i, operation in enumerate(self.operations)}
        left = {value for operation in self.operations if operation.bind for value in operation.values}
        self.kept = {value for value in (*self.results, *left) if isinstance(value, _Value) and value.in_pass and value.is_wide}
        # A result takes the place of the argument that stands at its place, as a step's do. Where it is not made in a pass, something
        # else may lie there meanwhile, if nobody reads the argument any more.
        alike = [(result, argument) for result, argument in zip(self.results, self.arguments, strict=False)
                 if isinstance(result, _Value) and (result.shape, result.dtype) == (argument.shape, argument.dtype)]
        self.place = {result: argument for result, argument in alike if result.in_pass}
        self.overwritten = {argument: result.depth for result, argument in self.place.items()}
        self.spare = {argument for result, argument in alike if not result.in_pass} - left
        self.spare -= {result for result in self.results if isinstance(result, _Value)}
        self.sums = {operation.results[0] for operation in self.operations if operation.name == "sum_of_squares"}
        self.passes: list[tuple[int, Pass]] = []  # with the depth at which each runs
        depths = [operation.results[0].depth for operation in self.operations]
        for depth in range(max(depths, default=0), -1, -1):
            self.passes += [(depth, one) for one in self._passes_at(depth)]

    def _passes_at(self, depth: int) -> list[Pass]:
        wanted = {value for value in self.kept if value.depth == depth} | {value for value in self.sums if value.depth == depth + 1}
        groups: dict[_Value, tuple[set[_Value], set[_Value]]] = {}  # by wide value: results, and all wide values they are made from
        for value in sorted(wanted, key=lambda value: self.order[value.made_by]):
            results, cone = {value}, self._cone(value, depth)
            for others, values in {id(groups[v]): groups[v] for v in cone if v in groups}.values():
                results |= others
                cone |= values
            groups |= dict.fromkeys(cone, (results, cone))
        different = {id(group): group for group in groups.values()}.values()
        made = [self._pass(results, cone, depth) for results, cone in different]
        return sorted(made, key=lambda one: self.order[one.results[0].made_by])  # so that the program is always the same

    def _cone(self, value: _Value, depth: int) -> set[_Value]:
        """The wide values from which a pass makes one, with those that are read from memory; keeps what it cannot make again."""
        cone, todo = {value}, [value]
        while todo:
            for operand in todo.pop().made_by.values:
                if operand.is_wide and operand not in cone:
                    if operand.in_pass and operand.depth < depth and not self._can_be_made(operand, depth):
                        self.kept.add(operand)
                    cone.add(operand)
                    if not self._is_read(operand, depth):
                        todo.append(operand)
        return cone

    def _pass(self, results: set[_Value], cone: set[_Value], depth: int) -> Pass:
        """The pass that makes some values, given all that they are made from; lays what it keeps where room is."""
        made = sorted((v for v in cone if v in results or not self._is_read(v, depth)), key=lambda v: self.order[v.made_by])
        instructions = _contracted([(v.made_by.name, v.made_by.operands, v) for v in made], results)
        there = {out for _, _, out in instructions}
        arguments = list(dict.fromkeys(x for _, xs, _ in instructions for x in xs if isinstance(x, _Value) and x not in there))
        arrays = [v for v in made if v in results and v.is_wide]
        sums = [v for v in made if v in results and not v.is_wide]
        for v in arrays:
            spare = next((x for x in arguments if x in self.spare and (x.shape, x.dtype) == (v.shape, v.dtype)), None)
            if v not in self.place and spare is not None:
                self.place[v] = spare
                self.spare.remove(spare)
        self.spare.difference_update(arguments)  # passes are made from the last to the first
        return _encode(instructions, arguments, arrays, sums, self.place)

    def _is_read(self, value: _Value, depth: int) -> bool:
        """Whether a pass at a depth reads a value from memory."""
        return not value.in_pass or (value in self.kept and value.depth < depth)

    def _can_be_made(self, value: _Value, depth: int) -> bool:
        """Whether a value follows, in not too many operations, from what is still there at a depth."""
        seen, todo = {value}, [value]
        while todo:
            if len(seen) > _MANY:
                return False
            one = todo.pop()
            if not self._is_read(one, depth):
                new = {operand for operand in one.made_by.values if operand.is_wide} - seen
                seen |= new
                todo += new
            elif self.overwritten.get(one, depth) < depth:
                return False
        return True


def _needed(operations: Sequence[_Operation], results: Iterable[Any]) -> list[_Operation]:
    """The operations that results depend on, in order."""
    needed = {result for result in results if isinstance(result, _Value)}
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.results):
            needed.update(operation.values)
            kept.append(operation)
    return kept[::-1]


_Instruction = tuple[str, Sequence[Any], _Value]  # an operation, its operands, its result


def _encode(instructions: list[_Instruction], arguments: list[_Value], arrays: list[_Value], sums: list[_Value],
            place: dict[_Value, _Value]) -> Pass:
    """Instructions as numbers: arguments, results, constants and registers are counted."""
    literals = {_key(x): x for _, xs, _ in instructions for x in xs if not isinstance(x, _Value)}
    index: dict[Any, int] = {key: i for i, key in enumerate((*arguments, *arrays, *literals))}
    first_register = used = len(index)
    last = {x: i for i, (_, xs, _) in enumerate(instructions) for x in xs if isinstance(x, _Value)}  # where a value is read last
    program: list[int] = []
    free: list[int] = []
    copies: list[tuple[int, int]] = []

    def write(name: str, to: int, sources: Sequence[int]) -> None:
        program.extend([OPERATIONS.index(name), to, *sources, *[sources[0]] * (4 - len(sources))])

    for i, (name, xs, out) in enumerate(instructions):
        sources = [index[_key(x)] for x in xs]
        over = {index[x] for x in xs if isinstance(x, _Value) and last[x] == i and index[x] >= first_register}  # registers read last
        if not out.is_wide:
            write(name, sums.index(out), sources)
            free += over
            continue
        if all(x.dtype == out.dtype for x in xs):  # else the result would be written over what is still to be read
            free += over
            over = set()
        taken = place.get(out)
        if out not in arrays or (taken is not None and last.get(taken, i) > i):  # what it would overwrite is still to be read
            if not free:
                free.append(used)
                used += 1
            register = free.pop()
            if out in arrays:
                copies.append((index[out], register))
                last[out] = len(instructions)
            index[out] = register
        write(name, index[out], sources)
        free += over
    for to, source in copies:
        write("copy", to, [source])
    aliases = {arguments.index(place[v]): i for i, v in enumerate(arrays) if place.get(v) in arguments}
    return Pass(arguments, [*arrays, *sums], [x.item() for x in literals.values()], program, used - first_register, aliases)


def _contracted(instructions: list[_Instruction], results: set[_Value]) -> list[_Instruction]:
    """With a product and the sum that it is used in as one operation, rounded once, where the CPU's compiler does that."""
    users: dict[_Value, set[str]] = {}
    for name, operands, _ in instructions:
        for x in operands:
            if isinstance(x, _Value):
                users.setdefault(x, set()).add(name)
    products = {_key(out): operands for name, operands, out in instructions
                if name == "mul" and users.get(out, set()) <= {"add", "sub"}}
    new = []
    for name, operands, out in instructions:
        first, second = map(_key, operands) if name in ("add", "sub") else (None, None)
        if first in products:
            name, operands = "fma" if name == "add" else "fms", (*products[first], operands[1])
        elif second in products:
            name, operands = "fma" if name == "add" else "fnma", (*products[second], operands[0])
        if name == "fma" and _key(operands[2]) in products:
            weight, array = products[_key(operands[2])]
            if operands[0].shape == weight.shape == ():
                name, operands = "average", (*operands[:2], weight, array)
        new.append((name, operands, out))
    used = {x for _, operands, _ in new for x in operands if isinstance(x, _Value)}
    return [(name, operands, out) for name, operands, out in new if out in used or out in results]


def evaluate(jaxpr: Any, operands: Sequence[jax.Array],
             call: Callable[[Pass, Sequence[jax.Array]], Sequence[jax.Array]]) -> list[Any]:
    """Evaluates a jaxpr in few passes.

    Args:
      jaxpr: what to evaluate.
      operands: its arguments, then its constants. A result may take the place of the argument with the same number.
      call: runs a pass on its arguments.

    Returns:
      The results.
    """
    plan = _Plan(jaxpr)
    env: dict[_Value, Any] = {**dict(zip(plan.arguments, operands, strict=True)), **plan.constants}

    def read(x: Any) -> Any:
        return env[x] if isinstance(x, _Value) else x

    steps = [(operation.results[0].depth, operation.results, operation.operands, operation.bind)
             for operation in plan.operations if operation.bind]
    steps += [(depth, one.results, one.arguments, lambda *arrays, one=one: call(one, arrays)) for depth, one in plan.passes]
    for _, results, values, run in sorted(steps, key=lambda step: step[0]):  # at each depth the passes last
        env.update(zip(results, run(*map(read, values)), strict=True))
    return [jnp.asarray(x) if not isinstance(x, _Value) else env[x] for x in plan.results]
