"""Lion by majority vote inside of `shard_map`."""

import functools
import itertools
import math
import re

import cases
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lionax
from lionax.demo import text, training
from lionax.demo.model import bits_per_character

SHAPES = {"kernel": (13, 5), "bias": (13,), "scale": (), "blocks": [(2, 3, 4), (13,)]}


def mesh_of(*sizes, names=("data", "model")):
    devices = np.array(jax.devices()[:math.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, names[:len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def specs_of(tx, params, axis="data"):
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: P(axis) if ".mu" in jax.tree_util.keystr(keys) else P(),
        jax.eval_shape(tx.init, params))


def on_workers(tx, params, workers, check_vma=True):
    """`init` and `step` on so many workers; the gradients have a first axis for them."""
    specs = specs_of(tx, params)

    def step(params, state, grads):
        return tx.step(params, state, jax.tree.map(lambda g: g[0], grads))

    shard = functools.partial(jax.shard_map, mesh=mesh_of(workers), check_vma=check_vma)
    return (jax.jit(shard(tx.init, in_specs=P(), out_specs=specs)),
            jax.jit(shard(step, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))))


def trained(tx, params, each, workers, **options):
    """Parameters and state after a step for each of these gradients."""
    init, step = on_workers(tx, params, workers, **options)
    state = init(params)
    for grads in each:
        params, state = step(params, state, grads)
    return params, state


def normal_tree(seed, *first, dtype=jnp.float32):
    is_shape = lambda node: isinstance(node, tuple)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=(*first, *shape)), dtype),
                        SHAPES, is_leaf=is_shape)


def reference(param, each, rate, decay=0.0, b1=0.9, b2=0.99):
    """One leaf in NumPy: float32 arithmetic on gradients [workers, ...], one rounding a step."""
    mu = np.zeros(each[0].shape, np.float32)
    for grads in each:
        grads, old = np.asarray(grads, np.float32), np.asarray(param, np.float32)
        votes = np.sign(np.float32(1 - b1) * grads + np.float32(b1) * mu)
        mu = np.float32(1 - b2) * grads + np.float32(b2) * mu
        update = np.sign(votes.sum(axis=0)) + np.float32(decay) * old
        param = (old - np.float32(rate) * update).astype(param.dtype)
    return param, mu


@pytest.mark.parametrize(("workers", "check_vma"), cases.but_for_fast(
    list(itertools.product([1, 2, 3, 8], [True, False])), (3, True)))
