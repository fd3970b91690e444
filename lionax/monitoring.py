"""What a transformation costs, told before it runs."""

import dataclasses
from typing import Any

import jax

from lionax.layout import Layout, Leaves, sweeps
from lionax.transformation import Transformation

__all__ = ["Plan", "plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a transformation runs over a parameter tree; made by `plan`. It prints as a table."""

    sweeps: tuple[tuple[str, ...], ...]  # names of the rules that run together, in order
    state_bytes: int  # of all arrays in the state
    parameters: int  # number of elements

    def __str__(self) -> str:
        rows = [f"sweep {i}: {', '.join(names)}" for i, names in enumerate(self.sweeps, 1)]
        each = f" ({self.state_bytes / self.parameters:.2f} per parameter)" if self.parameters else ""
        return "\n".join([*rows, f"state: {self.state_bytes:,} bytes{each}"])


def plan(tx: Transformation, params: Any) -> Plan:
    """How a transformation will run: which rules share a sweep over memory, and how much state they keep.

    Args:
      tx: a lionax transformation.
      params: the parameters, or their shapes (``jax.eval_shape``); nothing is computed.

    Raises:
      TypeError: if ``tx`` is not lionax's.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3))
    >>> print(lionax.plan(tx, {"w": jnp.zeros((3, 4))}))
    sweep 1: clip_by_global_norm, scale_by_lion, add_decayed_weights, scale_by_learning_rate
    state: 57 bytes (4.75 per parameter)
    """
    if not isinstance(tx, Transformation):
        raise TypeError(f"plan: {tx!r} is not a lionax transformation; wrap an Optax one in lionax.chain(...)")
    leaves = Leaves.of(params, params)
    program = Layout.of(tx.definition, leaves).stages
    state = jax.eval_shape(tx.init, params)
    return Plan(sweeps=tuple(tuple(program[i].rule.name for i in group) for group in sweeps(program)),
                state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                parameters=sum(leaf.size for leaf, here in zip(leaves.values, leaves.present, strict=True) if here))
