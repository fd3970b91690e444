"""How a chain of rules runs over a tree.

`lionax.layout` lays a definition out as a list of rules, grouped into **sweeps**. Within a sweep each leaf is carried
through all rules in the compute dtype, and rounded to its own dtype once, at the end. Before a sweep that begins with a
norm over the tree, that norm is taken.

A gate, as that of `accumulate`, runs another definition in some steps only. In `step` the parameters are written in its
branches, and what a branch does not change stays where it lies.

Whatever is not math of one array happens here: missing leaves, casts, hyperparameters, checks with the leaf's name.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from lionax import norms, ordering, storage
from lionax.hyperparameters import Hyperparameter
from lionax.layout import Gate, Layout, Leaves, Stage, Way, check_structures, gap, sweeps
from lionax.masks import is_placeholder
from lionax.rule import Definition, Rule, Step
from lionax.settings import Settings

__all__ = ["State", "init", "no_update", "run"]


class State(NamedTuple):
    """The state of a transformation.

    ``rules`` has the shape of the definition: a rule's NamedTuple, whose fields mirror the parameter tree; a tuple of
    these for a chain; a dict for a named chain or a partition. ``optax.EmptyState()`` stands for a rule without slots,
    ``optax.MaskedNode()`` for a leaf on which the rule does not act.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 []: how many updates were made
    hyperparameters: dict[str, Hyperparameter]  # learning rates, and what was injected
    rules: Any  # the slots


def init(definition: Definition, params: Any) -> State:
    """The state of a definition for a parameter tree."""
    leaves = Leaves.of(params, params)
    layout = Layout.of(definition, leaves)
    count = jnp.zeros((), jnp.int32)
    slots = [_init_stage(stage, leaves) for stage in layout.stages]
    return State(count, Settings(layout.stages, count, None).record(), layout.pack(iter(slots)))


def _init_stage(stage: Stage, leaves: Leaves) -> Any:
    if stage.tree_wide:
        return stage.rule.init(leaves.only(stage.active))
    slots = []
    for value, path, active in zip(leaves.values, leaves.paths, stage.active, strict=True):
        if active:
            stage.rule.check_dtype(value, f"the parameter {path!r}")
        slots.append(stage.rule.init(value) if active else gap(value))
    # Without any parameter, the slots of a scalar tell the fields.
    example = next((slot for slot, active in zip(slots, stage.active, strict=True) if active), None)
    if example is None:
        example = jax.eval_shape(stage.rule.init, jax.ShapeDtypeStruct((), jnp.float32))
    columns = [[getattr(slot, field) if active else slot for slot, active in zip(slots, stage.active, strict=True)]
               for field in example._fields]
    return type(example)(*map(leaves.treedef.unflatten, columns))


def run(definition: Definition, updates: Any, state: State, params: Any, extra: dict[str, Any], write: bool) -> tuple[Any, State]:
    """One step of a definition.

    Args:
      definition: what to run.
      updates: the gradients.
      state: as `init` made it.
      params: the parameters, or None where nothing needs them.
      extra: keyword arguments for those that take them.
      write: whether to return the new parameters instead of the updates.

    Returns:
      The updates, in the gradients' dtypes, or the new parameters, in their own; and the new state.
    """
    grads = Leaves.of(updates, params)
    old = None if params is None else Leaves.of(params, params)
    if old is not None:
        check_structures(grads, old)
    part = _Part(Layout.of(definition, grads), state, extra)
    passage = _Passage(grads, old)
    passage.insert(0, part, state)
    out = passage.run(0, write)
    return grads.treedef.unflatten(out), part.state(passage.states)


def no_update(updates: Any) -> Any:
    """Zeros like these."""
    # Chosen rather than made, so that inside `shard_map` a zero varies over the axes that its update varies on.
    return jax.tree.map(lambda u: jnp.where(jnp.zeros((), bool), u, jnp.zeros_like(u)), updates)


