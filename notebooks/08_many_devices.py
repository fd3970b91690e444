# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training on many devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/08_many_devices.ipynb)
#
# This notebook trains the demo's transformer on 8 devices in four layouts: data-parallel, ZeRO-1,
# fsdp and tensor-parallel. It compares the losses with those of one device. Then it draws where
# the arrays lie, and counts the bytes on each device and the collectives of a step. The devices
# are virtual: a CPU plays them.

# %%
# Installs what is missing; does nothing where all is there.
import importlib.metadata
import importlib.util
import sys

from IPython import get_ipython
from packaging.version import Version

NEEDED = {"jax": "0.10.2", "optax": "0.2.8", "flax": "0.12.7", "keras": "3.15",
          "matplotlib": "3.10.7", "scikit-learn": "1.4"}


def is_missing(name, least):
    try:
        return Version(importlib.metadata.version(name)) < Version(least)
    except importlib.metadata.PackageNotFoundError:
        return True


missing = [f'"{n}>={least}"' for n, least in NEEDED.items() if is_missing(n, least)]
if importlib.util.find_spec("lionax") is None:
    missing.append('"lionax @ git+https://github.com/lionax/lionax"')
if missing:
    get_ipython().run_line_magic("pip", "install -q " + " ".join(missing))
for name, least in NEEDED.items():
    loaded = getattr(sys.modules.get(name), "__version__", least)
    if Version(loaded) < Version(least):
        raise RuntimeError(f"{name} {loaded} is loaded, {least} is needed. Choose "
                           "Runtime > Restart session, then run all cells again.")

# %%
import collections
import math
import re

import jax

# Before JAX looks for devices. In a kernel that has used JAX: restart it.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lionax
from lionax.demo import model, text
from lionax.frameworks.nnx import Optimizer

plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})
print(len(jax.devices()), jax.devices()[0].platform, "devices")

# %% [markdown]
# ## Data and model
#
# The text is the help of Python. The model is a causal transformer with two layers of width 64.
# All trainings start from the same weights and see the same batches.

# %%
LENGTH, BATCH, STEPS = 32, 32, 40
data = text.load()
batches = [data.batch(data.train, BATCH, LENGTH, (0, step)) for step in range(STEPS)]


def new_model():
    """The same weights at each call."""
    return model.Transformer(len(data.vocabulary), LENGTH, width=64, heads=4, layers=2,
                             rngs=nnx.Rngs(0))


shapes = nnx.as_pure(nnx.state(nnx.eval_shape(new_model), nnx.Param))
print(f"{sum(x.size for x in jax.tree.leaves(shapes)):,} parameters in "
      f"{len(jax.tree.leaves(shapes))} leaves, {len(data.vocabulary)} characters")

# %% [markdown]
# ## Layouts
#
# A layout says over which axes of the mesh each parameter is split. The batch is split over the
# axis `data`.
#
# - data: parameters and state are replicated.
# - ZeRO-1: the same, but the state is split over `data`. `zero_axis` asks for it.
# - fsdp: parameters are split over `data`, along their largest axis that 8 divides.
# - tensor: heads and the hidden axis of the perceptrons are split over `model`. The first matrix
#   of a pair is split along its last axis, the second along its first, so that only their result
#   is summed over the devices.

# %%
def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(path, shape):
    return P()


def fsdp(path, shape):
    dividing = [axis for axis, size in enumerate(shape) if size % 8 == 0]
    if not dividing:
        return P()
    axis = max(dividing, key=lambda axis: shape[axis])
    return P(*[None] * axis, "data")


SPLIT = {r"(query|key|value|up)/kernel": P(None, "model"), r"(query|key|value|up)/bias": P("model"),
         r"(out|down)/kernel": P("model")}


def tensor(path, shape):
    return next((spec for regex, spec in SPLIT.items() if re.search(regex, path)), P())


LAYOUTS = {"one device": (None, replicated, None),
           "data": (mesh_of(8, 1), replicated, None), "ZeRO-1": (mesh_of(8, 1), replicated, "data"),
           "fsdp": (mesh_of(8, 1), fsdp, None), "tensor": (mesh_of(2, 4), tensor, None)}
COLORS = dict(zip(LAYOUTS, ("black", "tab:blue", "tab:orange", "tab:green", "tab:red"),
                  strict=True))


def place(tree, mesh, spec_of):
    """The arrays of a tree, or its shapes, with the shardings of a layout."""
    leaves, treedef = jax.tree.flatten(tree)
    shardings = [NamedSharding(mesh, spec_of(path, x.shape))
                 for path, x in zip(lionax.paths(tree), leaves, strict=True)]
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return treedef.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                                 for x, sharding in zip(leaves, shardings, strict=True))
    return treedef.unflatten(map(jax.device_put, leaves, shardings))


# %% [markdown]
# ## Training
#
# `Optimizer` lays the state out beside the parameters, and for ZeRO-1 splits it further. The
# training step is the same in all layouts: XLA adds the collectives. `out_shardings` says that
# what comes out lies where it was.

# %%
tx = lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3, weight_decay=0.1))
losses, programs, trained = {}, {}, {}


def train(mesh, spec_of, zero_axis):
    """The losses, the compiled step and the trained model and optimizer."""
    net = new_model()
    if mesh is not None:
        nnx.update(net, place(nnx.state(net), mesh, spec_of))
    optimizer = Optimizer(net, tx, wrt=nnx.Param, zero_axis=zero_axis)
    graph, state = nnx.split((net, optimizer))

    def step(state, batch):
        net, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(model.bits_per_character)(net, batch)
        optimizer.update(net, grads)
        return nnx.state((net, optimizer)), loss

    where = None if mesh is None else NamedSharding(mesh, P("data"))
    placed = [jax.device_put(batch, where) for batch in batches]
    kept = None if mesh is None else (jax.tree.map(lambda x: x.sharding, state), None)
    program = jax.jit(step, donate_argnums=0, out_shardings=kept,
                      compiler_options=lionax.compiler_options()).lower(state, placed[0]).compile()
    losses = []
    for batch in placed:
        state, loss = program(state, batch)
        losses.append(float(loss))
    return np.array(losses), program.as_text(), nnx.merge(graph, state)


