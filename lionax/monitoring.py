"""What a transformation costs, asked of the compiler before it runs."""

import dataclasses
import math
from typing import Any

import jax

from lionax.compiler import compiler_options
from lionax.core.layout import Layout, sweeps
from lionax.core.transformation import Transformation
from lionax.core.tree import Leaves

__all__ = ["Plan", "plan"]

_COSTS = ("bytes accessed", "bytes accessedout{}", "flops")  # as XLA calls them


@dataclasses.dataclass(frozen=True)
class Plan:
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

    def __str__(self) -> str:
        rows = [(f"sweep {i}", ", ".join(names)) for i, names in enumerate(self.sweeps, 1)]
        for field in dataclasses.fields(self)[2:]:
            value, name = getattr(self, field.name), field.name.removesuffix("_bytes")
            if value is not None:
                unit = "bytes" if name != field.name else "operations"
                each = f"{value / self.parameters:10.2f} per parameter" if self.parameters else ""
                rows.append((name, f"{value:>18,} {unit:<10}{each}".rstrip()))
        return "\n".join(f"{name:<10}{text}" for name, text in rows)


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
    if not isinstance(tx, Transformation):
        raise TypeError(f"plan: {tx!r} is not a lionax transformation; wrap an Optax one in "
                        "lionax.chain(...)")
    leaves = Leaves.of(params, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                          leaves.treedef.unflatten(leaves.values))
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
