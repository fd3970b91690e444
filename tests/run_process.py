"""What each process of `test_processes.py` runs: the training of `examples/cluster.py`.

Arguments: its number, how many there are, the coordinator's port, a folder that all share, and runs
as ``layout:name`` or ``layout:name:step``: the last process kills itself after that step.
"""

import copy
import json
import os
import pathlib
import pickle
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lionax

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
import cluster

SIZES = {"width": 32, "layers": 1, "save_every": 4}
STEPS = 12
SHAPES = {"split": (32, 256), "whole": (3,)}


def small():
    """A transformation of which each part keeps something."""
    return lionax.monitor(lionax.accumulate(lionax.chain(
        lionax.clip_by_global_norm(1.0), lionax.lamb(0.1, mu_dtype="int8")), 2))


def small_params(place=lambda value, spec: jnp.asarray(value)):
    """Its parameters; ``place`` puts an array on devices."""
    rng = np.random.default_rng(0)
    return {name: place(rng.normal(size=shape).astype(np.float32),
                        PartitionSpec(*["data"] * (name == "split")))
            for name, shape in SHAPES.items()}


def train(layout, folder, killed_after=None):
    """Prints the losses of a run, and returns its parameters."""
    reached = None
    for number, loss, params, _ in cluster.train(layout, STEPS, folder, **SIZES):
        reached = params
        if jax.process_index() == 0:
            print(f"{folder.name} {number} {float(loss)}", flush=True)
        if number == killed_after and jax.process_index() == jax.process_count() - 1:
            while not (folder / str(SIZES["save_every"])).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
    return multihost_utils.process_allgather(reached, tiled=True)


def on_a_small_state(folder):
    """What is read and written of a state that no process holds whole."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def place(value, spec):
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    tx, params = small(), small_params(place)
    state = tx.init(params)  # outside of `jit`
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, (params, state))
    step = jax.jit(tx.step)
    _, state = step(*step(params, state, params), params)
    found = {"summary": str(lionax.summary(tx, params)), "repr": repr(state)}
    if jax.process_index() == 0:  # alone
        found["metrics"] = {name: float(value) for name, value in lionax.metrics(state).items()}
    assigned = lionax.set_hyperparams(state, learning_rate=0.0)
    found["learning rate"] = [float(lionax.get_hyperparams(x)["learning_rate"])
                              for x in (state, assigned, copy.deepcopy(assigned))]
    found["shardings stay"] = jax.tree.leaves(jax.tree.map(
        lambda old, new: old.sharding == new.sharding, state, assigned))
    programs = step._cache_size()
    after = step(*step(params, assigned, params), params)[0]
    found["programs"] = [programs, step._cache_size()]
    found["moved"] = float(jnp.max(jnp.abs(after["split"] - params["split"])))
    try:
        pickle.dumps(state)
    except pickle.PicklingError as error:
        found["pickle"] = str(error)
    gathered = multihost_utils.process_allgather(state, tiled=True)
    found["bytes"] = len(pickle.dumps(gathered))
    return found


def main():
    """Runs, and leaves what was found in the folder."""
    process, processes, port = map(int, sys.argv[1:4])
    folder = pathlib.Path(sys.argv[4])
    lionax.compiler_options()  # touches no device
    if processes > 1:
        cluster.connect(f"127.0.0.1:{port}", processes, process)
    found = on_a_small_state(folder / f"small-{processes}")
    (folder / f"{processes}-{process}.json").write_text(json.dumps(found))
    for run in sys.argv[5:]:
        layout, name, *killed_after = run.split(":")
        params = train(layout, folder / name, *map(int, killed_after))
        if process == 0:
            np.savez(folder / f"{name}.npz", *jax.tree.leaves(params))


if __name__ == "__main__":
    main()
