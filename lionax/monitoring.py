"""What a transformation costs, told before it runs."""

import dataclasses
from typing import Any

import jax

from lionax.layout import Layout, Leaves, Stage
from lionax.traffic import Traffic
from lionax.transformation import Transformation

__all__ = ["Plan", "plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a transformation runs over a parameter tree; made by `plan`. It prints as a table."""

    sweeps: tuple[tuple[str, ...], ...]  # names of the rules between two measurements, in order
    parameters: int  # number of elements
    state_bytes: int  # of all arrays in the state
    bytes_read_per_param: float | None  # by a jitted `step` with donated arguments; None if a part sees whole trees
    bytes_written_per_param: float | None  # by the same
    temporary_bytes: int | None  # of arrays that it keeps beside parameters, state and gradients; None as above

    def __str__(self) -> str:
        rows = [(f"sweep {i}", ", ".join(names)) for i, names in enumerate(self.sweeps, 1)]
        if self.bytes_read_per_param is not None and self.bytes_written_per_param is not None:
            rows += [("read", f"{self.bytes_read_per_param:.2f} bytes per parameter"),
                     ("written", f"{self.bytes_written_per_param:.2f} bytes per parameter"),
                     ("temporary", f"{self.temporary_bytes:,} bytes")]
        each = f" ({self.state_bytes / self.parameters:.2f} per parameter)" if self.parameters else ""
        rows.append(("state", f"{self.state_bytes:,} bytes{each}"))
        return "\n".join(f"{name:<10}{text}" for name, text in rows)


def plan(tx: Transformation, params: Any) -> Plan:
    """How a transformation will run: which rules share a sweep over memory, what a step moves, and what the state keeps.

    A sweep ends where a norm must be known before the next rule can act. A rule that measures before any other has run
    has a sweep to itself, in which the gradients are only read.

    Bytes are those of a jitted ``step`` with donated arguments on one CPU device, whose compiler makes one loop over memory of each
    array that is written and of each norm. A compiler that writes several arrays in one loop reads less. Not counted are
    scalars, leaves of less than 64 KiB, which the cache holds, and a second sum where a norm is out of float32's range.

    Args:
      tx: a lionax transformation.
      params: the parameters, or their shapes (``jax.eval_shape``); nothing is computed.

    Raises:
      TypeError: if ``tx`` is not lionax's.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    >>> print(lionax.plan(tx, {"w": jnp.zeros((3, 4))}))
    sweep 1   clip_by_global_norm
    sweep 2   scale_by_lion, add_decayed_weights, scale_by_learning_rate
    read      24.00 bytes per parameter
    written   8.00 bytes per parameter
    temporary 0 bytes
    state     57 bytes (4.75 per parameter)
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"plan: {tx!r} is not a lionax transformation; wrap an Optax one in lionax.chain(...)")
    leaves = Leaves.of(params, params)
    program = Layout.of(tx.definition, leaves).stages
    state = jax.eval_shape(tx.init, params)
    parameters = sum(leaf.size for leaf, here in zip(leaves.values, leaves.present, strict=True) if here)
    read = written = temporary = None
    if parameters and not any(stage.tree_wide for stage in program):
        traffic = Traffic.of(tx.step, params, state, params)
        read, written = traffic.read / parameters, traffic.written / parameters
        # The leaves with a norm of their own wait for each other; a norm of the tree needs all updates at once.
        temporary = sum(traffic.kept) if any(stage.rule.scope == "tree" for stage in program[1:]) else max(traffic.kept, default=0)
    return Plan(sweeps=_sweeps(program), parameters=parameters,
                state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                bytes_read_per_param=read, bytes_written_per_param=written, temporary_bytes=temporary)


def _sweeps(program: list[Stage]) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = [[]]
    for i, stage in enumerate(program):
        measures = not stage.tree_wide and stage.rule.scope != "none"
        if groups[-1] and (measures or stage.tree_wide or program[i - 1].tree_wide):
            groups.append([])
        groups[-1].append(stage.rule.name)
        if measures and len(groups[-1]) == 1 and (i == 0 or program[i - 1].tree_wide):
            groups.append([])
    return tuple(tuple(group) for group in groups if group)
