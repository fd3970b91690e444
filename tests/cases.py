"""The one table of transformations and trees that every contract test runs over.

A public transformation that is missing from `CASES` and `IN_SHARD_MAP` fails `test_house.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.core.norms import joint_norm

SCHEDULE = optax.linear_schedule(0.05, 0.01, 30)
NEAREST = lionax.Storage("bfloat16", rounding="nearest")  # as Optax rounds


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation to test; `peer` is Optax's, if there is one."""

    public: str  # the public function that it is an example of
    make: Callable[[], lionax.Transformation]
    peer: Callable[[], optax.GradientTransformation] | None = None
    rtol: float = 0.0  # of the trajectory against Optax's in float32; 0 is bit for bit


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, tree)


CASES: dict[str, Case] = {
    "lion": Case("lion", lambda: lionax.lion(0.01), lambda: optax.lion(0.01)),
    "lion_decay": Case("lion", lambda: lionax.lion(0.01, weight_decay=0.1),
                       lambda: optax.lion(0.01, weight_decay=0.1)),
    "lion_betas": Case("lion", lambda: lionax.lion(0.01, 0.95, 0.98),
                       lambda: optax.lion(0.01, 0.95, 0.98)),
    "lion_schedule": Case("lion", lambda: lionax.lion(SCHEDULE, weight_decay=0.1),
                          lambda: optax.lion(SCHEDULE, weight_decay=0.1)),
    "lion_mu_bfloat16": Case("lion", lambda: lionax.lion(0.01, mu_dtype=NEAREST),
                             lambda: optax.lion(0.01, mu_dtype=jnp.bfloat16)),
    "lion_mask": Case("lion", lambda: lionax.lion(0.01, weight_decay=0.1, mask=_matrices),
                      lambda: optax.lion(0.01, weight_decay=0.1, mask=_matrices)),
    "lion_decay_schedule": Case("lion",
                                lambda: lionax.lion(0.01, weight_decay=SCHEDULE, mask=_matrices),
                                lambda: optax.lion(0.01, weight_decay=SCHEDULE, mask=_matrices)),
    "lion_decoupled": Case(
        "lion", lambda: lionax.lion(SCHEDULE, weight_decay=0.1, base_learning_rate=0.05)),
    "lion_injected": Case("lion", lambda: lionax.lion(lionax.inject(0.01), b1=lionax.inject(0.9))),
    "lamb": Case("lamb", lambda: lionax.lamb(0.01), lambda: optax.lamb(0.01), rtol=1e-6),
    "lamb_decay_mask": Case("lamb", lambda: lionax.lamb(SCHEDULE, weight_decay=0.1, mask=_matrices),
                            lambda: optax.lamb(SCHEDULE, weight_decay=0.1, mask=_matrices),
                            rtol=1e-6),
    "lamb_trust_mask": Case(
        "lamb", lambda: lionax.lamb(0.01, weight_decay=0.1, trust_mask=_matrices, mu_dtype=
                                    "bfloat16", nu_dtype="float16")),
    "lamb_decoupled": Case("lamb",
                           lambda: lionax.lamb(0.01, weight_decay=0.1, base_learning_rate=0.01)),
    "lamb_options": Case("lamb", lambda: lionax.lamb(0.01, max_trust_ratio=2.0,
                                                     bias_correction=False)),
    "adam": Case("adam", lambda: lionax.adam(0.01), lambda: optax.adam(0.01), rtol=1e-6),
    "adamw_schedule": Case("adamw", lambda: lionax.adamw(SCHEDULE, weight_decay=0.1, mask=_matrices,
                                                nesterov=True),
                  lambda: optax.adamw(SCHEDULE, weight_decay=0.1, mask=_matrices, nesterov=True),
                  rtol=1e-6),
    "sgd": Case("sgd", lambda: lionax.sgd(0.01), lambda: optax.sgd(0.01)),
    "sgd_momentum": Case("sgd", lambda: lionax.sgd(0.01, 0.9), lambda: optax.sgd(0.01, 0.9)),
    "sgd_nesterov": Case("sgd", lambda: lionax.sgd(SCHEDULE, 0.9, True),
                         lambda: optax.sgd(SCHEDULE, 0.9, True)),
    "sgd_accumulator": Case("sgd", lambda: lionax.sgd(0.01, 0.9, False, NEAREST),
                            lambda: optax.sgd(0.01, 0.9, False, jnp.bfloat16)),
    "sgd_dampening": Case("sgd", lambda: lionax.sgd(0.01, 0.9, dampening=0.3, weight_decay=0.1)),
    "sgdw": Case("sgd", lambda: lionax.sgd(0.01, 0.9, weight_decay=0.1, base_learning_rate=0.01)),
    "scale_by_lion": Case("scale_by_lion", lionax.scale_by_lion, optax.scale_by_lion),
    "scale_by_lion_smooth": Case(
        "scale_by_lion", lambda: lionax.scale_by_lion(mode="smooth", smooth_beta=2.0),
        lambda: optax.scale_by_lion(mode="smooth", smooth_beta=2.0), rtol=1e-6),
    "scale_by_lion_refined": Case("scale_by_lion", lambda: lionax.scale_by_lion(mode="refined"),
                                  lambda: optax.scale_by_lion(mode="refined"), rtol=1e-6),
    "scale_by_adam": Case("scale_by_adam", lionax.scale_by_adam, optax.scale_by_adam, rtol=1e-6),
    "scale_by_adam_nesterov": Case("scale_by_adam",
                                   lambda: lionax.scale_by_adam(eps_root=1e-8, nesterov=True),
                                   lambda: optax.scale_by_adam(eps_root=1e-8, nesterov=True),
                                   rtol=1e-6),
    "trace": Case("trace", lambda: lionax.trace(0.9, nesterov=True),
                  lambda: optax.trace(0.9, nesterov=True)),
    # Optax's correction takes the decay in float32, which is not what it multiplies with.
    "ema": Case("ema", lambda: lionax.ema(0.9), lambda: optax.ema(0.9), rtol=2e-6),
    "ema_plain": Case("ema", lambda: lionax.ema(0.9, debias=False),
                      lambda: optax.ema(0.9, debias=False), rtol=1e-6),
    "scale_by_trust_ratio": Case(
        "scale_by_trust_ratio",
        lambda: lionax.chain(lionax.scale_by_trust_ratio(), lionax.scale(0.1)),
        lambda: optax.chain(optax.scale_by_trust_ratio(), optax.scale(0.1)), rtol=1e-6),
    "scale_by_trust_ratio_options": Case("scale_by_trust_ratio",
                                         lambda: lionax.scale_by_trust_ratio(0.1, 0.5, 1e-3),
                                         lambda: optax.scale_by_trust_ratio(0.1, 0.5, 1e-3),
                                         rtol=1e-6),
    "add_decayed_weights": Case("add_decayed_weights", lambda: lionax.add_decayed_weights(0.1),
                                lambda: optax.add_decayed_weights(0.1)),
    "clip": Case("clip", lambda: lionax.clip(0.5), lambda: optax.clip(0.5)),
    "clip_by_norm": Case("clip_by_norm", lambda: lionax.clip_by_norm(0.5)),
    "clip_by_global_norm": Case("clip_by_global_norm", lambda: lionax.clip_by_global_norm(0.5),
                                lambda: optax.clip_by_global_norm(0.5), rtol=1e-6),
    "scale": Case("scale", lambda: lionax.scale(-0.1), lambda: optax.scale(-0.1)),
    "scale_by_learning_rate": Case("scale_by_learning_rate",
                                   lambda: lionax.scale_by_learning_rate(0.1, flip_sign=False),
                                   lambda: optax.scale_by_learning_rate(0.1, flip_sign=False)),
    "scale_by_schedule": Case("scale_by_schedule", lambda: lionax.scale_by_schedule(SCHEDULE),
                              lambda: optax.scale_by_schedule(SCHEDULE)),
    "params_ema": Case("params_ema", lambda: lionax.chain(lionax.sgd(0.1), lionax.params_ema(0.9))),
    "params_ema_overwrite": Case(
        "params_ema",
        lambda: lionax.chain(lionax.lion(0.1), lionax.params_ema(0.9, overwrite_every=3))),
    "chain": Case(
        "chain",
        lambda: lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lamb(0.01), lionax.clip(0.1)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.01), optax.clip(0.1)),
        rtol=2e-6),
    "chain_foreign": Case(
        "chain", lambda: lionax.chain(lionax.clip(1.0), optax.trace(0.9),
                                      lionax.scale_by_learning_rate(0.1)),
        lambda: optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale_by_learning_rate(0.1))),
    "named_chain": Case(
        "named_chain", lambda: lionax.named_chain(("lion", lionax.scale_by_lion()),
                                                  ("lr", lionax.scale(-0.1))),
        lambda: optax.named_chain(("lion", optax.scale_by_lion()), ("lr", optax.scale(-0.1)))),
    "masked": Case("masked", lambda: lionax.masked(lionax.lion(0.1), _matrices),
                   lambda: optax.masked(optax.lion(0.1), _matrices)),
    "partition": Case(
        "partition",
        lambda: lionax.partition({"a": lionax.lion(0.1), "b": lionax.sgd(0.1, 0.9)}, _labels),
        lambda: optax.partition({"a": optax.lion(0.1), "b": optax.sgd(0.1, 0.9)}, _labels)),
    "accumulate": Case(
        "accumulate", lambda: lionax.accumulate(
            lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)), 2)),
    "skip_nonfinite": Case("skip_nonfinite", lambda: lionax.skip_nonfinite(lionax.lamb(0.1), 3),
                           lambda: optax.apply_if_finite(optax.lamb(0.1), 3), rtol=1e-6),
    "skip_if": Case("skip_if", lambda: lionax.skip_if(lionax.sgd(0.1, 0.9), _is_large)),
    "dynamic_loss_scale": Case("dynamic_loss_scale",
                               lambda: lionax.dynamic_loss_scale(lionax.sgd(0.1, 0.9), 4.0, 3)),
    "monitor": Case("monitor", lambda: lionax.monitor(
        lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(0.1)))),
    "monitor_conditional": Case("monitor", lambda: lionax.monitor(lionax.dynamic_loss_scale(
        lionax.accumulate(lionax.sgd(0.1, 0.9), 2), 4.0, 3), every=3)),
    "master_weights": Case("master_weights", lambda: lionax.master_weights(lionax.lion(0.1))),
    "master_weights_int8": Case("master_weights", lambda: lionax.chain(
        lionax.clip_by_global_norm(1.0), lionax.master_weights(lionax.lamb(0.1), "int8"))),
    "sharded": Case("sharded", lambda: lionax.sharded(lionax.lamb(0.1), jax.P())),
    "unscale": Case("unscale", lambda: lionax.unscale(128.0)),
    "identity": Case("identity", lionax.identity, optax.identity),
    "set_to_zero": Case("set_to_zero", lionax.set_to_zero, optax.set_to_zero),
}

