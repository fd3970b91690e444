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
# # Quickstart: train a Flax model with Lion
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/01_quickstart.ipynb)
#
# A small convolutional network learns to read handwritten digits. You see how lionax
# is used with Flax NNX, what it tells about an optimizer before training, and what it
# measures during training.

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
from sklearn.datasets import load_digits

import lionax

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#8c8c8c"
plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})

# %% [markdown]
# ## The data
#
# scikit-learn ships 1797 images of 8 × 8 pixels. A fifth of them is kept for
# validation.

# %%
digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
order = np.random.default_rng(0).permutation(len(images))
held_out, train = np.split(order, [len(order) // 5])
x_train, y_train = images[train], labels[train]
x_valid, y_valid = images[held_out], labels[held_out]

fig, axes = plt.subplots(1, 10, figsize=(7, 1))
for ax, image, label in zip(axes, x_train, y_train, strict=False):
    ax.imshow(image[..., 0], cmap="gray_r")
    ax.set_title(label, loc="center")
    ax.set_axis_off()

# %% [markdown]
# ## The model
#
# `nnx.split` takes a Flax NNX module apart: into its structure, and its parameters,
# a tree of arrays. The parameters are what an optimizer works on.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.out(x.reshape(len(x), -1))


graph, params = nnx.split(Net(nnx.Rngs(0)))

# %% [markdown]
# ## The optimizer
#
# It is a chain: clip the gradients by their global norm, then Lion. The learning rate
# is one of Optax's schedules. `mask` chooses by path which leaves decay.
# `lionax.monitor` around the chain measures what it does.

# %%
BATCH, EPOCHS = 64, 15
batches = len(x_train) // BATCH  # in an epoch
decayed = lionax.not_matching("bias")


def schedule(peak):
    steps = EPOCHS * batches
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)


lion = lionax.lion(schedule(3e-3), weight_decay=3.0, mask=decayed)
tx = lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1.0), lion))

# %% [markdown]
# Before anything runs, `lionax.summary` shows which rules act on which leaf, and what
# the state holds for it. `mu` is Lion's momentum. `signs` belongs to the monitor.

# %%
lionax.summary(tx, params)

# %% [markdown]
# ## The training step
#
# `tx.step(params, state, grads)` returns the new parameters and the new state. Both are
# donated: the step writes into their buffers. `lionax.compiler_options()` are options
# of XLA with which a CPU copies none of these buffers. `lionax.metrics(state)` is what
# the monitor measured in this step.


# %%
def loss_of(params, x, y):
    logits = nnx.merge(graph, params)(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, logits.argmax(axis=-1)


def make_train_step(tx):
    def train_step(params, state, x, y):
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params, x, y)
        params, state = tx.step(params, state, grads)
        return params, state, {"loss": loss, **lionax.metrics(state)}

    return jax.jit(train_step, donate_argnums=(0, 1),
                   compiler_options=lionax.compiler_options())


evaluate = jax.jit(loss_of)


def train(tx, seed=0):
    _, params = nnx.split(Net(nnx.Rngs(seed)))
    state, train_step = tx.init(params), make_train_step(tx)
    rng, history, validation = np.random.default_rng(seed), [], []
    for _ in range(EPOCHS):
        for batch in rng.permutation(len(x_train))[:batches * BATCH].reshape(-1, BATCH):
            params, state, measured = train_step(params, state, x_train[batch],
                                                 y_train[batch])
            history.append(measured)
        validation.append(float(evaluate(params, x_valid, y_valid)[0]))
    history = jax.device_get(history)  # once, at the end: a step waits for nothing
    curves = {name: np.array([measured[name] for measured in history])
              for name in history[0]}
    return params, curves, validation


# %% [markdown]
# To compare, AdamW takes Lion's place in the same chain.

# %%
adamw = lionax.adamw(schedule(1e-2), weight_decay=0.03, mask=decayed)
runs = {
    "Lion": train(tx),
    "AdamW": train(lionax.monitor(lionax.chain(lionax.clip_by_global_norm(1.0), adamw))),
}
for name, (params, _, validation) in runs.items():
    _, predicted = evaluate(params, x_valid, y_valid)
    print(f"{name:6} validation loss {validation[-1]:.3f}, "
          f"wrong {np.sum(predicted != y_valid)} of {len(y_valid)}")

