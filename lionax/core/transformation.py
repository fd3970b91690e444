"""What users hold: `Transformation`, Optax's contract around a definition."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax.core import engine, storage
from lionax.core.definition import Foreign, nested
from lionax.core.placement import as_structs, on_mesh_of, own_buffers
from lionax.core.rule import Definition
from lionax.core.state import State, explained, init_state
from lionax.core.table import shown
from lionax.core.tree import is_placeholder

__all__ = ["Transformation", "apply_updates", "constructor"]

OWN = re.compile(r"[\w.]+: ")  # lionax's errors begin with the name of what refuses


@dataclasses.dataclass(frozen=True)
class _Init:
    """The first field of a `Transformation`."""

    definition: Definition
    call: str = dataclasses.field(default="", compare=False)  # how it was written, for repr
    made_by: Any = dataclasses.field(default=None, compare=False)  # the public function, or None
    given: Any = dataclasses.field(default=None, compare=False)  # and its arguments by name

    def __call__(self, params: Any) -> Any:
        with _context(self.definition):
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
                init = functools.partial(init_state, self.definition)
                return as_structs(jax.eval_shape(init, params), params)
            return on_mesh_of(params, own_buffers(init_state(self.definition, params), params))


@dataclasses.dataclass(frozen=True)
class _Update:
    """The second field of a `Transformation`."""

    definition: Definition

    def __call__(self, updates: Any, state: State, params: Any = None,
                 **extra: Any) -> tuple[Any, State]:
        if updates is None:
            return None, state
        like = updates if params is None else params
        with _context(self.definition), explained(self.definition, state, like):
            return engine.update(self.definition, updates, state, params, extra)


class Transformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation: the two fields of Optax's contract, and `step`.

    - It is an ``optax.GradientTransformationExtraArgs``: it works wherever Optax's do.
    - Those with equal definitions are equal, hash alike and share a trace as static arguments of
      ``jit``. They pickle. ``repr`` reads like the call that made them.
    - ``init(params)`` gives the state. Its structure and dtypes never change.
    - ``update(grads, state, params=None, **extra)`` gives updates in the gradients' dtypes, and the
      new state. Arithmetic is in float32, for float64 leaves in float64. With float32 parameters
      and bfloat16 gradients prefer ``step``, which does not round the update.
    - ``step(params, state, grads, **extra)`` gives the new parameters and the new state.
    - Extra arguments reach the parts that take them.
    - Leaves that are None, float0 or ``optax.MaskedNode()`` pass through. Their slots stay.
    """

    __slots__ = ()

    @classmethod
    def of(cls, definition: Definition, call: str = "") -> "Transformation":
        """The transformation that a rule or another definition describes; ``call`` is its repr."""
        return cls(cast(Any, _Init(definition, call)), cast(Any, _Update(definition)))

    @property
    def definition(self) -> Definition:
        """The data that says what the transformation does."""
        if isinstance(self.init, _Init) and isinstance(self.update, _Update):
            return self.init.definition
        return Foreign(optax.GradientTransformationExtraArgs(*self))  # made by `_replace`

    def step(self, params: Any, state: State, grads: Any, **extra: Any) -> tuple[Any, State]:
        """One training step: the new parameters and the new state.

        It is ``update`` followed by `apply_updates` in one function: to 1e-6 in float32, bit for
        bit in one compiled program for chains without norms and conditionals. In lower precision
        it is better: it adds the update before anything is rounded. In ``jit`` donate the first
        two arguments; they come back in the same order, so their memory is used again.

        Args:
          params: the parameters.
          state: as ``init`` made it for them.
          grads: the gradients, of the parameters' structure and shapes.
          **extra: for transformations that take extra arguments.

        Raises:
          TypeError: for an extra argument that none of them takes; ``update`` ignores it, as
            Optax's contract has it.
          ValueError: without parameters.

        >>> import jax, jax.numpy as jnp, lionax
        >>> tx = lionax.lion(0.1, weight_decay=0.0)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
        >>> params, state = step(params, tx.init(params), {"w": jnp.array([3.0, -4.0])})
        >>> [round(w, 3) for w in params["w"].tolist()]
        [0.9, 2.1]
        """
        if params is None:
            raise ValueError(f"{self!r}: step needs the parameters, which it returns anew; without "
                             "them, call update(grads, state)")
        _check_keywords(self.definition, extra)
        with _context(self.definition), explained(self.definition, state, params):
            return engine.step(self.definition, params, state, grads, extra)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self!r} is a constant: {name} cannot be assigned. Make another "
                             "transformation, or assign a hyperparameter in the state with "
                             "lionax.set_hyperparams(state, ...)")

    def made_by(self, function: Callable[..., Any]) -> dict[str, Any] | None:
        """The arguments by name, if it came from a call of this public function; else None."""
        init: Any = self.init
        return dict(init.given) if getattr(init, "made_by", None) is function else None

    def __repr__(self) -> str:
        return getattr(self.init, "call", "") or f"Transformation.of({self.definition!r})"


