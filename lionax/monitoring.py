"""What a transformation costs and does: `plan` and `summary` before it runs, `metrics` after."""

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lionax.compiler import compiler_options
from lionax.core.definition import Conditional
from lionax.core.hyperparameters import get_hyperparams, is_number, names_in_state
from lionax.core.inspection import bytes_of, contents_by_leaf
from lionax.core.layout import Layout, sweeps
from lionax.core.placement import local, shardings_of_leaves, split_further
from lionax.core.rule import Definition
from lionax.core.table import Shown, Table, in_bytes, shown
from lionax.core.transformation import Transformation
from lionax.core.tree import Leaves
from lionax.transforms.measuring import is_monitor

__all__ = ["LeafSummary", "Plan", "Summary", "metrics", "plan", "summary"]

_COSTS = ("bytes accessed", "bytes accessedout{}", "flops")  # as XLA calls them


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Shown):
    """How a transformation runs over a parameter tree; made by `plan`. It prints as a table.

    All but sweeps, parameters and state are the compiler's count; None where it does not tell.
    """

    sweeps: tuple[tuple[str, ...], ...]  # names of the rules between two norms over the tree
    parameters: int  # number of elements
    state_bytes: int  # of all arrays in the state
    read_bytes: int | None  # by all loops of a step together
    written_bytes: int | None  # by the same
    aliased_bytes: int | None  # of donated buffers in which results are written
    temporary_bytes: int | None  # held beside parameters, state and gradients
    flops: int | None  # floating-point operations

    def table(self) -> Table:
        """Rows of what is known."""
        rows = [(f"sweep {i}", ", ".join(names), "") for i, names in enumerate(self.sweeps, 1)]
        for field in dataclasses.fields(self)[2:]:
            value, name = getattr(self, field.name), field.name.removesuffix("_bytes")
            if value is not None:
                unit = "bytes" if name != field.name else "operations"
                each = f"{value / self.parameters:.2f} per parameter" if self.parameters else ""
                rows.append((name, f"{value:,} {unit}", each))
        return Table((), rows)


