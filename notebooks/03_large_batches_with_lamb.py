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
# # Large batches with LAMB
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/03_large_batches_with_lamb.ipynb)
#
# LAMB was made to train with large batches. This notebook trains a small classifier with batches
# of 32 to 4096 on the same number of examples, with SGD, Lion and LAMB, each at the best rate of
# a sweep. Then it looks at LAMB's trust ratios, and at how far each optimizer moves each layer.

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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import lionax

plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})
COLORS = {"sgd": "tab:gray", "lion": "tab:orange", "lamb": "tab:blue"}

# %% [markdown]
# ## Data and model
#
# The data are scikit-learn's digits, 1797 images of 8 × 8 pixels. Each training image also comes
# shifted by one pixel in each direction, so that a batch of 4096 has something to draw from.

# %%
images, targets = load_digits(return_X_y=True)
images = (images / 16 - 0.3).astype(np.float32).reshape(-1, 8, 8)
order = np.random.default_rng(0).permutation(len(images))
train, held_out = order[:1437], order[1437:]
padded = np.pad(images[train], ((0, 0), (1, 1), (1, 1)), constant_values=-0.3)
shifted = [padded[:, i:i + 8, j:j + 8] for i in range(3) for j in range(3)]
x_train = jnp.asarray(np.concatenate(shifted).reshape(-1, 64))
y_train = jnp.asarray(np.tile(targets[train], 9))
x_held_out = jnp.asarray(images[held_out].reshape(-1, 64))
y_held_out = jnp.asarray(targets[held_out])