# They need the axis of a `shard_map`: a test file of their own runs them.
IN_SHARD_MAP = {"majority_vote_lion"}


def _is_large(updates: Any, params: Any) -> Any:
    return joint_norm(jax.tree.leaves(updates)) > 100.0


def _labels(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "a" if leaf.ndim >= 2 else "b", tree)


class Pair(NamedTuple):
    """A container of two."""

    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """A container with named fields."""

    kernel: Any
    bias: Any


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape).astype(
        np.float32)).astype(dtype)


TREES: dict[str, Callable[[], Any]] = {
    # Many leaves, few shapes: each shape is compiled once.
    "nested": lambda: {
        "dense": {"kernel": normal(4, 3), "bias": jnp.zeros(3)},
        "embed": [normal(2, 1, 3)], "scale": jnp.asarray(2.0, jnp.float32),
        "pair": Pair(normal(3), Block(normal(4, 3, seed=2), None)),
    },
    "array": lambda: normal(6, 4),
    "scalar": lambda: jnp.asarray(0.5, jnp.float32),
    "empty": lambda: {},
    "none_leaves": lambda: {"a": None, "b": normal(3), "c": [None, normal(2, 2)]},
    "zero_size": lambda: {"a": jnp.zeros((0, 3)), "b": normal(2, 3)},
    "bfloat16": lambda:
    {"kernel": normal(9, 5, dtype=jnp.bfloat16), "bias": jnp.zeros(5, jnp.bfloat16)},
    "float16": lambda:
    {"kernel": normal(9, 5, dtype=jnp.float16), "bias": jnp.zeros(5, jnp.float16)},
    "mixed": lambda: {"half": normal(4, 4, dtype=jnp.bfloat16), "full": normal(4, 4, seed=1)},
}
LOW_PRECISION = ("bfloat16", "float16", "mixed")
FLOAT32 = tuple(name for name in TREES if name not in LOW_PRECISION)


