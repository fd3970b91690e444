"""Transformations made of transformations: chains, masks and partitions."""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from lionax.core.definition import Combination, Foreign, Member, OfOne, Sharded
from lionax.core.masks import Mask, freeze, select
from lionax.core.rule import Applied, Definition, Rule, Step
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import Leaves

__all__ = ["Chain", "Identity", "Masked", "NamedChain", "Partition", "SetToZero", "chain",
           "definition_of", "identity", "masked", "named_chain", "partition", "restrict",
           "set_to_zero"]


def definition_of(tx: Any, owner: str) -> Definition:
    """What a transformation is made of; refuses what is not one."""
    if isinstance(tx, Transformation):
        if isinstance(tx.definition, Sharded):
            raise TypeError(f"{owner}: a sharded inside of it would not say how its own leaves are "
                            f"split; write sharded({owner}(...), specs)")
        return tx.definition
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)):
        return Foreign(tx)
    remedy = (f"unpack it: {owner}(*transformations)" if isinstance(tx, list | tuple) else
              "give what a constructor such as lionax.lion(1e-3) or optax.scale(-1.0) returns")
    raise TypeError(f"{owner}: {tx!r} is not a gradient transformation; {remedy}")


@dataclasses.dataclass(frozen=True)
class Chain(Combination):
    """Definitions one after the other. Its state is the tuple of theirs."""

    parts: tuple[Definition, ...]

    def members(self, leaves: Leaves) -> list[Member]:
        return [Member(part, [True] * len(leaves.values)) for part in self.parts]

    def pack(self, states: list[Any]) -> Any:
        return tuple(states)

    def unpack(self, state: Any) -> Sequence[Any]:
        return state


@constructor
def chain(*transformations: optax.GradientTransformation) -> Transformation:
    """Applies transformations one after the other.

    A chain of chains is one flat chain, so that chaining is associative. `identity` is left out.
    The chain of one is that one, the chain of none `identity`.

    Args:
      *transformations: lionax's or Optax's. Extra arguments reach those that take them.

    Raises:
      TypeError: for what is not a transformation.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.clip(1.0), lionax.scale(-0.5))
    >>> tx
    chain(clip(max_delta=1.0), scale(step_size=-0.5))
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].tolist()
    [-0.5]
    """
    parts: list[Definition] = []
    for tx in transformations:
        definition = definition_of(tx, "chain")
        if definition != Identity():
            parts += definition.parts if isinstance(definition, Chain) else (definition,)
    if not parts:
        return identity()
    return Transformation.of(parts[0] if len(parts) == 1 else Chain(tuple(parts)))


@dataclasses.dataclass(frozen=True)
class NamedChain(Combination):
    """A chain whose parts have names. Its state is a dict."""

    parts: tuple[tuple[str, Definition], ...]

    def members(self, leaves: Leaves) -> list[Member]:
        return [Member(part, [True] * len(leaves.values), name) for name, part in self.parts]

    def pack(self, states: list[Any]) -> Any:
        return dict(zip(dict(self.parts), states, strict=True))

    def unpack(self, state: Any) -> Sequence[Any]:
        return [state[name] for name in dict(self.parts)]


@constructor
def named_chain(*transformations: tuple[str, optax.GradientTransformation]) -> Transformation:
    """A `chain` whose state is a dict by name.

    Args:
      *transformations: pairs of a name and a transformation.

    Raises:
      TypeError: for what is not such a pair.
      ValueError: for a name given twice.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.named_chain(("clip", lionax.clip(1.0)), ("momentum", lionax.trace(0.9)))
    >>> sorted(tx.init(jnp.zeros(1)).rules)
    ['clip', 'momentum']
    """
    parts: dict[str, Definition] = {}
    for pair in transformations:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"named_chain: {pair!r} is not a pair of a name and a transformation, "
                            "such as ('clip', lionax.clip(1.0))")
        if pair[0] in parts:
            raise ValueError(f"named_chain: the name {pair[0]!r} is given twice")
        parts[pair[0]] = definition_of(pair[1], "named_chain")
    return Transformation.of(NamedChain(tuple(parts.items())))


@dataclasses.dataclass(frozen=True)
class Masked(OfOne):
    """A definition that acts on the leaves of a mask. Its state is that of the definition."""

    part: Definition
    mask: Any  # as `lionax.core.masks.freeze` gives it
    owner: str = "masked"  # for error messages

    def members(self, leaves: Leaves) -> list[Member]:
        return [Member(self.part, select(leaves, self.mask, bool, self.owner, "mask"))]


def restrict(rule: Rule, mask: Mask, owner: str) -> Transformation:
    """A rule with a mask argument; None for all leaves."""
    if mask is None:
        return Transformation.of(rule)
    return Transformation.of(Masked(rule, freeze(mask, bool, owner, "mask"), owner))


