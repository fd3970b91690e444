"""The weights of a running Keras optimizer, into a state and out of it.

A constructor tells which weights its reference has, in which order and under which names (`_Form`).
What is read from a list or a dict goes to the slots that stand for it (`_SLOTS`), and back.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lionax.compat import dtensor, keras2, keras3, tf_models
from lionax.core import storage
from lionax.core.hyperparameters import as_count, get_hyperparams, set_hyperparams
from lionax.core.state import State
from lionax.core.table import shown
from lionax.core.transformation import Transformation
from lionax.core.tree import is_beyond, is_placeholder, named_leaves
from lionax.transforms.accumulation import AccumulateState, live_sum
from lionax.transforms.adaptive import ScaleByAdamState
from lionax.transforms.averaging import ParamsEmaState
from lionax.transforms.momentum import TraceState
from lionax.transforms.sign_momentum import ScaleByLionState

__all__ = ["from_weights", "to_weights"]

_SLOTS = {
    ScaleByLionState: {"mu": "momentum"}, ScaleByAdamState: {"mu": "momentum", "nu": "velocity"},
    TraceState: {"trace": "downhill"}, ParamsEmaState: {"params_ema": "average"}
}
"""What the fields of states are called here. Keras's momentum of SGD is the trace, downhill."""

_COUNT = ("iteration", "iterations", "_iterations", "iter")
_RATE = ("learning_rate", "_learning_rate")
_CHECKPOINT = "/.ATTRIBUTES/VARIABLE_VALUE"  # ends what TensorFlow's checkpoint reader lists


