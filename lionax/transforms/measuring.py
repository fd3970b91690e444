"""What a step does, in numbers: norms, clips, trust ratios, changed signs."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core import engine, norms, storage
from lionax.core.branching import branch, reading_branch
from lionax.core.definition import Combination, Conditional
from lionax.core.hyperparameters import check_count, get_hyperparams, names_in_state
from lionax.core.layout import Layout, Stage
from lionax.core.masks import PathLabels, check_matched, check_regexes, labels
from lionax.core.rule import Definition, Step
from lionax.core.state import init_state
from lionax.core.transformation import Transformation, constructor
from lionax.core.tree import Leaves
from lionax.core.varying import number_of_elements
from lionax.transforms.adaptive import ScaleByTrustRatio
from lionax.transforms.clipping import Clip, ClipByNorm
from lionax.transforms.combining import definition_of
from lionax.transforms.sign_momentum import ScaleByLion

__all__ = ["Monitor", "MonitorState", "metrics", "monitor"]

Values = dict[str, dict[str, jax.Array]]
"""Measurements by group and name. The group "" is the whole tree."""


class MonitorState(NamedTuple):
    """The state of `Monitor`."""

    values: Values  # float32 []: as they were taken last; 0 at first
    age: dict[str, jax.Array]  # int32 []: how many calls of the outermost monitor ago; -1 at first
    calls: jax.Array  # int32 []: how many steps were made
    signs: Any  # Lion's direction in the last step; the parameter's shape; int8
    inner: Any  # the state of the transformation that is measured


@dataclasses.dataclass(frozen=True)
class Monitor(Conditional):
    """The definition of `monitor`: the inner one always runs.

    Measuring runs beside the step, on the step's inputs.
    """

    inner: Definition
    groups: PathLabels
    every: int
    which: str = ""  # the gradients that it sees, inside of a conditional

    def __post_init__(self):
        check_count(self.every, "monitor", "every")

    def init(self, params: Any) -> MonitorState:
        leaves = Leaves.of(params, params)
        stages, is_whole = _measurable(Layout.of(self.inner, leaves))
        names = [self._public(name) for name in _names(stages, is_whole)]
        values = {group: {name: jnp.zeros((), jnp.float32) for name in names}
                  for group in self._groups(leaves)}
        has_sign = [any(stage.active[leaf] for stage in stages
                        if isinstance(stage.rule, ScaleByLion)) for leaf in range(len(leaves.keys))]
        zeros = [jnp.zeros_like(x, dtype=jnp.int8) if here else None
                 for x, here in zip(leaves.values, has_sign, strict=True)]
        return MonitorState(values, {f"{self.which}age": jnp.full((), -1, jnp.int32)},
                            jnp.zeros((), jnp.int32), leaves.tree(zeros, has_sign),
                            init_state(self.inner, params))

    def open(self, updates: Any, state: MonitorState, params: Any,
             extra: Mapping[str, Any]) -> tuple[Any, MonitorState, bool]:
        if not self.which:  # the outermost one counts for all
            state = jax.tree.map(_aged, state, is_leaf=_is_monitor)

        def recorded(params: Any, inner: Any) -> _Recorder:
            run = _Recorder(self.inner, updates, inner, params, dict(extra))
            engine.transform(run, _measurable(run.layout)[0])
            return run

        def measured(reads: Any, values: Values, age: Any) -> tuple[Values, Any]:
            found = self._measured(recorded(*reads[:2]), reads[2], state.calls == 0)
            return found, jax.tree.map(jnp.zeros_like, age)

        due, due_next = (self.every == 1 or (state.calls + n) % self.every == 0 for n in (1, 2))
        (params, inner, signs), values, age = reading_branch(
            due, measured, (params, state.inner, state.signs), state.values, state.age)
        if jax.tree.leaves(signs):  # to compare with in the next step
            (params, inner), signs = reading_branch(
                due_next, lambda reads, old: (recorded(*reads).new_signs(old),), (params, inner),
                signs)
        calls = jnp.asarray(optax.safe_increment(state.calls))
        return params, MonitorState(values, age, calls, signs, inner), True

    def accepts(self, updates: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> Any:
        return True

    def close(self, updates: Any, state: MonitorState, due: Any, accepted: Any) -> MonitorState:
        return state

    def _public(self, name: str) -> str:
        return f"{self.which}{name}" if name in ("gradient_norm", "nonfinite") else name

    def _groups(self, leaves: Leaves) -> dict[str, list[int]]:
        """The present leaves of each group, and of the whole tree."""
        if self.groups.rules:  # refuses an expression that matches nothing
            check_matched(self.groups.rules, leaves.keys, "monitor")
        chosen = self.groups.select(leaves.keys, leaves.present, "monitor")
        present = [leaf for leaf, here in enumerate(leaves.present) if here]
        return {"": present, **{group: [leaf for leaf in present if chosen[leaf] == group]
                                for _, group in self.groups.rules}}

    def _measured(self, run: "_Recorder", signs: Any, is_first: jax.Array) -> Values:
        """The measurements of a step."""
        stages, is_whole = _measurable(run.layout)
        groups = self._groups(run.grads)
        found = _norms_of(groups, run, is_whole)
        changed = run.changed_signs(signs)
        for group, members in groups.items():
            factors = [run.clip_factors[leaf] for leaf in members if leaf in run.clip_factors]
            ratios = [jnp.ravel(run.trust_ratios[leaf]) for leaf in members
                      if leaf in run.trust_ratios]
            factor = jnp.stack(factors or [jnp.ones((), jnp.float32)])
            ratio = jnp.concatenate(ratios or [jnp.ones(1, jnp.float32)])
            found[group] |= {
                "nonfinite": _nonfinite(found[group]["gradient_norm"], [
                    run.grads.values[leaf] for leaf in members]),
                "sign_changes": jnp.where(is_first, 0.0, run.share(changed, members)),
                "clipped": run.share(run.clipped, members), "clip_factor": jnp.min(factor),
                "trust_ratio_min": jnp.min(ratio), "trust_ratio_median": jnp.median(ratio),
                "trust_ratio_max": jnp.max(ratio)}
        return {group: {self._public(name): found[group][name].astype(jnp.float32)
                        for name in _names(stages, is_whole)} for group in groups}


class _Recorder(engine.Run):
    """A step that records by leaf what its rules do."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.signs: list[Any] = [None] * len(self.updates)
        self.clip_factors: dict[int, jax.Array] = {}
        self.clipped: dict[int, jax.Array] = {}  # number of elements
        self.trust_ratios: dict[int, jax.Array] = {}

    def apply(self, stage: Stage, leaf: int, tree_norms: tuple[jax.Array, ...]) -> None:
        before, rule = self.updates[leaf], stage.rule
        slots = self.slots[stage.index][leaf]
        super().apply(stage, leaf, tree_norms)
        after = self.updates[leaf]
        if isinstance(rule, ScaleByLion):
            self.signs[leaf] = jnp.sign(after.real).astype(jnp.int8)
        elif isinstance(rule, ScaleByTrustRatio):
            self.trust_ratios[leaf] = self._factor(stage, leaf, before, slots, tree_norms)
        elif isinstance(rule, ClipByNorm):
            factor = self._factor(stage, leaf, before, slots, tree_norms)
            self._clip(leaf, factor, jnp.where(factor < 1, number_of_elements(before), 0))
        elif isinstance(rule, Clip):
            before = storage.load(before, self._dtype(leaf))
            factor = _quotient(*(norms.joint_norm([x]) for x in (after, before)), at_zero=1.0)
            self._clip(leaf, factor, _count((before != after) & ~jnp.isnan(before)))

    def _clip(self, leaf: int, factor: jax.Array, count: jax.Array) -> None:
        """Several clips of a leaf multiply their factors."""
        self.clip_factors[leaf] = self.clip_factors.get(leaf, 1.0) * factor.astype(jnp.float32)
        self.clipped[leaf] = jnp.maximum(self.clipped.get(leaf, 0.0), count.astype(jnp.float32))

    def _factor(self, stage: Stage, leaf: int, before: Any, slots: Any,
                tree_norms: tuple[jax.Array, ...]) -> jax.Array:
        """What a rule that scales a leaf by its norms makes of 1."""
        static, operands, shared = self._bind(stage, leaf)
        rule, one = static.with_values(operands), jnp.ones((), static.dtype)
        found = engine.norms_for(rule, before, self.param[leaf], tree_norms)
        return rule.apply(one, slots, one, Step(self.count, found, shared))[0]

    def share(self, counts: Mapping[int, jax.Array], leaves: Sequence[int]) -> jax.Array:
        """The share of elements that was counted, of the leaves of these in which one counts."""
        counted = [leaf for leaf in leaves if leaf in counts]
        size = sum(number_of_elements(self.grads.values[leaf]) for leaf in counted)
        return sum((counts[leaf] for leaf in counted), jnp.zeros((), jnp.float32)) / max(size, 1)

    def new_signs(self, signs: Any) -> Any:
        """The signs of the directions, in place of the old ones; those of absent leaves stay."""
        old = self.grads.treedef.flatten_up_to(signs)
        return self.grads.treedef.unflatten(
            a if b is None else b for a, b in zip(old, self.signs, strict=True))

    def changed_signs(self, signs: Any) -> dict[int, jax.Array]:
        """By leaf the number of signs that differ from the old ones."""
        old = self.grads.treedef.flatten_up_to(signs)
        return {leaf: _count(a != b) for leaf, (a, b) in enumerate(
            zip(old, self.signs, strict=True)) if b is not None}