@constructor
def masked(inner: optax.GradientTransformation, mask: Mask) -> Transformation:
    """Applies a transformation to some of the leaves only.

    The others keep their update: ``masked(lion(1e-3), mask)`` alone *adds the raw gradient* there.
    To freeze them use ``partition({"train": lion(1e-3), "freeze": set_to_zero()}, labels)``.

    Args:
      inner: lionax's or Optax's.
      mask: the leaves that it acts on: a tree of bools with the parameters' structure or a prefix
        of it (matched by path, whatever the container), a function that makes one from the
        parameters, or `matching`.

    Raises:
      TypeError: for a mask of strings or of anything but bools.
      ValueError: where it is used, if the mask does not fit the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.masked(lionax.scale(-1.0), lionax.matching("bias"))
    >>> grads = {"bias": jnp.array(1.0), "kernel": jnp.array(1.0)}
    >>> {name: float(u) for name, u in tx.update(grads, tx.init(grads))[0].items()}
    {'bias': -1.0, 'kernel': 1.0}
    """
    return Transformation.of(
        Masked(definition_of(inner, "masked"), freeze(mask, bool, "masked", "mask")))


@dataclasses.dataclass(frozen=True)
class Partition(Combination):
    """A definition for each label. Its state is a dict by label, as a string."""

    parts: tuple[tuple[Any, Definition], ...]
    labels: Any  # as `lionax.core.masks.freeze` gives it

    def members(self, leaves: Leaves) -> list[Member]:
        chosen = select(leaves, self.labels, object, "partition", "param_labels")
        known = [label for label, _ in self.parts]
        for path, label in zip(leaves.paths, chosen, strict=True):
            if label is not None and label not in known:
                raise ValueError(f"partition: the leaf {path!r} has the label {label!r}, for which "
                                 f"there is no transformation; there are {known}")
        return [Member(part, [label == given for given in chosen], str(label))
                for label, part in self.parts]

    def pack(self, states: list[Any]) -> Any:
        return dict(zip((str(label) for label, _ in self.parts), states, strict=True))

    def unpack(self, state: Any) -> Sequence[Any]:
        return [state[str(label)] for label, _ in self.parts]


@constructor
def partition(transforms: Mapping[Hashable, optax.GradientTransformation],
              param_labels: Any) -> Transformation:
    """Applies another transformation to each group of leaves.

    Args:
      transforms: label -> transformation, lionax's or Optax's. A label is anything hashable; the
        state's keys are ``str(label)``.
      param_labels: a tree of labels with the parameters' structure or a prefix of it (matched by
        path), a function that makes one from the parameters, or `labels`.

    Raises:
      ValueError: for two labels with one string; where it is used, for a label without a
        transformation, or a tree without fit.

    >>> import jax.numpy as jnp, lionax
    >>> transforms = {"train": lionax.sgd(0.5), "freeze": lionax.set_to_zero()}
    >>> tx = lionax.partition(transforms, {"w": "train", "b": "freeze"})
    >>> params = {"w": jnp.array(2.0), "b": jnp.array(2.0)}
    >>> params, _ = tx.step(params, tx.init(params), {"w": jnp.array(1.0), "b": jnp.array(1.0)})
    >>> {name: float(p) for name, p in sorted(params.items())}
    {'b': 2.0, 'w': 1.5}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(f"partition: transforms={transforms!r} is not a mapping from labels to "
                        "transformations")
    names = Counter(map(str, transforms))
    if len(names) < len(transforms):
        raise ValueError(f"partition: two labels are both {names.most_common(1)[0][0]!r} as a "
                         "string, the key of their state; rename one")
    parts = {label: definition_of(transforms[label], "partition")
             for label in sorted(transforms, key=str)}
    labels = freeze(param_labels, object, "partition", "param_labels")
    return Transformation.of(Partition(tuple(parts.items()), labels))


@dataclasses.dataclass(frozen=True)
class Identity(Rule):
    """The rule of `identity`."""

    dtypes: ClassVar = (jnp.number, jnp.bool_)
    is_memoryless: ClassVar = True

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        return update, slots


@constructor
def identity() -> Transformation:
    """Leaves the updates as they are.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.identity()
    >>> float(tx.update(jnp.array(3.0), tx.init(jnp.array(0.0)))[0])
    3.0
    """
    return Transformation.of(Identity())


@dataclasses.dataclass(frozen=True)
class SetToZero(Rule):
    """The rule of `set_to_zero`."""

    dtypes: ClassVar = (jnp.number, jnp.bool_)
    is_memoryless: ClassVar = True

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        # Inside of `shard_map` parameters may be the same on devices whose gradients differ.
        return jnp.zeros_like(update if param is None else param, dtype=update.dtype), slots


@constructor
def set_to_zero() -> Transformation:
    """Sets every update to zero: what freezes a group of leaves in `partition`.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.set_to_zero()
    >>> float(tx.update(jnp.array(3.0), tx.init(jnp.array(0.0)))[0])
    0.0
    """
    return Transformation.of(SetToZero())
