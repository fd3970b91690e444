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
# # Masks, groups, schedules and hyperparameters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/04_masks_schedules_hyperparameters.ipynb)
#
# This notebook chooses leaves by path, gives groups of leaves optimizers of their own, changes
# hyperparameters while a compiled step runs, and trains with twelve learning rates in one
# program.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch
from sklearn.datasets import load_digits

import lionax

plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})

# %% [markdown]
# ## Data and model
#
# The data are scikit-learn's digits: 1437 images of 8 × 8 pixels to train on and 360 held out.

# %%
images, targets = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x = jnp.asarray(images[order] / 16 - 0.3, jnp.float32)
y = jnp.asarray(targets[order])
x_train, y_train, x_held_out, y_held_out = x[:1437], y[:1437], x[1437:], y[1437:]


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


def loss_of(params, x, y):
    """The mean cross-entropy."""
    logits = nnx.merge(graph, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def new_params():
    """The parameters of a new model."""
    return nnx.state(Classifier(32, 2, nnx.Rngs(0)))


def batches(steps, size=128):
    """Random batches, the same for every run."""
    for seed in range(steps):
        chosen = np.random.default_rng(seed).integers(0, len(x_train), size)
        yield x_train[chosen], y_train[chosen]


graph = nnx.graphdef(Classifier(32, 2, nnx.Rngs(0)))

# %% [markdown]
# ## Masks
#
# A mask says on which leaves a transformation acts. Leaves have paths, whatever the tree is made
# of.

# %%
print(*lionax.paths(new_params()), sep="\n")

# %% [markdown]
# `matching` and `not_matching` choose by regular expressions over these paths. The mask below
# keeps the weight decay away from biases and scales. `summary` shows what acts on which leaf: the
# rows with `add_decayed_weights` are the kernels.

# %%
kernels = lionax.not_matching("bias", "scale")
lionax.summary(lionax.lion(1e-3, weight_decay=0.3, mask=kernels), new_params())

# %% [markdown]
# An expression that matches no leaf is an error. It names the nearest paths.

# %%
try:
    lionax.lion(1e-3, mask=lionax.matching("kernle")).init(new_params())
except ValueError as error:
    print(error)

# %% [markdown]
# ## Groups
#
# `partition` gives groups of leaves transformations of their own, and `labels` makes the groups,
# by the first expression that matches. Here Lion trains the kernels and AdamW the biases and the
# scales. The first layer is frozen.

# %%
groups = lionax.labels({"^embed": "frozen", "kernel": "kernels"}, default="others")
grouped = lionax.partition(
    {"kernels": lionax.lion(1e-3, weight_decay=0.3), "others": lionax.adamw(5e-3),
     "frozen": lionax.set_to_zero()},
    groups)
lionax.summary(grouped, new_params())

# %%
traced = []  # grows when JAX traces a step


def train_step(tx):
    """A compiled training step, which writes into the buffers of its first two arguments."""

    def step(params, state, x, y):
        traced.append(tx)
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        return *tx.step(params, state, grads), loss

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())


params, first = new_params(), new_params()
state = grouped.init(params)
step = train_step(grouped)
for batch in batches(150):
    params, state, loss = step(params, state, *batch)
print(f"held-out loss {loss_of(first, x_held_out, y_held_out):.2f} before, "
      f"{loss_of(params, x_held_out, y_held_out):.2f} after training")
for name, value in lionax.get_hyperparams(state).items():
    print(f"{name} = {value:.4f}")

# %%
colors = {"kernels": "tab:orange", "others": "tab:blue", "frozen": "tab:gray"}
moved = [float(jnp.sqrt(jnp.mean((new - old) ** 2))) for new, old in zip(
    jax.tree.leaves(params), jax.tree.leaves(first), strict=True)]
figure, axis = plt.subplots(figsize=(7, 4))
axis.barh(lionax.paths(first), moved,
          color=[colors[group] for group in jax.tree.leaves(groups(first))])
axis.invert_yaxis()
axis.set(xlabel="root mean square of the change of an element", title="Change in 150 steps")
axis.grid(axis="y")
axis.legend(handles=[Patch(color=color, label=group) for group, color in colors.items()])
plt.show()

# %% [markdown]
# The frozen leaves did not change. Lion moves each element of a kernel by the learning rate, so
# the orange bars are nearly of one length; the blue ones, of AdamW, are not. The state names the
# two rates by group, `kernels/learning_rate` and `others/learning_rate`.
#
# ## Schedules, and values that live in the state
#
# Any number may be a schedule, a function of the step. The state holds the learning rate, and
# every number given as `inject(value)`. `set_hyperparams` assigns them between two steps, and
# None returns to the schedule. Here a run has a small rate for 80 steps.