def test_the_equations_in_numpy(workers, check_vma):
    tx = lionax.majority_vote_lion(0.01, weight_decay=0.1, mask=lionax.not_matching("bias"),
                                   axis_name="data")
    params = normal_tree(0)
    each = [normal_tree(step, workers) for step in range(1, 6)]
    new, state = trained(tx, params, each, workers, check_vma=check_vma)
    mus = jax.tree.leaves(state.rules[0].mu)
    for path, leaf, mu, param, *grads in zip(
            lionax.paths(params), *map(jax.tree.leaves, (new, mus, params, *each)), strict=True):
        expected = reference(np.asarray(param), grads, 0.01, 0.0 if path == "bias" else 0.1)
        np.testing.assert_allclose(leaf, expected[0], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(mu, expected[1], rtol=2e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_bfloat16_parameters_are_rounded_once(workers):
    tx = lionax.majority_vote_lion(1e-3, weight_decay=0.1, mu_dtype="float32", axis_name="data")
    params = normal_tree(0, dtype=jnp.bfloat16)
    each = [normal_tree(step, workers, dtype=jnp.bfloat16) for step in range(1, 6)]
    new, _ = trained(tx, params, each, workers)
    for leaf, param, *grads in zip(*map(jax.tree.leaves, (new, params, *each)), strict=True):
        assert leaf.dtype == jnp.bfloat16
        expected, _ = reference(np.asarray(param), grads, 1e-3, 0.1)
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("how", ["bfloat16", "int8"])
def test_momenta_in_low_precision(how, check_vma):
    """Also under `sharded`, which knows the axes of the leaf, not that of the workers."""
    tx = lionax.sharded(lionax.majority_vote_lion(
        0.1, mu_dtype=lionax.Storage(how, rounding="nearest"), axis_name="data"), P())
    params, each = cases.normal(64, 64), [cases.normal(3, 64, 64, seed=1)] * 2
    new, _ = trained(tx, params, each, 3, check_vma=check_vma)
    float_tx = lionax.majority_vote_lion(0.1, axis_name="data")
    expected, _ = trained(float_tx, params, each, 3)
    assert np.mean(np.asarray(new == expected)) > 0.9
    low = lionax.sharded(lionax.majority_vote_lion(0.1, mu_dtype=how, axis_name="data"), P())
    if check_vma:
        _, state = trained(low, params, [jnp.stack([each[0][0]] * 3)], 3)
        mu = jax.tree.leaves(state.rules[0].mu)[0]
        assert (mu[0] != mu[1]).any()  # the workers have random bits of their own
    else:
        with pytest.raises(ValueError, match="rounding='nearest'"):
            trained(low, params, each, 3, check_vma=False)


def test_a_frozen_group_stays_the_same_on_all_workers():
    tx = lionax.partition({"train": lionax.majority_vote_lion(0.1, axis_name="data"),
                           "freeze": lionax.set_to_zero()}, {"w": "train", "z": "freeze"})
    params = {"w": jnp.ones(4), "z": jnp.ones(4)}
    new, _ = trained(tx, params, [jax.tree.map(lambda x: jnp.stack([x] * 4), params)], 4)
    np.testing.assert_array_equal(new["z"], params["z"])
    assert (new["w"] < params["w"]).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("workers", "tree"), cases.but_for_fast(
    [(workers, tree) for workers in (2, 3, 8)
     for tree in ("nested", "none_leaves", "scalar", "zero_size", "empty")],
    (3, "none_leaves"), (2, "empty")))
def test_with_equal_gradients_it_is_lion_bit_for_bit(workers, tree):
    """Also where they are 0, and with a schedule and an injected hyperparameter."""
    options = {"b1": lionax.inject(0.9), "weight_decay": 0.1}
    tx = lionax.majority_vote_lion(cases.SCHEDULE, **options, axis_name="data")
    lion = lionax.lion(cases.SCHEDULE, **options)
    params = cases.TREES[tree]()
    each = [cases.gradients(params, step) for step in range(8)]
    stacked = [jax.tree.map(lambda g: jnp.stack([g] * workers), grads) for grads in each]
    new, state = trained(tx, params, stacked, workers)
    expected, theirs = params, lion.init(params)
    lion_step = jax.jit(lion.step)
    for grads in each:
        expected, theirs = lion_step(expected, theirs, grads)
    cases.assert_equal(new, expected)
    for ours, mu in zip(*map(jax.tree.leaves, (state.rules[0].mu, theirs.rules[0].mu)),
                        strict=True):
        np.testing.assert_array_equal(ours, np.stack([mu] * workers))


def votes(*workers, steps=1):
    """The sums of the updates for these gradients of 48 elements, one list for each worker."""
    tx = lionax.majority_vote_lion(1.0, weight_decay=0.0, axis_name="data")
    grads = jnp.stack([jnp.resize(jnp.asarray(one, jnp.float32), 48) for one in workers])
    new, _ = trained(tx, jnp.zeros(48), [grads] * steps, len(workers))
    return (-new).reshape(-1, len(workers[0])).tolist()


def test_a_tie_moves_nothing():
    assert votes([1, -2, 3], [-9, -1, 1]) == [[0, -1, 1]] * 16


@pytest.mark.parametrize("workers", cases.but_for_fast([1, 2, 3, 8], 3))
def test_what_has_no_gradient_on_any_worker_does_not_move(workers):
    assert votes(*[[0.0, 1.0]] * workers, steps=3) == [[0, 3]] * 24


@pytest.mark.slow
def test_a_vote_without_a_sign_counts_up_and_down_in_turn():
    """Whichever of the workers counts the element."""
    assert votes([2.0, -1.0], [0.0, 0.0], steps=2) == [[1, -1]] * 24
    assert votes([2.0, -1.0], [math.nan, 0.0], steps=4) == [[2, -2]] * 24


@pytest.mark.slow
def test_a_worker_with_nan_is_outvoted():
    assert votes([1.0, -1.0], [math.nan, math.nan], [1.0, -1.0], steps=3) == [[3, -3]] * 24


def wire_bytes(compiled, workers):
    """The collectives of a program, and the bytes that a device sends, by rings."""
    found = re.findall(r"^ *(?:ROOT )?%\S+ = (.+?) (all-to-all|all-gather|all-reduce|"
                       r"reduce-scatter|collective-permute)(?:-start)?\(", compiled.as_text(), re.M)
    sent = 0.0
    for result, name in found:
        size = sum(jnp.dtype({"u8": "uint8", "f32": "float32", "s32": "int32"}[dtype]).itemsize
                   * math.prod(map(int, filter(None, shape.split(","))))
                   for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result))
        assert name in ("all-to-all", "all-gather", "all-reduce")
        sent += size * (workers - 1) / workers * (2 if name == "all-reduce" else 1)
    return [name for _, name in found], sent


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, 8])
def test_a_device_sends_at_most_a_sixteenth_of_an_all_reduce(workers):
    """Counted from the shapes of the collectives in the compiled program."""
    _, params = training.initial(text.load(), 0)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct((workers, *p.shape), p.dtype), params)
    n = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    tx = lionax.majority_vote_lion(1e-3, axis_name="data")
    init, step = on_workers(tx, params, workers)
    state = jax.eval_shape(init, params)
    names, sent = wire_bytes(step.lower(params, state, grads).compile(), workers)
    assert sorted(names) == ["all-gather", "all-to-all"]  # for all leaves
    assert sent == pytest.approx(3 / 8 * n * (workers - 1) / workers, rel=1e-3)

    mean = jax.shard_map(lambda grads: jax.tree.map(lambda g: jax.lax.pmean(g[0], "data"), grads),
                         mesh=mesh_of(workers), in_specs=P("data"), out_specs=P())
    names, of_all_reduce = wire_bytes(jax.jit(mean).lower(grads).compile(), workers)
    assert set(names) == {"all-reduce"}
    assert of_all_reduce == pytest.approx(8 * n * (workers - 1) / workers)
    assert sent <= of_all_reduce / 16


