"""Hyperparameters: numbers, schedules, and values that live in the state and can be assigned during training.

Wherever a transformation takes a ``Scalar``, it takes a float, a 0-d NumPy or JAX array, a tracer, a schedule (any
function of the step, such as Optax's) or ``inject(value)``. None of these ever changes a dtype.
"""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lionax import storage

__all__ = ["Hyperparameter", "Injected", "Interval", "Scalar", "check_count", "check_scalar", "get_hyperparams", "inject",
           "is_hyperparameter", "scalar", "set_hyperparams", "value_at"]

Scalar = Any
"""A float, a 0-d array, a schedule (step -> value) or ``inject(value)``."""


class Hyperparameter(NamedTuple):
    """A hyperparameter in the state: that of a learning rate, always, and of whatever was given as ``inject(value)``.

    While ``overridden`` is False the definition (a number or a schedule) gives the value and ``value`` reports it; once
    it is assigned, the state's value counts.
    """

    value: jax.Array  # float32 []: the value that the last step used, or that was assigned
    overridden: jax.Array  # bool []: whether it was injected or assigned


@dataclasses.dataclass(frozen=True)
class Injected:
    """A hyperparameter that lives in the state; made by `inject`."""

    value: Any

    def __repr__(self) -> str:
        return f"inject({self.value!r})"


def inject(value: float) -> Injected:
    """A hyperparameter that lives in the optimizer's state, where `set_hyperparams` assigns it without a retrace.

    A learning rate lives there in any case and needs this only to let the restored state, not the definition, decide.

    Args:
      value: the initial value; a float or a 0-d array.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lion(1e-3, b1=lionax.inject(0.9))
    >>> state = lionax.set_hyperparams(tx.init(jnp.ones(2)), b1=0.95)
    >>> round(float(lionax.get_hyperparams(state)["b1"]), 4)
    0.95
    """
    return Injected(check_scalar(value, Interval(), "inject", "value", dynamic=False))


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers that an argument accepts."""

    low: float = -math.inf
    high: float = math.inf
    open_high: bool = False
    remedy: str = ""

    def __contains__(self, x: float) -> bool:
        return self.low <= x and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a number"
        if math.isinf(self.high):
            return f"a number of at least {self.low:g}"
        return f"a number in [{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def scalar(default: Any = dataclasses.MISSING, *, low: float = -math.inf, high: float = math.inf, open_high: bool = False,
           recorded: bool = False, remedy: str = "") -> Any:
    """A dataclass field of a rule that holds a `Scalar`.

    Args:
      default: the field's default.
      low: the least value accepted.
      high: the greatest value accepted.
      open_high: whether ``high`` itself is refused.
      recorded: whether the state always holds it, injected or not.
      remedy: what to do instead of a value out of range.
    """
    metadata = {"scalar": Interval(low, high, open_high, remedy), "recorded": recorded}
    return dataclasses.field(default=default, metadata=metadata)


def check_scalar(value: Any, accepted: Interval, owner: str, argument: str, dynamic: bool = True) -> Any:
    """A `Scalar` argument in canonical form: a float, a tracer, a schedule or an `Injected`; refuses what is not one."""
    if isinstance(value, Tracer):
        if value.shape == ():
            return value
    elif dynamic and isinstance(value, Injected):
        check_scalar(value.value, accepted, owner, argument)
        return value
    elif dynamic and callable(value):
        return value
    elif _is_number(value) and float(value) in accepted:
        return float(value)
    schedule = " (or a schedule, or inject(...))" if dynamic else ""
    remedy = f"; {accepted.remedy}" if accepted.remedy else ""
    kind = ValueError if _is_number(value) else TypeError
    raise kind(f"{owner}: {argument}={value!r} is not accepted; give {accepted}{schedule}{remedy}")


def check_count(value: Any, owner: str, argument: str, of: str = "steps", or_none: bool = False) -> None:
    """Refuses what is not a whole number of at least 1, fixed when an optimizer is made."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        accepted = f"a number of {of}, at least 1{', or None' if or_none else ''}"
        raise ValueError(f"{owner}: {argument}={value!r} is not accepted; give {accepted}")


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or isinstance(value, bool):
        return False
    dtype = jnp.result_type(value)
    return np.ndim(value) == 0 and jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)


