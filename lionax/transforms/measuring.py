"""What a step does, in numbers: norms, clips, trust ratios, changed signs."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core import engine, norms, storage
from lionax.core.branching import branch, reading_branch
from lionax.core.counting import next_count, next_in_turn
from lionax.core.definition import Combination, Conditional
from lionax.core.hyperparameters import check_count
from lionax.core.layout import Layout, Stage
from lionax.core.masks import PathLabels, check_matched, check_regexes, labels
from lionax.core.one_leaf import norms_for
from lionax.core.rule import Applied, Definition, Step
from lionax.core.state import init_state, state_of_step
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import Leaves, placeholder
from lionax.core.varying import number_of_elements
from lionax.transforms.adaptive import ScaleByTrustRatio
from lionax.transforms.clipping import Clip, ClipByNorm
from lionax.transforms.combining import definition_of
from lionax.transforms.sign_momentum import ScaleByLion

__all__ = ["Monitor", "MonitorState", "is_monitor", "monitor"]

Values = dict[str, dict[str, jax.Array]]
"""Measurements by group and name. The group "" is the whole tree."""


class MonitorState(NamedTuple):
    """The state of `Monitor`."""

    values: Values  # float32 []: as they were taken last; 0 at first
    age: dict[str, jax.Array]  # int32 []: how many calls of the outermost monitor ago; -1 at first
    calls: jax.Array  # int32 []: how many steps were made; near 2^31 it begins at 0 again
    signs: Any  # Lion's direction in the last step; the parameter's shape; int8
    inner: Any  # the state of the transformation that is measured


@dataclasses.dataclass(frozen=True)
class Monitor(Conditional):
    """The definition of `monitor`: the inner one always runs, and is measured beside."""

    inner: Definition
    groups: PathLabels
    every: int
    which: str = ""  # the gradients that it sees, inside of a conditional

    def __post_init__(self):
        check_count(self.every, "monitor", "every")

    def init(self, params: Any) -> MonitorState:
        leaves, inner = Leaves.of(params, params), init_state(self.inner, params)
        layout = Layout.of(self.inner, leaves)
        stages, is_whole = _measurable(layout)
        slots = layout.unpack(state_of_step(inner, layout).rules)
        names = [f"{self.which}{name}" if name in ("gradient_norm", "nonfinite") else name
                 for name in _names(stages, is_whole, slots)]
        values = {group: {name: jnp.zeros((), jnp.float32) for name in names}
                  for group in self._groups(leaves)}
        of_lion = [stage.active for stage in stages if isinstance(stage.rule, ScaleByLion)]
        signs = [jnp.zeros_like(x, dtype=jnp.int8) if any(active[leaf] for active in of_lion) else
                 placeholder(x) for leaf, x in enumerate(leaves.values)]
        return MonitorState(values, {f"{self.which}age": jnp.full((), -1, jnp.int32)},
                            jnp.zeros((), jnp.int32), leaves.treedef.unflatten(signs), inner)

    def open(self, updates: Any, state: MonitorState, params: Any,
             extra: Mapping[str, Any]) -> tuple[Any, MonitorState, bool]:
        if not self.which:  # the outermost one counts for all
            state = jax.tree.map(_aged, state, is_leaf=is_monitor)

        def recorded(params: Any, inner: Any, signs: Any) -> _Recorder:
            run = _Recorder(signs, self.inner, updates, inner, params, dict(extra))
            engine.transform(run, _measurable(run.layout)[0])
            return run

        def measured(reads: Any, values: Values, age: Any) -> tuple[Values, Any]:
            found = self._measured(recorded(*reads), values, state.calls == 0)
            return found, jax.tree.map(jnp.zeros_like, age)

        def renewed(reads: Any, signs: Any) -> tuple[Any]:
            run = recorded(reads[0], reads[1], signs)
            return (jax.tree.map(storage.store, run.grads.treedef.unflatten(run.signs), signs),)

        due, due_next = (self.every == 1 or (state.calls + n) % self.every == 0 for n in (1, 2))
        (params, inner, signs), values, age = reading_branch(
            due, measured, (params, state.inner, state.signs), state.values, state.age)
        if jax.tree.leaves(signs):  # to compare with in the next step
            (params, inner), signs = reading_branch(due_next, renewed, (params, inner), signs)
        calls = next_in_turn(state.calls, self.every)
        return params, MonitorState(values, age, calls, signs, inner), True

    def accepts(self, updates: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> Any:
        return True

    def close(self, updates: Any, state: MonitorState, due: Any, accepted: Any) -> MonitorState:
        return state

    def _groups(self, leaves: Leaves) -> dict[str, list[int]]:
        """The present leaves of each group, and of the whole tree."""
        if self.groups.rules:  # refuses an expression that matches nothing
            check_matched(self.groups.rules, leaves.keys, "monitor")
        chosen = self.groups.select(leaves.keys, leaves.present, "monitor")
        present = [leaf for leaf, here in enumerate(leaves.present) if here]
        return {"": present, **{group: [leaf for leaf in present if chosen[leaf] == group]
                                for _, group in self.groups.rules}}

    def _measured(self, run: "_Recorder", values: Values, is_first: jax.Array) -> Values:
        """The measurements of a step, in place of these values."""
        groups = self._groups(run.grads)
        found = _norms_of(groups, run, _measurable(run.layout)[1])
        for group, members in groups.items():
            factors, ratios = (
                jnp.concatenate([jnp.ravel(held[leaf]) for leaf in members if leaf in held]
                                or [jnp.ones(1)]) for held in (run.clip_factors, run.trust_ratios))
            found[group] |= {
                "nonfinite": run.nonfinite(found[group]["gradient_norm"], members),
                **{name: _share(counts, members) for name, counts in run.counts.items()},
                "clip_factor": jnp.min(factors), "trust_ratio_min": jnp.min(ratios),
                "trust_ratio_median": jnp.median(ratios), "trust_ratio_max": jnp.max(ratios)}
            found[group]["sign_changes"] = jnp.where(is_first, 0.0, found[group]["sign_changes"])
        return {group: {name: found[group][name.removeprefix(self.which)].astype(jnp.float32)
                        for name in names} for group, names in values.items()}


class _Recorder(engine.Run):
    """A step that records by leaf what its rules do."""

    def __init__(self, old_signs: Any, *arguments: Any):
        super().__init__(*arguments)
        self.old_signs = self.grads.treedef.flatten_up_to(old_signs)
        self.signs = list(self.old_signs)  # those of absent leaves stay
        self.clip_factors: dict[int, jax.Array] = {}
        self.trust_ratios: dict[int, jax.Array] = {}
        names = "clipped", "sign_changes", "sign_disagreement", "stalled"
        self.counts = {name: defaultdict[int, Any](float) for name in names}  # as of `_count`

    def apply(self, stage: Stage, leaf: int, tree_norms: tuple[jax.Array, ...]) -> None:
        before, rule, slots = self.updates[leaf], stage.rule, self.slots[stage.index]
        if any(storage.are_rounded(slots[leaf])):
            self._compare(stage, leaf, tree_norms)
        super().apply(stage, leaf, tree_norms)
        after = self.updates[leaf]
        if isinstance(rule, ScaleByLion):
            self.signs[leaf] = jnp.sign(after.real).astype(jnp.int8)
            old = storage.on_device(self.old_signs[leaf])
            self.counts["sign_changes"][leaf] = self._count(
                leaf, self.signs[leaf] != old.astype(jnp.int8))
        elif isinstance(rule, ClipByNorm | ScaleByTrustRatio):
            one = jnp.ones((), self._dtype(leaf))
            factor = self._unrounded(stage, leaf, before, tree_norms)(one, (), one)[0]
            if isinstance(rule, ScaleByTrustRatio):
                self.trust_ratios[leaf] = factor
            else:
                size = jnp.float32(number_of_elements(before, self.grads.splits[leaf]))
                self._clip(leaf, factor, jnp.stack([jnp.where(factor < 1, size, 0), size]))
        elif isinstance(rule, Clip):
            before = storage.load(before, self._dtype(leaf))
            factor = _quotient(*(norms.joint_norm([x], [self.grads.splits[leaf]])
                                 for x in (after, before)), at_zero=1.0)
            self._clip(leaf, factor, self._count(leaf, (before != after) & ~jnp.isnan(before)))

    def _unrounded(self, stage: Stage, leaf: int, before: Any,
                   tree_norms: tuple[jax.Array, ...]) -> Callable[..., Applied]:
        """The `apply` of a rule at a leaf, in this step. It does not round."""
        static, operands, shared = self._bind(stage, leaf)
        found = norms_for(stage.rule, before, self.param[leaf], tree_norms,
                          self.grads.splits[leaf])
        return functools.partial(static.with_values(operands).apply,
                                 step=Step(self.count, found, shared))

    def _clip(self, leaf: int, factor: jax.Array, count: jax.Array) -> None:
        """Several clips of a leaf multiply their factors."""
        self.clip_factors[leaf] = self.clip_factors.get(leaf, 1.0) * factor.astype(jnp.float32)
        self.counts["clipped"][leaf] = jnp.maximum(self.counts["clipped"][leaf], count)

    def _compare(self, stage: Stage, leaf: int, tree_norms: tuple[jax.Array, ...]) -> None:
        """Compares the new slots of a leaf with the old ones, and with what is rounded to them."""
        given = self.updates[leaf], self.slots[stage.index][leaf]
        # XLA would keep in memory what this and the step share, and copy the old slots.
        update, old = jax.tree.map(jax.lax.optimization_barrier, given)
        self.updates[leaf], self.slots[stage.index][leaf] = update, old
        super().apply(stage, leaf, tree_norms)
        update, param = storage.aligned(update, old, self.param[leaf])
        arrays = update, old, self.slots[stage.index][leaf], param
        self.updates[leaf], self.slots[stage.index][leaf] = given
        update, before, new, param = storage.loaded(
            arrays, self._dtype(leaf), self.grads.splits[leaf])
        unrounded = self._unrounded(stage, leaf, update, tree_norms)
        exact = unrounded(update, before, param)[1]
        each = zip(*map(jax.tree.leaves, (before, new, exact)), strict=True)
        stalled = [(a == b) & (a != c)
                   for a, b, c in itertools.compress(each, storage.are_rounded(old))]
        if not isinstance(stage.rule, ScaleByLion):
            self.counts["stalled"][leaf] += sum(self._count(leaf, bits) for bits in stalled)
            return
        a, b = (jnp.sign(unrounded(update, mu, param)[0].real) for mu in (new, exact))
        # One sum, for which XLA keeps nothing. A `lax.reduce` of two arrays counts to 2**24 only.
        number, size = self._count(leaf, jax.lax.complex(*map(_ones, (stalled[0], a != b))))
        self.counts["stalled"][leaf] += jnp.stack([number.real, size.real])
        self.counts["sign_disagreement"][leaf] = jnp.stack([number.imag, size.real])

    def _count(self, leaf: int, bits: jax.Array) -> jax.Array:
        """How many bits are set, real and imaginary ones apart; and of how many, on all devices."""
        ones, split = bits if storage.is_complex(bits) else _ones(bits), self.grads.splits[leaf]
        number = norms.total(norms.by_axes([jnp.sum(ones)], [split]))
        return jnp.stack([number, jnp.full_like(number, float(number_of_elements(bits, split)))])

    def nonfinite(self, norm: jax.Array, leaves: Sequence[int]) -> jax.Array:
        """How many elements of leaves are not finite; none, without a look, if their norm is."""
        zero = jnp.zeros((), jnp.float32)
        (count,) = branch(~jnp.isfinite(norm), lambda _: (sum((
            self._count(leaf, ~jnp.isfinite(self.grads.values[leaf]))[0] for leaf in leaves),
            zero),), zero)
        return count


def _ones(bits: jax.Array) -> jax.Array:
    return bits.astype(jnp.float32)


def _share(counts: Mapping[int, Any], leaves: Sequence[int]) -> jax.Array:
    """The share of elements that was counted in these leaves."""
    pair = sum((counts[leaf] for leaf in leaves if leaf in counts), jnp.zeros(2, jnp.float32))
    return pair[0] / jnp.maximum(pair[1], 1)


def _names(stages: Sequence[Stage], is_whole: bool, slots: Sequence[Any]) -> list[str]:
    """What is measured of these stages, and of what they keep."""
    rounded = [stage for stage, held in zip(stages, slots, strict=False)
               if not stage.is_tree_wide and any(storage.are_rounded(held))]

    def has(kinds: Any, among: Sequence[Stage] = stages) -> bool:
        return any(isinstance(stage.rule, kinds) for stage in among)

    names = {"gradient_norm nonfinite": True,
             "update_norm parameter_norm update_to_parameter": is_whole,
             "clipped clip_factor": has(ClipByNorm | Clip),
             "trust_ratio_min trust_ratio_median trust_ratio_max": has(ScaleByTrustRatio),
             "sign_changes": has(ScaleByLion), "sign_disagreement": has(ScaleByLion, rounded),
             "stalled": bool(rounded)}
    return [name for several, is_there in names.items() if is_there for name in several.split()]


def _measurable(layout: Layout) -> tuple[list[Stage], bool]:
    """The stages up to the first conditional, and whether these are all."""
    stages = list(itertools.takewhile(
        lambda stage: not isinstance(stage.rule, Conditional), layout.stages))
    return stages, len(stages) == len(layout.stages)


def _norms_of(groups: dict[str, list[int]], run: _Recorder, is_whole: bool) -> Values:
    """The norms of each group; the compiler sums an array once that is in two."""
    arrays = {"gradient_norm": run.grads.values}
    if is_whole:
        arrays |= {"update_norm": run.updates, "parameter_norm": run.param}
    splits = run.grads.splits
    measured = iter(norms.fused_norms([
        norms.by_axes([values[leaf] for leaf in members], [splits[leaf] for leaf in members])
        for members in groups.values() for values in arrays.values()]))
    found: Values = {group: {name: next(measured).astype(jnp.float32) for name in arrays}
                     for group in groups}
    for values in found.values() if is_whole else ():
        if run.params is None:
            values["parameter_norm"] = jnp.full((), jnp.nan, jnp.float32)
        values["update_to_parameter"] = _quotient(
            values["update_norm"], values["parameter_norm"], at_zero=0.0)
    return found


def _quotient(dividend: jax.Array, divisor: jax.Array, at_zero: float) -> jax.Array:
    """A quotient of norms, without a division by 0, at which a debugger of NaN would stop."""
    is_zero = divisor == 0
    return jnp.where(is_zero, at_zero, dividend / jnp.where(is_zero, 1.0, divisor))


def is_monitor(node: Any) -> bool:
    """Whether a node of a state is a monitor's."""
    return isinstance(node, MonitorState)


