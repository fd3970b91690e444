"""How a chain of rules runs over a tree.

`lionax.layout` lays a definition out as a list of rules, grouped into **sweeps**. Within a sweep each leaf is carried
through all rules in the compute dtype, and rounded to its own dtype once, at the end. Before a sweep that begins with a
norm over the tree, that norm is taken.

Whatever is not math of one array happens here: missing leaves, casts, hyperparameters, checks with the leaf's name.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from lionax import norms, ordering, storage
from lionax.hyperparameters import Hyperparameter, Injected, value_at
from lionax.layout import Layout, Leaves, Stage, gap, sweeps
from lionax.masks import is_placeholder
from lionax.rule import Definition, Rule, Step

__all__ = ["State", "init", "no_update", "run", "run_if"]


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
    return State(count, _Settings(layout.stages, count, None).record(), layout.pack(iter(slots)))


def _init_stage(stage: Stage, leaves: Leaves) -> Any:
    if stage.tree_wide:
        return stage.rule.init(leaves.only(stage.active))
    slots = []
    for value, path, active in zip(leaves.values, leaves.paths, stage.active, strict=True):
        if active:
            _refuse_dtype(stage.rule, value, f"the parameter {path!r}")
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
    if not isinstance(state, State):
        raise TypeError(f"the state is a {type(state).__name__}, not a lionax State; make it with tx.init(params)")
    grads = Leaves.of(updates, params)
    old = None if params is None else Leaves.of(params, params)
    if old is not None:
        _check_structures(grads, old)
    layout = Layout.of(definition, grads)
    passage = _Passage(layout, grads, old, state, extra)
    *first, last = sweeps(passage.program) or [[]]
    for group in first:
        passage.sweep(group)
    passage.sweep(last, write=write)
    out = passage.written if write else passage.in_dtype_of_gradients()
    new = State(jnp.asarray(optax.safe_increment(state.count)), passage.settings.record(), layout.pack(iter(passage.states)))
    return grads.treedef.unflatten(out), new


def run_if(predicate: jax.Array, definition: Definition, updates: Any, state: State, params: Any,
           extra: dict[str, Any]) -> tuple[Any, State]:
    """`run` where the predicate holds; else updates of zero and the state as it is. The one not taken costs nothing."""
    return jax.lax.cond(predicate, lambda: run(definition, updates, state, params, extra, write=False),
                        lambda: (no_update(updates), state))


def no_update(updates: Any) -> Any:
    """Zeros like these."""
    # Chosen rather than made, so that inside `shard_map` a zero varies over the axes that its update varies on.
    return jax.tree.map(lambda u: jnp.where(jnp.zeros((), bool), u, jnp.zeros_like(u)), updates)


class _Passage:
    """The updates on their way through the sweeps of one step, and the states that have been renewed."""

    def __init__(self, layout: Layout, grads: Leaves, params: Leaves | None, state: State, extra: dict[str, Any]):
        self.grads, self.params, self.count, self.extra = grads, params, state.count, extra
        self.program = layout.stages
        self.settings = _Settings(self.program, state.count, state.hyperparameters)
        self.states = layout.unpack(state.rules)
        self.updates = list(grads.values)
        values = [None] * len(grads.values) if params is None else params.values
        self.param = values  # for each leaf, or None
        self.functions: dict[Any, Callable[..., tuple[jax.Array, Any]]] = {}
        self.written: list[Any] = [None] * len(values)  # the new parameters, if they are asked for
        self.dtypes: list[Any] = [storage.compute_dtype(*(x for x in (g, p) if x is not None)) if present else None
                       for g, p, present in zip(grads.values, values, grads.present, strict=True)]

    def in_dtype_of_gradients(self) -> list[Any]:
        """The updates as the caller, or a tree-wide definition, is to see them."""
        return [u if d is None else u.astype(d if g is None else g.dtype)
                for u, g, d in zip(self.updates, self.grads.values, self.dtypes, strict=True)]

    def sweep(self, group: list[int], write: bool = False) -> None:
        """Carries every leaf through the stages with these indices, and may add the updates to the parameters then."""
        if not group or self.program[group[0]].tree_wide:
            if group:
                self._tree_wide(group[0])
            if write:
                self.written = [storage.add(p, u) for p, u in zip(self.param, self.updates, strict=True)]
            return
        shared = self._tree_norms(group[0])
        slots = {i: self._columns(i) for i in group}
        active = {i: self.program[i].active for i in group}
        before = None  # the parameter that was written last, of those that wait for each other
        for leaf in range(len(self.updates)):
            acting = [i for i in group if active[i][leaf]]
            if acting and ordering.worth_ordering(self.updates[leaf]):
                before = self._run_in_order(acting, leaf, slots, shared, before, write)
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

    def _columns(self, i: int) -> list[Any]:
        """From a rule's NamedTuple of trees to one for each leaf."""
        state = self.states[i]
        try:
            columns = [self.grads.treedef.flatten_up_to(tree) for tree in state]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.program[i].rule.name}: its state does not have the structure of the gradients; make it "
                             f"with tx.init(params) ({error})") from None
        return [type(state)(*row) for row in zip(*columns, strict=True)] if columns else [state] * len(self.updates)

    def _operands(self, i: int, leaf: int) -> tuple[Rule, jax.Array, jax.Array | None]:
        """The rule, the update and the parameter, ready for arithmetic."""
        rule, dtype, param, path = self.program[i].rule, self.dtypes[leaf], self.param[leaf], self.grads.paths[leaf]
        _refuse_dtype(rule, self.updates[leaf], f"the gradient of {path!r}")
        if param is None and rule.needs_params:
            raise ValueError(f"{rule.name}: needs the parameters (here {path!r}); call update(grads, state, params)")
        if not jnp.issubdtype(self.updates[leaf].dtype, jnp.floating):
            return rule, self.updates[leaf], param
        if param is not None:
            _refuse_dtype(rule, param, f"the parameter {path!r}")
            param = param.astype(dtype)
        return self.settings.rule(i, dtype), self.updates[leaf].astype(dtype), param

    def _tree_norms(self, i: int) -> tuple[jax.Array, ...]:
        """The norms over all leaves that a stage asks for."""
        stage = self.program[i]
        if stage.rule.scope != "tree":
            return ()
        measured = []
        for leaf, active in enumerate(stage.active):
            if active:
                rule, update, param = self._operands(i, leaf)
                measured.append(rule.measure(update, param))
        return tuple(norms.joint_norm(arrays) for arrays in zip(*measured, strict=True))

    def _run_in_order(self, acting: list[int], leaf: int, slots: dict[int, list[Any]], shared: tuple[jax.Array, ...],
                      before: jax.Array | None, write: bool) -> jax.Array | None:
        """Runs the rules on one leaf, and may write its parameter, with the writes in an order in which none needs a copy.

        Where a rule takes the norm of what others made, that is kept until the norm is known; so the leaf waits for the one
        before it. Returns the array for which the next is to wait.
        """
        waits = any(self.program[i].rule.scope == "leaf" for i in acting[1:])
        if waits and before is not None:
            zero = ordering.zero_once_written(before)
            self.updates[leaf] = ordering.after(zero, self.updates[leaf])
            for i in acting:
                slots[i][leaf] = jax.tree.map(functools.partial(ordering.after, zero), slots[i][leaf])
        arrived, stored = self.updates[leaf], {i: slots[i][leaf] for i in acting}
        for i in acting:
            slots[i][leaf] = self._apply(i, leaf, slots[i][leaf], shared)
        done = self.updates[leaf]
        if write:
            done = self.written[leaf] = storage.add(self.param[leaf], self.updates[leaf])
        self._renew_after_writing(acting, leaf, slots, arrived, stored, shared, done)
        return done if waits else before

    def _renew_after_writing(self, acting: list[int], leaf: int, slots: dict[int, list[Any]], arrived: jax.Array,
                             stored: dict[int, Any], shared: tuple[jax.Array, ...], done: jax.Array) -> None:
        """Where an update reads old slots: the new slots once more, from what is read when ``done`` is written.

        The compiler drops what is not used of either run.
        """
        rules = {i: self.program[i].rule for i in acting}
        readers = [i for i in acting if rules[i].update_reads_old_slots]
        again = acting[: acting.index(readers[-1]) + 1] if readers else []
        if any(rules[i].needs_params or rules[i].scope == "leaf" for i in again):
            return  # the parameter is written by then, and a norm would be taken twice
        # The arrived update goes the same way as the slots: a sum of two products is else rounded otherwise than in the first run.
        zero, update = ordering.zero_once_written(done), self.updates[leaf]
        self.updates[leaf] = ordering.after(zero, arrived)
        for i in again:
            new = self._apply(i, leaf, jax.tree.map(functools.partial(ordering.after, zero), stored[i]), shared)
            if i in readers:
                slots[i][leaf] = new
        self.updates[leaf] = update

    def _apply(self, i: int, leaf: int, stored: Any, tree_norms: tuple[jax.Array, ...]) -> Any:
        """Runs one rule on one leaf; returns its new slots."""
        rule, update, param = self._operands(i, leaf)
        shapes = jax.tree.map(jnp.shape, stored)
        if any(slot.shape != update.shape for slot in jax.tree.leaves(stored)) and (
                shapes != jax.tree.map(jnp.shape, jax.eval_shape(rule.init, update))):
            raise ValueError(f"{rule.name}: the gradient of {self.grads.paths[leaf]!r} has shape {update.shape}, its state "
                             f"{shapes}; they do not fit")
        self.updates[leaf], slots = self._function(i, rule, update)(update, stored, param, tree_norms)
        return slots

    def _function(self, i: int, rule: Rule, update: jax.Array) -> Callable[..., tuple[jax.Array, Any]]:
        """A stage as a function of one leaf's arrays; in a trace it is one function for all leaves of a shape."""
        key = (i, rule.name, update.dtype)
        if key not in self.functions:

            def function(update, stored, param, tree_norms):
                measured = tuple(norm.astype(update.dtype) for norm in tree_norms) if rule.scope == "tree" else ()
                if rule.scope == "leaf":
                    measured = tuple(norms.joint_norm([array]) for array in rule.measure(update, param))
                loaded = jax.tree.map(lambda slot: storage.load(slot, update.dtype), stored)
                update, slots = rule.apply(update, loaded, param, Step(self.count, measured))
                return update, jax.tree.map(storage.store, slots, stored)

            self.functions[key] = jax.jit(function) if isinstance(update, Tracer) else function
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

    def _tree_wide(self, i: int) -> None:
        """Runs a definition that sees all leaves at once."""
        stage, leaves = self.program[i], self.grads
        params = None if self.params is None else self.params.only(stage.active)
        seen = dataclasses.replace(leaves, values=self.in_dtype_of_gradients()).only(stage.active)
        new, self.states[i] = stage.rule.update(seen, self.states[i], params, **self.extra)
        active = stage.active
        for leaf, value in enumerate(leaves.treedef.flatten_up_to(new)):
            if active[leaf]:
                self.updates[leaf] = value


