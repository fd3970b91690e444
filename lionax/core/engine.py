"""How a definition runs over a tree.

`lionax.core.layout` lays a definition out as a list of stages. `transform` carries the updates of
all leaves through them: in each sweep a norm over the tree is taken first, if the sweep needs one,
and then each leaf goes through all stages of the sweep in the compute dtype.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lionax.core import norms, one_leaf, storage
from lionax.core.branching import branch
from lionax.core.counting import next_count
from lionax.core.definition import Conditional
from lionax.core.layout import Layout, Stage, StateError, sweeps
from lionax.core.rule import Definition, Observer, at_path
from lionax.core.settings import Settings, StaticRule
from lionax.core.state import (
    State,
    needs_no_state,
    slots_of_leaves,
    state_of_step,
    trees_of_slots,
)
from lionax.core.tree import Leaves, check_structures, is_placeholder

__all__ = ["Run", "step", "transform", "update"]


def update(definition: Definition, grads: Any, state: State, params: Any,
           extra: dict[str, Any]) -> tuple[Any, State]:
    """The updates, in the gradients' dtypes, and the new state."""
    run = Run(definition, grads, state, params, extra)
    transform(run, run.stages)
    return run.grads.treedef.unflatten(run.rounded_updates()), run.state()


def step(definition: Definition, params: Any, state: State, grads: Any,
         extra: dict[str, Any]) -> tuple[Any, State]:
    """The new parameters and the new state."""
    run = Run(definition, grads, state, params, extra)
    stages, observers = _split_observers(run.stages)
    if not stages or not isinstance(stages[-1].rule, Conditional):
        transform(run, run.stages)
        run.write()
    else:
        transform(run, stages[:-1])
        run.conditionally(stages[-1], writes=True)
        run.updates = [jnp.zeros_like(param) if here else None
                       for param, here in zip(run.param, run.grads.present, strict=True)]
        transform(run, observers)
        run.write()
    return run.grads.treedef.unflatten(run.param), run.state()


def _split_observers(stages: Sequence[Stage]) -> tuple[list[Stage], list[Stage]]:
    """The stages that make updates, and the observers behind all of these that share a leaf."""
    others, observers = [], []
    for stage in reversed(stages):
        changed_later = any(a and b for later in others
                            for a, b in zip(stage.chosen, later.chosen, strict=True))
        is_last = isinstance(stage.rule, Observer) and not changed_later
        (observers if is_last else others).insert(0, stage)
    return others, observers


def transform(run: "Run", stages: Sequence[Stage]) -> None:
    """Carries the updates of all leaves through consecutive stages."""
    for sweep in sweeps(stages):
        first = sweep[0]
        if isinstance(first.rule, Conditional):
            run.conditionally(first, writes=False)
        elif first.is_tree_wide:
            run.foreign(first)
        else:
            tree_norms = run.tree_norms(first)
            for leaf in range(len(run.updates)):
                for stage in sweep:
                    if stage.active[leaf]:
                        run.apply(stage, leaf, tree_norms if stage is first else ())