def _aged(node: Any) -> Any:
    """A monitor's state, and those inside of it, one call older."""
    if not is_monitor(node):
        return node
    age = {name: next_count(old, old >= 0) for name, old in node.age.items()}
    return node._replace(age=age, inner=jax.tree.map(_aged, node.inner, is_leaf=is_monitor))


def _monitored(definition: Any, groups: PathLabels, every: int) -> Any:
    """A definition, with a monitor inside of each conditional."""
    if isinstance(definition, tuple):
        return tuple(_monitored(item, groups, every) for item in definition)
    if isinstance(definition, Conditional) and not isinstance(definition, Monitor):
        inner = Monitor(_monitored(definition.inner, groups, every), groups, every,
                        definition.inner_gradients)
        return dataclasses.replace(definition, inner=inner)  # pyright: ignore
    if isinstance(definition, Combination):
        return dataclasses.replace(definition, **{  # pyright: ignore
            name: _monitored(value, groups, every) for name, value in vars(definition).items()})
    return definition


@constructor
def monitor(tx: optax.GradientTransformation, groups: Mapping[str, str] | None = None,
            every: int = 1) -> Transformation:
    """Measures what a transformation does. `metrics` reads the measurements from the state.

    - ``gradient_norm``: the norm of the gradients that the transformation gets, before a clip;
    - ``nonfinite``: how many of their elements are NaN or infinite;
    - ``update_norm``, ``parameter_norm``: of the final updates and of the old parameters;
    - ``update_to_parameter``: the quotient of both;
    - ``clipped``: the share of elements that a clip changed;
    - ``clip_factor``: the least number by which clips multiplied a leaf;
    - ``trust_ratio_min``, ``_median``, ``_max``: of the ratios of all leaves;
    - ``sign_changes``: the share of signs of Lion's direction that differ from the last step's;
    - ``stalled``: the share of elements of slots in codes or at most 16 bits that rounding left as
      they were, though the new value in float32 differs from the old one; of all slots together;
    - ``sign_disagreement``: the share of signs of ``b1·m + (1 - b1)·g`` that differ between Lion's
      new ``m`` as stored and before rounding, both with this step's ``g``: the next is not known;
    - ``age``: how many calls ago these were measured; -1 before the first time.

    Inside of a conditional further gradients are measured: ``accumulated_gradient_norm`` is that of
    the mean in `accumulate`, ``unscaled_gradient_norm`` that in `dynamic_loss_scale`,
    ``accepted_gradient_norm`` that in `skip_if`, and so ``accumulated_age`` and the others. They
    keep their last value until the inner transformation runs again, and are NaN before. What
    follows a conditional in a chain is not measured.

    Norms are those of `clip_by_global_norm`, right on a mesh. They cost loops over memory that the
    step itself does not need: `plan` counts them. With ``every=n`` they are in a branch. For
    ``sign_changes`` the state holds a byte for each parameter.

    Args:
      tx: what is measured; lionax's or Optax's.
      groups: regular expression -> name: the same for the leaves that it is the first to match, by
        path as in `matching`, as ``name/gradient_norm``.
      every: measure every n-th step only.

    Raises:
      ValueError: for ``every`` below 1; where it is used, for an expression that matches no leaf.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.sgd(0.5)))
    >>> params, state = tx.step(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.array([3.0, 4.0]))
    >>> measured = lionax.metrics(state)
    >>> [round(float(measured[name]), 3) for name in ("gradient_norm", "clip_factor")]
    [5.0, 0.2]
    """
    if not isinstance(groups, Mapping | None):
        raise TypeError(f"monitor: groups={groups!r} is not a mapping from regular expressions to "
                        "names")
    check_regexes(groups or {}, "monitor")
    by_path = labels(groups or {}, default="")
    for regex, name in by_path.rules:
        if not isinstance(name, str) or not name:
            raise TypeError(f"monitor: groups has {name!r} for {regex!r}; give the group's name")
    definition = definition_of(tx, "monitor")
    return Transformation.of(Monitor(_monitored(definition, by_path, every), by_path, every))