class _Settings:
    """The values of all hyperparameters at one step, and the rules with these in place."""

    def __init__(self, program: Sequence[Stage], count: jax.Array, held: dict[str, Hyperparameter] | None):
        self._program, self._held, self._resolved = program, held, {}
        self._names = _recorded(program)
        if held is not None and set(held) != set(self._names.values()):
            raise ValueError(f"the state holds the hyperparameters {sorted(held)}, the transformation has "
                             f"{sorted(self._names.values())}: the state was made by another transformation")
        self._values = {(i, field): value_at(value, count, stage.rule.name)
                        for i, stage in enumerate(program) for field, value in _scalars(stage)}

    def rule(self, i: int, dtype: np.dtype) -> Rule:
        """The rule of a stage with its scalars as numbers for arithmetic in ``dtype``."""
        if (i, dtype) not in self._resolved:
            rule = self._program[i].rule
            # Past the constructor: it checks what a user wrote, and would make Python numbers of these.
            resolved = object.__new__(type(rule))
            resolved.__dict__.update(rule.__dict__, **{f: self._value(i, f, dtype) for f, _ in _scalars(self._program[i])})
            self._resolved[i, dtype] = resolved
        return self._resolved[i, dtype]

    def _value(self, i: int, field: str, dtype: np.dtype) -> Any:
        value = self._values[i, field]
        value = jnp.asarray(value).astype(dtype) if hasattr(value, "dtype") else value
        name = self._names.get((i, field))
        if name is None or self._held is None:
            return value
        held = self._held[name]
        if not isinstance(held, Hyperparameter):
            raise TypeError(f"the hyperparameter {name!r} in the state is {held!r}; assign it with lionax.set_hyperparams(state, ...)")
        return jnp.where(held.overridden, held.value.astype(dtype), jnp.asarray(value, dtype))

    def record(self) -> dict[str, Hyperparameter]:
        """What the state is to hold after this step, or, without a state, at the beginning."""
        new = {}
        for (i, field), name in self._names.items():
            # A copy: a schedule may return an array of the caller's, which a donated state must not take along.
            value = jnp.array(self._value(i, field, jnp.dtype(jnp.float32)), jnp.float32)
            if self._held is None:
                overridden = jnp.asarray(isinstance(getattr(self._program[i].rule, field), Injected))
            else:
                overridden = self._held[name].overridden
            new[name] = Hyperparameter(value, overridden)
        return new


