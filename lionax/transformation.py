"""What users hold: `Transformation`, Optax's contract around a definition."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionax import engine, storage
from lionax.eager import Program
from lionax.masks import is_placeholder
from lionax.rule import Definition

__all__ = ["Transformation", "apply_updates", "constructor"]


@dataclasses.dataclass(frozen=True)
class _Init:
    """The first field of a `Transformation`."""

    definition: Definition
    call: str = dataclasses.field(default="", compare=False)  # how it was written, for repr
    made_by: Any = dataclasses.field(default=None, compare=False)  # the public function, or None
    given: Any = dataclasses.field(default=None, compare=False)  # and its arguments by name

    def __call__(self, params: Any) -> engine.State:
        return engine.init(self.definition, params)


@dataclasses.dataclass(frozen=True)
class _Update:
    """The second field of a `Transformation`."""

    definition: Definition

    def __call__(self, updates: Any, state: engine.State, params: Any = None, **extra: Any) -> tuple[Any, engine.State]:
        return self.program(updates, state, params, extra, write=False)

    @functools.cached_property
    def program(self) -> Program:
        """What runs it."""
        return Program(self.definition)

    def __getstate__(self) -> dict[str, Any]:
        return {"definition": self.definition}  # without the program, which holds compiled code


class Transformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation: the two fields of Optax's contract, and `step`.

    - It is an ``optax.GradientTransformationExtraArgs``: ``init, update = tx`` works, and so does every place that takes
      an Optax optimizer.
    - Transformations with equal definitions are equal and hash alike; they pickle; ``repr`` reads like the call that
      made them. As a static argument of ``jit``, equal ones share one trace.
    - ``init(params)`` gives the state. Its structure and dtypes never change.
    - ``update(grads, state, params=None, **extra)`` gives updates in the gradients' dtypes, and the new state. Arithmetic is
      in float32, or in float64 for float64 leaves. With float32 parameters and bfloat16 gradients prefer ``step``, which does
      not round the update. Extra arguments reach the parts that take them.
    - ``step(params, state, grads, **extra)`` gives the new parameters and the new state.
    - Leaves that are None, float0 or ``optax.MaskedNode()`` pass through, and their state is kept (by lionax's own parts).
    """

    __slots__ = ()

    @classmethod
    def of(cls, definition: Definition) -> "Transformation":
        """The transformation that a rule or another definition describes.

        Args:
          definition: a `Rule`, or a combination of definitions.
        """
        return cls(_Init(definition), cast(Any, _Update(definition)))

    @property
    def definition(self) -> Definition:
        """The data that says what the transformation does."""
        return cast(_Init, self.init).definition

    def step(self, params: Any, state: engine.State, grads: Any, **extra: Any) -> tuple[Any, engine.State]:
        """One training step: the new parameters and the new state.

        Equal to ``update`` followed by `apply_updates` in one function, bit for bit in float32. With lower precision it is
        better: the parameter and its update are added before either is rounded. In ``jit`` donate the first two
        arguments; they come back in the same order, so their memory is used again.

        Args:
          params: the parameters.
          state: as ``init`` made it for them.
          grads: the gradients, of the parameters' structure and shapes.
          **extra: for transformations that take extra arguments.

        Raises:
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
            raise ValueError(f"{self!r}: step needs the parameters, which it returns anew; without them, call update(grads, state)")
        return cast(_Update, self.update).program(grads, state, params, extra, write=True)

    def made_by(self, function: Callable[..., Any]) -> dict[str, Any] | None:
        """The arguments by name, if it came from a call of this public function; else None."""
        init = cast(_Init, self.init)
        return dict(init.given) if init.made_by is function else None

    def __repr__(self) -> str:
        return cast(_Init, self.init).call or f"Transformation.of({self.definition!r})"


def constructor(function: Callable[..., Transformation]) -> Callable[..., Transformation]:
    """Makes the ``repr`` of what a function returns read like the call: arguments by name, defaults left out."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def construct(*args: Any, **kwargs: Any) -> Transformation:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}; the signature is {function.__name__}{signature}") from None
        shown = []
        for name, value in given.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                shown += map(_shown, value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                shown += [f"{key}={_shown(item)}" for key, item in value.items()]
            elif type(value) is not type(parameter.default) or value != parameter.default:
                shown.append(f"{name}={_shown(value)}")
        definition = function(*args, **kwargs).definition
        init = _Init(definition, f"{function.__name__}({', '.join(shown)})", construct, dict(given))
        return Transformation(init, cast(Any, _Update(definition)))

    return construct


def _shown(value: Any) -> str:
    """``repr``, but a dtype by its name, as it may also be written."""
    return repr(jnp.dtype(value).name if isinstance(value, type | np.dtype) else value)


def apply_updates(params: Any, updates: Any) -> Any:
    """Parameters plus updates, each sum taken in float32 (float64 for float64 leaves) and rounded once.

    Args:
      params: the parameters.
      updates: as ``update`` returns them; where there is no update (None, float0, ``optax.MaskedNode()``), the parameter stays.

    Returns:
      The new parameters, in the dtypes of the old.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})["w"].tolist()
    [1.5, 1.5]
    """
    return jax.tree.map(storage.add, params, updates, is_leaf=is_placeholder)