def _context(definition: Any) -> AbstractContextManager[Any]:
    """In what the engine runs; it refuses what is no definition."""
    is_known = isinstance(definition, Definition)
    return definition.context() if is_known else contextlib.nullcontext()


def _check_keywords(definition: Definition, extra: dict[str, Any]) -> None:
    """Refuses an extra argument that no part of a definition takes."""
    known = set().union(*(part.takes for part in nested(definition))) if extra else set()
    for name in extra if "**" not in known else ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            accepted = ", ".join(sorted(known)) or "none"
            raise TypeError(f"step: no part of the transformation takes the argument {name!r}" +
                            (f"; did you mean {near[0]!r}?" if near else
                             f"; it takes {accepted}"))


def constructor(function: Callable[..., Transformation]) -> Callable[..., Transformation]:
    """Makes ``repr`` of what a function returns read like the call, without the defaults."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def construct(*args: Any, **kwargs: Any) -> Transformation:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}; the signature is "
                            f"{function.__name__}{_names(signature)}") from None
        try:
            definition = function(*args, **kwargs).definition
            call = f"{function.__name__}({', '.join(_arguments(signature, given))})"
        except Exception as error:
            if isinstance(error, TypeError | ValueError) and OWN.match(str(error)):
                raise
            kind = ValueError if isinstance(error, ValueError) else TypeError
            what = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
            raise kind(f"{function.__name__}: {what} is not accepted: {error}; the signature is "
                       f"{function.__name__}{_names(signature)}") from error
        init = _Init(definition, call, construct, dict(given))
        return Transformation(cast(Any, init), cast(Any, _Update(definition)))

    return construct


def _names(signature: inspect.Signature) -> inspect.Signature:
    """The signature without annotations."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


def _arguments(signature: inspect.Signature, given: dict[str, Any]) -> Iterator[str]:
    """The arguments of a call as they may be written."""
    for name, value in given.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from map(_shown, value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            yield from (f"{key}={_shown(item)}" for key, item in value.items())
        elif type(value) is not type(parameter.default) or value != parameter.default:
            yield f"{name}={_shown(value)}"


def _shown(value: Any) -> str:
    """``repr``, but a dtype by its name, as it may also be written."""
    return repr(jnp.dtype(value).name if isinstance(value, type | np.dtype) else value)


def apply_updates(params: Any, updates: Any) -> Any:
    """Parameters plus updates; each sum is taken in float32 or float64 and rounded once.

    Args:
      params: the parameters.
      updates: as ``update`` returns them. A parameter stays where there is none: None, float0 or
        ``optax.MaskedNode()``.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.apply_updates(jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])).tolist()
    [1.5, 1.5]
    """
    return jax.tree.map(storage.add, params, updates, is_leaf=is_placeholder)
