"""Orbax's checkpoints: on another mesh, under another definition, killed while saving, and old.

``PYTHONPATH=. python tests/test_checkpoints.py`` stores the fixture of a new version: what later
versions must restore. The one of a released version is never written again.
"""

import functools
import json
import multiprocessing
import pathlib
import random
import sys
import time

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lionax
from lionax.core.inspection import contents
from lionax.core.quantized import is_quantized

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
STORED = sorted(folder.name for folder in FIXTURES.iterdir()) if FIXTURES.exists() else []
KILLS, SAVING = 20, 0.4  # seconds of saving until a process is killed, at most


def save(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def restore(folder, like=None):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, like)


def parameters(dtype=jnp.float32):
    rows = jnp.tile(jnp.linspace(-1.0, 1.0, 64, dtype=jnp.float32), (64, 1))
    return {"w": rows.astype(dtype), "b": jnp.zeros(3, dtype)}


def trained(tx, params, state, steps):
    """Parameters and state after these steps; the gradients depend on both numbers."""

    @jax.jit
    def step(params, state, t):
        slope = 1 + t.astype(jnp.float32) / 8
        grads = jax.tree.map(lambda p: (p.astype(jnp.float32) * slope + 0.25).astype(p.dtype),
                             params)
        return tx.step(params, state, grads)

    for t in steps:
        params, state = step(params, state, jnp.asarray(t))
    return params, state


# Another number of devices

MESHED = {
    "accumulate": lambda: lionax.accumulate(lionax.chain(
        lionax.clip_by_global_norm(1.0), lionax.lion(0.01)), 2),
    "int8": lambda: lionax.lamb(0.01, mu_dtype="int8", nu_dtype="int8"),
}


def on_mesh(tx, devices, zero):
    """Shapes with shardings of parameters and state on so many devices."""
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,),
                         devices=jax.devices()[:devices])
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh, PartitionSpec("x") if name == "w" and not zero else PartitionSpec()))
        for name, x in parameters().items()}
    state = tx.init(shapes)
    if zero:
        state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding), state, lionax.state_sharding(tx, shapes, "x"))
    return shapes, state


@pytest.mark.slow
@pytest.mark.promise("Meshes", "A state saved on 8 devices goes on on 2 and on 1")
@pytest.mark.parametrize(("name", "zero"), [
    pytest.param("int8", False, id="int8"),
    *(pytest.param(name, zero, id=f"{name}-{'zero' if zero else 'split'}", marks=pytest.mark.slow)
      for name, zero in (("int8", True), ("accumulate", False), ("accumulate", True)))])
def test_saved_on_eight_devices_it_goes_on_on_two_and_on_one(name, zero, tmp_path):
    tx = MESHED[name]()
    like = on_mesh(tx, 8, zero)
    params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), parameters(), like[0])
    state = jax.device_put(tx.init(params), jax.tree.map(lambda x: x.sharding, like[1]))
    for first, devices in ((0, 8), (3, 2), (6, 1)):
        if devices < 8:
            save(tmp_path / str(devices), (params, state))
            params, state = restore(tmp_path / str(devices), on_mesh(tx, devices, zero))
        slots = [x for x in jax.tree.leaves(state) if x.ndim == 2]
        assert {x.sharding.num_devices for x in slots} == {devices}
        assert {x.sharding.is_fully_replicated for x in slots} == {devices == 1}
        params, state = trained(tx, params, state, range(first, first + 3))
    alone, _ = trained(tx, parameters(), tx.init(parameters()), range(9))
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=0, atol=2e-6)


# Another definition

@pytest.mark.usefixtures("standard_promotion")
def test_a_float_learning_rate_restores_into_the_state_of_a_schedule(tmp_path):
    before = lionax.sgd(0.5)
    after = lionax.sgd(optax.piecewise_constant_schedule(0.25, {3: 0.5}))
    save(tmp_path / "saved", trained(before, parameters(), before.init(parameters()), range(2)))
    params, state = restore(tmp_path / "saved", jax.eval_shape(
        lambda: (parameters(), after.init(parameters()))))
    rates = []
    for t in range(2, 5):
        params, state = trained(after, params, state, [t])
        rates.append(float(lionax.get_hyperparams(state)["learning_rate"]))
    assert rates == [0.25, 0.125, 0.125]


@pytest.mark.slow
@pytest.mark.parametrize("low", cases.but_for_fast(["int8", "int4", "bfloat16"], "int8"))
def test_float32_moments_go_on_in_low_precision(low, tmp_path):
    tx, lower = (lionax.adamw(0.01, mu_dtype=how, nu_dtype=how) for how in (None, low))
    params, state = trained(tx, parameters(), tx.init(parameters()), range(3))
    save(tmp_path / "saved", (params, state))
    params, state = restore(tmp_path / "saved", jax.eval_shape(lambda: (params, state)))
    moved = lionax.cast_state(state, lower.init(params))
    mu = moved.rules[0].mu["w"]
    assert is_quantized(mu) == (low != "bfloat16")
    numbers = mu.decode() if is_quantized(mu) else mu
    error = jnp.max(jnp.abs(numbers.astype(jnp.float32) - state.rules[0].mu["w"]))
    assert error <= {"int8": 0.02, "int4": 0.3, "bfloat16": 0.01}[low] * jnp.max(jnp.abs(
        state.rules[0].mu["w"]))
    ours, _ = trained(lower, params, moved, [3])
    expected, _ = trained(tx, params, state, [3])
    assert jnp.max(jnp.abs(ours["w"] - expected["w"])) < 0.01


