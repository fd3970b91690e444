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
# # Optimizer state in 16, 8 and 4 bits
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/07_low_precision.ipynb)
#
# Lion keeps one moment for each parameter, AdamW two. In float32 these are 4 and 8 bytes. This
# notebook stores them in bfloat16, int8 and int4, and compares the bytes and the losses. Then it
# draws what stochastic rounding does, and chooses formats by path.

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
import time

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
FORMATS = {"float32": "black", "bfloat16": "tab:blue", "int8": "tab:orange", "int4": "tab:red"}

# %% [markdown]
# ## Data and model
#
# The data are scikit-learn's digits: 1000 images to train on and 797 held out. A leaf is stored
# in codes if it has at least 4096 elements and its last axis is a multiple of 64 for int8, of 32
# for int4. Other leaves keep the parameter's dtype. So the width is 128. Only the last kernel, of
# 1280 elements, is too small.

# %%
images, targets = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
x = jnp.asarray(images[order] / 16 - 0.3, jnp.float32)
y = jnp.asarray(targets[order])
x_train, y_train, x_held_out, y_held_out = x[:1000], y[:1000], x[1000:], y[1000:]


class Classifier(nnx.Module):
    """64 pixels to 10 logits, with a perceptron beside a skip connection and no biases."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.embed = linear(64, width)
        self.up = linear(width, 2 * width)
        self.down = linear(2 * width, width)
        self.head = linear(width, 10)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.down(nnx.relu(self.up(jax.nn.standardize(x))))
        return self.head(jax.nn.standardize(x))


def new_params(seed):
    """The parameters of a new model."""
    return nnx.state(Classifier(128, nnx.Rngs(seed)))


def loss_of(params, x, y):
    """The mean cross-entropy."""
    logits = nnx.merge(graph, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


graph, model = nnx.split(Classifier(128, nnx.Rngs(0)))

# %% [markdown]
# ## Bytes
#
# `mu_dtype` and `nu_dtype` name the format of a moment. `lionax.summary` shows what each leaf
# gets, and allocates nothing.

# %%
def lion(rate, dtype):
    return lionax.lion(rate, weight_decay=1.0, mu_dtype=dtype)


def adamw(rate, dtype):
    return lionax.adamw(rate, weight_decay=0.3, mu_dtype=dtype, nu_dtype=dtype)


OPTIMIZERS = {"lion": (lion, 1e-3), "adamw": (adamw, 4e-3)}
print(lionax.summary(adamw(1e-3, "int8"), model))

# %%
sizes = {}
for name, (optimizer, _) in OPTIMIZERS.items():
    for dtype in FORMATS:
        summary = lionax.summary(optimizer(1e-3, dtype), model)
        sizes[name, dtype] = summary.state_bytes / summary.parameters
        print(f"{name:5} {dtype:8} {summary.state_bytes:9,} bytes, "
              f"{sizes[name, dtype]:.2f} for each parameter")

# %% [markdown]
# ## Losses
#
# Each format trains from the same three seeds with the same batches and rate. The rate warms up
# and falls to 0 along a cosine. Its peak is near the best one of a small sweep in float32, judged
# on the held-out images. The other formats have no sweep of their own. `vmap` trains the seeds
# side by side.

# %%
STEPS, BATCH, SEEDS, PARTS = 200, 128, 3, 20


def train(optimizer, peak, dtype, params, chosen):
    """The held-out losses along a training on the chosen images."""
    tx = optimizer(optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS), dtype)

    def step(carry, chosen):
        params, state = carry
        grads = jax.grad(loss_of)(params, x_train[chosen], y_train[chosen])
        return tx.step(params, state, grads), None

    def part(carry, chosen):
        carry, _ = jax.lax.scan(step, carry, chosen)
        return carry, loss_of(carry[0], x_held_out, y_held_out)

    batches = chosen.reshape(PARTS, STEPS // PARTS, BATCH)
    return jax.lax.scan(part, (params, tx.init(params)), batches)[1]


starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(new_params, range(SEEDS)))
chosen = jax.random.randint(jax.random.key(0), (SEEDS, STEPS * BATCH), 0, len(x_train))
losses = {}
for name, (optimizer, peak) in OPTIMIZERS.items():
    for dtype in FORMATS:
        run = jax.vmap(functools.partial(train, optimizer, peak, dtype))
        program = jax.jit(run, compiler_options=lionax.compiler_options())
        losses[name, dtype] = np.asarray(program(starts, chosen))  # [seed, part]

# %%
print(f"{'':6}{'format':9}{'bytes/parameter':>16}{'loss':>9} ± deviation of seeds"
      f"{'difference from float32 by seed':>34}")
for (name, dtype), loss in losses.items():
    last, difference = loss[:, -1], loss[:, -1] - losses[name, "float32"][:, -1]
    print(f"{name:6}{dtype:9}{sizes[name, dtype]:16.2f}{last.mean():9.4f} ± {last.std(ddof=1):.4f}"
          f"{'':16}{'  '.join(f'{one:+.4f}' for one in difference):>32}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=(1, 1, 0.8))
steps = np.arange(1, PARTS + 1) * STEPS // PARTS
for axis, name in zip(axes[:2], OPTIMIZERS, strict=True):
    for width, (dtype, color) in zip((6, 4, 2.5, 1), FORMATS.items(), strict=True):
        loss = losses[name, dtype]
        axis.plot(steps, loss.mean(axis=0), color=color, linewidth=width, label=dtype)
        axis.fill_between(steps, loss.min(axis=0), loss.max(axis=0), color=color, alpha=0.1,
                          linewidth=0)
    axis.set(xlabel="step", yscale="log", title=f"{name}: held-out loss (nats)")
axes[0].sharey(axes[1])
axes[0].legend()
for shift, name in zip((-0.2, 0.2), OPTIMIZERS, strict=True):
    bars = axes[2].bar(np.arange(len(FORMATS)) + shift, [sizes[name, one] for one in FORMATS],
                       0.38, color=list(FORMATS.values()), alpha=1.0 if name == "lion" else 0.5)
    axes[2].bar_label(bars, [f"{name}\n{sizes[name, one]:.1f}" for one in FORMATS], fontsize=7)
axes[2].set(xticks=range(len(FORMATS)), xticklabels=FORMATS,
            title="state: bytes for each parameter", ylim=(0, 9))
axes[2].grid(False)
plt.show()

# %% [markdown]
# Curves are means of the seeds, bands their range. Thick lines lie under thin ones.
#
# bfloat16 and int8 end within 0.002 of float32 with each seed, for both optimizers. AdamW in int4
# ends within 0.005. The deviation of the seeds is 0.013 for Lion and 0.005 for AdamW.
#
# Lion in int4 takes a path of its own. Its update is a sign, and coarse codes flip the signs of
# small moments: [the benchmark of quality](https://github.com/lionax/lionax/blob/main/docs/benchmarks/quality.md)
# counts 6% to 18% of all signs, against 1.3% to 1.4% in int8. Two seeds end lower than in float32
# here, by 0.017 and 0.010, and one ends as there. Three seeds that share their random bits
# do not show that int4 is better. They show that its training is not the same.
#
# Trainings amplify rounding, so another version of JAX or another machine changes the last digits.
#
# ## A step of a hundredth of an ulp
#
# An ulp is the distance of neighbouring floats: 2⁻⁷ in bfloat16 between 1 and 2. Below, a momentum
# stands at 1 and a constant gradient would move it by 1/100 ulp in a step. Rounded to the nearest
# it never moves. Rounded stochastically it moves by a whole ulp in one of 100 steps at first, and
# its expected value is exact.

# %%
ULP, COUNT, ELEMENTS = 2.0**-7, 2000, 1000
gradient = jnp.full(ELEMENTS, 1 + 10 * ULP)  # with b2 = 0.999 a thousandth of 10 ulp


def momenta(storage):
    """The momentum after each step, as float32."""
    tx = lionax.scale_by_lion(b2=0.999, mu_dtype=storage)
    state = tx.init(gradient)
    mu = jnp.ones_like(state.rules.mu)
    state = state._replace(rules=state.rules._replace(mu=mu))

    def step(state, _):
        state = tx.update(gradient, state)[1]
        return state, state.rules.mu.astype(jnp.float32)

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, state, length=COUNT)[1])())


STORAGES = {"float32": "float32", "nearest": lionax.Storage("bfloat16", rounding="nearest"),
            "stochastic": lionax.Storage("bfloat16")}
momentum = {name: momenta(storage) for name, storage in STORAGES.items()}

# %% [markdown]
# A parameter in bfloat16 loses a step of 1/100 ulp in the same way. `lionax.master_weights` keeps
# it. With None the new parameter is rounded stochastically. With "int8" or "bfloat16" the
# state keeps what rounding took away, for 1 or 2 bytes. With "float32" it keeps a copy in float32,
# for 4.


# %%
def parameters(tx):
    """The parameters after each step, as float32."""
    start = jnp.ones(ELEMENTS, jnp.bfloat16)
    grads = jnp.full(ELEMENTS, -ULP / 100)

    def step(carry, _):
        carry = tx.step(*carry, grads)
        return carry, carry[0].astype(jnp.float32)

    return np.asarray(jax.jit(
        lambda: jax.lax.scan(step, (start, tx.init(start)), length=COUNT)[1])())


sgd = lionax.sgd(1.0)
REMAINDERS = {"None": "tab:blue", "int8": "tab:orange", "bfloat16": "tab:green",
              "float32": "tab:red"}
kept = {"plain": parameters(sgd), "None": parameters(lionax.master_weights(sgd))} | {
    kind: parameters(lionax.master_weights(sgd, kind)) for kind in list(REMAINDERS)[1:]}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
left.plot((momentum["stochastic"][:, :4] - 1) / ULP, color="tab:blue", alpha=0.35, linewidth=0.8)
for name, color, style in (("float32", "black", "-"), ("nearest", "tab:red", "-"),
                           ("stochastic", "tab:blue", "--")):
    left.plot((momentum[name].mean(axis=1) - 1) / ULP, color=color, linestyle=style, label=name)
left.set(xlabel="step", ylabel="distance from the start (ulp)",
         title="momentum: mean of 1000, thin: four elements")
left.legend()
right.plot(np.arange(COUNT) / 100, color="black", label="exact")
right.plot((kept["plain"][:, 0] - 1) / ULP, color="tab:gray", label="plain bfloat16")
for width, (kind, color) in zip((1, 5, 3, 1), REMAINDERS.items(), strict=True):
    right.plot((kept[kind][:, 0] - 1) / ULP, color=color, linewidth=width,
               label=f"remainder {kind}")
right.set(xlabel="step", title="one parameter in bfloat16")
right.legend()
plt.show()

# %%
print(f"float32 momentum: {(momentum['float32'][-1].mean() - 1) / ULP:.2f} ulp from the start")
for name in ("nearest", "stochastic"):
    last = (momentum[name][-1] - 1) / ULP
    print(f"{name:10} mean {last.mean():6.2f}, deviation of elements {last.std():.2f}")
print(f"\nparameters, exact: {COUNT / 100:.2f} ulp from the start")
for name, path in kept.items():
    last = (path[-1] - 1) / ULP
    print(f"{name:10} mean {last.mean():6.2f}, deviation of elements {last.std():.2f}")

# %% [markdown]
# The stochastic momentum's mean is float32's: 8.66 and 8.65 ulp. Single elements differ by an ulp
# or so from it, and the average's decay pulls them back.
#
# Nothing pulls a parameter back. With None the mean is right, 20.08 ulp, but the elements spread
# by 4.23 ulp, and the spread grows with the root of the steps. With a remainder each element is
# where it should be: one byte is enough for a gradient as small as this.
#
# ## Formats by path
#
# A dict chooses by path. The first regular expression that matches counts.

# %%
by_path = lionax.lion(1e-3, mu_dtype={"embed": "bfloat16", ".*": "int8"})
print(lionax.summary(by_path, model))

# %% [markdown]
# The first layer's moment is in bfloat16, those of the two kernels in the middle are in int8. The
# last kernel is too small for codes and keeps float32, as biases and scales would.
#
# ## Time
#
# Codes are decoded and encoded in each step. That costs operations and saves memory traffic. This
# cell times a step of Lion on 4 million parameters, on the machine that ran the notebook.

# %%
params = {"w": jnp.ones((2048, 2048))}
grads = {"w": jnp.full((2048, 2048), 0.1)}


def seconds(dtype):
    """The least time of a compiled step."""
    tx = lionax.lion(1e-3, mu_dtype=dtype)
    step = jax.jit(tx.step, compiler_options=lionax.compiler_options())
    state, times = tx.init(params), []
    for _ in range(15):
        start = time.perf_counter()
        jax.block_until_ready(step(params, state, grads))
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one compiles


measured = {dtype: seconds(dtype) for dtype in FORMATS}
print(f"on {jax.default_backend()}, this machine:", ", ".join(
    f"{dtype} {measured[dtype] / measured['float32']:.1f}" for dtype in FORMATS),
    "times float32's time")

# %% [markdown]
# ## Which format to choose
#
# - bfloat16 halves the state. In the trainings above it cannot be told from float32.
# - int8 takes 1.03 bytes for an element in codes: 1 byte and the scale of its block. Its losses
#   above are float32's within 0.002. It is the format to try first where memory is short.
# - int4 takes 0.56 bytes. Try it with AdamW, or with Lion where a training of yours shows that
#   the flipped signs do no harm. In five runs on 2 cores of a CPU the cell above printed 2.0 to
#   2.3 times float32's time, and 1.6 to 1.8 times in int8.
# - Give a dict where single layers need more.
# - For parameters in bfloat16 use `master_weights`, with "int8" if a byte for each is there.
#
# The rounding of codes is unbiased, but it is noise. In the benchmark of quality each of lionax's
# formats ends within the spread of float32's seeds on small tasks. Neither it nor this notebook
# says what a long training of a large model does: compare there with bfloat16.
#
# [The guide to precision](https://github.com/lionax/lionax/blob/main/docs/guides/precision.md)
# says how codes and rounding are defined.