class Block(nnx.Module):
    """A perceptron after a norm and beside a skip connection."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Classifier(nnx.Module):
    """64 pixels to 10 logits."""

    def __init__(self, width: int, blocks: int, rngs: nnx.Rngs):
        self.embed = nnx.Linear(64, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def new_params(seed):
    """The parameters of a new model."""
    return nnx.state(Classifier(48, 2, nnx.Rngs(seed)))


def loss_of(params, x, y):
    """The mean cross-entropy."""
    logits = nnx.merge(graph, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


graph = nnx.graphdef(Classifier(48, 2, nnx.Rngs(0)))
print(f"{len(x_train):,} training images, {len(x_held_out)} held out, "
      f"{sum(leaf.size for leaf in jax.tree.leaves(new_params(0))):,} parameters")

# %% [markdown]
# ## The same examples in fewer steps
#
# Every run sees 65,536 examples, in 2048 steps of 32 or in 16 steps of 4096. SGD, Lion and LAMB
# see the same examples in the same order. Their rates warm up in the first eighth of the steps
# and then fall to 0 along a cosine.

# %%
EXAMPLES, SEEDS = 65_536, 2
BATCHES = (32, 256, 1024, 4096)
kernels = lionax.not_matching("bias", "scale")
OPTIMIZERS = {
    "sgd": lambda rate: lionax.sgd(rate, momentum=0.9),
    "lion": lambda rate: lionax.lion(rate, weight_decay=0.1, mask=kernels),
    "lamb": lambda rate: lionax.lamb(rate, weight_decay=0.01, mask=kernels, trust_mask=kernels)}
RATES = {  # the peaks that are tried
    "sgd": 2.0 ** np.arange(-7, 0), "lion": 2.0 ** np.arange(-12, -4),
    "lamb": 2.0 ** np.arange(-9, -2)}


def schedule_of(peak, batch):
    """Warm-up to the peak, then a cosine to 0."""
    steps = EXAMPLES // batch
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 8, steps)
    return lambda step: peak * shape(step)


def train(name, batch, peak, params, chosen):
    """Trains on the chosen images; the loss and the accuracy on the held-out ones."""
    tx = OPTIMIZERS[name](schedule_of(peak, batch))

    def step(carry, chosen):
        params, state = carry
        grads = jax.grad(loss_of)(params, x_train[chosen], y_train[chosen])
        return tx.step(params, state, grads), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), chosen.reshape(-1, batch))
    predicted = nnx.merge(graph, params)(x_held_out).argmax(axis=-1)
    return loss_of(params, x_held_out, y_held_out), jnp.mean(predicted == y_held_out)


# %% [markdown]
# `vmap` over the peak rate and over the seed makes one program of each optimizer and batch, which
# trains all rates at once. The rate is traced: lionax takes a schedule that holds a traced value.

# %%
starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(new_params, range(SEEDS)))
chosen = jax.random.randint(jax.random.key(0), (SEEDS, EXAMPLES), 0, len(x_train))
losses, accuracies = {}, {}
for name in OPTIMIZERS:
    for batch in BATCHES:
        grid = jax.vmap(jax.vmap(functools.partial(train, name, batch), (None, 0, 0)),
                        (0, None, None))
        program = jax.jit(grid, compiler_options=lionax.compiler_options())
        results = program(jnp.asarray(RATES[name]), starts, chosen)
        losses[name, batch], accuracies[name, batch] = (np.mean(x, axis=1) for x in results)

best = {run: int(np.nanargmin(loss)) for run, loss in losses.items()}
print(f"{'':10}" + "".join(f"{f'batch {batch}':>26}" for batch in BATCHES))
for name in OPTIMIZERS:
    cells = ""
    for batch in BATCHES:
        i = best[name, batch]
        cells += (f"{losses[name, batch][i]:8.3f} {accuracies[name, batch][i]:6.1%} "
                  f"at 2^{int(np.log2(RATES[name][i])):3d}  ")
    print(f"{name:10}" + cells)

# %% [markdown]
# The table has the held-out loss in nats, the accuracy and the best peak rate, means of two
# seeds. Up to a batch of 256 the three differ little. At 1024, in 64 steps, LAMB is ahead with a
# loss of 0.146, before Lion with 0.211 and SGD with 0.327. At 4096 only 16 steps are left. That
# is too few for all of them, and Lion is ahead of LAMB, 0.813 to 1.063.

# %%
figure, axes = plt.subplots(1, len(BATCHES), figsize=(11, 3.2), sharey=True)
for axis, batch in zip(axes, BATCHES, strict=True):
    for name, color in COLORS.items():
        axis.plot(RATES[name], losses[name, batch], color=color, marker=".", label=name)
        i = best[name, batch]
        axis.plot(RATES[name][i], losses[name, batch][i], color=color, marker="*", markersize=13)
    axis.set(xscale="log", yscale="log", ylim=(0.04, 3), title=f"batch {batch}",
             xlabel="peak learning rate")
axes[0].set_ylabel("held-out loss (nats)")
axes[0].legend(loc="upper left")
figure.suptitle("Loss by learning rate; a star is the best rate")
plt.show()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for name, color in COLORS.items():
    left.plot(BATCHES, [losses[name, batch][best[name, batch]] for batch in BATCHES],
              color=color, marker="o", label=name)
    right.plot(BATCHES, [RATES[name][best[name, batch]] for batch in BATCHES],
               color=color, marker="o", label=name)
first = RATES["lamb"][best["lamb", BATCHES[0]]]
right.plot(BATCHES, first * np.sqrt(np.array(BATCHES) / BATCHES[0]), color="black",
           linestyle=":", label="∝ √batch")
left.set(xscale="log", yscale="log", xlabel="batch (examples)", ylabel="held-out loss (nats)",
         title="Loss at the best rate")
right.set(xscale="log", yscale="log", xlabel="batch (examples)", ylabel="peak learning rate",
          title="The best rate")
for axis in (left, right):
    axis.set_xticks(BATCHES, map(str, BATCHES))
    axis.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# From a batch of 32 to one of 1024 the best rate grows by a factor of 8 for LAMB and Lion, the
# square root of the batch by 5.7. SGD's grows by 4, but at a batch of 32 its curve is flat. From
# 1024 to 4096 no rate grows. The rates that were tried are a factor of 2 apart.
#
# ## Trust ratios
#
# LAMB multiplies the update of each leaf by its trust ratio, the norm of the parameters over the
# norm of the update that Adam and the decay make. `summary` shows on which leaves `trust_mask`
# lets it act: on the kernels.

# %%
lionax.summary(OPTIMIZERS["lamb"](RATES["lamb"][0]), new_params(0))

# %% [markdown]
# `monitor` measures what a step does, with `groups` for each kernel alone. `metrics` reads the
# measurements from the state.

# %%
BATCH = 1024
names = ["embed", *(f"blocks/{i}/{part}" for i in range(2) for part in ("up", "down")), "head"]


def monitored_run(name):
    """The measurements of every step, at the best rate of the sweep."""
    peak = RATES[name][best[name, BATCH]]
    tx = OPTIMIZERS[name](schedule_of(peak, BATCH))
    tx = lionax.monitor(tx, groups={f"^{layer}/kernel": layer for layer in names})
    params = new_params(0)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    def train_step(params, state, x, y):
        return tx.step(params, state, jax.grad(loss_of)(params, x, y))

    measured = []
    for indices in chosen[0].reshape(-1, BATCH):
        params, state = train_step(params, state, x_train[indices], y_train[indices])
        measured.append(jax.device_get(lionax.metrics(state)))
    return {key: np.array([step[key] for step in measured]) for key in measured[0]}


runs = {name: monitored_run(name) for name in OPTIMIZERS}

# %%
layer_colors = dict(zip(names, plt.get_cmap("viridis")(np.linspace(0, 0.92, len(names))),
                        strict=True))
figure, axis = plt.subplots(figsize=(7, 3.6))
for layer, color in layer_colors.items():
    axis.plot(runs["lamb"][f"{layer}/trust_ratio_median"], color=color, label=layer)
axis.set(xlabel="step", ylabel="trust ratio", yscale="log",
         title=f"LAMB's trust ratios by layer, batch {BATCH}")
axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
for layer in names:
    ratio, norm = (runs["lamb"][f"{layer}/{what}"] for what in (
        "trust_ratio_median", "parameter_norm"))
    print(f"{layer:14} trust ratio {ratio[0]:.2f} in the first step, {ratio.max():.1f} at most; "
          f"norm of the kernel × {norm[-1] / norm[0]:.1f}")

# %% [markdown]
# All ratios begin between 0.10 and 0.14: Adam's first steps move every element by about the rate,
# and the kernels are small. They rise to between 3.5 and 6.7. The kernels' norms grow by a factor
# of 2.2 or 2.3 only. The rest of the rise is the other norm, that of Adam's update, which falls.
#
# ## How far a step moves a layer

# %%
steps = np.arange(1, EXAMPLES // BATCH)  # the rate is 0 in the first step
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for axis, name in zip(axes, OPTIMIZERS, strict=True):
    for layer, color in layer_colors.items():
        axis.plot(steps, runs[name][f"{layer}/update_to_parameter"][1:], color=color, label=layer)
    axis.plot(steps, runs[name]["learning_rate"][1:], color="black", linestyle=":",
              label="learning rate")
    axis.set(xlabel="step", title=name, yscale="log")
axes[0].set_ylabel("norm of update ÷ norm of parameters")
axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
figure.suptitle(f"How far each step moves each layer, batch {BATCH}")
plt.show()
for name in OPTIMIZERS:
    moved = np.array([runs[name][f"{layer}/update_to_parameter"][1:] for layer in names])
    print(f"{name:5} greatest ÷ least over the layers, median over the steps: "
          f"{np.median(moved.max(axis=0) / moved.min(axis=0)):.1f}")

# %% [markdown]
# In LAMB a step moves each kernel by the learning rate times its norm: all lines lie on the
# dotted one. Under SGD the layers differ, by a factor of 3.1 in the median step. Lion moves each
# element alike, and the kernels of this model have elements of similar size, so that its layers
# differ by a factor of 1.3.
#
# The best rates were chosen on the held-out images.
# This is one small model with two seeds. It shows what a trust ratio does, and is no benchmark.
# Long runs amplify rounding: with another version of JAX a loss at batch 32 changed by 0.007.
