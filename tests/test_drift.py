"""Averages over a million steps of a stationary stream: they stay where they belong.

A stream is uniform noise around a center. What a state keeps of it is compared with what it is in
the mean, over the first and the last tenth of the run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import sized

import lionax
from lionax.core.quantized import is_quantized
from lionax.core.rounding import as_uniform, key_of, random_bits

STEPS = sized(10_000, 1_000_000)
CENTER = jnp.linspace(-1.0, 1.0, 4096)  # the smallest leaf that is kept in codes
SQUARE = CENTER**2 + 0.25 / 12
DECAY = 0.99
SECTION = "Long runs"


def stream(center, step):
    """The center and noise in [-0.25, 0.25)."""
    noise = as_uniform(random_bits(key_of(7, step), center))
    return center + 0.5 * (noise - 0.5)


def errors(one, read, carry, truth):
    """The mean error of each element, and of all the root of the mean square: [10, n] and [10]."""

    def body(start):
        def step(sums, i):
            carry, total, squares = sums
            carry = one(carry, start + i)
            error = read(carry).astype(jnp.float32) - truth
            return (carry, total + error, squares + jnp.mean(error**2)), None

        return step

    @jax.jit
    def tenth(carry, start):
        sums = carry, jnp.zeros_like(truth), jnp.zeros(())
        return jax.lax.scan(body(start), sums, jnp.arange(STEPS // 10))[0]

    carry = tenth(carry, jnp.int32(STEPS))[0]  # the first settles
    found = []
    for start in range(0, STEPS, STEPS // 10):
        carry, total, squares = tenth(carry, jnp.int32(start))
        found.append((np.asarray(total) / (STEPS // 10), float(squares) / (STEPS // 10)))
    means, squares = zip(*found, strict=True)
    return np.array(means), np.sqrt(squares)


def check(means, spread, figure, bias=1e-5, memory=1 / (1 - DECAY)):
    """Bounds the mean error of a tenth by four standard errors and a bias; so the spread's change.

    An average over so many steps has so few independent values in a tenth.
    """
    share = np.sqrt(memory / (STEPS // 10 * means.shape[1]))
    signs = np.sign(np.asarray(CENTER[-means.shape[1]:]))  # what shrinks is not what shifts
    error = max(np.abs(means.mean(1)).max(), np.abs((means * signs).mean(1)).max())
    change = np.abs(spread / spread[0] - 1).max()
    assert error <= 4 * np.sqrt(2) * share * spread[0] + bias
    assert change <= 4 * share + 0.01
    figure("steps", STEPS)
    figure("largest error of the mean", float(error))
    figure("largest change of the spread", float(change))


def updated(tx):
    def one(state, step):
        return tx.update(stream(CENTER, step), state)[1]

    return one, tx.init(CENTER)


@pytest.mark.slow
@pytest.mark.promise(SECTION, "An average in float32, bfloat16, int8 or int4 stays at the mean, to "
                     "four standard errors.")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_averages(dtype, figure):
    one, state = updated(lionax.ema(DECAY, debias=False, accumulator_dtype=dtype))
    check(*errors(one, lambda state: load(state.rules.ema), state, CENTER), figure)


@pytest.mark.slow
@pytest.mark.promise(SECTION, "A mean square in bfloat16, int8 or int4 stays at the mean, to four "
                     "standard errors.")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_mean_squares(dtype, figure):
    one, state = updated(lionax.scale_by_adam(DECAY, DECAY, nu_dtype=dtype))
    check(*errors(one, lambda state: load(state.rules.nu), state, SQUARE), figure)


@pytest.mark.slow
@pytest.mark.promise(SECTION, "The average of parameters stays at their mean.")
def test_average_of_parameters(figure):
    decay, params = sized(DECAY, 0.9999), CENTER[-64:]
    tx = lionax.params_ema(decay)

    def one(state, step):
        return tx.update(stream(params, step) - params, state, params)[1]

    found = errors(one, lambda state: state.rules.params_ema, tx.init(params), params)
    check(*found, figure, memory=1 / (1 - decay))


@pytest.mark.slow
@pytest.mark.promise(SECTION, "bfloat16 parameters with master weights stay at their optimum.")
@pytest.mark.parametrize("remainder", [None, "int8", "bfloat16", "float32"])
def test_master_weights(remainder, figure):
    target, tx = CENTER[-64:], lionax.master_weights(lionax.sgd(1 - DECAY), remainder)

    def one(carry, step):
        return tx.step(*carry, carry[0].astype(jnp.float32) - stream(target, step))

    params = target.astype(jnp.bfloat16)
    found = errors(one, lambda carry: carry[0], (params, tx.init(params)), target)
    check(*found, figure, bias=1e-5 if remainder is None else 2.0**-9)  # of rounding to nearest


def load(slot):
    """A slot in float32."""
    return slot.decode() if is_quantized(slot) else slot
