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
# # Choosing a learning rate for Lion
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/06_choosing_a_learning_rate_for_lion.ipynb)
#
# Lion's authors advise a learning rate 3 to 10 times below AdamW's, and a weight decay as much
# above. This notebook looks whether that holds for a small classifier: it trains it with each
# rate, decay and batch of a grid, with Lion and with AdamW, and draws the loss as a map.

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
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits

import lionax

plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})
COLORS = {"lion": "tab:orange", "adamw": "tab:blue"}

# %% [markdown]
# ## Data and model
#
# The data are scikit-learn's digits: 1000 images to train on and 797 held out.

# %%
images, targets = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x = jnp.asarray(images[order] / 16 - 0.3, jnp.float32)
y = jnp.asarray(targets[order])
x_train, y_train, x_held_out, y_held_out = x[:1000], y[:1000], x[1000:], y[1000:]


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
    return nnx.state(Classifier(32, 2, nnx.Rngs(seed)))


def loss_of(params, x, y):
    """The mean cross-entropy."""
    logits = nnx.merge(graph, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


graph = nnx.graphdef(Classifier(32, 2, nnx.Rngs(0)))

# %% [markdown]
# ## The grid
#
# Every run sees the same number of examples. Its rate warms up in the first tenth of the steps
# and falls to 0 along a cosine. Kernels are decayed; biases and scales are not.

# %%
EXAMPLES, SEEDS = 32_000, 3
BATCHES = (32, 128, 512)
RATES = 10.0 ** np.linspace(-4, -1, 10)  # the peaks
DECAYS = (0.1, 0.3, 1.0, 3.0, 10.0)
kernels = lionax.not_matching("bias", "scale")
OPTIMIZERS = {
    "lion": lambda rate, decay: lionax.lion(rate, weight_decay=decay, mask=kernels),
    "adamw": lambda rate, decay: lionax.adamw(rate, weight_decay=decay, mask=kernels)}


def train(name, batch, peak, decay, params, chosen):
    """Trains on the chosen images; the loss on the held-out ones."""
    steps = EXAMPLES // batch
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    tx = OPTIMIZERS[name](lambda step: peak * shape(step), decay)

    def step(carry, chosen):
        params, state = carry
        grads = jax.grad(loss_of)(params, x_train[chosen], y_train[chosen])
        return tx.step(params, state, grads), None

    batches = chosen[:steps * batch].reshape(steps, batch)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return loss_of(params, x_held_out, y_held_out)


# %% [markdown]
# The rate and the decay are traced, so `vmap` runs over both. One compiled program trains all 10
# × 5 × 3 runs of an optimizer and a batch.

# %%
starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(new_params, range(SEEDS)))
chosen = jax.random.randint(jax.random.key(0), (SEEDS, EXAMPLES), 0, len(x_train))
losses = {}
for name in OPTIMIZERS:
    for batch in BATCHES:
        run = functools.partial(train, name, batch)
        for axes in ((None, None, 0, 0), (None, 0, None, None), (0, None, None, None)):
            run = jax.vmap(run, axes)  # the seeds, then the decays, then the rates
        program = jax.jit(run, compiler_options=lionax.compiler_options())
        result = np.asarray(program(jnp.asarray(RATES), jnp.asarray(DECAYS), starts, chosen))
        losses[name, batch] = np.nan_to_num(result.mean(axis=2), nan=np.inf)  # [rate, decay]

# %% [markdown]
# ## The maps
#
# Each cell is the held-out loss of one rate and one decay, the mean of three seeds. A star marks
# the best one. On a dotted line rate × decay is the same as there: the share of a kernel that a
# step at the peak takes away.