def gradients(params: Any, step: int) -> Any:
    """Reproducible gradients with traps: zeros, one large element, a step that is all zero."""

    def one(path, leaf):
        seed = [step, *jax.tree_util.keystr(path).encode()]
        g = np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)
        g = np.where(np.abs(g) < 0.2, 0.0, g)
        if g.size > 3 and step % 7 == 3:
            g.flat[2] = 1000.0
        return jnp.asarray(g * np.float32(step % 12 != 5)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6, of: Any = None) -> float:
    """Trees of one structure, equal to ``rtol`` of a leaf's greatest element, or ``of`` its.

    Returns the largest difference in these terms.
    """
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)

    def scaled(leaf: Any, scale: Any) -> np.ndarray:
        largest = np.max(np.abs(np.asarray(scale, np.float64)), initial=0.0)
        return np.asarray(leaf, np.float64) / (largest if np.isfinite(largest) and largest else 1.0)

    scales = expected if of is None else of
    actual, expected = jax.tree.map(scaled, actual, scales), jax.tree.map(scaled, expected, scales)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=rtol)
    return max(map(largest_error, jax.tree.leaves(actual), jax.tree.leaves(expected)), default=0.0)


def largest_error(actual: Any, expected: Any, scale: Any = 1.0) -> float:
    """The largest difference of two arrays, but for NaN in both, as a share of a scale."""
    difference = np.nan_to_num(np.abs(np.asarray(actual, np.float64) - expected), nan=0.0)
    return float(np.max(difference, initial=0.0) / (scale or 1.0))