class _Part:
    """A definition at work in one step, with a count, settings and extra arguments of its own: the whole, or what is behind a gate."""

    def __init__(self, layout: Layout, state: State, extra: dict[str, Any]):
        if not isinstance(state, State):
            raise TypeError(f"the state is a {type(state).__name__}, not a lionax State; make it with tx.init(params)")
        self.layout, self.stages, self.count, self.extra = layout, layout.stages, state.count, extra
        self.settings = Settings(self.stages, state.count, state.hyperparameters)

    def state(self, states: Sequence[Any]) -> State:
        """The new state, from those of the stages."""
        return State(jnp.asarray(optax.safe_increment(self.count)), self.settings.record(), self.layout.pack(iter(states)))


class _Passage:
    """The updates on their way through the stages of one step, and the states that have been renewed."""

    def __init__(self, grads: Leaves, params: Leaves | None):
        values = [None] * len(grads.values) if params is None else params.values
        self.grads, self.params = grads, params
        self.param = list(values)  # for each leaf, or None; a leaf that waits is read from here meanwhile
        self.updates: list[Any] = list(grads.values)
        self.written: list[Any] = [None] * len(values)  # the new parameters, if they are asked for
        self.dtypes: list[Any] = [storage.compute_dtype(*(x for x in (g, p) if x is not None)) if present else None
                                  for g, p, present in zip(grads.values, values, grads.present, strict=True)]
        self.program: list[Stage] = []
        self.owners: list[tuple[_Part, int]] = []  # for each stage its part, and its index there
        self.states: list[Any] = []  # of each stage
        self.exits: list[int] = []  # for each gate whose part is in the program, how many stages follow the part
        self.settled: list[set[int | None]] = []  # for each leaf the stages after which its update leaves such a part
        self.rules: dict[Any, Rule] = {}
        self.functions: dict[Any, Callable[..., tuple[jax.Array, Any]]] = {}

    def insert(self, at: int, part: _Part, state: State) -> None:
        """Puts the stages of a part into the program."""
        self.program[at:at] = part.stages
        self.owners[at:at] = [(part, index) for index in range(len(part.stages))]
        self.states[at:at] = part.layout.unpack(state.rules)

    def fork(self, gate: int, params: list[Any], later: list[Any]) -> "_Passage":
        """A passage for a branch of the compiled program, where the stage ``gate`` and all but as many as ``later`` are left out."""
        new = copy.copy(self)
        new.param, new.params = list(params), None if self.params is None else dataclasses.replace(self.params, values=params)
        follows = slice(gate + 1, gate + 1 + len(later))
        new.program, new.owners = [*self.program[:gate], *self.program[follows]], [*self.owners[:gate], *self.owners[follows]]
        new.states = [*self.states[:gate], *later]
        new.updates, new.written, new.dtypes = list(self.updates), list(self.written), list(self.dtypes)
        new.exits = list(self.exits) if later or gate + 1 == len(self.program) else []
        new.rules, new.functions = {}, {}  # their values belong to a branch
        return new

    def run(self, start: int, write: bool) -> list[Any]:
        """Carries the updates through the stages from ``start`` on; returns them, or the new parameters."""
        groups = sweeps(self.program, start)
        lasts = [self._last_changes(start, len(self.program) - ends) for ends in self.exits]
        self.settled = [{last[leaf] for last in lasts} for leaf in range(len(self.updates))]
        for group in groups:
            if write and isinstance(self.program[group[0]].rule, Gate) and self._is_best_merged(group[0]):
                return self._through_gate(group[0], write)
            self.sweep(group, write and group is groups[-1])
        if write and not groups:
            self._write()
        return self.written if write else self.in_dtype_of_gradients()

    def in_dtype_of_gradients(self) -> list[Any]:
        """The updates as the caller, or a tree-wide definition, is to see them."""
        return [u if d is None else u.astype(d if g is None else g.dtype)
                for u, g, d in zip(self.updates, self.grads.values, self.dtypes, strict=True)]

    def sweep(self, group: list[int], write: bool = False) -> None:
        """Carries every leaf through the stages with these indices, and may add the updates to the parameters then."""
        if self.program[group[0]].tree_wide:
            if isinstance(self.program[group[0]].rule, Gate):
                self.updates = self._through_gate(group[0], write=False)
            else:
                self._foreign(group[0])
            if write:
                self._write()
            return
        shared = self._tree_norms(group[0])
        slots = {i: self._columns(i) for i in group}
        active = {i: self.program[i].active for i in group}
        before = list(shared or [self.owners[group[0]][0].count]) * ordering.AT_ONCE  # what leaves wait for
        for leaf in range(len(self.updates)):
            acting = [i for i in group if active[i][leaf]]
            if acting and ordering.worth_ordering(self.updates[leaf]):
                before.append(self._run_in_order(acting, leaf, slots, shared, before, write))
                continue
            for i in group:
                if active[i][leaf]:
                    slots[i][leaf] = self._apply(i, leaf, slots[i][leaf], shared)
                elif self._acts_on_idle(i, leaf):
                    slots[i][leaf] = self._apply_to_idle(i, leaf, slots[i][leaf])
            if write:
                self.written[leaf] = storage.add(self.param[leaf], self.updates[leaf])
        for i in group:
            if self.states[i]:
                rows = zip(*slots[i], strict=True) if slots[i] else ([] for _ in self.states[i])
                self.states[i] = type(self.states[i])(*map(self.grads.treedef.unflatten, rows))

    def _write(self) -> None:
        self.written = [storage.add(p, u) for p, u in zip(self.param, self.updates, strict=True)]

    def _columns(self, i: int) -> list[Any]:
        """From a rule's NamedTuple of trees to one for each leaf."""
        state = self.states[i]
        try:
            columns = [self.grads.treedef.flatten_up_to(tree) for tree in state]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.program[i].rule.name}: its state does not have the structure of the gradients; make it "
                             f"with tx.init(params) ({error})") from None
        return [type(state)(*row) for row in zip(*columns, strict=True)] if columns else [state] * len(self.updates)

    def _operands(self, i: int, leaf: int) -> tuple[Rule, np.dtype, jax.Array, jax.Array | None]:
        """The rule, the dtype of its arithmetic, the update and the parameter."""
        rule, update, param, path = self.program[i].rule, self.updates[leaf], self.param[leaf], self.grads.paths[leaf]
        rule.check_dtype(update, f"the gradient of {path!r}")
        if param is None and rule.needs_params:
            raise ValueError(f"{rule.name}: needs the parameters (here {path!r}); call update(grads, state, params)")
        if not jnp.issubdtype(update.dtype, jnp.floating):
            return rule, update.dtype, update, param
        if param is not None:
            rule.check_dtype(param, f"the parameter {path!r}")
        return self._resolved(i, self.dtypes[leaf]), self.dtypes[leaf], update, param

    def _resolved(self, i: int, dtype: np.dtype) -> Rule:
        """The rule of a stage with its scalars as numbers for arithmetic in ``dtype``."""
        if (i, dtype) not in self.rules:
            part, index = self.owners[i]
            self.rules[i, dtype] = part.settings.rule(index, dtype)
        return self.rules[i, dtype]

    def _tree_norms(self, i: int) -> tuple[jax.Array, ...]:
        """The norms over all leaves that a stage asks for."""
        stage = self.program[i]
        if stage.rule.scope != "tree":
            return ()
        measured = [storage.unloaded(rule.measure, dtype, *operands) for rule, dtype, *operands in
                    (self._operands(i, leaf) for leaf, active in enumerate(stage.active) if active)]
        return tuple(norms.joint_norm(arrays) for arrays in zip(*measured, strict=True))

    def _run_in_order(self, acting: list[int], leaf: int, slots: dict[int, list[Any]], shared: tuple[jax.Array, ...],
                      before: list[jax.Array], write: bool) -> jax.Array:
        """Runs the rules on one leaf, and may write its parameter, in the order that `lionax.ordering` tells; returns what is last."""
        arrived, param, stored = self.updates[leaf], self.param[leaf], {i: slots[i][leaf] for i in acting}
        readers = [i for i in acting if self.program[i].rule.update_reads_old_slots or self._is_stored_rounded(i, leaf, stored[i])]
        again = acting[: acting.index(readers[-1]) + 1] if readers else []
        if any(self.program[i].rule.needs_params or self.program[i].rule.scope == "leaf" for i in again):
            again = []  # the parameter is written by then, and a norm would be taken twice
        self._wait(leaf, stored, before, bool(shared), bool(readers), bool(again) and write)
        for i in acting:
            slots[i][leaf] = self._apply(i, leaf, stored[i], shared)
        done = update = self.updates[leaf]
        if write:
            done = self.written[leaf] = storage.add(self.param[leaf], update)
        # Where an update reads old slots: the new slots once more, from what is read when the parameter is written. The arrived update
        # goes the same way, lest a sum of two products is rounded otherwise. The compiler drops what is not used of either run.
        if again:
            self.updates[leaf], stored = ordering.after(done, (arrived, {i: stored[i] for i in again}))
        for i in again:
            new = self._apply(i, leaf, stored[i], shared)
            if i in readers:
                slots[i][leaf] = new
                done = next((s for s in jax.tree.leaves(new) if (s.shape, s.dtype) == (arrived.shape, self.dtypes[leaf])), done)
        self.updates[leaf], self.param[leaf] = update, param
        return done

    def _wait(self, leaf: int, stored: dict[int, Any], before: list[jax.Array], normed: bool, reads_old: bool, param_first: bool) -> None:
        """Lets the first loop over a leaf wait for a leaf before it: by the parameter or the update, whichever it reads in any case."""
        update, param, rules = self.updates[leaf], self.param[leaf], {i: self.program[i].rule for i in stored}
        loads_update, loads_param = (x is not None and x.dtype != self.dtypes[leaf] for x in (update, param))
        scopes = [rule.scope for rule in rules.values()]
        keeps = "leaf" in (scopes if loads_update else scopes[1:])  # an update, or a loaded gradient, until its norm is known
        earlier = before[-1 if keeps else -ordering.AT_ONCE]
        has_slots = any(jax.tree.leaves(stored[i]) for i, rule in rules.items() if rule.changes_update)
        if keeps or (has_slots and not reads_old) or (normed and loads_update):
            self.updates[leaf] = ordering.after(earlier, update)
        if param is not None and (param_first or (keeps and loads_param)):
            self.param[leaf] = ordering.after(earlier, param)

    def _is_stored_rounded(self, i: int, leaf: int, stored: Any) -> bool:
        """Whether a rule's update is made of its new slots, but not as they are stored: then the compiler makes it of the old ones."""
        floating = [slot for slot in jax.tree.leaves(stored) if jnp.issubdtype(slot.dtype, jnp.floating)]
        return self.program[i].rule.changes_update and any(slot.dtype != self.dtypes[leaf] for slot in floating)

    def _apply(self, i: int, leaf: int, stored: Any, tree_norms: tuple[jax.Array, ...]) -> Any:
        """Runs one rule on one leaf; returns its new slots."""
        rule, dtype, update, param = self._operands(i, leaf)
        shapes = jax.tree.map(jnp.shape, stored)
        if any(slot.shape != update.shape for slot in jax.tree.leaves(stored)) and (
                shapes != jax.tree.map(jnp.shape, jax.eval_shape(rule.init, update))):
            raise ValueError(f"{rule.name}: the gradient of {self.grads.paths[leaf]!r} has shape {update.shape}, its state "
                             f"{shapes}; they do not fit")
        # A norm is of the parameter as it came: what the compiler loads for it and for more, it would keep.
        came = None if self.params is None or rule.scope != "leaf" else self.params.values[leaf]
        self.updates[leaf], slots = self._function(i, rule, dtype, isinstance(update, Tracer))(update, stored, param, came, tree_norms)
        self._settle(i, leaf)
        return slots

    def _function(self, i: int, rule: Rule, dtype: np.dtype, traced: bool) -> Callable[..., tuple[jax.Array, Any]]:
        """A stage as a function of one leaf's arrays; in a trace it is one function for all leaves of a shape."""
        key = (i, rule.name, dtype)
        if key not in self.functions:
            count = self.owners[i][0].count
            shared = rule.prepare(count, dtype)

            def function(update, stored, param, came, tree_norms):
                measured = tuple(norm.astype(dtype) for norm in tree_norms) if rule.scope == "tree" else ()
                if rule.scope == "leaf":
                    measured = norms.norm_of_each(storage.unloaded(rule.measure, dtype, update, came))
                update, loaded, param = jax.tree.map(lambda x: storage.load(x, dtype), (update, stored, param))
                update, slots = rule.apply(update, loaded, param, Step(count, measured, shared))
                return update, jax.tree.map(storage.store, slots, stored)

            self.functions[key] = jax.jit(function) if traced else function
        return self.functions[key]

    def _acts_on_idle(self, i: int, leaf: int) -> bool:
        """Whether a rule is to be applied to a parameter that has no gradient in this step."""
        stage = self.program[i]
        idle = self.grads.values[leaf] is None and stage.chosen[leaf] and stage.rule.acts_without_gradient
        return idle and not is_placeholder(self.param[leaf])

    def _apply_to_idle(self, i: int, leaf: int, stored: Any) -> Any:
        param: Any = self.param[leaf]
        self.dtypes[leaf] = storage.compute_dtype(param)
        self.updates[leaf] = nothing = jnp.zeros_like(param, dtype=self.dtypes[leaf])
        slots = self._apply(i, leaf, stored, ())
        if self.updates[leaf] is nothing:
            self.updates[leaf], self.dtypes[leaf] = None, None
        return slots

    def _last_changes(self, start: int, stop: int) -> list[int | None]:
        """For each leaf the last of some stages that changes its update."""
        last: list[int | None] = [None] * len(self.updates)
        for i in range(start, stop):
            stage = self.program[i]
            if stage.tree_wide or stage.rule.changes_update:
                last = [i if active else before for active, before in zip(stage.active, last, strict=True)]
        return last

    def _settle(self, i: int, leaf: int) -> None:
        """Rounds an update where it leaves what a gate runs: in `update` a branch ends there, and `step` is to be the same."""
        if i in self.settled[leaf]:
            self.updates[leaf] = ordering.rounded(self.updates[leaf], self.owners[i][0].count)

    def replace_updates(self, stage: Stage, tree: Any) -> None:
        """Goes on with the updates of a tree, on the leaves on which a stage acts."""
        for leaf, (value, active) in enumerate(zip(self.grads.treedef.flatten_up_to(tree), stage.active, strict=True)):
            if active:
                self.updates[leaf] = value

    def _foreign(self, i: int) -> None:
        """Runs an Optax transformation."""
        stage, part = self.program[i], self.owners[i][0]
        params = None if self.params is None else self.params.only(stage.active)
        seen = dataclasses.replace(self.grads, values=self.in_dtype_of_gradients()).only(stage.active)
        new, self.states[i] = stage.rule.update(seen, self.states[i], params, part.extra)
        self.replace_updates(stage, new)
        for leaf in range(len(self.updates)):
            self._settle(i, leaf)

    def _is_best_merged(self, i: int) -> bool:
        """Whether what follows a gate is to be part of each of its ways: if it changes no update, as an average of the parameters.

        Not inside `shard_map`, where a parameter that is written may vary over axes on which the old one does not.
        """
        arrays = [x for x in (*self.updates, *self.param) if isinstance(x, jax.Array)]
        changes = any(stage.tree_wide or stage.rule.changes_update for stage in self.program[i + 1:])
        return not changes and not any(map(norms.varying_axes, arrays))

    def _through_gate(self, i: int, write: bool) -> list[Any]:
        """Goes on by the way that a gate chooses: to the end if the parameters are to be written, else to the end of its part."""
        gate, extra = self.program[i], self.owners[i][0].extra
        own = {name: value for name, value in extra.items() if name in gate.rule.arguments}
        others = {name: value for name, value in extra.items() if name not in own}
        arrived = dataclasses.replace(self.grads, values=self.updates).only(gate.active)
        choice, state, ways = gate.rule.open(arrived, self.states[i], own)
        later = self.states[i + 1:] if write else []

        def take(way: Way, params: list[Any], states: list[Any]) -> tuple[list[Any], list[Any]]:
            passage, state, end = self.fork(i, params, states[1:]), states[0], i
            passage.replace_updates(gate, no_update(arrived) if way.updates is None else way.updates(state))
            part = passage.part_behind(gate, state.inner, others) if way.runs else None
            if part is not None:
                passage.insert(i, part, state.inner)
                end += len(part.stages)
                passage.enter(i, end, self.owners[i][0].count)
            out = passage.run(i, write)
            if not write:  # not rounded to the gradients' dtypes, which is for the end
                out = [storage.load(u, d) if present else u
                       for u, d, present in zip(passage.updates, self.dtypes, self.grads.present, strict=True)]
            out = [None if storage.is_float0(value) else value for value in out]
            if part is not None:
                state = state._replace(inner=part.state(passage.states[i:end]))
            if way.emptied is not None:
                zeros = passage.emptied(getattr(state, way.emptied), gate, range(i, end), out)
                state = state._replace(**{way.emptied: zeros})
            return out, [state._replace(**way.changes), *passage.states[end:]]

        out, states = self.param, [state, *later]
        with ordering.for_kernels(False):  # they leave branches to the compiler
            if write:
                # Of a branch beside one that changes nothing, the compiler writes the results in place; of others it would copy them.
                for index, way in enumerate(ways):
                    out, states = jax.lax.cond(choice == index, functools.partial(take, way), lambda *same: same, out, states)
            else:
                out, states = jax.lax.switch(choice, [functools.partial(take, way) for way in ways], out, states)
        self.states[i:i + len(states)] = states
        return [old if new is None else new for old, new in zip(self.param if write else self.updates, out, strict=True)]

    def enter(self, start: int, end: int, count: jax.Array) -> None:
        """Notes that a gate's part has come into the program, see `_settle`."""
        self.exits.append(len(self.program) - end)
        for leaf, last in enumerate(self._last_changes(start, end)):
            if last is None and isinstance(self.updates[leaf], jax.Array):
                self.updates[leaf] = ordering.rounded(self.updates[leaf], count)

    def part_behind(self, gate: Stage, state: State, extra: dict[str, Any]) -> _Part:
        """What a gate runs."""
        params = None if self.params is None else self.params.only(gate.active)
        leaves = Leaves.of(self.grads.only(gate.active), params)
        return _Part(Layout.of(gate.rule.part, leaves, gate.active), state, extra)

    def emptied(self, tree: Any, gate: Stage, stages: Sequence[int], out: list[Any]) -> Any:
        """Zeros in place of what a gate let the stages read, once each leaf has been written."""
        slots = [self._columns(i) for i in stages if not self.program[i].tree_wide]
        leaves = self.grads.treedef.flatten_up_to(tree)
        for leaf, active in enumerate(gate.active):
            if active and stages and ordering.worth_ordering(leaves[leaf]):
                written = jax.tree.leaves((out[leaf], [column[leaf] for column in slots]))
                leaves[leaf] = ordering.zeros_once_written(leaves[leaf], *written)
            elif active:
                leaves[leaf] = no_update(leaves[leaf])
        return self.grads.treedef.unflatten(leaves)
