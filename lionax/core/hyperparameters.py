"""Hyperparameters: numbers, schedules, and values that live in the state.

A ``Scalar`` is a float, a 0-d array, a tracer, a schedule (any function of the step, such as
Optax's) or ``inject(value)``. None of these ever changes a dtype.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from lionax.core import storage
from lionax.core.counting import LARGEST_COUNT
from lionax.core.internals import Tracer
from lionax.core.quantized import QuantizedArray
from lionax.core.table import shown

__all__ = ["Held", "Hyperparameters", "Injected", "Interval", "Scalar",
           "as_count", "check_count", "check_scalar", "flag", "get_hyperparams", "inject",
           "is_number", "named", "names_in_state", "register_with_flax",
           "scalar", "set_hyperparams", "value_at"]

Scalar = Any
"""A float, a 0-d array, a schedule (step -> value) or ``inject(value)``."""

LARGEST = sys.float_info.max  # the bound of what must be finite


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers that an argument accepts."""

    low: float = -LARGEST
    high: float = LARGEST
    open_high: bool = False
    nonzero: bool = False
    remedy: str = ""

    def __contains__(self, x: float) -> bool:
        # A decay that float32, in which states hold it, takes for 1 never forgets.
        is_below = float(np.float32(x)) < self.high if self.open_high else x <= self.high
        return self.low <= x and is_below and not (self.nonzero and x == 0)

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        if self.low == -LARGEST:
            return "a finite number other than 0" if self.nonzero else "a finite number"
        if self.high >= LARGEST:
            kind = "number" if math.isinf(self.high) else "finite number"
            return f"a {kind} of at least {self.low:g}"
        return (f"a number in [{self.low:g}, {self.high:g}" +
                ("), also in float32" if self.open_high else "]"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "assigned"],
                   meta_fields=["accepted"])
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters in a state: learning rates, and what was given as ``inject(value)``."""

    values: dict[str, jax.Array]  # float32 []: what the last step used, or what was assigned
    assigned: dict[str, jax.Array]  # int32 []: by `flag` of the name, 1 if the value counts
    accepted: tuple[tuple[str, Interval], ...]  # the names, sorted, and their ranges


def register_with_flax() -> None:
    """Lets ``flax.serialization`` save the nodes of a state, if Flax was imported by now."""
    flax: Any = sys.modules.get("flax.serialization")
    for cls, fields in _SAVED.items() if flax else ():
        flax.register_serialization_state(cls, *_passage(flax, fields), override=True)


_SAVED = {Hyperparameters: ("values", "assigned"), QuantizedArray: ("codes", "scales")}


def _passage(flax: Any, fields: tuple[str, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A node as a dict of its fields, and a node with the fields of such a dict."""
    def saved(node: Any) -> dict[str, Any]:
        # Copies of dicts: Flax converts what it gets in place.
        values = {name: getattr(node, name) for name in fields}
        return {name: dict(x) if isinstance(x, dict) else x for name, x in values.items()}

    return saved, lambda node, state: dataclasses.replace(
        node, **flax.from_state_dict(saved(node), state))


def flag(name: str) -> str:
    """The key in ``assigned``. It is not the name, which ``optax.tree.get`` should find once."""
    return f"{name} counts"


@dataclasses.dataclass(frozen=True)
class Injected:
    """A hyperparameter that lives in the state; made by `inject`."""

    value: Any
    name: str = ""  # in the state; the rule's name for it if empty
    accepted: Interval | None = None  # the range; the rule's if None

    def __repr__(self) -> str:
        return f"inject({self.value!r})"


@dataclasses.dataclass(frozen=True)
class Held:
    """A learning rate that is traced: as with ``optax.inject_hyperparams``, the caller holds it."""

    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def named(value: Scalar, name: str, accepted: Interval | None = None) -> Scalar:
    """An injected value with the public argument's name and range; anything else as it is."""
    if not isinstance(value, Injected):
        return value
    return dataclasses.replace(value, name=name, accepted=accepted)


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