@pytest.mark.slow
def test_workers_along_several_axes_vote_together():
    tx = lionax.majority_vote_lion(0.01, axis_name=("data", "model"))
    params, grads = normal_tree(0), normal_tree(1, 8)
    expected, _ = trained(lionax.majority_vote_lion(0.01, axis_name="data"), params, [grads], 8)
    axes = ("data", "model")
    step = jax.shard_map(
        lambda p, g: tx.step(p, tx.init(p), jax.tree.map(lambda g: g[0], g))[0],
        mesh=mesh_of(2, 4), in_specs=(P(), P(axes)), out_specs=P())
    cases.assert_equal(jax.jit(step)(params, grads), expected)


@pytest.mark.slow
def test_an_explicit_mesh():
    tx = lionax.majority_vote_lion(0.01, axis_name="data")
    params, grads = cases.normal(13), cases.normal(8, 13)
    expected, _ = trained(tx, params, [grads], 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    step = jax.shard_map(lambda p, g: tx.step(p, tx.init(p), g[0])[0], mesh=mesh,
                         in_specs=(P(), P("data")), out_specs=P())
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
              for x, spec in ((params, P()), (grads, P("data")))]
    cases.assert_equal(jax.jit(step)(*placed), expected)


@pytest.mark.slow
def test_a_further_axis_shards_some_of_the_leaves():
    """Leaves that are replicated over it stay so, by their types."""
    tx = lionax.majority_vote_lion(0.01, axis_name="data")
    params = {"kernel": cases.normal(6, 8), "bias": cases.normal(13)}
    grads = {"kernel": cases.normal(4, 6, 8), "bias": cases.normal(4, 13)}
    expected, _ = trained(tx, params, [grads], 4)
    in_specs = ({"kernel": P(None, "model"), "bias": P()},
                {"kernel": P("data", None, "model"), "bias": P("data")})
    step = jax.shard_map(
        lambda p, g: tx.step(p, tx.init(p), jax.tree.map(lambda g: g[0], g))[0],
        mesh=mesh_of(4, 2), in_specs=in_specs, out_specs=in_specs[0])
    cases.assert_equal(jax.jit(step)(params, grads), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", ["bfloat16", "int8", "float16"])
def test_each_worker_rounds_its_momentum_with_bits_of_its_own(mu_dtype):
    tx = lionax.majority_vote_lion(0.01, mu_dtype=mu_dtype, axis_name="data")
    params, grads = cases.normal(64, 128), cases.normal(64, 128, seed=1)
    init, step = on_workers(tx, params, 8)
    state = init(params)
    new, after = step(params, state, jnp.stack([grads] * 8))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    mu = after.rules[0].mu
    each = np.asarray(mu.decode() if mu_dtype == "int8" else mu, np.float32)
    assert each.shape == (8, 64, 128)
    assert all((each[0] != other).mean() > 0.1 for other in each[1:])
    np.testing.assert_allclose(each.mean(axis=0), 0.01 * grads, atol=2e-3 * 0.01 * 400)
    expected, _ = jax.jit(lionax.lion(0.01).step)(params, lionax.lion(0.01).init(params), grads)
    cases.assert_equal(new, expected)  # the first vote has no momentum to round


@pytest.mark.slow
def test_a_scan_carries_the_state():
    """Inside of `shard_map` the type of the state stays from `init` on."""
    tx = lionax.majority_vote_lion(0.01, axis_name="data")

    def steps(params, grads):
        body = lambda carry, g: (tx.step(*carry, g), None)
        return jax.lax.scan(body, (params, tx.init(params)), grads)[0][0]

    each = cases.normal(5, 8, 13)
    scanned = jax.jit(jax.shard_map(lambda p, g: steps(p, g[:, 0]), mesh=mesh_of(8),
                                    in_specs=(P(), P(None, "data")), out_specs=P()))
    expected, _ = trained(tx, jnp.ones(13), each, 8)
    cases.assert_close(scanned(jnp.ones(13), each), expected)


@pytest.mark.slow
def test_in_a_conditional_all_workers_step_or_none():
    tx = lionax.skip_nonfinite(lionax.majority_vote_lion(0.01, axis_name="data"), 3)
    params, good = jnp.ones(13), cases.normal(8, 13)
    init, step = on_workers(tx, params, 8)
    state = init(params)
    new, dropped = step(params, state, good.at[5, 2].set(jnp.nan))
    cases.assert_equal(new, params)
    cases.assert_equal(jax.tree.leaves(dropped.rules.inner.rules), jax.tree.leaves(
        state.rules.inner.rules))
    new, _ = step(params, dropped, good)
    expected, _ = trained(lionax.majority_vote_lion(0.01, axis_name="data"), params, [good], 8)
    cases.assert_close(new, expected)


TX = lionax.majority_vote_lion(0.01, axis_name="data")


def test_outside_of_shard_map_it_tells_where_to_call_it():
    params = {"w": jnp.ones(3)}
    message = r"majority_vote_lion: axis_name='data' is not an axis .* has none; .*jax.shard_map"
    with pytest.raises(ValueError, match=message):
        TX.step(params, TX.init(params), params)
    with pytest.raises(ValueError, match="has 'model'; call step"):
        jax.shard_map(lambda p: TX.step(p, TX.init(p), p)[0], mesh=mesh_of(8, names=("model",)),
                      in_specs=P(), out_specs=P())(params)


def test_gradients_that_jax_summed_over_the_workers_are_refused():
    params, batch = {"w": jnp.ones(3)}, cases.normal(8, 3)

    def step(differentiated_at):
        def run(params, batch):
            loss = lambda params: jnp.sum((params["w"] * batch) ** 2)
            return TX.step(params, TX.init(params), jax.grad(loss)(differentiated_at(params)))[0]

        return jax.shard_map(run, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P())

    with pytest.raises(ValueError, match=r"the gradient of 'w' does not vary over .*'data'; .*"
                       r"jax.lax.pcast\(params, 'data', to='varying'\)"):
        step(lambda params: params)(params, batch)
    new = jax.jit(step(lambda params: jax.lax.pcast(params, "data", to="varying")))(params, batch)
    np.testing.assert_allclose(new["w"], 1 - 0.01 * (1 + 1e-3), rtol=1e-6)


def test_what_cannot_vote_is_refused():
    for wrong in (None, 3, (), ("data", "data"), ["data"]):
        with pytest.raises(TypeError, match="majority_vote_lion: axis_name="):
            lionax.majority_vote_lion(0.01, axis_name=wrong)
    with pytest.raises(TypeError, match="axis_name"):
        lionax.majority_vote_lion(0.01)
    with pytest.raises(TypeError, match="majority_vote_lion: the parameter 'w' has dtype complex"):
        TX.init({"w": jnp.ones(3, jnp.complex64)})
    with pytest.raises(ValueError, match="majority_vote_lion: b1=2"):
        lionax.majority_vote_lion(0.01, 2.0, axis_name="data")


STEPS, SEED = 150, 1
PEAK = 1.4e-3  # of 7e-4, 1e-3, 1.4e-3, 2e-3 and 2.8e-3 the best of both


@pytest.mark.slow
@pytest.mark.once
def test_the_demo_ends_within_a_hundredth_of_the_synchronous_loss(monkeypatch, standard_promotion):
    """Eight workers share the batch of 32 windows on which the demo trains."""
    monkeypatch.setitem(training.OPTIMIZERS, "votes", lambda rate: lionax.majority_vote_lion(
        rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=training.NOT_DECAYED, axis_name="data"))
    corpus = text.load()
    *_, run = training.train("lion", training.optimizer("lion", STEPS, PEAK), corpus,
                             STEPS, SEED)

    tx = training.optimizer("votes", STEPS, PEAK)
    graph, params = training.initial(corpus, SEED)
    loss = lambda params, batch: bits_per_character(nnx.merge(graph, params), batch)
    specs = specs_of(tx, params)

    def train_step(params, state, batch):
        own = jax.lax.pcast(params, "data", to="varying")
        return tx.step(params, state, jax.grad(loss)(own, batch))

    shard = functools.partial(jax.shard_map, mesh=mesh_of(8))
    train_step = jax.jit(shard(train_step, in_specs=(P(), specs, P("data")),
                               out_specs=(P(), specs)), donate_argnums=(0, 1))
    state = jax.jit(shard(tx.init, in_specs=P(), out_specs=specs))(params)
    for step in range(STEPS):
        batch = corpus.batch(corpus.train, training.BATCH, training.LENGTH, (SEED, 0, step))
        # On a CPU with fewer cores than devices, steps in flight wait for each other's threads.
        params, state = jax.block_until_ready(train_step(params, state, batch))
    held_out = jnp.stack([
        corpus.batch(corpus.validation, training.BATCH, training.LENGTH, (SEED, 1, i))
        for i in range(training.EVALUATION_BATCHES)])
    params = jax.device_put(params, jax.devices()[0])
    reached = jax.jit(lambda batches: jax.lax.map(lambda b: loss(params, b), batches).mean())
    assert float(reached(held_out)) <= 1.01 * run.validation[-1]
