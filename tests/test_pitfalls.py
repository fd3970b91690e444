"""What goes wrong in Optax, and what lionax does instead."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax

pytestmark = pytest.mark.usefixtures("standard_promotion")


def last_update(tx, params, grads, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
    return updates


def test_weight_decay_acts_in_bfloat16():
    """Beside a sign of 1 a decay of 0.002 is below bfloat16's last digit. On average it shows."""
    params = jnp.full(2, 2.0, jnp.bfloat16)
    rates = np.linspace(1e-3, 2e-3, 400)

    def decay(tx):
        steps = jax.vmap(lambda rate: tx(rate).update(params,
                                                      tx(rate).init(params), params)[0][0])(
                                                          jnp.asarray(rates, jnp.float32))
        return np.mean(np.asarray(steps).astype(np.float64) / -rates) - 1.0

    assert decay(lambda rate: lionax.lion(rate, weight_decay=1e-3)) == pytest.approx(2e-3, rel=0.2)
    assert abs(decay(lambda rate: optax.lion(rate, weight_decay=1e-3))) < 4e-4


def test_decay_reaches_bfloat16_parameters_through_step():
    """A parameter decays with its own decimals, even where the update is below its last digit."""
    params = {"w": jnp.full(4, 256.0, jnp.bfloat16)}
    tx = lionax.lion(1.0, weight_decay=0.01)
    new, _ = tx.step(params, tx.init(params), {"w": jnp.ones(4, jnp.bfloat16)})
    assert float(new["w"][0]) == float(jnp.bfloat16(256.0 - 1.0 - 2.56))


def test_scalars_of_any_kind_with_bfloat16_gradients():
    grads = jnp.full(4, 2.0, jnp.bfloat16)
    for limit in (1.0, np.float32(1.0), np.float64(1.0), jnp.float32(1.0)):
        assert last_update(lionax.clip_by_global_norm(limit), grads, grads).dtype == jnp.bfloat16
        for rate in (limit, lambda step, limit=limit: limit):
            update = last_update(lionax.lion(rate, weight_decay=0.1), grads, grads)
            assert update.dtype == jnp.bfloat16
    assert last_update(optax.scale(np.float32(1.0)), grads,
                       grads).dtype != last_update(optax.scale(1.0), grads, grads).dtype
    with jax.enable_x64(True):
        assert last_update(lionax.lion(np.float64(0.1)), jnp.ones(2, jnp.float32),
                           jnp.ones(2, jnp.float32)).dtype == jnp.float32


def test_infinite_gradients_are_not_silent():
    """As `clip_by_global_norm` says: the infinite element is NaN, the others 0, as in Optax."""
    grads = {"a": jnp.array([jnp.inf, 1.0]), "b": jnp.ones(2)}
    updates = last_update(lionax.clip_by_global_norm(1.0), grads, grads)
    assert np.isnan(updates["a"][0])
    assert updates["b"].tolist() == [0.0, 0.0]
    poisoned = last_update(lionax.clip_by_global_norm(1.0), grads,
                           {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)})
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(poisoned))


def test_zero_initialised_bias_under_lamb():
    """The paper's rule: a first step of lr, then steps in proportion to the small norm."""
    def sizes(tx):
        params = {"bias": jnp.zeros(4)}
        state, moves = tx.init(params), []
        for _ in range(2):
            updates, state = tx.update({"bias": jnp.ones(4)}, state, params)
            new = optax.apply_updates(params, updates)
            moves.append(float(jnp.abs(new["bias"] - params["bias"])[0]))
            params = new
        return moves

    assert sizes(lionax.lamb(0.01)) == pytest.approx([0.01, 1e-4], rel=1e-3)
    assert sizes(optax.lamb(0.01)) == pytest.approx([0.01, 1e-4], rel=1e-3)
    masked = lionax.lamb(0.01, trust_mask=lionax.not_matching("bias"))
    assert sizes(masked) == pytest.approx([0.01, 0.01], rel=1e-3)
    bounded = lionax.chain(lionax.scale_by_adam(), lionax.scale_by_trust_ratio(min_norm=1.0),
                           lionax.scale_by_learning_rate(0.01))
    assert sizes(bounded)[1] > 4e-3


def test_state_dtypes_are_fixed():
    half = jnp.ones(4, jnp.bfloat16)
    tx = lionax.lion(1e-3, b1=lionax.inject(0.9), b2=lionax.inject(0.999))
    state = tx.init(half)
    _, new = tx.update(half, state, half)
    assert new.rules[0].mu.dtype == state.rules[0].mu.dtype == jnp.bfloat16
    assert float(lionax.get_hyperparams(new)["b2"]) == pytest.approx(
        0.999)  # not rounded to 1, as bfloat16 would
    assert jnp.bfloat16(0.999) == 1.0
    assert np.all(np.isfinite(np.asarray(last_update(tx, half, half, 3)).astype(np.float32)))