@pytest.mark.parametrize(("other", "path"), [
    (lambda: lionax.lamb(0.1), "'rules', '0', 'nu'"),
    (lambda: lionax.sgd(0.1, 0.9), "'rules', '1', 'trace'"),
    (lambda: lionax.chain(lionax.clip(1.0), lionax.lion(0.1)), "'rules', '1', 'mu'")])
def test_orbax_names_what_the_state_of_another_transformation_lacks(other, path, tmp_path):
    save(tmp_path / "saved", lionax.lion(0.1).init(parameters()))
    with pytest.raises(ValueError, match=path):
        restore(tmp_path / "saved", jax.eval_shape(other().init, parameters()))


# Killed while saving

def saved_in_a_loop(folder, said):
    """Goes on from the last checkpoint, tells its number, and then each that is finished."""
    tx, params = lionax.lion(1.0, weight_decay=0.0), {"w": jnp.zeros((64, 64))}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        last, state = manager.latest_step() or 0, tx.init(params)
        if last:
            params, state = manager.restore(last, args=ocp.args.StandardRestore((params, state)))
        assert int(state.count) == last
        assert jnp.all(params["w"] == -last), "each step subtracts 1"
        step = jax.jit(tx.step).lower(params, state, params).compile()
        said.send(last)
        while True:
            last += 1
            params, state = step(params, state, {"w": jnp.ones((64, 64))})
            manager.save(last, args=ocp.args.StandardSave((params, state)))
            manager.wait_until_finished()
            said.send(last)


@pytest.mark.slow
@pytest.mark.promise("Interrupted runs", "A process that is killed while Orbax saves leaves a "
                     "checkpoint that restores")
def test_a_process_that_is_killed_while_it_saves_leaves_a_checkpoint_that_restores(
        tmp_path, figure):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "lionax", "orbax.checkpoint", __name__])
    moments = random.Random(0)
    finished = 0
    for _ in range(KILLS):
        heard, said = context.Pipe(duplex=False)
        process = context.Process(target=saved_in_a_loop, args=(tmp_path / "run", said))
        process.start()
        said.close()
        try:
            assert heard.poll(60), "it does not restore"
            restored = heard.recv()  # what was finished is there; the next one may be, too
            assert restored - finished in (0, 1)
            finished = restored
            time.sleep(moments.uniform(0, SAVING))
        finally:
            process.kill()
            process.join()
        while heard.poll():
            try:
                finished = heard.recv()
            except EOFError:
                break
    assert finished > KILLS, "most were killed after several checkpoints"
    figure("kills", KILLS)


# The layout on disk

FIXTURE = {
    "lamb": (jnp.float32, lambda: lionax.monitor(lionax.accumulate(lionax.chain(
        lionax.clip_by_global_norm(1.0),
        lionax.lamb(lionax.inject(0.1), mu_dtype="int8", nu_dtype="int8"),
        lionax.params_ema(0.5)), 2))),
    "lion": (jnp.float32, lambda: lionax.skip_nonfinite(lionax.partition(
        {"matrices": lionax.lion(0.1, mu_dtype="int4"),
         "vectors": lionax.chain(lionax.ema(0.5), lionax.sgd(0.1, 0.5, weight_decay=0.1))},
        lionax.labels({"w": "matrices"}, default="vectors")), 3)),
    "half": (jnp.bfloat16, lambda: lionax.dynamic_loss_scale(lionax.master_weights(
        lionax.adam(0.1), "int8"), 4.0, 3)),
}
STEPS = 3  # before it is saved, and after it is restored


def to_store(name):
    dtype, make = FIXTURE[name]
    tx, params = make(), parameters(dtype)
    return tx, *trained(tx, params, tx.init(params), range(STEPS))


def samples(params):
    """Some numbers of the parameters."""
    return {name: np.ravel(np.asarray(x, np.float64))[::97].tolist() for name, x in params.items()}


@functools.cache
def restored_fixture(version):
    like = {name: jax.eval_shape(lambda make=make, dtype=dtype: (
        parameters(dtype), make().init(parameters(dtype)))) for name, (dtype, make)
        in FIXTURE.items()}
    return restore(FIXTURES / version / "checkpoint", like)


@pytest.mark.promise("Versions", "A state that an earlier version saved goes on")
@pytest.mark.parametrize("name", FIXTURE)
@pytest.mark.parametrize("version", STORED)
def test_what_an_earlier_version_saved_goes_on(version, name):
    params, state = restored_fixture(version)[name]
    params, state = trained(FIXTURE[name][1](), params, state, range(STEPS, 2 * STEPS))
    expected = json.loads((FIXTURES / version / "expected.json").read_text())[name]
    for leaf, numbers in samples(params).items():
        np.testing.assert_allclose(numbers, expected[leaf], rtol=0, atol=1e-6)


def test_this_version_has_a_fixture():
    assert lionax.__version__ in STORED


def test_the_fixture_holds_each_class_of_state():
    known = {name for module in list(sys.modules) if module.startswith("lionax.transforms.")
             for name, thing in vars(sys.modules[module]).items()
             if name.endswith("State") and hasattr(thing, "_fields")}
    found = {held.slot[0] for dtype, make in FIXTURE.values()
             for held in contents(jax.eval_shape(make().init, parameters(dtype)))}
    known -= {"MajorityVoteLionState", "CountVotesState"}  # a step of these needs a mesh
    assert len(known) >= 10
    assert known | {"State"} <= found


if __name__ == "__main__":
    target = FIXTURES / lionax.__version__
    save(target.absolute() / "checkpoint", {name: to_store(name)[1:] for name in FIXTURE})
    (target / "checkpoint" / "commit_success.txt").unlink()  # it names this machine's folder
    (target / "expected.json").write_text(json.dumps({
        name: samples(trained(*to_store(name), range(STEPS, 2 * STEPS))[0]) for name in FIXTURE}))