def _count(bits: jax.Array) -> jax.Array:
    """How many bits of an array are set, on all devices."""
    return norms.total([jnp.sum(bits.astype(jnp.float32))])


def _nonfinite(norm: jax.Array, arrays: list[jax.Array]) -> jax.Array:
    """How many elements of arrays are not finite; none, without a look, if their norm is."""
    zero = jnp.zeros((), jnp.float32)
    (count,) = branch(~jnp.isfinite(norm), lambda _: (
        sum((_count(~jnp.isfinite(x)) for x in arrays), zero),), zero)
    return count


def _names(stages: Sequence[Stage], is_whole: bool) -> list[str]:
    """What is measured of these stages."""
    names = ["gradient_norm", "nonfinite"]
    if is_whole:
        names += ["update_norm", "parameter_norm", "update_to_parameter"]
    by_rule = {(ClipByNorm, Clip): ["clipped", "clip_factor"],
               (ScaleByTrustRatio,): [f"trust_ratio_{x}" for x in ("min", "median", "max")],
               (ScaleByLion,): ["sign_changes"]}
    for rules, of_these in by_rule.items():
        names += of_these if any(isinstance(stage.rule, rules) for stage in stages) else []
    return names


def _measurable(layout: Layout) -> tuple[list[Stage], bool]:
    """The stages up to the first conditional, and whether these are all."""
    stages = list(itertools.takewhile(
        lambda stage: not isinstance(stage.rule, Conditional), layout.stages))
    return stages, len(stages) == len(layout.stages)