def scalar(default: Any = dataclasses.MISSING, *, low: float = -LARGEST, high: float = LARGEST,
           open_high: bool = False, nonzero: bool = False, recorded: bool = False,
           remedy: str = "") -> Any:
    """A field of a `Rule` that holds a `Scalar`, checked when the rule is made.

    Args:
      default: the field's default.
      low: the least value accepted; any finite number if it is left out.
      high: the greatest value accepted, of the same kind; ``math.inf`` accepts infinity.
      open_high: whether ``high`` itself is refused.
      nonzero: whether 0 is refused.
      recorded: whether the state always holds it, injected or not, unless it is a tracer.
      remedy: what an error tells to do instead of a value out of range.

    >>> import dataclasses, lionax
    >>> @dataclasses.dataclass(frozen=True)
    ... class Shift(lionax.Rule):
    ...     by: lionax.Scalar = lionax.scalar(1.0, low=0)
    >>> Shift(0.5).name, Shift(0.5).by
    ('shift', 0.5)
    """
    interval = Interval(low, high, open_high, nonzero, remedy)
    metadata = {"scalar": interval, "recorded": recorded}
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
    elif dynamic and isinstance(value, Held):
        return value
    elif dynamic and callable(value):
        _check_schedule(value, owner, argument)
        return value
    elif is_number(value) and _as_float(value) in accepted:
        return float(value)
    schedule = " (or a schedule, or inject(...))" if dynamic else ""
    remedy = f"; {accepted.remedy}" if accepted.remedy else ""
    kind = ValueError if is_number(value) else TypeError
    raise kind(f"{owner}: {argument}={shown(value)} is not accepted; give {accepted}{schedule}"
               f"{remedy}")


def _as_float(value: Any) -> float:
    """A number; NaN, which is in no interval, for an int beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _check_schedule(schedule: Any, owner: str, argument: str) -> None:
    """Refuses a function that does not take the step: a compiled step would call it once."""
    try:
        inspect.signature(schedule).bind(0)
    except TypeError:
        raise TypeError(f"{owner}: {argument}={schedule!r} cannot be called with the step alone; "
                        "give a schedule, a function of the step, or assign a value with "
                        f"lionax.set_hyperparams(state, {argument}=...)") from None
    except ValueError:  # no signature to be had
        pass


def check_count(value: Any, owner: str, argument: str, of: str = "steps, at least 1") -> None:
    """Refuses what is not a whole number of at least 1, fixed when an optimizer is made."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value <= LARGEST_COUNT:
        raise ValueError(f"{owner}: {argument}={shown(value)} is not accepted; give an int below "
                         f"2^31: the number of {of}")


def as_count(value: Any, owner: str, argument: str) -> int:
    """How many steps or calls were made, as an int; refuses what a counter cannot hold."""
    if is_number(value) and not isinstance(value, Tracer):
        number = _as_float(value)
        if number.is_integer() and 0 <= number <= LARGEST_COUNT:
            return int(number)
    raise ValueError(f"{owner}: {argument}={shown(value)} is not accepted; give a whole number of "
                     "at least 0, below 2^31")


def is_number(value: Any) -> bool:
    """Whether a value is a real number or a 0-d array of one."""
    if isinstance(value, bool | int | float):
        return not isinstance(value, bool)
    is_scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0
    dtype = value.dtype if is_scalar else np.dtype(bool)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def value_at(definition: Any, count: jax.Array, owner: str) -> Any:
    """What a canonical `Scalar` is at a step: a float if it is constant, else a 0-d array."""
    if not callable(definition):
        return definition.value if isinstance(definition, Injected | Held) else definition
    try:
        value: Any = definition(count)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError) as error:
        raise TypeError(f"{owner}: the schedule {definition!r} needs the number of the step, which "
                        "is traced in a compiled step; write jnp.where instead of Python's if, and "
                        "jax.numpy instead of numpy") from error
    is_scalar = is_number(value) or isinstance(value, Tracer)
    if not is_scalar or jnp.shape(value) != ():
        what = f"shape {jnp.shape(value)}" if isinstance(value, jax.Array) else repr(value)
        raise ValueError(f"{owner}: a schedule must return a scalar; at this step it gave {what}")
    return value


def _is_node(node: Any) -> bool:
    return isinstance(node, Hyperparameters)


def _nodes(state: Any) -> dict[Any, Hyperparameters]:
    """The hyperparameters in a state, by the key path of each node."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_node)
    nodes = {keys: node for keys, node in pairs if _is_node(node)}
    for node in nodes.values():
        _check_node(node)
    return nodes


def _found(nodes: dict[Any, Hyperparameters]) -> dict[tuple[Any, str], str]:
    """The name of every hyperparameter, by its node's key path and its name there."""
    held = [(keys, name) for keys, node in nodes.items() for name in node.values]
    return dict(zip(held, names_in_state(held), strict=True))


def _check_node(node: Any) -> None:
    """Refuses a node that `Settings` did not make: a state that was edited or spoiled."""
    try:
        names = [name for name, interval in node.accepted if isinstance(interval, Interval)]
        is_whole = (set(node.values) == set(names) == {str(name) for name in names}
                    and set(node.assigned) == set(map(flag, names))
                    and all(len(jax.tree.leaves(value)) == 1 for held in
                            (node.values, node.assigned) for value in held.values()))
    except (TypeError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"the hyperparameters in the state are {shown(node)}, which no "
                         "transformation made: a value, its name or its range is missing; make "
                         "them with tx.init(params)")


