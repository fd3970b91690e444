"""Lion by majority vote: workers exchange signs, not gradients."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lionax.core.definition import TreeWide
from lionax.core.hyperparameters import Scalar, scalar
from lionax.core.internals import manual_axes
from lionax.core.rule import Applied, Rule, Step
from lionax.core.storage import StorageLike, zero_slot
from lionax.core.transformation import Transformation
from lionax.core.tree import Leaves
from lionax.core.varying import axes_of, explicit_sharding, is_unchecked, varying_axes
from lionax.transforms.combining import chain

__all__ = ["AxisName", "CountVotes", "CountVotesState", "MajorityVoteLion",
           "MajorityVoteLionState", "scale_by_majority_vote"]

AxisName = str | tuple[str, ...]
"""The mesh axis or axes along which the workers differ."""


class MajorityVoteLionState(NamedTuple):
    """The slots of `MajorityVoteLion`."""

    mu: Any  # the worker's own average; [1, *the parameter's shape]; mu_dtype or the parameter's


@dataclasses.dataclass(frozen=True)
class MajorityVoteLion(Rule):
    """What one worker votes for. The axis of size 1 in its slots is that of the workers."""

    b1: Scalar = scalar(0.9, low=0, high=1)
    b2: Scalar = scalar(0.99, low=0, high=1)
    mu_dtype: StorageLike = None
    axis_name: AxisName = ()

    dtypes: ClassVar = (jnp.floating,)

    def __post_init__(self):
        super().__post_init__()
        names = _axes(self.axis_name)
        is_named = bool(names) and all(isinstance(name, str) for name in names)
        if not is_named or len(set(names)) < len(names):
            raise TypeError(f"majority_vote_lion: axis_name={self.axis_name!r} is not accepted; "
                            "give the name of a mesh axis, or a tuple of different names")

    def init(self, param: jax.Array) -> MajorityVoteLionState:
        mu = zero_slot(jnp.expand_dims(param, 0), self.mu_dtype)
        return MajorityVoteLionState(mu=jax.tree.map(self._varying, mu))

    def _varying(self, array: jax.Array) -> jax.Array:
        """The array, of the type that it has after a step: inside of ``shard_map`` it varies."""
        axes = tuple(axis for axis in _axes(self.axis_name)
                     if axis in manual_axes() and axis not in varying_axes(array))
        return lax.pcast(array, axes, to="varying") if axes else array

    def check_leaf(self, leaf: jax.Array, what: str) -> None:
        super().check_leaf(leaf, what)
        if not what.startswith("the gradient"):
            return  # a parameter is the same on all workers
        for axis in _axes(self.axis_name):
            if axis not in manual_axes():
                known = ", ".join(map(repr, sorted(manual_axes()))) or "none"
                raise ValueError(f"majority_vote_lion: axis_name={axis!r} is not an axis of a "
                                 f"jax.shard_map around the step, which has {known}; call step "
                                 "and update in jax.shard_map, on a mesh with this axis")
            if axis not in varying_axes(leaf) and not is_unchecked():
                raise ValueError(
                    f"majority_vote_lion: {what} does not vary over the mesh axis {axis!r}; each "
                    "worker votes with its own gradient, and jax.grad sums those of parameters "
                    "that are the same on all workers. Differentiate at "
                    f"jax.lax.pcast(params, {axis!r}, to='varying')")
        sharding = explicit_sharding(leaf)
        if sharding is not None and any(axes_of(sharding.spec)):
            raise ValueError(f"majority_vote_lion: {what} is split over axes of the mesh that "
                             f"jax.shard_map does not name, {sharding.spec}; add its axis_names")

    def apply(self, update: jax.Array, slots: MajorityVoteLionState, param: Any,
              step: Step) -> Applied:
        mu = slots.mu[0]
        average = (1.0 - self.b1) * update + self.b1 * mu  # as `ScaleByLion` rounds
        new = (1.0 - self.b2) * update + self.b2 * mu
        return jnp.sign(average), MajorityVoteLionState(mu=new[None])


def _axes(axis_name: Any) -> tuple[Any, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


class CountVotesState(NamedTuple):
    """The state of `CountVotes`."""

    turn: jax.Array  # int32 []: 0 and 1 in turn; which of the votes without a sign count up


@dataclasses.dataclass(frozen=True)
class CountVotes(TreeWide):
    """Replaces every worker's signs by those of the majority, for all leaves in one vote."""

    axis_name: AxisName

    def init(self, params: Any) -> CountVotesState:
        return CountVotesState(turn=jnp.zeros((), jnp.int32))

    def update(self, updates: Any, state: CountVotesState, params: Any,
               extra: Mapping[str, Any]) -> tuple[Any, CountVotesState]:
        """The majority's signs, in the dtypes of the updates, and the new state."""
        leaves = Leaves.of(updates, None)
        values, groups = list(leaves.values), {}
        for leaf, here in enumerate(leaves.present):
            if here:  # what is replicated over a further axis stays apart from what is not
                groups.setdefault(varying_axes(values[leaf]), []).append(leaf)
        for members in groups.values():
            votes = jnp.concatenate([_signs(values[leaf]).ravel() for leaf in members])
            ends = np.cumsum([values[leaf].size for leaf in members])[:-1]
            parts = jnp.split(_majority(votes, state.turn, self.axis_name), ends)
            for leaf, part in zip(members, parts, strict=True):
                values[leaf] = part.reshape(values[leaf].shape).astype(values[leaf].dtype)
        return leaves.treedef.unflatten(values), CountVotesState(turn=1 - state.turn)


def _signs(x: jax.Array) -> jax.Array:
    """The signs as int8; that of NaN is 0."""
    return (x > 0).astype(jnp.int8) - (x < 0).astype(jnp.int8)


def _majority(votes: jax.Array, turn: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sign of the sum over the workers of signs: int8 [n] to int8 [n].

    Each worker counts one part of the elements. A vote travels as one bit, the result as two.
    A 0 travels as up or down by the distance of its worker to the one that counts, in turn. So the
    0s of an even number of workers cancel; in an odd number the counting worker leaves its own out.
    """
    if not votes.size:
        return votes
    workers, worker = lax.axis_size(axis_name), lax.axis_index(axis_name)
    parts = jnp.pad(votes, (0, -votes.size % (8 * workers))).reshape(workers, -1)
    distance = (worker - jnp.arange(workers, dtype=jnp.int32)) % workers
    zero_is_up = (distance + turn) % 2 == 1
    bits = jnp.packbits(jnp.where(parts == 0, zero_is_up[:, None], parts > 0), axis=1)
    bits = lax.all_to_all(bits, axis_name, 0, 0, tiled=True)
    total = 2 * jnp.unpackbits(bits, axis=1).sum(axis=0, dtype=jnp.int32) - workers
    if workers % 2:
        total -= jnp.where(parts[worker] == 0, 2 * turn - 1, 0)
    result = jnp.packbits(jnp.stack([total > 0, total < 0]), axis=1)
    result = lax.all_gather(result, axis_name, axis=1, tiled=True, to="invarying")
    up, down = jnp.unpackbits(result, axis=1, count=votes.size).astype(jnp.int8)
    return up - down


def scale_by_majority_vote(b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: StorageLike = None, *,
                           axis_name: AxisName) -> Transformation:
    """Lion's direction by vote, of `lionax.majority_vote_lion`."""
    return chain(Transformation.of(MajorityVoteLion(b1, b2, mu_dtype, axis_name)),
                 Transformation.of(CountVotes(axis_name)))