def _norms_of(groups: dict[str, list[int]], run: _Recorder, is_whole: bool) -> Values:
    """The norms of each group, in which the arrays of a group are summed once."""
    arrays = {"gradient_norm": run.grads.values}
    if is_whole:
        arrays |= {"update_norm": run.updates, "parameter_norm": run.param}
    named = [members for group, members in groups.items() if group]
    in_group = set(itertools.chain(*named))
    rest = [leaf for leaf in groups[""] if leaf not in in_group]
    parts = [rest, *named]
    each = iter(norms.fused_norms([
        [values[leaf] for leaf in part if values[leaf] is not None]
        for values in arrays.values() for part in parts]))
    found: Values = {group: {} for group in groups}
    for name in arrays:
        of_parts = list(itertools.islice(each, len(parts)))
        found[""][name] = norms.joint_norm(of_parts) if named else of_parts[0]
        for group, norm in zip((group for group in groups if group), of_parts[1:], strict=True):
            found[group][name] = norm
    for values in found.values() if is_whole else ():
        if run.params is None:
            values["parameter_norm"] = jnp.full((), jnp.nan)
        values["update_to_parameter"] = _quotient(
            values["update_norm"], values["parameter_norm"], at_zero=0.0)
    return found


def _quotient(dividend: jax.Array, divisor: jax.Array, at_zero: float) -> jax.Array:
    """A quotient of norms, without a division by 0, at which a debugger of NaN would stop."""
    is_zero = divisor == 0
    one = jnp.ones_like(divisor)
    return jnp.where(is_zero, at_zero * one, dividend / jnp.where(is_zero, one, divisor))