def names_in_state(held: list[tuple[Any, str]]) -> list[str]:
    """A name for each (keys, name): qualified by its groups; by all keys if two would be equal.

    Groups are the dict keys below a field of a state: labels, and names in a chain.
    """
    short = []
    for keys, name in held:
        below = itertools.dropwhile(lambda key: not isinstance(key, GetAttrKey), keys)
        groups = [str(key.key) for key in below if isinstance(key, DictKey)]
        short.append("/".join((*groups, name)))
    times = Counter(short)
    return [name if times[name] == 1 else
            jax.tree_util.keystr((*keys, DictKey(own)), simple=True, separator="/")
            for name, (keys, own) in zip(short, held, strict=True)]


def get_hyperparams(state: Any) -> dict[str, jax.Array]:
    """The learning rates and injected hyperparameters in a state.

    Args:
      state: of a lionax transformation, alone or anywhere inside another's (``optax.chain`` …).

    Returns:
      Name to float32 scalar: the value that the last step used or, if assigned since, the next will
      use. A name is the argument's. In a group it is qualified: ``head/learning_rate``. Where
      several transformations share a name, each is qualified by where it stands in the state.

    >>> import jax.numpy as jnp, lionax
    >>> state = lionax.lion(1e-3).init(jnp.ones(2))
    >>> {name: round(float(value), 6) for name, value in lionax.get_hyperparams(state).items()}
    {'learning_rate': 0.001}
    """
    nodes = _nodes(state)
    return {full: jax.tree.leaves(nodes[keys].values[name])[0]
            for (keys, name), full in _found(nodes).items()}


def set_hyperparams(state: Any, **values: Any) -> Any:
    """A state with other hyperparameters, effective from the next step, without a retrace.

    It assigns learning rates, also scheduled ones, and all that was given as `inject`. Structure,
    dtypes and shardings stay. In a run of several processes all of them call it.

    Args:
      state: as `get_hyperparams`.
      **values: new value by name; None returns a learning rate to the number or schedule of the
        definition, and leaves what was injected, which lives in the state alone. A plain name sets
        all that share it; a qualified one, ``**{"head/b1": 0.9}``, comes before. Traced values are
        not checked.

    Raises:
      KeyError: for a name that the state does not hold.
      TypeError: for a value that is not a scalar, or a state of shapes.
      ValueError: for a value out of the argument's range.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.sgd(1.0)
    >>> state = lionax.set_hyperparams(tx.init(jnp.ones(2)), learning_rate=0.5)
    >>> tx.update(jnp.ones(2), state)[0].tolist()
    [-0.5, -0.5]
    """
    held = _found(_nodes(state))
    given = {key: next((known for known in (full, key[1].rpartition("/")[2]) if known in values),
                       None) for key, full in held.items()}
    for name in values:
        if name not in given.values():
            raise KeyError(f"set_hyperparams: the state holds no hyperparameter {name!r}; it holds "
                           f"{', '.join(sorted(held.values())) or 'none'}. Give an argument as "
                           "inject(value) to assign it")

    def assign(keys: Any, node: Any) -> Any:
        if not _is_node(node):
            return node
        new, assigned = dict(node.values), dict(node.assigned)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((new, assigned))):
            raise TypeError(f"set_hyperparams: the state holds {shown(new)}; give one of arrays")
        for name, accepted in node.accepted:
            spelled = given[keys, name]
            if spelled is not None:
                value, key = values[spelled], flag(name)
                assigned[key] = storage.in_place_of(value is not None, assigned[key])
                if value is not None:
                    new[name] = _assigned(value, new[name], accepted, spelled)
        return dataclasses.replace(node, values=new, assigned=assigned)

    return jax.tree_util.tree_map_with_path(assign, state, is_leaf=_is_node)


def _assigned(value: Any, old: Any, accepted: Interval, name: str) -> Any:
    """A value in place of the old one; under ``vmap`` it may be an array of values."""
    (held,) = jax.tree.leaves(old)
    is_batch = np.ndim(value) > 0 and np.shape(value) == held.shape
    if not is_batch:
        check_scalar(value, accepted, "set_hyperparams", name, dynamic=False)
    elif not isinstance(value, Tracer):
        for each in np.ravel(value):
            check_scalar(each, accepted, "set_hyperparams", name, dynamic=False)
    # A copy: an array of the caller's may serve several groups, and must not be donated.
    return storage.in_place_of(jnp.array(value), old)