def _scalars(stage: Stage) -> list[tuple[str, Any]]:
    """The scalar fields of a stage's rule that were given."""
    fields = () if stage.tree_wide else dataclasses.fields(stage.rule)
    return [(f.name, getattr(stage.rule, f.name)) for f in fields
            if "scalar" in f.metadata and getattr(stage.rule, f.name) is not None]


def _recorded(program: Sequence[Stage]) -> dict[tuple[int, str], str]:
    """Which (stage, field) the state holds, and under which name: the field's, qualified if several share it."""
    always = {(i, f.name) for i, stage in enumerate(program) if not stage.tree_wide
              for f in dataclasses.fields(stage.rule) if f.metadata.get("recorded")}
    held = [(i, field) for i, stage in enumerate(program) for field, value in _scalars(stage)
            if (i, field) in always or isinstance(value, Injected)]
    names = [field for _, field in held]
    for prefix in (lambda i: program[i].key, lambda i: (*program[i].key, program[i].rule.name)):
        times = Counter(names)
        names = ["/".join((*prefix(i), field)) if times[name] > 1 else name
                 for name, (i, field) in zip(names, held, strict=True)]
    times = Counter(names)
    numbered = [f"{name}_{names[:at].count(name)}" if times[name] > 1 else name for at, name in enumerate(names)]
    return dict(zip(held, numbered, strict=True))