class Run:
    """One step: the stages of a definition, and the arrays of every leaf."""

    def __init__(self, definition: Definition, grads: Any, state: State, params: Any,
                 extra: dict[str, Any]):
        self.grads = Leaves.of(grads, params)
        self.layout = Layout.of(definition, self.grads)
        self.given, state = state, state_of_step(state, self.layout)
        self.extra, self.count = extra, state.count
        self.params = None if params is None else Leaves.of(params, params)
        if self.params is not None:
            check_structures(self.grads, self.params)
        self.updates: list[Any] = list(self.grads.values)
        absent = [None] * len(self.updates)
        self.param: list[Any] = absent if self.params is None else list(self.params.values)
        self.stages = [self._seeing_params(stage) for stage in self.layout.stages]
        self.settings = Settings(self.stages, state.count, state.hyperparameters)
        pairs = zip(self.stages, self.layout.unpack(state.rules), strict=True)
        self.slots: list[Any] = [
            old if stage.is_tree_wide else slots_of_leaves(old, stage, self.grads)
            for stage, old in pairs]
        self.bound: dict[Any, Any] = {}

    def _seeing_params(self, stage: Stage) -> Stage:
        """The stage; an observer acts on parameters, whether they have a gradient or not."""
        if not isinstance(stage.rule, Observer) or self.params is None:
            return stage
        pairs = zip(stage.chosen, self.param, strict=True)
        active = tuple(chosen and not is_placeholder(param) for chosen, param in pairs)
        return dataclasses.replace(stage, active=active)

    def state(self) -> State:
        """The new state."""
        if needs_no_state(self.layout.definition, self.given):
            return self.given
        rules = [slots if stage.is_tree_wide else trees_of_slots(slots, stage, self.grads)
                 for stage, slots in zip(self.stages, self.slots, strict=True)]
        return State(next_count(self.count), self.settings.record(), self.layout.pack(iter(rules)))

    def write(self) -> None:
        """Adds the updates to the parameters."""
        self.param = list(map(storage.add, self.param, self.updates))

    def rounded_updates(self) -> list[Any]:
        """The updates like the gradients, as the caller and Optax's parts see them."""
        columns = zip(self.updates, self.grads.values, self.grads.present, strict=True)
        return [storage.store(new, old) if here else new for new, old, here in columns]

    def tree_norms(self, stage: Stage) -> tuple[jax.Array, ...]:
        """The norms over the tree that a stage needs."""
        if stage.rule.scope != "tree":
            return ()
        leaves = [leaf for leaf, is_active in enumerate(stage.active) if is_active]
        for leaf in leaves:
            self._check(stage, leaf)
        arrays = {"update": self.updates, "param": self.param}
        self.grads.check_devices(self.updates, stage.active, stage.rule.name)
        splits = [self.grads.splits[leaf] for leaf in leaves]
        return tuple(norms.joint_norm([arrays[name][leaf] for leaf in leaves], splits)
                     for name in stage.rule.norms_of)

    def apply(self, stage: Stage, leaf: int, tree_norms: tuple[jax.Array, ...]) -> None:
        """Applies a rule to one leaf."""
        self._check(stage, leaf)
        update, param, slots = self.updates[leaf], self.param[leaf], self.slots[stage.index]
        static, operands, shared = self._bind(stage, leaf)
        self.updates[leaf], slots[leaf] = one_leaf.apply(
            static, self.grads.splits[leaf], operands, update, slots[leaf], param, self.count,
            tree_norms, shared, np.uint32(stage.index << 20 ^ leaf))

    def _dtype(self, leaf: int) -> np.dtype:
        """The dtype of arithmetic on a leaf."""
        arrays = (self.grads.values[leaf], self.param[leaf])
        return storage.compute_dtype(*(array for array in arrays if not is_placeholder(array)))

    def _bind(self, stage: Stage, leaf: int) -> tuple[StaticRule, dict[str, jax.Array], Any]:
        """A rule for a leaf: the static part, its operands, what leaves share."""
        dtype, rule = self._dtype(leaf), at_path(stage.rule, self.grads.paths[leaf])
        key = (stage.index, dtype, None if rule is stage.rule else leaf)
        if key not in self.bound:
            operands = self.settings.operands(stage, dtype)
            static = StaticRule.of(rule, dtype, tuple(operands))
            self.bound[key] = static, operands, one_leaf.prepare(static, operands, self.count)
        return self.bound[key]

    def _check(self, stage: Stage, leaf: int) -> None:
        """Refuses a leaf to which a rule cannot be applied."""
        one_leaf.check(stage.rule, self.grads, leaf, self.updates[leaf], self.param[leaf],
                       self.slots[stage.index][leaf])

    def foreign(self, stage: Stage) -> None:
        """Runs an Optax transformation."""
        params = None if self.params is None else self.params.tree(self.param, stage.active)
        updates = self.grads.tree(self.rounded_updates(), stage.active)
        extra = {name: self.grads.masked(value, stage.active) for name, value in self.extra.items()}
        new, self.slots[stage.index] = stage.rule.update(
            updates, self.slots[stage.index], params, extra)
        for given, made in zip(*map(jax.tree.leaves, (updates, new)), strict=False):
            if jnp.shape(given) != jnp.shape(made):
                raise StateError(f"{stage.rule.name}: of an update of shape {jnp.shape(given)} it "
                                 f"made one of shape {jnp.shape(made)}; its state does not fit")
        self.updates = self._replaced(self.updates, stage, new)

    def _replaced(self, values: Sequence[Any], stage: Stage, tree: Any) -> list[Any]:
        """The values of a tree on the leaves on which a stage acts, the old ones on all others."""
        columns = zip(values, self.grads.treedef.flatten_up_to(tree), stage.active, strict=True)
        return [new if is_active else old for old, new, is_active in columns]

    def conditionally(self, stage: Stage, *, writes: bool) -> None:
        """Runs a conditional, which changes the updates or, with `writes`, the parameters."""
        rule = stage.rule
        extra = {name: value for name, value in self.extra.items() if name not in rule.arguments}
        given = None if self.params is None else self.params.tree(self.param, stage.active)
        arrived = self.grads.tree(self.updates, stage.active)
        if rule.sums:
            self.grads.check_devices(self.updates, stage.active, rule.name)
        params, state, due = rule.open(arrived, self.slots[stage.index], given, self.extra)

        def inner_step(carry, inner):
            updates = jax.tree.map(_loaded, rule.inner_updates(arrived, state))
            if writes:
                return step(rule.inner, carry, inner, updates, extra)
            new, inner = update(rule.inner, updates, inner, params, extra)
            return jax.tree.map(storage.store, new, carry), inner

        def due_call(carry, inner, _):
            accepted = rule.accepts(arrived, state, params, extra)
            return *branch(accepted, inner_step, carry, inner), accepted

        carry = params if writes else jax.tree.map(lambda u: jnp.zeros_like(_loaded(u)), arrived)
        carry, inner, accepted = branch(due, due_call, carry, state.inner, jnp.zeros((), bool))
        state = rule.close(arrived, state, due, accepted)._replace(inner=inner)
        carry, state = rule.write(carry, params, given, state, writes)
        (carry,) = branch(rule.poisons(state), lambda x: (jax.tree.map(_nan_like, x),), carry)
        self.slots[stage.index] = state
        if not writes:
            self.updates = self._replaced(self.updates, stage, carry)
            return
        self.updates = [None if is_active else update
                        for update, is_active in zip(self.updates, stage.active, strict=True)]
        self.write()
        self.param = self._replaced(self.param, stage, carry)


def _loaded(array: jax.Array) -> jax.Array:
    return storage.load(array, storage.compute_dtype(array))


def _nan_like(array: jax.Array) -> jax.Array:
    return array * jnp.nan if jnp.issubdtype(array.dtype, jnp.inexact) else array