for name, layout in LAYOUTS.items():
    losses[name], programs[name], trained[name] = train(*layout)
for name, loss in losses.items():
    print(f"{name:11}{loss[0]:8.4f} to {loss[-1]:.4f} bits per character, from one device "
          f"{abs(loss - losses['one device']).max():.1e}")

# %% [markdown]
# Other layouts sum gradients and norms in another order. So losses differ in their last digits,
# and another machine has others. The curves lie on each other:

# %%
figure, axis = plt.subplots(figsize=(7, 3.4))
for width, (name, loss) in zip((7, 5.5, 4, 2.5, 1), losses.items(), strict=True):
    axis.plot(np.arange(STEPS), loss, color=COLORS[name], linewidth=width, label=name)
axis.set(xlabel="step", title="bits per character of the batch")
axis.legend()
plt.show()

# %% [markdown]
# ## Where the arrays lie
#
# The first matrix of a perceptron, 64 × 256, and its momentum. The numbers are those of devices.

# %%
for name in ("ZeRO-1", "fsdp", "tensor"):
    net, optimizer = trained[name]
    rules = nnx.as_pure(optimizer.opt_state.rules)
    slots = dict(zip(lionax.paths(rules), jax.tree.leaves(rules), strict=True))
    (momentum,) = (slot for path, slot in slots.items() if path.endswith("blocks/0/up/kernel"))
    for kind, array in (("parameter", net.blocks[0].up.kernel[...]), ("momentum", momentum)):
        print(f"{name}, {kind}: {array.sharding.shard_shape(array.shape)} on each device")
        jax.debug.visualize_array_sharding(array, scale=0.5)

# %% [markdown]
# ## Bytes on each device
#
# Lion keeps one moment. In float32 it has the size of the parameters, in int8 about a quarter of
# it where a leaf is stored in codes. `state_sharding` needs shapes only, so the optimizer in int8
# is not trained.

# %%
def on_device(tree):
    """The bytes of arrays or shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree))


def of_shapes(tx, mesh, spec_of, zero_axis):
    """The bytes of a state on one device, without the state."""
    params = place(shapes, mesh, spec_of)
    shardings = lionax.state_sharding(tx, params, zero_axis)
    state = jax.eval_shape(tx.init, shapes)
    return on_device(jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), state, shardings))


coded = lionax.lion(1e-3, weight_decay=0.1, mu_dtype="int8")
bytes_of = {}
for name, (net, optimizer) in trained.items():
    mesh, *others = LAYOUTS[name]
    bytes_of[name] = {
        "parameters": on_device(nnx.state(net, nnx.Param)),
        "state": on_device(nnx.state(optimizer)),
        "int8 state": of_shapes(coded, mesh or mesh_of(1, 1), *others)}
    print(f"{name:11}", ", ".join(f"{kind} {number:,}" for kind, number in bytes_of[name].items()))

# %%
figure, axis = plt.subplots(figsize=(11, 3.4))
for shift, kind, alpha in ((-0.27, "parameters", 1.0), (0, "state", 0.6),
                           (0.27, "int8 state", 0.3)):
    heights = [bytes_of[name][kind] / 1e3 for name in LAYOUTS]
    bars = axis.bar(np.arange(len(LAYOUTS)) + shift, heights, 0.25, color=list(COLORS.values()),
                    alpha=alpha)
    axis.bar_label(bars, [f"{kind}\n{height:.0f}" for height in heights], fontsize=7)
axis.set(xticks=range(len(LAYOUTS)), xticklabels=LAYOUTS, title="kB on each device",
         ylim=(0, 560))
axis.grid(False)
plt.show()

# %% [markdown]
# ## What the devices send
#
# The collectives that XLA put into a training step, outside of branches:

# %%
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
for name, program in programs.items():
    entry = program[program.index("\nENTRY"):]
    found = collections.Counter(re.findall(rf" ({KINDS})(?:-start)?\(", entry))
    print(f"{name:11}", ", ".join(f"{number} {kind}" for kind, number in found.items()) or "none")

# %% [markdown]
# Data-parallel training needs one all-reduce, of all gradients and the loss. In ZeRO-1 each device
# updates its part of a leaf, and an all-gather makes the leaf whole again. Of all leaves only the
# bias of the head, one element for each character, may have no axis that 8 divides: then it stays
# whole. In fsdp XLA gathers parameters where the computation needs them.
#
# [What a step sends](https://github.com/lionax/lionax/blob/main/docs/benchmarks/meshes.md)
# counts the bytes of such steps for a larger model.
#
# ## Which layout to choose
#
# - data: where parameters and state fit on each device.
# - ZeRO-1: where the parameters fit. Above it takes the state from 462 kB to 58 kB on each
#   device.
# - fsdp: where the parameters do not fit. Above they take 58 kB in place of 462 kB.
# - tensor: where a layer is large. It splits the computation, and what it does not split stays
#   whole: 164 kB here.
# - int8 halves this state: only kernels of at least 4096 elements whose last axis is a multiple of
#   64 are in codes. A larger model comes near to a quarter.
#
# [The guide to meshes](https://github.com/lionax/lionax/blob/main/docs/guides/meshes.md) has
# explicit meshes, the memory of the host and `shard_map`.
