"""Laws, searched for counterexamples."""

import cases
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis.extra import numpy as hnp

import lionax

# Multiples of 1/8 and factors that are powers of two keep float32 exact, so that laws hold to the
# last bit.
DYADIC = st.integers(-64, 64).map(lambda n: n / 8)
ARRAYS = hnp.arrays(np.float32, (3, 2), elements=DYADIC)
POWERS = st.integers(-20, 20).map(lambda k: 2.0**k)
PARTS = st.sampled_from([
    lionax.scale(0.5),
    lionax.clip(2.0),
    lionax.scale_by_lion(0.5, 0.75),
    lionax.trace(0.5),
    lionax.identity(),
    lionax.clip_by_global_norm(1.0),
    lionax.add_decayed_weights(0.25),
    lionax.scale_by_trust_ratio(),
    lionax.sgd(0.5, 0.5),
    lionax.named_chain(("a", lionax.clip(1.0)), ("b", lionax.scale(2.0))),
    lionax.ema(0.5)
])


def run(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        params, state = tx.step(params, state, g)
    return params


@pytest.mark.slow
@given(PARTS, PARTS, PARTS, ARRAYS, ARRAYS)
def test_chain_is_associative_and_identity_is_neutral(a, b, c, p, g):
    left, right = lionax.chain(lionax.chain(a, b), c), lionax.chain(a, lionax.chain(b, c))
    assert left == right
    assert hash(left) == hash(right)
    identity = lionax.identity()
    assert lionax.chain(a, identity) == lionax.chain(identity, a) == lionax.chain(a) == a
    np.testing.assert_array_equal(run(left, jnp.asarray(p), [g, g]),
                                  run(right, jnp.asarray(p), [g, g]))


@given(PARTS, PARTS, ARRAYS, ARRAYS)
def test_chain_is_composition(a, b, p, g):
    both, _ = lionax.chain(a, b).update(jnp.asarray(g),
                                        lionax.chain(a, b).init(jnp.asarray(p)), jnp.asarray(p))
    first, _ = a.update(jnp.asarray(g), a.init(jnp.asarray(p)), jnp.asarray(p))
    second, _ = b.update(first, b.init(jnp.asarray(p)), jnp.asarray(p))
    np.testing.assert_array_equal(both, second)


@given(st.dictionaries(st.sampled_from("abcdef"), st.booleans(), min_size=1), ARRAYS, ARRAYS)
def test_masks_partition(mask, p, g):
    params = {name: jnp.asarray(p) for name in mask}
    grads = {name: jnp.asarray(g) for name in mask}
    opposite = {name: not chosen for name, chosen in mask.items()}
    lion, sgd = lionax.lion(0.5, 0.5, 0.75, weight_decay=0.0), lionax.sgd(0.25)
    by_masks = lionax.chain(lionax.masked(lion, mask), lionax.masked(sgd, opposite))
    labels = {name: "lion" if chosen else "sgd" for name, chosen in mask.items()}
    by_labels = lionax.partition({"lion": lion, "sgd": sgd}, labels)
    cases.assert_equal(run(by_masks, params, [grads] * 2), run(by_labels, params, [grads] * 2))
    alone = {
        name: run(lion if chosen else sgd, jnp.asarray(p), [jnp.asarray(g)] * 2)
        for name, chosen in mask.items()
    }
    cases.assert_equal(run(by_labels, params, [grads] * 2), alone)


@given(ARRAYS, ARRAYS, POWERS)
def test_lion_does_not_see_the_scale_of_the_gradient(p, g, factor):
    tx = lionax.lion(0.5, 0.5, 0.75)
    grads = [g, g / 2, -g]
    np.testing.assert_array_equal(run(tx, jnp.asarray(p), grads),
                                  run(tx, jnp.asarray(p), [factor * g for g in grads]))


@given(ARRAYS, ARRAYS, POWERS, POWERS)
def test_trust_ratio_follows_the_scale_of_the_parameter_only(p, g, factor, other):
    assume(np.any(p) and np.any(g))
    tx = lionax.scale_by_trust_ratio()
    state = tx.init(jnp.asarray(p))
    once, _ = tx.update(jnp.asarray(g), state, jnp.asarray(p))
    scaled, _ = tx.update(jnp.asarray(other * g, jnp.float32), state,
                          jnp.asarray(factor * p, jnp.float32))
    np.testing.assert_allclose(scaled, factor * once, rtol=1e-6)


@pytest.mark.slow
@given(ARRAYS, st.floats(0.0625, 128.0, width=32))
def test_a_clipped_norm_is_at_most_the_limit(g, limit):
    for tx in (lionax.clip_by_global_norm(limit), lionax.clip_by_norm(limit)):
        clipped, _ = tx.update(jnp.asarray(g), tx.init(jnp.asarray(g)))
        assert np.linalg.norm(np.asarray(clipped).astype(np.float64)) <= limit * (1 + 1e-6)
        if np.linalg.norm(g) < limit * (1 - 1e-6):
            np.testing.assert_array_equal(clipped, g)


@pytest.mark.slow
@given(PARTS, ARRAYS, ARRAYS)
def test_jit_is_eager(tx, p, g):
    p, g = jnp.asarray(p), jnp.asarray(g)
    state = tx.init(p)
    cases.assert_close(jax.jit(tx.step)(p, state, g), tx.step(p, state, g), rtol=1e-6)


@given(PARTS, ARRAYS, ARRAYS)
def test_step_is_update_and_apply_updates(tx, p, g):
    p, g = jnp.asarray(p), jnp.asarray(g)
    state = tx.init(p)
    updates, new = tx.update(g, state, p)
    cases.assert_equal(tx.step(p, state, g), (lionax.apply_updates(p, updates), new))


@given(PARTS, ARRAYS, ARRAYS, st.permutations("abc"))
def test_permuting_leaves_permutes_results(tx, p, g, order):
    leaves = {name: jnp.asarray(p) * (i + 1) for i, name in enumerate("abc")}
    grads = {name: jnp.asarray(g) * (i - 1) for i, name in enumerate("abc")}
    turned = run(tx, {order[i]: leaves[n] for i, n in enumerate("abc")},
                 [{order[i]: grads[n] for i, n in enumerate("abc")}])
    straight = run(tx, leaves, [grads])
    cases.assert_close({n: turned[order[i]] for i, n in enumerate("abc")}, straight, rtol=1e-6)
