"""Threads that share transformations, and lionax's caches, compute the same numbers."""

import concurrent.futures
import functools
import sys
import threading

import cases
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import P

import lionax

THREADS, STEPS = 8, 3

MAKERS = {
    "sgd": lambda rate: lionax.monitor(lionax.sgd(rate, 0.9)),
    "lion": lambda rate: lionax.monitor(lionax.chain(
        lionax.clip_by_global_norm(1.0), lionax.lion(rate, mu_dtype="int8"))),
    "lamb": lambda rate: lionax.skip_nonfinite(lionax.lamb(rate, mu_dtype="bfloat16"), 3),
    "masked": lambda rate: lionax.accumulate(
        lionax.lion(rate, mask=lionax.not_matching("bias")), 2),
    "schedule": lambda rate: lionax.dynamic_loss_scale(
        lionax.adamw(cases.SCHEDULE, weight_decay=rate), 4.0, 2),
}


def at_once(works):
    """What functions return that threads begin at the same moment."""
    barrier = threading.Barrier(len(works))

    def one(work):
        barrier.wait()
        return work()

    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(one, work) for work in works]]


def run(tx, compiled, params):
    """Parameters, state and metrics after some steps."""
    step = jax.jit(tx.step) if compiled else tx.step
    carry = params, tx.init(params)
    for t in range(STEPS):
        carry = step(*carry, cases.gradients(params, t))
    measured = lionax.metrics(carry[1]) if repr(tx).startswith("monitor") else {}
    return jax.device_get((*carry, measured))


def same(one, other):
    """Bit for bit."""
    leaves, others = (jax.tree.leaves_with_path(tree) for tree in (one, other))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, a), (_, b) in zip(leaves, others, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


promise = pytest.mark.promise(
    "Threads", "8 threads that init, step and read metrics of the same and of different "
    "transformations at once get the numbers of one thread, bit for bit, also where they are the "
    "first to use them.")


@pytest.fixture
def switching():
    """Threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@promise
@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("names", "compiled"), cases.but_for_fast(
    [(("sgd",), False), (("lion",), True), (tuple(MAKERS), False), (tuple(MAKERS), True)],
    (("sgd",), False)), ids=["one-eager", "one-jit", "several-eager", "several-jit"])
def test_threads_get_the_numbers_of_one(names, compiled, figure):
    """At the first use, when nothing is compiled for these shapes, and at a later one."""
    for repeat in range(probes.sized(1, 10)):
        rows = 70 + 40 * compiled + 20 * len(names) + repeat
        params = {"kernel": cases.normal(rows, 64), "bias": cases.normal(rows)}
        made = [MAKERS[name](0.01) for name in names]
        works = [functools.partial(run, made[i % len(made)], compiled, params)
                 for i in range(THREADS)]
        found = at_once(works) + at_once(works)
        alone = [run(tx, compiled, params) for tx in made]
        for i, result in enumerate(found):
            same(result, alone[i % THREADS % len(made)])
        figure("runs in threads", len(found))


@promise
@pytest.mark.slow
@pytest.mark.usefixtures("switching")
def test_what_a_thread_says_of_shards_is_its_own(figure):
    """`sharded` holds its specs while a step is traced: each thread has those that it gave."""
    mesh, x = probes.mesh_of(8), jnp.arange(16.0).reshape(2, 8) + 1

    def norms(spec, rounds):
        tx = lionax.sharded(lionax.clip_by_global_norm(1.0), spec)
        for _ in range(rounds):  # a new function is traced anew
            clip = jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=spec,
                                 out_specs=spec, check_vma=False)
            yield np.asarray(jax.jit(clip)(x))

    rounds = probes.sized(1, 10)
    specs = [P(None, "x"), P()] * (THREADS // 2)
    expected = np.asarray(x / jnp.linalg.norm(x))
    for found in at_once([lambda spec=spec: list(norms(spec, rounds)) for spec in specs]):
        for each in found:
            np.testing.assert_allclose(each, expected, rtol=1e-6)
        figure("traces in threads", rounds)


@promise
@pytest.mark.usefixtures("switching")
def test_definitions_made_and_compared_in_threads(figure):
    """Each thread makes, prints, hashes, writes and reads them."""
    def one():
        made = [make(0.5) for make in list(MAKERS.values())[:3]]
        again = [lionax.from_config(lionax.to_config(tx)) for tx in made]
        return [(hash(tx), repr(tx), tx == other) for tx, other in zip(made, again, strict=True)]

    rounds = probes.sized(2, 200)
    expected = one()
    for _ in range(rounds):
        assert at_once([one] * THREADS) == [expected] * THREADS
    figure("definitions made in threads", rounds * THREADS * 3)