@dataclasses.dataclass(frozen=True)
class _Form:
    """The weights of a reference's optimizer: its iteration, in Keras 3 its rate, its slots."""

    groups: tuple[
        tuple[str, ...],
        ...]  # of slots; the variables of a group follow each other, parameter by parameter
    spelled: Callable[[str, str],
                      tuple[str,
                            ...]]  # the names of the variable for a slot and a parameter's name
    constant: bool  # whether the learning rate is a number
    count: bool = True  # whether the iteration is a weight
    rate: bool = False  # whether the learning rate is one
    window: int = 1  # how many calls make a step

    @classmethod
    def of(cls, tx: Transformation, owner: str) -> "_Form":
        """That of the constructor which made a transformation; refuses what none has made."""
        own = {
            keras3.Lion: ("momentum",), keras3.SGD: ("downhill",),
            keras3.Lamb: ("momentum", "velocity"), keras2.Lion: ("momentum",),
            keras2.SGD: ("downhill",), dtensor.SGD: ("downhill",),
            tf_models.LAMB: ("momentum", "velocity")
        }
        makers = [
            maker for maker in own
            if isinstance(tx, Transformation) and tx.made_by(maker) is not None
        ]
        if not makers:
            names = ", ".join(
                f"{maker.__module__.removeprefix('lionax.')}.{maker.__name__}" for maker in own)
            raise TypeError(f"{owner}: {tx!r} was not returned by one of {names}, so it is not "
                            "known which weights its reference has")
        maker, given = makers[0], tx.made_by(makers[0]) or {}
        constant = not callable(given.get("learning_rate"))
        average = (("average",),) if given.get("use_ema") else ()
        if maker is tf_models.LAMB:
            return cls((("momentum",), ("velocity",)), _spelled_in_model_garden, constant)
        if maker in (keras2.Lion, keras2.SGD, dtensor.SGD):
            return cls((*average, own[maker]), _spelled_in_keras2, constant, count=maker
                       is not dtensor.SGD)
        window = given.get("gradient_accumulation_steps") or 1
        sums = (("gradient_accumulator",),) if window > 1 else ()
        slots = () if maker is keras3.SGD and not given.get("momentum") else (own[maker],)
        return cls((*average, *sums, *slots), _spelled_in_keras3, constant, rate=constant,
                   window=window)

    @property
    def slots(self) -> list[str]:
        """All slots."""
        return [slot for group in self.groups for slot in group]

    def entries(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Slot and leaf of each weight, in their order."""
        return [(slot, path) for group in self.groups for path in paths for slot in group]


def _spelled_in_keras3(slot: str, name: str) -> tuple[str, ...]:
    return (f"{name.replace('/', '_')}_{'momentum' if slot == 'downhill' else slot}",)


def _spelled_in_keras2(slot: str, name: str) -> tuple[str, ...]:
    return (f"{'average' if slot == 'average' else 'm'}/{name}",)


def _spelled_in_model_garden(slot: str, name: str) -> tuple[str, ...]:
    short = {"momentum": "m", "velocity": "v"}[slot]
    return f"{name}/{short}", f"{name}/.OPTIMIZER_SLOT/optimizer/{short}"


@dataclasses.dataclass(frozen=True)
class _Variables:
    """The parameters as the reference has them."""

    names: dict[str, str]  # a leaf's path → the reference's name, in the reference's order
    ordered: bool  # whether that order is known

    @classmethod
    def of(cls, tree: Any, variables: Sequence[str] | Mapping[str, str] | None,
           owner: str) -> "_Variables":
        """From the user's argument, checked against a tree like the parameters."""
        paths = list(_by_path(tree))
        if variables is None:
            return cls(dict(zip(paths, paths, strict=True)),
                       len(paths) == 1 or isinstance(tree, list | tuple))
        is_list = isinstance(variables, Mapping | list | tuple) and all(
            isinstance(name, str) for pair in (variables, dict(variables).values() if isinstance(
                variables, Mapping) else ()) for name in pair)
        if not is_list or sorted(variables) != sorted(paths):
            raise ValueError(f"{owner}: variables={shown(variables)} are not the paths of the "
                             f"leaves, each once: {paths}")
        return cls(
            dict(variables) if isinstance(variables, Mapping) else dict(
                zip(variables, variables, strict=True)), True)

    def check_order(self, owner: str) -> None:
        """Refuses to guess: JAX sorts dicts, Keras does not."""
        if not self.ordered:
            raise ValueError(f"{owner}: the order of the reference's variables is not known; give "
                             "variables=[...], the paths of the leaves in the order of "
                             f"model.trainable_variables; they are {list(self.names)}")


def from_weights(tx: Transformation, params: Any, weights: Sequence[Any] | Mapping[str, Any],
                 variables: Sequence[str] | Mapping[str, str] | None = None, *,
                 count: int | None = None) -> State:
    """The state in which lionax goes on with a run of Keras.

    Args:
      tx: what the constructor of `lionax.compat` returned that stands for the Keras optimizer.
      params: the parameters, as they are now.
      weights: the optimizer's: a list, as ``get_weights()`` or ``[v.numpy() for v in
        optimizer.variables]`` gives it; or a dict by number or name, as ``save_own_variables``,
        ``{v.path: v.numpy() for v in optimizer.variables}`` or TensorFlow's checkpoint reader gives
        it. If a learning rate is among them and differs, it is assigned.
      variables: the paths of the leaves in the order of ``model.trainable_variables``; or a dict
        from path to the reference's name of the variable, in that order. May be left out if the
        parameters are a list, or the weights have names made of the paths.
      count: how many calls were made, where the weights do not tell: those of DTensor in TensorFlow
        2.12.

    Returns:
      The state, in the dtypes and on the devices of ``tx.init(params)``.

    Raises:
      TypeError: for a transformation of another origin.
      ValueError: for weights that do not fit in number, name or shape; for an order that is not
        known.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.compat.keras3.Lion(0.5)
    >>> state = lionax.compat.from_weights(tx, [jnp.ones(2)], [3, 0.5, [0.25, -1.0]])
    >>> int(state.count), lionax.compat.to_weights(tx, state)[2].tolist()
    (3, [0.25, -1.0])
    """
    owner = "compat.from_weights"
    form, leaves = _Form.of(tx, owner), _by_path(params)
    known = _Variables.of(params, variables, owner)
    if isinstance(weights, Mapping):
        calls, rate, found = _from_dict(form, known, weights, owner)
    else:
        calls, rate, found = _from_list(form, known, weights, owner)
    calls = count if calls is None else calls
    if calls is None:
        raise ValueError(f"{owner}: the weights do not tell how many calls were made; give "
                         "count=...")
    calls = as_count(calls, owner, "the iteration")
    if count is not None and calls != count:
        raise ValueError(f"{owner}: count={shown(count)}, but the weights tell of {calls} calls; "
                         "leave count out")
    found = {(slot, path): _array(value, f"the {_shown(slot)} of {path!r}", owner)
             for (slot, path), value in found.items()}
    for (slot, path), value in found.items():
        if np.shape(value) != np.shape(leaves[path]):
            raise ValueError(f"{owner}: the {_shown(slot)} of {path!r} has shape "
                             f"{np.shape(value)}, the parameter {np.shape(leaves[path])}; give the "
                             "weights in the order of variables")
    state = _filled(cast(State, tx.init(params)), found, calls, form.window)
    rate = None if rate is None else _array(rate, "the learning rate", owner)
    if rate is not None and form.constant and (rate.shape or np.float32(rate) != _rate(state)):
        state = set_hyperparams(state, learning_rate=rate)
    return state


def to_weights(tx: Transformation, state: State,
               variables: Sequence[str] | Mapping[str, str] | None = None) -> list[np.ndarray]:
    """The weights with which Keras goes on with a run of lionax: the inverse of `from_weights`.

    Args:
      tx: as `from_weights`.
      state: its state.
      variables: as `from_weights`: the order in which the weights are to stand.

    Returns:
      What Keras's ``optimizer.variables`` are to be: for ``set_weights``, or for
      ``optimizer.load_own_variables({str(i): weight for i, weight in enumerate(weights)})``.

    Raises:
      TypeError: for a transformation of another origin.
      ValueError: for an order that is not known.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.compat.keras3.SGD(0.5, momentum=0.5)
    >>> params, state = tx.step([jnp.ones(2)], tx.init([jnp.ones(2)]), [jnp.ones(2)])
    >>> [weight.tolist() for weight in lionax.compat.to_weights(tx, state)]
    [1, 0.5, [-0.5, -0.5]]
    """
    owner = "compat.to_weights"
    form = _Form.of(tx, owner)
    weights = [np.asarray(state.count)] * form.count + [_rate(state)] * form.rate
    if not form.slots:
        return weights
    trees = _slots(state)
    known = _Variables.of(trees[form.slots[0]], variables, owner)
    known.check_order(owner)
    values = {slot: _by_path(trees[slot]) for slot in form.slots}
    return weights + [np.asarray(-values[slot][path] if slot == "downhill" else values[slot][path])
                      for slot, path in form.entries(list(known.names))]


def _array(value: Any, what: str, owner: str) -> np.ndarray:
    """A weight; refuses what is no array of numbers, such as an object that was pickled."""
    try:
        array = np.asarray(None if isinstance(value, np.ma.MaskedArray) else value)
    except (TypeError, ValueError, OverflowError):
        array = np.asarray(None)
    kinds = (jnp.floating, jnp.integer)
    if is_beyond(array) or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise ValueError(f"{owner}: {what} is {shown(value)}, which is no array of real numbers")
    return array


def _by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a tree."""
    names, leaves, _ = named_leaves(tree)
    return {
        name: leaf for name, leaf in zip(names, leaves, strict=True) if not is_placeholder(leaf)
    }


def _rate(state: State) -> np.ndarray:
    """The learning rate, which several rules may share."""
    return next(
        np.asarray(value)
        for name, value in get_hyperparams(state).items()
        if name.rpartition("/")[2] == "learning_rate")


def _shown(slot: str) -> str:
    return "momentum" if slot == "downhill" else slot


def _is_known(node: Any) -> bool:
    return isinstance(node, AccumulateState) or type(node) in _SLOTS


def _slots(state: Any) -> dict[str, Any]:
    """The trees of all slots in a state."""
    trees = {}
    for node in jax.tree.leaves(state, is_leaf=_is_known):
        if isinstance(node, AccumulateState):
            sums = jax.tree.map(live_sum, node.gradients, node.live)
            trees |= {"gradient_accumulator": sums, **_slots(node.inner)}
        trees |= {name: getattr(node, field) for field, name in _SLOTS.get(type(node), {}).items()}
    return trees


def _filled(state: State, found: Mapping[tuple[str, str], Any], count: int, window: int) -> State:
    """A state with these arrays in its slots, after so many calls."""

    def tree(slot: str, old: Any) -> Any:
        names, leaves, treedef = named_leaves(old)
        new = [(-1 if slot == "downhill" else 1) * jnp.asarray(found[slot, name]) if
               (slot, name) in found else None for name in names]
        return treedef.unflatten(leaf if value is None else storage.in_place_of(value, leaf)
                                 for value, leaf in zip(new, leaves, strict=True))

    def fill(node: Any) -> Any:
        if isinstance(node, AccumulateState):
            part = count % window
            return node._replace(calls=storage.in_place_of(part, node.calls),
                                 weight=storage.in_place_of(part, node.weight),
                                 live=storage.in_place_of(int(part > 0), node.live),
                                 gradients=tree("gradient_accumulator", node.gradients),
                                 inner=_filled(node.inner, found, count // window, 1))
        if type(node) in _SLOTS:
            return node._replace(**{
                field: tree(slot, getattr(node, field))
                for field, slot in _SLOTS[type(node)].items()
            })
        return node

    return state._replace(count=storage.in_place_of(count, state.count),
                          rules=jax.tree.map(fill, state.rules, is_leaf=_is_known))


Found = tuple[Any, Any, dict[tuple[str, str], Any]]
"""The iteration or None, the learning rate or None, and the weight of each slot and leaf."""


def _from_list(form: _Form, known: _Variables, weights: Sequence[Any], owner: str) -> Found:
    if not isinstance(weights, Sequence) or isinstance(weights, str | bytes):
        raise ValueError(f"{owner}: weights is a {type(weights).__name__}; give a list or a dict")
    known.check_order(owner)
    entries = form.entries(list(known.names))
    scalars = [_array(weight, f"the weight {i}", owner)
               for i, weight in enumerate(weights[: form.count + form.rate])]
    if len(weights) != form.count + form.rate + len(entries) or any(
            scalar.shape != () for scalar in scalars):
        wanted = ["the iteration"] * form.count + ["the learning rate"] * form.rate
        wanted += [f"{_shown(slot)} of {path!r}" for slot, path in entries]
        raise ValueError(f"{owner}: {len(weights)} weights do not fit; expected are "
                         f"{', '.join(wanted)}")
    count = scalars[0] if form.count else None
    rate = scalars[int(form.count)] if form.rate else None
    return count, rate, dict(zip(entries, weights[len(scalars):], strict=True))


def _from_dict(form: _Form, known: _Variables, weights: Mapping[str, Any], owner: str) -> Found:
    if not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{owner}: the names of the weights are {shown(list(weights))}; give "
                         "strings")
    free = {
        re.sub(r":\d+$", "", key.removesuffix(_CHECKPOINT)): value
        for key, value in weights.items()
    }
    if len(free) != len(weights):
        raise ValueError(f"{owner}: of the names of the weights, two are the same but for what "
                         f"ends them: {shown(sorted(weights))}")

    def take(names: Sequence[str]) -> Any:
        """The weight of one of these names, whatever stands before it."""
        found = [key for key in free
                 if any(key == name or key.endswith("/" + name) for name in names)]
        return free.pop(min(found, key=len)) if found else None

    count, rate, found = take(_COUNT), take(_RATE), {}
    numbered = {int(match[1]): value for key, value in free.items()
                if (match := re.fullmatch(r"(?:(?:.*/)?(?:vars|_variables)/)?(\d{1,9})", key))}
    if numbered:
        if count is not None:  # a checkpoint lists it under its name only
            numbered[0] = count
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"{owner}: of the numbered weights there are only {sorted(numbered)}")
        count, listed_rate, found = _from_list(form, known,
                                               [numbered[i] for i in range(len(numbered))], owner)
        return count, rate if listed_rate is None else listed_rate, found
    for slot, path in form.entries(list(known.names)):
        names = form.spelled(slot, known.names[path])
        found[slot, path] = value = take(names)
        if value is None:
            raise ValueError(f"{owner}: there is no weight named {' or '.join(names)}, the "
                             f"{_shown(slot)} of {path!r}; give the reference's names of the "
                             f"variables as variables={{path: name}}; the weights are "
                             f"{sorted(weights)}")
    from_checkpoint = any(key.endswith(_CHECKPOINT)
                          for key in weights)  # then the model's variables are among them
    if free and not from_checkpoint:
        raise ValueError(f"{owner}: the weight {min(free)!r} belongs to no slot of the "
                         "transformation; is it of another optimizer, or of other arguments?")
    return count, rate, found