def test_shapes_are_not_broadcast():
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.ones((3, 1))}
    assert last_update(optax.add_decayed_weights(0.1), params, grads)["w"].shape == (3, 2)
    with pytest.raises(ValueError, match="'w' has shape"):
        last_update(lionax.add_decayed_weights(0.1), params, grads)


def test_an_integer_leaf_is_refused():
    assert optax.apply_updates(jnp.array([1, 2]),
                               last_update(optax.sgd(0.5), jnp.array([1, 2]),
                                           jnp.array([1, 2]))).tolist() == [0, 1]
    with pytest.raises(TypeError, match="dtype int32"):
        lionax.sgd(0.5).init(jnp.array([1, 2]))


def test_a_masked_optimizer_passes_the_raw_gradient_and_partition_freezes():
    params, mask = {"w": jnp.ones(2), "b": jnp.ones(2)}, {"w": True, "b": False}
    assert last_update(lionax.masked(lionax.lion(0.1), mask), params,
                       params)["b"].tolist() == [1.0, 1.0]
    frozen = lionax.partition({"on": lionax.lion(0.1), "off": lionax.set_to_zero()},
                              {"w": "on", "b": "off"})
    assert last_update(frozen, params, params)["b"].tolist() == [0.0, 0.0]


def test_decay_schedule_and_mask_in_bfloat16_give_one_dtype():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    mask = {"w": True, "b": False}
    for lion, dtypes in ((lionax.lion, 1), (optax.lion, 2)):
        updates = last_update(lion(1e-3, weight_decay=cases.SCHEDULE, mask=mask), params, params)
        assert len({leaf.dtype for leaf in jax.tree.leaves(updates)}) == dtypes


def test_ema_of_ones_in_bfloat16():
    ones = jnp.ones(2, jnp.bfloat16)

    def run(tx):
        return jax.lax.scan(lambda state, _: (tx.update(ones, state)[1], tx.update(ones, state)[0]),
                            tx.init(ones), None, length=3000)

    state, outputs = run(lionax.ema(0.999))
    assert float(outputs[-1][0]) == pytest.approx(1.0, abs=0.01)
    assert float(state.rules.ema[0]) == pytest.approx(1 - 0.999**3000, abs=0.01)
    theirs, _ = run(optax.ema(0.999))
    assert float(theirs.ema[0]) < 0.6


def test_an_injected_value_needs_no_retrace():
    tx, traces = lionax.lion(lionax.inject(0.1)), []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        return tx.step(params, state, grads)

    params = jnp.ones(2)
    state = tx.init(params)
    for value in (0.1, 0.2, np.float32(0.3)):
        params, state = step(params, lionax.set_hyperparams(state, learning_rate=value), params)
    assert len(traces) == 1


def test_equal_optimizers_are_one_static_argument():
    assert lionax.lion(1e-3) == lionax.lion(1e-3)
    assert optax.lion(1e-3) != optax.lion(1e-3)


def test_the_learning_rate_may_become_a_schedule_and_a_mask_be_added():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    variants = [((0.1,), {}), ((cases.SCHEDULE,), {}), ((0.1,), {"mask": {"w": True, "b": False}})]
    ours = {
        jax.tree.structure(lionax.lion(*args, **kwargs).init(params)) for args, kwargs in variants
    }
    theirs = {
        jax.tree.structure(optax.lion(*args, **kwargs).init(params)) for args, kwargs in variants
    }
    assert len(ours) == 1
    assert len(theirs) == 3


def test_callable_pytrees_are_not_called():
    class Labels(dict):
        def __call__(self, params):
            raise AssertionError("called")

    jax.tree_util.register_pytree_node(Labels, lambda labels:
                                       (list(labels.values()), tuple(labels)),
                                       lambda keys, values: Labels(zip(keys, values, strict=True)))
    params = Labels(w=jnp.ones(2))
    new, _ = (tx := lionax.partition({"a": lionax.sgd(1.0)},
                                     Labels(w="a"))).step(params, tx.init(params), params)
    assert new["w"].tolist() == [0.0, 0.0]
    with pytest.raises(AssertionError, match="called"):
        optax.partition({"a": optax.sgd(1.0)}, Labels(w="a")).init(params)


def test_lamb_keeps_moments_in_the_dtypes_asked_for():
    tx = lionax.lamb(0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16)
    adam = tx.init(jnp.ones(2)).rules[0]
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.float16)
