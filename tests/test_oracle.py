"""Each transformation against its equation, written out in NumPy with float64."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lionax

# The rounding of the result.
DTYPES = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 1e-14}
# A schedule of a count in int32 is in float32.
SCHEDULED = ("add_decayed_weights_schedule", "scale_by_learning_rate", "scale_by_schedule")


class Lion:
    def __init__(self, b1=0.9, b2=0.99):
        self.b1, self.b2, self.m = b1, b2, 0.0

    def __call__(self, g, p, t):
        u = np.sign(self.b1 * self.m + (1 - self.b1) * g)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return u


class Adam:
    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False):
        self.b1, self.b2, self.eps, self.eps_root, self.nesterov = b1, b2, eps, eps_root, nesterov
        self.m = self.v = 0.0

    def __call__(self, g, p, t):
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m = self.m / (1 - self.b1**t)
        if self.nesterov:
            m = self.b1 * self.m / (1 - self.b1 ** (t + 1)) + (1 - self.b1) * g / (1 - self.b1**t)
        return m / (np.sqrt(self.v / (1 - self.b2**t) + self.eps_root) + self.eps)


class Trace:
    def __init__(self, decay, nesterov=False, dampening=0.0):
        self.decay, self.nesterov, self.dampening, self.sum = decay, nesterov, dampening, 0.0

    def __call__(self, g, p, t):
        self.sum = self.decay * self.sum + (g if t == 1 else (1 - self.dampening) * g)
        return g + self.decay * self.sum if self.nesterov else self.sum


class Ema:
    def __init__(self, decay, debias=True):
        self.decay, self.debias, self.mean = decay, debias, 0.0

    def __call__(self, g, p, t):
        self.mean = self.decay * self.mean + (1 - self.decay) * g
        return self.mean / (1 - self.decay**t) if self.debias else self.mean


def trust_ratio(min_norm=0.0, coefficient=1.0, eps=0.0):
    def apply(g, p, t):
        p_norm, g_norm = max(np.linalg.norm(p), min_norm), max(np.linalg.norm(g), min_norm)
        return g if p_norm == 0 or g_norm == 0 else g * coefficient * p_norm / (g_norm + eps)

    return apply


def clip_norm(limit):
    return lambda g, p, t: g if np.linalg.norm(g) < limit else g * (limit / np.linalg.norm(g))


def rate(t):
    return 0.05 + (0.01 - 0.05) * min(t - 1, 30) / 30


ORACLES = {
    "scale_by_lion": (lionax.scale_by_lion, Lion),
    "scale_by_lion_betas": (lambda: lionax.scale_by_lion(0.5, 0.75), lambda: Lion(0.5, 0.75)),
    "scale_by_adam": (lionax.scale_by_adam, Adam),
    "scale_by_adam_options": (lambda: lionax.scale_by_adam(0.8, 0.95, 1e-3, 1e-3, nesterov=True),
                              lambda: Adam(0.8, 0.95, 1e-3, 1e-3, nesterov=True)),
    "trace": (lambda: lionax.trace(0.9), lambda: Trace(0.9)),
    "trace_nesterov": (lambda: lionax.trace(0.9, nesterov=True), lambda: Trace(0.9, nesterov=True)),
    "trace_dampening": (lambda: lionax.trace(0.9, dampening=0.25),
                        lambda: Trace(0.9, dampening=0.25)),
    "ema": (lambda: lionax.ema(0.9), lambda: Ema(0.9)),
    "ema_plain": (lambda: lionax.ema(0.9, debias=False), lambda: Ema(0.9, debias=False)),
    "scale_by_trust_ratio": (lionax.scale_by_trust_ratio, trust_ratio),
    "scale_by_trust_ratio_options": (lambda: lionax.scale_by_trust_ratio(20.0, 0.5, 0.1),
                                     lambda: trust_ratio(20.0, 0.5, 0.1)),
    "add_decayed_weights": (lambda: lionax.add_decayed_weights(0.1),
                            lambda: lambda g, p, t: g + 0.1 * p),
    "add_decayed_weights_schedule": (lambda: lionax.add_decayed_weights(cases.SCHEDULE),
                                     lambda: lambda g, p, t: g + rate(t) * p),
    "add_decayed_weights_base": (lambda: lionax.add_decayed_weights(0.1, base_learning_rate=0.5),
                                 lambda: lambda g, p, t: g + 0.2 * p),
    "clip": (lambda: lionax.clip(0.5), lambda: lambda g, p, t: np.clip(g, -0.5, 0.5)),
    "clip_by_norm": (lambda: lionax.clip_by_norm(2.0), lambda: clip_norm(2.0)),
    "clip_by_global_norm": (lambda: lionax.clip_by_global_norm(2.0), lambda: clip_norm(2.0)),
    "scale": (lambda: lionax.scale(-0.3), lambda: lambda g, p, t: -0.3 * g),
    "scale_by_learning_rate": (lambda: lionax.scale_by_learning_rate(cases.SCHEDULE),
                               lambda: lambda g, p, t: -rate(t) * g),
    "scale_by_schedule": (lambda: lionax.scale_by_schedule(cases.SCHEDULE),
                          lambda: lambda g, p, t: rate(t) * g),
    "identity": (lionax.identity, lambda: lambda g, p, t: g),
    "set_to_zero": (lionax.set_to_zero, lambda: lambda g, p, t: 0 * g),
}


@pytest.fixture
def x64(dtype):
    """Float64 for the tests that need it."""
    with jax.enable_x64(dtype == "float64"):
        yield


@pytest.mark.promise("Exact", "A primitive is its equation in NumPy's float64, but for a rounding")
@pytest.mark.parametrize("dtype", cases.but_for_slow(DTYPES, ["float16", "float64"]))
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.usefixtures("x64")
def test_primitive(name, dtype, figure):
    make, oracle = ORACLES[name]
    tx, expect = make(), oracle()
    # The state is at least in float32: the oracle rounds nothing, so what is tested is one rounding
    # of the update.
    state = tx.init(jnp.zeros((17, 3), jnp.float64 if dtype == "float64" else jnp.float32))
    update = jax.jit(tx.update)
    for t in range(1, 13):
        p = cases.normal(17, 3, seed=100 + t, dtype=dtype)
        g = cases.normal(17, 3, seed=t, dtype=dtype)
        actual, state = update(g, state, p)
        expected = expect(np.asarray(g).astype(np.float64), np.asarray(p).astype(np.float64), t)
        assert actual.dtype == dtype
        # 1 - 0.999 has five digits in float32; lionax corrects the bias there with Optax's numbers.
        rounding = max(DTYPES[dtype], 1e-5 if name == "scale_by_adam" and dtype != "float64" else 0)
        rounding = max(rounding, 1e-7 if name in SCHEDULED else 0)
        atol = rounding * np.max(np.abs(expected))
        actual = np.asarray(actual).astype(np.float64)
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=atol)
        scale = np.max(np.abs(expected)) or 1.0
        figure(f"largest error in {dtype}", float(np.max(np.abs(actual - expected)) / scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_params_ema(dtype):
    tx = lionax.chain(lionax.sgd(0.5), lionax.params_ema(0.9, overwrite_every=4))
    params = cases.normal(5, 2, dtype=dtype)
    state, average = tx.init(params), np.asarray(params).astype(np.float64)
    for t in range(1, 10):
        before = np.asarray(params).astype(np.float64)
        g = cases.normal(5, 2, seed=t, dtype=dtype)
        params, state = tx.step(params, state, g)
        new = before - 0.5 * np.asarray(g).astype(np.float64)
        average = 0.9 * average + 0.1 * new
        expected = average if t % 4 == 0 else new
        np.testing.assert_allclose(lionax.averaged_params(state), average,
                                   atol=3e-6 if dtype == "float32" else 1e-4)
        np.testing.assert_allclose(
            np.asarray(params).astype(np.float64), expected, rtol=DTYPES[dtype], atol=1e-5)
    assert lionax.averaged_params(state).dtype == jnp.float32


def test_lamb_by_hand():
    p, g = np.array([3.0, 4.0]), np.array([1.0, -2.0])
    tx = lionax.lamb(0.1, weight_decay=0.01)
    adam = g / (np.abs(g) + 1e-6) + 0.01 * p
    expected = p - 0.1 * np.linalg.norm(p) / np.linalg.norm(adam) * adam
    actual, _ = tx.step(jnp.asarray(p, jnp.float32), tx.init(jnp.zeros(2)),
                        jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_decoupled_decay_follows_the_schedule_alone():
    """Loshchilov and Hutter: p ← p - η_t·(α·u + wd·p), where lr_t = α·η_t."""
    alpha, decay, p = 0.05, 0.1, 2.0
    for tx in (lionax.lion(cases.SCHEDULE, weight_decay=decay, base_learning_rate=alpha),
               lionax.lamb(cases.SCHEDULE, weight_decay=decay, base_learning_rate=alpha),
               lionax.sgd(cases.SCHEDULE, 0.9, weight_decay=decay, base_learning_rate=alpha)):
        params = jnp.float32(p)
        state = tx.init(params)
        for t in range(1, 4):
            before = float(params)
            params, state = tx.step(params, state, jnp.float32(0.0))
            assert float(params) == pytest.approx(before - rate(t) / alpha * decay * before,
                                                  rel=1e-6)
