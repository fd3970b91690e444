r"""Several processes: data-parallel, fsdp or ZeRO-1, with checkpoints that any number of them read.

On one machine, or on several with a common folder, start each process with its number:

    python examples/cluster.py --coordinator 127.0.0.1:9911 --processes 2 --process 0 &
    python examples/cluster.py --coordinator 127.0.0.1:9911 --processes 2 --process 1

On a cluster with SLURM it is the same program; JAX reads all three from SLURM:

    srun --nodes 4 --ntasks-per-node 1 --kill-on-bad-exit \
        python examples/cluster.py --checkpoints /shared/run

If a process dies, the others wait for it until JAX ends them, a minute or more later; with SLURM's
option they end at once. Start any number of processes that divides the batch, with the same folder:
they go on from the last checkpoint, with the same batches. Alone it needs no argument.
"""

import argparse
import functools
import os
import pathlib

import flax.nnx as nnx
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lionax
from lionax.demo import text
from lionax.demo.model import Transformer, bits_per_character

LENGTH, BATCH = 64, 32


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes, if there are several; comes before anything that touches a device."""
    if coordinator or "SLURM_STEP_NODELIST" in os.environ:
        jax.distributed.initialize(coordinator, processes, process)


def split(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct) -> NamedSharding:
    """Fsdp: a parameter is split along its largest axis that the number of devices divides."""
    axes = [axis for axis in range(x.ndim) if x.shape[axis] % mesh.size == 0]
    largest = max(axes, key=lambda axis: x.shape[axis], default=None)
    return NamedSharding(mesh, PartitionSpec(*["data" if axis == largest else None
                                               for axis in range(x.ndim)]))


def local_rows(batch: np.ndarray) -> np.ndarray:
    """The part of a global batch that this process feeds."""
    return np.split(batch, jax.process_count())[jax.process_index()]


def train(layout, steps, folder=None, *, save_every=10, width=128, layers=2):
    """Yields (number of the step, loss, parameters, state) after each step that it makes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, by_rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    corpus = text.load()
    model = functools.partial(Transformer, len(corpus.vocabulary), LENGTH, width, 4, layers)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, max(1, steps // 10), steps)
    tx = lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1.0),
                                     lionax.lamb(rate, weight_decay=0.01)))

    # Shapes with shardings: what is made from nothing, or restored, is laid out like this.
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=split(mesh, x) if layout == "fsdp" else everywhere), shapes)
    shardings = (jax.tree.map(lambda x: x.sharding, placed),
                 lionax.state_sharding(tx, placed, "data" if layout == "zero" else None))

    @functools.partial(jax.jit, out_shardings=shardings)
    def start():
        params = nnx.state(model(nnx.Rngs(0)))
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*shardings, everywhere),
                       compiler_options=lionax.compiler_options())
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(
            lambda params: bits_per_character(nnx.merge(graph, params), batch))(params)
        return *tx.step(params, state, grads), loss

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=save_every)
    manager = folder and ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options)
    last = manager.latest_step() if manager else None
    if last is None:
        params, state = start()
    else:
        like = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding), jax.eval_shape(start), shardings)
        params, state = manager.restore(last, args=ocp.args.StandardRestore(like))

    for number in range(last or 0, steps):
        batch = corpus.batch(corpus.train, BATCH, LENGTH, (0, number))
        batch = jax.make_array_from_process_local_data(by_rows, local_rows(batch))
        params, state, loss = step(params, state, batch)
        if manager:
            manager.save(number + 1, args=ocp.args.StandardSave((params, state)))
        yield number + 1, loss, params, state
    if manager:
        manager.close()


def main() -> None:
    """Trains, and lets process 0 print what was reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=("data", "fsdp", "zero"), default="zero")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--checkpoints", help="a folder that all processes share")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--coordinator", help="address:port of process 0; not with SLURM")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    connect(args.coordinator, args.processes, args.process)
    for number, loss, _, state in train(
            args.layout, args.steps, args.checkpoints, save_every=args.save_every,
            width=args.width, layers=args.layers):
        if jax.process_index() == 0 and (number % 10 == 0 or number == args.steps):
            norm = lionax.metrics(state)["gradient_norm"]
            print(f"step {number}: loss {loss:.6f}, gradient norm {norm:.4f}", flush=True)


if __name__ == "__main__":
    main()