# %% [markdown]
# Both learn the digits. AdamW reaches the lower loss here; the rates and decays were
# chosen from a handful, and one run each says little about the optimizers.

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.2))
for color, (name, (_, curves, validation)) in zip((BLUE, ORANGE), runs.items(), strict=True):
    steps = np.arange(1, len(curves["loss"]) + 1)
    ax.semilogy(steps, curves["loss"], color=color, alpha=0.35, lw=1,
                label=f"{name}, training batch")
    ax.semilogy(steps[batches - 1::batches], validation, "o-", color=color, ms=3.5,
                label=f"{name}, validation")
ax.set(xlabel="step", ylabel="cross entropy (nats)", title="The loss of both runs")
ax.legend(ncol=2, fontsize=9)
plt.show()

# %% [markdown]
# ## What was measured
#
# Every element of Lion's direction is 1 or -1, so the schedule sets the size of an
# update. Divided by the norm of the parameters, it shows warm-up and decay. The signs
# tell how much the gradients agree from step to step: 0 would be a constant direction,
# 0.5 a toss of a coin.

# %%
curves = runs["Lion"][1]
panels = {
    "gradient_norm": "Norm of the gradients\nbefore the clip",
    "update_to_parameter": "Norm of the update ÷\nnorm of the parameters",
    "sign_changes": "Share of signs that\ndiffer from the last step's",
}
fig, axes = plt.subplots(1, 3, figsize=(9, 2.7))
for ax, (name, title) in zip(axes, panels.items(), strict=True):
    ax.plot(steps, curves[name], color=BLUE, lw=1)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
axes[0].axhline(1.0, color=GREY, ls="--", lw=1)
axes[0].text(steps[-1], 1.1, "clip", color=GREY, ha="right", va="bottom")
axes[0].set_yscale("log")
plt.show()
print(f"The clip acted in {np.sum(curves['clip_factor'] < 1)} of {len(steps)} steps.")

# %% [markdown]
# ## What the model gets wrong

# %%
params = runs["Lion"][0]
_, predicted = evaluate(params, x_valid, y_valid)
wrong = np.flatnonzero(predicted != y_valid)[:10]
fig, axes = plt.subplots(1, 10, figsize=(7, 1.1))
for ax in axes:
    ax.set_axis_off()
for ax, i in zip(axes, wrong, strict=False):
    ax.imshow(x_valid[i, ..., 0], cmap="gray_r")
    ax.set_title(f"{y_valid[i]} as {predicted[i]}", loc="center", fontsize=9)
plt.show()

# %% [markdown]
# ## Why lionax
#
# `lionax.plan` compiles a step without running it, and asks XLA what it costs. It needs
# shapes only, so a large model takes no memory. These are the weight matrices of a
# transformer with 12 layers:

# %%
matrices = {"attention": (768, 3072), "up": (768, 3072), "down": (3072, 768)}
large = {f"layer{i}": {name: jax.ShapeDtypeStruct(shape, jnp.float32)
                       for name, shape in matrices.items()} for i in range(12)}
lionax.plan(lionax.lion(1e-4), large)

# %% [markdown]
# What the plan calls temporary, for both libraries, without the options and with them:


# %%
def optax_step(params, state, grads):
    updates, state = optax.lion(1e-4).update(grads, state, params)
    return optax.apply_updates(params, updates), state


for name, step in {"Optax": optax_step, "lionax": lionax.lion(1e-4).step}.items():
    init = optax.lion(1e-4).init if name == "Optax" else lionax.lion(1e-4).init
    arguments = large, jax.eval_shape(init, large), large
    for title, options in {"without": {}, "with": lionax.compiler_options()}.items():
        program = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
        memory = program.lower(*arguments).compile().memory_analysis()
        print(f"{name:6} {title:7} {memory.temp_size_in_bytes:12,} bytes")

# %% [markdown]
# - **Lean.** On a CPU the options spare a copy of the momentum, four bytes for each
#   parameter. They are plain options of XLA, so they help Optax, too.
# - **Inspectable.** `summary` shows which rule acts on which leaf, `plan` what a step
#   costs, `metrics` what it did.
# - **Compatible.** Each piece is an Optax transformation. Optax's schedules and
#   transformations work in `lionax.chain`, and lionax's in `optax.chain`.
# - **Exact.** The numbers are those of the reference optimizers.
#   [The next notebook](https://github.com/lionax/lionax/blob/main/notebooks/02_coming_from_optax_keras_pytorch.ipynb)
#   moves runs of Optax, Keras and PyTorch to lionax in mid-training.