# %%
STEPS = 300
schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 30, STEPS)
tx = lionax.lion(schedule, b1=lionax.inject(0.9), weight_decay=0.3, mask=kernels)
params = new_params()
state = tx.init(params)
step = train_step(tx)
traced.clear()
rates, losses = [], []
held_out_loss = jax.jit(lambda params: loss_of(params, x_held_out, y_held_out))
for count, batch in enumerate(batches(STEPS)):
    if count == 60:
        state = lionax.set_hyperparams(state, learning_rate=2e-4, b1=0.95)
    if count == 140:
        state = lionax.set_hyperparams(state, learning_rate=None)
    params, state, loss = step(params, state, *batch)
    values = lionax.get_hyperparams(state)
    rates.append(float(values["learning_rate"]))
    losses.append(float(held_out_loss(params)))
print(f"traced {len(traced)} time in {STEPS} steps; b1 is {values['b1']:.2f} at the end")

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True)
top.plot(schedule(jnp.arange(STEPS)), color="black", linestyle=":", label="schedule")
top.plot(rates, color="tab:orange", label="in the state")
top.set(ylabel="learning rate", title="A rate is assigned from step 60 to 139")
top.legend()
bottom.plot(losses, color="tab:orange")
bottom.set(xlabel="step", ylabel="held-out loss (nats)", yscale="log")
for axis in (top, bottom):
    axis.axvspan(60, 140, color="tab:gray", alpha=0.15)
plt.show()

# %% [markdown]
# While the rate is small the loss is smooth and falls little. Then the schedule goes on at the
# step that the run has reached, and the loss falls further. The step was traced once, so neither
# assignment compiled anything. `b1` was assigned, too, and keeps its value.
#
# ## Twelve learning rates in one program
#
# Since the rate lives in the state, `vmap` over states trains with many rates at once. The
# program is compiled once, and all runs see the same batches. An assigned rate is constant.

# %%
RATES = 10.0 ** np.linspace(-4.5, -1, 12)
tx = lionax.lion(1e-3, weight_decay=0.3, mask=kernels)
params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(RATES)), new_params())
states = jax.vmap(lambda params, rate: lionax.set_hyperparams(
    tx.init(params), learning_rate=rate))(params, jnp.asarray(RATES))


def sweep_step(params, state, x, y):
    """A step of one run."""
    traced.append(tx)
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    return *tx.step(params, state, grads), loss


step_all = jax.jit(jax.vmap(sweep_step, in_axes=(0, 0, None, None)), donate_argnums=(0, 1),
                   compiler_options=lionax.compiler_options())
traced.clear()
curves = []
for batch in batches(STEPS):
    params, states, losses = step_all(params, states, *batch)
    curves.append(losses)
curves = np.stack(curves)
held_out = np.asarray(jax.vmap(loss_of, (0, None, None))(params, x_held_out, y_held_out))
print(f"traced {len(traced)} time for {len(RATES)} runs of {STEPS} steps")
for rate, loss in zip(RATES, held_out, strict=True):
    print(f"learning rate {rate:.1e}: held-out loss {loss:.3f}")

# %%
norm = LogNorm(RATES[0], RATES[-1])
colors = plt.get_cmap("plasma")(norm(RATES) * 0.9)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
smooth = np.stack([np.convolve(curve, np.ones(10) / 10, "valid") for curve in curves.T])
for curve, rate, color, loss in zip(smooth, RATES, colors, held_out, strict=True):
    left.plot(np.arange(9, STEPS), curve, color=color)
    right.plot(rate, loss, marker="o", color=color)
left.set(xlabel="step", ylabel="loss, mean of 10 batches (nats)", yscale="log",
         title="Training")
right.plot(RATES, held_out, color="tab:gray", linewidth=1, zorder=0)
right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss (nats)",
          title=f"After {STEPS} steps")
plt.show()

# %% [markdown]
# The best of these rates is 5.9e-04; with 1.2e-03 the training loss falls further, and the
# held-out loss is higher. Where each rate should follow a schedule, trace the peak instead, as
# [Large batches with LAMB][lamb] does.
#
# [lamb]: https://github.com/lionax/lionax/blob/main/notebooks/03_large_batches_with_lamb.ipynb
