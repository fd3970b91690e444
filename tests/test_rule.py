"""Rules of one's own."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lionax
from lionax.core import storage
from lionax.core.hyperparameters import scalar


class FactoredState(NamedTuple):
    rows: Any
    seen: Any


@dataclasses.dataclass(frozen=True)
class Factored(lionax.Rule):
    """Slots of another shape and kind than the parameter's."""

    decay: float = scalar(0.5, low=0, high=1)

    def init(self, param):
        return FactoredState(rows=jnp.zeros(param.shape[:1], jnp.bfloat16), seen=jnp.zeros((), jnp.int32))

    def apply(self, update, slots, param, step):
        assert slots.rows.dtype == update.dtype == jnp.float32
        assert slots.seen.dtype == jnp.int32
        rows = self.decay * slots.rows + update.sum(axis=1)
        return update * rows[:, None], FactoredState(rows, slots.seen + 1)


def test_slots_may_have_other_shapes_and_kinds():
    tx = lionax.chain(lionax.Transformation.of(Factored()), lionax.scale(-1.0))
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 1), jnp.bfloat16)}
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    np.testing.assert_array_equal(updates["a"], -3.0)
    assert state.rules[0].rows["b"].shape == (4,)
    assert state.rules[0].rows["b"].dtype == jnp.bfloat16
    assert int(state.rules[0].seen["a"]) == 1
    with pytest.raises(ValueError, match="factored: the gradient of 'a' has shape"):
        tx.update({"a": jnp.ones((5, 3)), "b": params["b"]}, state)


def test_the_momentum_of_the_docstring():
    class MomentumState(NamedTuple):
        m: Any

    @dataclasses.dataclass(frozen=True)
    class Momentum(lionax.Rule):
        decay: float = scalar(0.9, low=0, high=1)

        def init(self, param):
            return MomentumState(m=storage.zero_slot(param))

        def apply(self, update, slots, param, step):
            m = self.decay * slots.m + update
            return m, MomentumState(m=m)

    ours, theirs = lionax.Transformation.of(Momentum(0.75)), lionax.trace(0.75)
    g = jnp.array([1.0, -2.0])
    a, b = ours.init(g), theirs.init(g)
    for _ in range(3):
        (u, a), (v, b) = ours.update(g, a), theirs.update(g, b)
        np.testing.assert_array_equal(u, v)
    with pytest.raises(ValueError, match=r"momentum: decay=2\.0 is not accepted"):
        Momentum(2.0)
    assert lionax.Transformation.of(Momentum(0.5)) == lionax.Transformation.of(Momentum(jnp.float32(0.5)))