def plan(tx: Transformation, params: Any) -> Plan:
    """How a transformation will run: its sweeps, and what the compiler says that a step costs.

    A sweep is one run over the leaves; it ends where the next rule needs a norm over the tree.
    Bytes and operations are those of a jitted ``step`` on the default device, with
    `compiler_options` and donation; of branches those of the most expensive. XLA counts what each
    loop reads and writes, cached or not.

    Args:
      tx: a lionax transformation.
      params: the parameters or their shapes (``jax.eval_shape``); nothing is allocated or run.

    Raises:
      TypeError: if ``tx`` is not lionax's.

    >>> import jax, jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    >>> plan = lionax.plan(tx, {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    >>> plan.sweeps
    (('clip_by_global_norm', 'scale_by_lion', 'add_decayed_weights', 'scale_by_learning_rate'),)
    >>> round(plan.state_bytes / plan.parameters, 2)
    4.0
    """
    leaves, shapes = _shapes(tx, params, "plan")
    state = jax.eval_shape(tx.init, shapes)
    step = jax.jit(tx.step, donate_argnums=(0, 1), compiler_options=compiler_options())
    program = step.lower(shapes, state, shapes).compile()
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    accessed, written, flops = (cost.get(key) for key in _COSTS)
    stages = Layout.of(tx.definition, leaves).stages
    return Plan(
        sweeps=tuple(tuple(stage.rule.name for stage in sweep) for sweep in sweeps(stages)),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        read_bytes=None if accessed is None or written is None else int(accessed - written),
        written_bytes=None if written is None else int(written),
        aliased_bytes=getattr(memory, "alias_size_in_bytes", None),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        flops=None if flops is None else int(flops))


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """A row of a `Summary`."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    rules: tuple[str, ...]  # that act on the leaf; a conditional before those inside of it
    state: tuple[str, ...]  # its arrays in the state: ``mu float32``
    state_bytes: int
    whole: str = ""  # why its state is not split over the axis that was asked for


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Shown):
    """Which rules act on which leaf, and what is kept of it; made by `summary`."""

    leaves: tuple[LeafSummary, ...]
    parameters: int  # number of elements
    parameter_bytes: int
    state_bytes: int  # of all arrays in the state, also those that belong to no leaf

    def table(self) -> Table:
        """A row for each leaf. Rules that act on all stand above."""
        counts = [Counter(leaf.rules) for leaf in self.leaves]
        everywhere = functools.reduce(operator.and_, counts, counts[0] if counts else Counter())
        further = [leaf_rules - everywhere for leaf_rules in counts]
        rows = [(leaf.path or "(the array)", str(leaf.shape).replace(" ", ""), leaf.dtype,
                 ", ".join(others.elements()) or "–", ", ".join(leaf.state) or "–",
                 in_bytes(leaf.state_bytes))
                for leaf, others in zip(self.leaves, further, strict=True)]
        own = self.state_bytes - sum(leaf.state_bytes for leaf in self.leaves)
        each = f"{self.state_bytes / self.parameters:.2f}" if self.parameters else "–"
        whole = [f"left whole: {leaf.path}, {leaf.whole}" for leaf in self.leaves if leaf.whole]
        return Table(
            ("leaf", "shape", "dtype", "further rules", "state", "bytes"), rows,
            [f"on every leaf: {', '.join(everywhere.elements()) or 'nothing'}"],
            [f"leaves: {len(self.leaves)}; parameters: {self.parameters:,}, "
             f"{in_bytes(self.parameter_bytes)}",
             f"state: {in_bytes(self.state_bytes)}, {each} bytes per parameter; of no leaf: "
             f"{in_bytes(own)}", *whole])


def summary(tx: Transformation, params: Any, zero_axis: str | None = None) -> Summary:
    """A table of leaves: path, shape, dtype, the rules that act, the arrays of the state.

    ``print`` shows it as text, a notebook as HTML, ``rich.print`` as rich's table.

    Args:
      tx: a lionax transformation.
      params: the parameters or their shapes (``jax.eval_shape``); nothing is allocated or run.
      zero_axis: as for `state_sharding`; then it lists the leaves whose state is not split over
        that axis of the mesh, and why.

    Raises:
      TypeError: if ``tx`` is not lionax's.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lion(1e-3, mask=lionax.not_matching("bias"))
    >>> print(lionax.summary(tx, {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}))
    on every leaf: scale_by_lion, scale_by_learning_rate
    leaf    shape  dtype    further rules        state       bytes
    ------  -----  -------  -------------------  ----------  -----
    bias    (3,)   float32  –                    mu float32  12 B
    kernel  (2,3)  float32  add_decayed_weights  mu float32  24 B
    leaves: 2; parameters: 9, 36 B
    state: 48 B, 5.33 bytes per parameter; of no leaf: 12 B
    """
    leaves, shapes = _shapes(tx, params, "summary")
    state = jax.eval_shape(tx.init, shapes)
    kept, acting = contents_by_leaf(state, leaves), _acting(tx.definition, leaves)
    rows = tuple(
        LeafSummary(path, value.shape, value.dtype.name, tuple(names),
                    tuple(f"{field} {array.dtype.name}" for field, array in arrays),
                    sum(bytes_of(array) for _, array in arrays),
                    split_further(sharding, value.shape, zero_axis)[1] if zero_axis else "")
        for path, value, names, arrays, sharding, here in zip(
            leaves.paths, leaves.values, acting, kept, shardings_of_leaves(leaves), leaves.present,
            strict=True) if here)
    arrays = jax.tree.leaves(shapes)
    return Summary(rows, sum(math.prod(array.shape) for array in arrays),
                   sum(map(bytes_of, arrays)), sum(map(bytes_of, jax.tree.leaves(state))))


def _acting(definition: Definition, leaves: Leaves) -> list[list[str]]:
    """The names of the rules that act on each leaf."""
    names: list[list[str]] = [[] for _ in leaves.values]
    for stage in Layout.of(definition, leaves).stages:
        inside: list[list[str]] = [[] for _ in leaves.values]
        if isinstance(stage.rule, Conditional):
            tree = leaves.tree(leaves.values, stage.active)
            inside = _acting(stage.rule.inner, Leaves.of(tree, tree))
        for leaf, is_active in enumerate(stage.active):
            names[leaf] += [stage.rule.name, *inside[leaf]] if is_active else []
    return names


def _shapes(tx: Any, params: Any, owner: str) -> tuple[Leaves, Any]:
    """The leaves of the parameters, and their tree as shapes."""
    if not isinstance(tx, Transformation):
        raise TypeError(f"{owner}: {tx!r} is not a lionax transformation; wrap an Optax one in "
                        "lionax.chain(...)")
    leaves = Leaves.of(params, params)
    return leaves, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                                leaves.treedef.unflatten(leaves.values))


def metrics(state: Any) -> dict[str, jax.Array]:
    """What `monitor` measured last, and the hyperparameters of `get_hyperparams`.

    Nothing is moved to the host: ``jax.device_get(metrics(state))`` does that, and waits for the
    step. In a run of several processes one of them may read alone.

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
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_monitor)
    for inner_keys, node in pairs:
        if is_monitor(node):
            here = (*keys, *inner_keys)
            ages = [(name, _number(x)) for name, x in _items(node.age)]
            for name, age in ages:
                yield here, name, age
            for group, values in _items(node.values):
                for name, value in _items(values):
                    measured = jnp.where(ages[0][1] < 0, jnp.nan, _number(value, jnp.float32))
                    yield here, f"{group}/{name}" if group else name, measured
            yield from _found(node.inner, (*here, jax.tree_util.GetAttrKey("inner")))


def _items(node: Any) -> Any:
    """The items of a dict of measurements; refuses what is none, or empty."""
    if not isinstance(node, Mapping) or not node:
        raise ValueError(f"metrics: the state holds {shown(node)} in place of measurements; make "
                         "it with tx.init(params)")
    return node.items()


def _number(node: Any, dtype: Any = jnp.int32) -> jax.Array:
    """The one array in a node; refuses what is no number."""
    arrays = jax.tree.leaves(node)  # A Flax optimizer wraps each array in a variable.
    value = local(arrays[0]) if len(arrays) == 1 and isinstance(arrays[0], jax.Array) else None
    if value is None or not is_number(value):
        raise ValueError(f"metrics: the state holds {shown(node)} in place of a measurement; make "
                         "it with tx.init(params). Of a batch of states it is "
                         "jax.vmap(lionax.metrics)(state)")
    return value.astype(dtype)