# %%
best = {run: np.unravel_index(np.argmin(loss), loss.shape) for run, loss in losses.items()}
figure, axes = plt.subplots(2, len(BATCHES), figsize=(10, 5.6), sharex=True, sharey=True)
for row, name in zip(axes, OPTIMIZERS, strict=True):
    for axis, batch in zip(row, BATCHES, strict=True):
        loss = np.minimum(losses[name, batch], 1e3)
        mesh = axis.pcolormesh(RATES, DECAYS, loss.T, cmap="viridis_r",
                               norm=LogNorm(0.05, 1.0), shading="nearest")
        rate, decay = (grid[i] for grid, i in zip((RATES, DECAYS), best[name, batch], strict=True))
        axis.plot(RATES, rate * decay / RATES, color="white", linestyle=":")
        axis.plot(rate, decay, marker="*", markersize=15, color="white", markeredgecolor="black")
        axis.set(xscale="log", yscale="log", title=f"{name}, batch {batch}", xlim=(7e-5, 0.15),
                 ylim=(0.055, 18))
        axis.grid(False)
for axis in axes[-1]:
    axis.set_xlabel("peak learning rate")
for axis in axes[:, 0]:
    axis.set_ylabel("weight decay")
figure.colorbar(mesh, ax=axes, label="held-out loss (nats)", extend="both")
plt.show()

# %% [markdown]
# ## Rates side by side
#
# For each rate the best decay is taken. A bar at the bottom marks the rates whose loss is at most
# 1.3 times the least one.

# %%
figure, axes = plt.subplots(1, len(BATCHES), figsize=(10, 3.2), sharey=True)
found, BARS = {}, {"lion": 0.045, "adamw": 0.041}
for axis, batch in zip(axes, BATCHES, strict=True):
    for name, color in COLORS.items():
        profile = losses[name, batch].min(axis=1)
        good = RATES[profile <= 1.3 * profile.min()]
        found[name, batch] = RATES[profile.argmin()], good
        axis.plot(RATES, profile, color=color, marker=".", label=name)
        axis.plot(good, np.full(len(good), BARS[name]), color=color, linewidth=4, marker="|")
        axis.plot(RATES[profile.argmin()], profile.min(), color=color, marker="*", markersize=13)
    axis.set(xscale="log", yscale="log", ylim=(0.038, 3), title=f"batch {batch}",
             xlabel="peak learning rate")
axes[0].set_ylabel("held-out loss (nats)")
axes[0].legend()
plt.show()

# %%
print(f"{'batch':>5}  {'':6}{'loss':>6}{'rate':>9}{'decay':>7}{'rate x decay':>14}   good rates")
for batch in BATCHES:
    for name in OPTIMIZERS:
        rate, decay = best[name, batch]
        good = found[name, batch][1]
        print(f"{batch:5}  {name:6}{losses[name, batch][rate, decay]:6.3f}{RATES[rate]:9.1e}"
              f"{DECAYS[decay]:7}{RATES[rate] * DECAYS[decay]:14.1e}   "
              f"{good.min():.1e} to {good.max():.1e}")
for batch in BATCHES:
    (lion, lions), (adamw, adamws) = found["lion", batch], found["adamw", batch]
    print(f"batch {batch}: AdamW's best rate is {adamw / lion:.1f} times Lion's, its least good "
          f"rate {adamws.min() / lions.min():.1f} times Lion's least")

# %% [markdown]
# ## What the maps show
#
# - With batches of 32, 128 and 512 AdamW's best rate is 10.0, 4.6 and 4.6 times Lion's. The
#   advice of 3 to 10 holds here, as far as the grid tells: its rates are a factor of 2.2 apart.
# - Lion's best decay is 3.0, 3.0 and 1.0, AdamW's is 0.3: Lion's is 3 to 10 times greater. So
#   rate × decay is alike: equal at batch 32, within a factor of 2.2 at 128 and 512.
# - The best rate of both grows with the batch.
# - AdamW forgives a large rate, here up to the grid's end. Lion does so at batches of 32 and 128
#   only with a decay of 3 or 10; with less decay the map is darker to the right of the star.
# - AdamW ends at a lower loss with every batch: 0.065, 0.066 and 0.086 against Lion's 0.074,
#   0.084 and 0.108. The best cell was chosen on the held-out images, for both.
#
# This is one small model on 1000 images with three seeds. Long runs amplify rounding, so single
# cells differ a little from one version of JAX to another. What to take from the maps is where to
# look: start Lion's sweep at a fifth of AdamW's rate with five times its decay, and vary both.