def _is_monitor(node: Any) -> bool:
    return isinstance(node, MonitorState)


def _aged(node: Any) -> Any:
    """A monitor's state, and those inside of it, one call older."""
    if not _is_monitor(node):
        return node
    age = {name: jnp.where(old < 0, old, old + 1) for name, old in node.age.items()}
    return node._replace(age=age, inner=jax.tree.map(_aged, node.inner, is_leaf=_is_monitor))


def _monitored(definition: Any, groups: PathLabels, every: int) -> Any:
    """A definition, with a monitor inside of each conditional."""
    if isinstance(definition, tuple):
        return tuple(_monitored(item, groups, every) for item in definition)
    if isinstance(definition, Conditional) and not isinstance(definition, Monitor):
        inner = Monitor(_monitored(definition.inner, groups, every), groups, every,
                        definition.inner_gradients)
        return dataclasses.replace(definition, inner=inner)  # pyright: ignore
    if isinstance(definition, Combination):
        fields = dataclasses.fields(definition)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(definition, **{  # pyright: ignore
            field.name: _monitored(getattr(definition, field.name), groups, every)
            for field in fields})
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


def metrics(state: Any) -> dict[str, jax.Array]:
    """What `monitor` measured last, and the hyperparameters of `get_hyperparams`.

    Nothing is moved to the host: ``jax.device_get(metrics(state))`` does that, and waits for the
    step.

    Args:
      state: of a transformation with a `monitor`, alone or anywhere inside another's.

    Returns:
      Name to scalar. Where several monitors share a name, it is qualified by where they stand in
      the state.

    Raises:
      KeyError: if nothing in the state is measured.

    >>> import jax.numpy as jnp, lionax
    >>> state = lionax.monitor(lionax.sgd(0.5)).init(jnp.zeros(2))
    >>> sorted(lionax.metrics(state))[:3]
    ['age', 'gradient_norm', 'learning_rate']
    """
    with jax.debug_nans(False):  # which stands for what was not measured yet
        found = list(_found(state, ()))
    if not found:
        raise KeyError("metrics: nothing in the state is measured; wrap the transformation in "
                       "lionax.monitor(tx)")
    names = names_in_state([(keys, name) for keys, name, _ in found])
    return get_hyperparams(state) | dict(zip(names, (value for *_, value in found), strict=True))


def _found(state: Any, keys: tuple[Any, ...]) -> Any:
    """Keys, name and value of everything measured in a state."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_monitor)
    for inner_keys, node in pairs:
        if _is_monitor(node):
            here = (*keys, *inner_keys)
            # A Flax optimizer wraps each array of the state in a variable.
            ((age_name, age),) = ((name, jax.tree.leaves(x)[0]) for name, x in node.age.items())
            yield here, age_name, age
            for group, values in node.values.items():
                for name, value in values.items():
                    measured = jnp.where(age < 0, jnp.nan, jax.tree.leaves(value)[0])
                    yield here, f"{group}/{name}" if group else name, measured
            yield from _found(node.inner, (*here, jax.tree_util.GetAttrKey("inner")))