def _refuse_dtype(rule: Any, leaf: Any, what: str) -> None:
    if rule.any_dtype or jnp.issubdtype(leaf.dtype, jnp.floating):
        return
    remedy = ("wrap the transformation in optax.contrib.split_real_and_imaginary" if
              jnp.issubdtype(leaf.dtype, jnp.complexfloating) else
              "keep it out of the tree, or out of the transformation with lionax.masked or lionax.partition")
    raise TypeError(f"{rule.name}: {what} has dtype {leaf.dtype}; floating-point is accepted; {remedy}")


def _check_structures(grads: Leaves, params: Leaves) -> None:
    if grads.treedef != params.treedef:
        missing = [p for p in params.paths if p not in set(grads.paths)]
        extra = [p for p in grads.paths if p not in set(params.paths)]
        detail = (f"there is no gradient for {missing[0]!r}" if missing else
                  f"there is no parameter for the gradient {extra[0]!r}" if extra else
                  f"the containers differ: {grads.treedef} and {params.treedef}")
        raise ValueError(f"the gradients do not have the structure of the parameters: {detail}")
    for grad, present, param, path in zip(grads.values, grads.present, params.values, grads.paths, strict=True):
        if present and (is_placeholder(param) or grad.shape != param.shape):
            what = f"is {param!r}" if is_placeholder(param) else f"has shape {param.shape}"
            raise ValueError(f"the gradient of {path!r} has shape {grad.shape}, the parameter {what}; they must be equal "
                             "(nothing is broadcast)")