def value_at(definition: Any, count: jax.Array, owner: str) -> Any:
    """What a canonical `Scalar` is at a step: a float if it is constant, else a 0-d array."""
    if isinstance(definition, Injected):
        return definition.value
    if not callable(definition):
        return definition
    value: Any = definition(count)
    if value is None or jnp.shape(value) != ():
        what = "None" if value is None else f"shape {jnp.shape(value)}"
        raise ValueError(f"{owner}: a schedule must return a scalar; at this step it gave {what}")
    return value


def is_hyperparameter(node: Any) -> bool:
    """True for the `Hyperparameter` nodes of a state."""
    return isinstance(node, Hyperparameter)


def _found(state: Any) -> dict[Any, tuple[str, Any]]:
    """Every hyperparameter of a state: its key path to its name and node. A name held twice is qualified by the path."""
    pairs = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_hyperparameter)[0]
    nodes = {keys: node for keys, node in pairs if is_hyperparameter(node)}
    short = Counter(keys[-1].key for keys in nodes)
    names = {keys: keys[-1].key if short[keys[-1].key] == 1 else jax.tree_util.keystr(keys, simple=True, separator="/")
             for keys in nodes}
    return {keys: (names[keys], node) for keys, node in nodes.items()}


def get_hyperparams(state: Any) -> dict[str, jax.Array]:
    """The learning rates and injected hyperparameters in a state.

    Args:
      state: the state of a lionax transformation, alone or anywhere inside another's (``optax.chain``, ``MultiSteps``).

    Returns:
      Name to float32 scalar: the value that the last step used or, if assigned since, that the next will use. A name
      that several transformations share is qualified by where it stands: ``head/learning_rate``.

    >>> import jax.numpy as jnp, lionax
    >>> state = lionax.lion(1e-3).init(jnp.ones(2))
    >>> {name: round(float(value), 6) for name, value in lionax.get_hyperparams(state).items()}
    {'learning_rate': 0.001}
    """
    return {name: jax.tree.leaves(node.value)[0] for name, node in _found(state).values()}


def set_hyperparams(state: Any, **values: Any) -> Any:
    """A state with other hyperparameters, effective from the next step, without a retrace.

    Works for a learning rate given as a number, as a schedule (which the assigned value overrides until it is set to
    None) or injected, and for every other hyperparameter that was given as `inject`.

    Args:
      state: as `get_hyperparams`.
      **values: new value by name; None returns to the definition. A plain name sets all that share it; qualified names go in
        as ``**{"head/b1": 0.9}`` and come before.

    Returns:
      The new state, of the same structure, dtypes and shardings.

    Raises:
      KeyError: for a name that the state does not hold.
      TypeError: for a value that is not a scalar.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.sgd(1.0)
    >>> state = lionax.set_hyperparams(tx.init(jnp.ones(2)), learning_rate=0.5)
    >>> tx.update(jnp.ones(2), state)[0].tolist()
    [-0.5, -0.5]
    """
    held = {keys: name for keys, (name, _) in _found(state).items()}
    named = {keys: next((given for given in values if given in (name, keys[-1].key.rpartition("/")[2])), None)
             for keys, name in held.items()}
    for name in values:
        if name not in named.values():
            raise KeyError(f"set_hyperparams: the state holds no hyperparameter {name!r}; it holds "
                           f"{', '.join(sorted(held.values())) or 'none'}. Give an argument as inject(value) to assign it")

    def assign(keys, node):
        name = named.get(keys)
        if name is None:
            return node
        value = values[name]
        if value is None:
            return Hyperparameter(node.value, storage.in_place_of(False, node.overridden))
        (held_value,) = jax.tree.leaves(node.value)
        if np.ndim(value) == 0 or np.shape(value) != held_value.shape:  # a state under vmap takes an array of them
            value = check_scalar(value, Interval(), "set_hyperparams", name, dynamic=False)
        return Hyperparameter(storage.in_place_of(value, node.value), storage.in_place_of(True, node.overridden))

    return jax.tree_util.tree_map_with_path(assign, state, is_leaf=is_hyperparameter)