def assert_equal(actual: Any, expected: Any) -> None:
    """Trees of one structure, shapes and dtypes with equal elements."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


class Prepared(NamedTuple):
    """A case on a tree: compiled once in a session and shared by the tests."""

    tx: lionax.Transformation
    params: Any
    state: Any
    donating: Callable[..., Any]  # the jitted step, with donated parameters and state

    def step(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """One step that leaves its arguments alone."""
        return self.donating(*jax.tree.map(jnp.copy, (params, state)), grads)

    def run(self, steps: int) -> tuple[Any, Any]:
        """Parameters and state after some steps."""
        carry = self.params, self.state
        for t in range(steps):
            carry = self.step(*carry, gradients(self.params, t))
        return carry


@functools.cache
def prepared(case: str, tree: str) -> Prepared:
    """The case on the tree."""
    tx, params = CASES[case].make(), TREES[tree]()
    return Prepared(tx, params, tx.init(params), jax.jit(tx.step, donate_argnums=(0, 1)))


def but_for_slow(names: Any, slow: Any) -> list[Any]:
    """Parameters of a test, of which some run in the slow command only."""
    return [pytest.param(*(name if isinstance(name, tuple) else (name,)),
                         marks=[pytest.mark.slow] * (name in slow)) for name in names]


def but_for_fast(names: Any, *fast: Any) -> list[Any]:
    """Parameters of a test, of which but some run in the slow command only."""
    return but_for_slow(names, [name for name in names if name not in fast])


def grouped(names: Any, every: int = 1) -> list[Any]:
    """Parameters of a test, of which one in so many runs in the plain command.

    All tests of a name run in one process and share `prepared`.
    """
    return [pytest.param(name, marks=(pytest.mark.xdist_group(name),
                                      *([pytest.mark.slow] if i % every else ())))
            for i, name in enumerate(names)]
