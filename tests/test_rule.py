"""Rules of one's own."""

import dataclasses
import json
import pathlib
import pickle
import re
import sys
import types
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lionax


class FactoredState(NamedTuple):
    rows: Any
    seen: Any


@dataclasses.dataclass(frozen=True)
class Factored(lionax.Rule):
    """Slots of another shape and kind than the parameter's."""

    decay: float = lionax.scalar(0.5, low=0, high=1)

    def init(self, param):
        return FactoredState(jnp.zeros(param.shape[:1], jnp.bfloat16), jnp.zeros((), jnp.int32))

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


DOCUMENT = (pathlib.Path(__file__).parent.parent / "docs" / "rules.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture(scope="module")
def documented():
    """The names that the page defines, in a module, so that its classes pickle."""
    module = types.ModuleType("documented_rule")
    sys.modules[module.__name__] = module
    for block in BLOCKS:
        exec(compile(block, "docs/rules.md", "exec"), vars(module))
    return module


def test_momentum_from_scratch_is_short_and_public(documented):
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code[code.index("class MomentumState(NamedTuple):"):-1]) <= 15
    assert set(re.findall(r"lionax\.(\w+)", "".join(BLOCKS))) <= set(lionax.__all__)


def test_it_is_trace(documented):
    ours, theirs = documented.momentum, lionax.trace(0.9)
    grads = cases.gradients(cases.TREES["nested"](), 1)
    for update in (lambda tx: tx.update, lambda tx: jax.jit(tx.update)):
        a, b = ours.init(grads), theirs.init(grads)
        for _ in range(3):
            (u, a), (v, b) = update(ours)(grads, a), update(theirs)(grads, b)
            cases.assert_close(u, v)


def test_it_pickles_masks_and_goes_through_config(documented):
    assert pickle.loads(pickle.dumps(documented.sgd)) == documented.sgd
    config = json.loads(json.dumps(lionax.to_config(documented.sgd)))
    assert lionax.from_config(config) == documented.sgd
    params = {"w": jnp.ones(3), "b": jnp.ones(3)}
    tx = documented.frozen
    new, _ = jax.jit(tx.step)(params, tx.init(params), params)
    assert new["b"].tolist() == [1.0] * 3
    assert new["w"][0] < 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_stores_in_low_precision(documented, dtype):
    tx = lionax.Transformation.of(documented.Momentum(0.5, m_dtype=dtype))
    params = {"w": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    assert state.rules.m["w"].dtype == dtype
    with pytest.raises(ValueError, match="momentum: m_dtype='int16' is not accepted"):
        documented.Momentum(m_dtype="int16")


def test_it_works_on_a_mesh_and_with_schedules_and_injected_values(documented):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.ones((8, 2)), rows)}
    for decay in (0.5, lambda step: 0.5, lionax.inject(0.5)):
        tx = lionax.Transformation.of(documented.Momentum(decay))
        updates, state = jax.jit(tx.update)(params, tx.init(params))
        updates, _ = jax.jit(tx.update)(params, state)
        np.testing.assert_array_equal(updates["w"], 1.5)
        assert updates["w"].sharding.spec == rows.spec


def test_rules_that_cannot_be_registered():
    class NoDataclass(lionax.Rule):
        pass

    for bad in (NoDataclass, dict, 3):
        with pytest.raises(TypeError, match=r"register_rule: .* is not a frozen dataclass"):
            lionax.register_rule(bad)

    @dataclasses.dataclass(frozen=True)
    class Clip(lionax.Rule):
        pass

    with pytest.raises(ValueError, match="Clip is the name of a rule of lionax"):
        lionax.register_rule(Clip)


def test_scalars_of_a_rule_are_checked(documented):
    with pytest.raises(ValueError, match=r"momentum: decay=2\.0 is not accepted; give a number in"):
        documented.Momentum(2.0)
    assert documented.Momentum(0.5) == documented.Momentum(jnp.float32(0.5))
