"""Hyperparameters: numbers, schedules, and values that live in the state.

A ``Scalar`` is a float, a 0-d array, a tracer, a schedule (any function of the step, such as
Optax's) or ``inject(value)``. None of these ever changes a dtype.
"""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lionax.core import storage

__all__ = ["Hyperparameter", "Injected", "Interval", "Scalar", "check_count", "check_scalar",
           "get_hyperparams", "inject", "scalar", "set_hyperparams", "value_at"]

Scalar = Any
"""A float, a 0-d array, a schedule (step -> value) or ``inject(value)``."""


class Hyperparameter(NamedTuple):
    """A learning rate in the state, or what was given as ``inject(value)``."""

    value: jax.Array  # float32 []: the value that the last step used, or that was assigned
    overridden: jax.Array  # bool []: whether this value counts, not the definition's


@dataclasses.dataclass(frozen=True)
class Injected:
    """A hyperparameter that lives in the state; made by `inject`."""

    value: Any

    def __repr__(self) -> str:
        return f"inject({self.value!r})"


def inject(value: float) -> Injected:
    """A hyperparameter in the optimizer's state, where `set_hyperparams` assigns it.

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
        if math.isinf(self.high):
            return "a number" if math.isinf(self.low) else f"a number of at least {self.low:g}"
        return f"a number in [{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def scalar(default: Any = dataclasses.MISSING, *, low: float = -math.inf, high: float = math.inf,
           open_high: bool = False, recorded: bool = False, remedy: str = "") -> Any:
    """A field of a `Rule` that holds a `Scalar`, checked when the rule is made.

    Args:
      default: the field's default.
      low: the least value accepted.
      high: the greatest value accepted.
      open_high: whether ``high`` itself is refused.
      recorded: whether the state always holds it, injected or not.
      remedy: what an error tells to do instead of a value out of range.

    >>> import dataclasses, lionax
    >>> @dataclasses.dataclass(frozen=True)
    ... class Shift(lionax.Rule):
    ...     by: lionax.Scalar = lionax.scalar(1.0, low=0)
    >>> Shift(0.5).name, Shift(0.5).by
    ('shift', 0.5)
    """
    metadata = {"scalar": Interval(low, high, open_high, remedy), "recorded": recorded}
    return dataclasses.field(default=default, metadata=metadata)


def check_scalar(value: Any, accepted: Interval, owner: str, argument: str,
                 dynamic: bool = True) -> Any:
    """A `Scalar` argument as a float, a tracer, a schedule or an `Injected`; refuses all else."""
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


def check_count(value: Any, owner: str, argument: str, of: str = "steps, at least 1") -> None:
    """Refuses what is not a whole number of at least 1, fixed when an optimizer is made."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}: {argument}={value!r} is not accepted; give a number of {of}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return not isinstance(value, bool)
    is_scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0
    dtype = jnp.result_type(value) if is_scalar else jnp.dtype(bool)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def value_at(definition: Any, count: jax.Array, owner: str) -> Any:
    """What a canonical `Scalar` is at a step: a float if it is constant, else a 0-d array."""
    if not callable(definition):
        return definition.value if isinstance(definition, Injected) else definition
    value: Any = definition(count)
    if value is None or jnp.shape(value) != ():
        what = "None" if value is None else f"shape {jnp.shape(value)}"
        raise ValueError(f"{owner}: a schedule must return a scalar; at this step it gave {what}")
    return value


def _is_hyperparameter(node: Any) -> bool:
    return isinstance(node, Hyperparameter)


def _found(state: Any) -> dict[Any, tuple[str, Any]]:
    """The name and node of every hyperparameter of a state, by key path."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_hyperparameter)
    nodes = {keys: node for keys, node in pairs if _is_hyperparameter(node)}
    times = Counter(keys[-1].key for keys in nodes)
    full = {keys: jax.tree_util.keystr(keys, simple=True, separator="/") for keys in nodes}
    return {keys: (keys[-1].key if times[keys[-1].key] == 1 else full[keys], node)
            for keys, node in nodes.items()}


def get_hyperparams(state: Any) -> dict[str, jax.Array]:
    """The learning rates and injected hyperparameters in a state.

    Args:
      state: of a lionax transformation, alone or anywhere inside another's (``optax.chain`` …).

    Returns:
      Name to float32 scalar: the value that the last step used or, if assigned since, the next will
      use. A name that several share is qualified by where it stands: ``head/learning_rate``.

    >>> import jax.numpy as jnp, lionax
    >>> state = lionax.lion(1e-3).init(jnp.ones(2))
    >>> {name: round(float(value), 6) for name, value in lionax.get_hyperparams(state).items()}
    {'learning_rate': 0.001}
    """
    return {name: jax.tree.leaves(node.value)[0] for name, node in _found(state).values()}


def set_hyperparams(state: Any, **values: Any) -> Any:
    """A state with other hyperparameters, effective from the next step, without a retrace.

    It assigns learning rates, also scheduled ones, and all that was given as `inject`. Structure,
    dtypes and shardings stay.

    Args:
      state: as `get_hyperparams`.
      **values: new value by name; None returns to the number or schedule of the definition. A plain
        name sets all that share it; a qualified one, ``**{"head/b1": 0.9}``, comes before.

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
    plain = {keys: keys[-1].key.rpartition("/")[2] for keys in held}
    named = {keys: next((given for given in values if given in (name, plain[keys])), None)
             for keys, name in held.items()}
    for name in values:
        if name not in named.values():
            raise KeyError(f"set_hyperparams: the state holds no hyperparameter {name!r}; it holds "
                           f"{', '.join(sorted(held.values())) or 'none'}. Give an argument as "
                           "inject(value) to assign it")

    def assign(keys, node):
        name = named.get(keys)
        if name is None:
            return node
        value = values[name]
        if value is None:
            return Hyperparameter(node.value, storage.in_place_of(False, node.overridden))
        (held_value,) = jax.tree.leaves(node.value)
        if np.ndim(value) == 0 or np.shape(value) != held_value.shape:  # vmap: an array of them
            value = check_scalar(value, Interval(), "set_hyperparams", name, dynamic=False)
        return Hyperparameter(storage.in_place_of(value, node.value),
                              storage.in_place_of(True, node.overridden))

    return jax.tree_util.tree_map_with_path(assign, state, is_leaf=_is_hyperparameter)
