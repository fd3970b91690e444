"""What a transformation costs, told before it runs."""

import dataclasses
from typing import Any

import jax

from lionax.layout import Layout, Leaves, Stage
from lionax.transformation import Transformation

__all__ = ["Plan", "plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a transformation runs over a parameter tree; made by `plan`. It prints as a table."""

    sweeps: tuple[tuple[str, ...], ...]  # names of the rules between two measurements, in order
    state_bytes: int  # of all arrays in the state
    parameters: int  # number of elements

    def __str__(self) -> str:
        rows = [f"sweep {i}: {', '.join(names)}" for i, names in enumerate(self.sweeps, 1)]
        each = f" ({self.state_bytes / self.parameters:.2f} per parameter)" if self.parameters else ""
        return "\n".join([*rows, f"state: {self.state_bytes:,} bytes{each}"])


def plan(tx: Transformation, params: Any) -> Plan:
    """How a transformation will run: which rules share a sweep over memory, and how much state they keep.

    A sweep ends where a norm must be known before the next rule can act. A rule that measures before any other has run
    has a sweep to itself, in which the gradients are only read.

    Args:
      tx: a lionax transformation.
      params: the parameters, or their shapes (``jax.eval_shape``); nothing is computed.

    Raises:
      TypeError: if ``tx`` is not lionax's.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    >>> print(lionax.plan(tx, {"w": jnp.zeros((3, 4))}))
    sweep 1: clip_by_global_norm
    sweep 2: scale_by_lion, add_decayed_weights, scale_by_learning_rate
    state: 57 bytes (4.75 per parameter)
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"plan: {tx!r} is not a lionax transformation; wrap an Optax one in lionax.chain(...)")
    leaves = Leaves.of(params, params)
    program = Layout.of(tx.definition, leaves).stages
    state = jax.eval_shape(tx.init, params)
    return Plan(sweeps=_sweeps(program),
                state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                parameters=sum(leaf.size for leaf, here in zip(leaves.values, leaves.present, strict=True) if here))


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
