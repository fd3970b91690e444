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
# # Bring your own rule
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/05_bring_your_own_rule.ipynb)
#
# A rule of lionax is the math of one array. The engine adds the rest: trees, masks,
# schedules, dtypes, checks, meshes. Here you write AdaBelief (Zhuang et al., 2020), which
# lionax does not have, compare it to Optax's, and use it in all these ways.

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
import dataclasses
import json
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import lionax

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#8c8c8c"
plt.rcParams.update({
    "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left",
})

# %% [markdown]
# ## The equation, and the rule
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\,g \qquad
# s \leftarrow \beta_2 s + (1 - \beta_2)\,(g - m)^2 + \epsilon$$
#
# $$u = \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}$$
#
# AdaBelief divides by how far the gradients stray from their mean, where Adam divides by
# how large they are. A rule is a frozen dataclass. Its fields are the hyperparameters,
# `init` makes the slots of one parameter, and `apply` is the equation. What all leaves
# share, here the two corrections of the bias, `prepare` computes once in a step.


# %%
class AdaBeliefState(NamedTuple):
    m: jax.Array  # mean of gradients; the parameter's shape; m_dtype or the parameter's
    s: jax.Array  # mean squared distance from m; the parameter's shape and dtype


@lionax.register_rule  # lets configs name it
@dataclasses.dataclass(frozen=True)
class AdaBelief(lionax.Rule):
    b1: lionax.Scalar = lionax.scalar(0.9, low=0, high=1, open_high=True)
    b2: lionax.Scalar = lionax.scalar(0.999, low=0, high=1, open_high=True)
    eps: lionax.Scalar = lionax.scalar(1e-16, low=0)
    m_dtype: str | None = None

    def init(self, param):
        return AdaBeliefState(lionax.zero_slot(param, self.m_dtype), lionax.zero_slot(param))

    def prepare(self, count, dtype):
        t = (count + 1).astype(dtype)
        return 1 - self.b1 ** t, 1 - self.b2 ** t

    def apply(self, update, slots, param, step):
        m = self.b1 * slots.m + (1 - self.b1) * update
        s = self.b2 * slots.s + (1 - self.b2) * (update - m) ** 2 + self.eps
        correct_m, correct_s = step.shared
        direction = (m / correct_m) / (jnp.sqrt(s / correct_s) + self.eps)
        return direction, AdaBeliefState(m, s)


def scale_by_adabelief(**hyperparameters):
    return lionax.Transformation.of(AdaBelief(**hyperparameters))


# %% [markdown]
# ## Compared to the equation
#
# In NumPy, in float64, for one array and 200 steps:

# %%
gradients = np.random.default_rng(0).normal(0.3, 1.0, size=(200, 50)).astype(np.float32)
m, s, expected = np.zeros(50), np.zeros(50), []
for t, g in enumerate(gradients.astype(np.float64), 1):
    m = 0.9 * m + 0.1 * g
    s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
    expected.append(m / (1 - 0.9 ** t) / (np.sqrt(s / (1 - 0.999 ** t)) + 1e-16))

tx = scale_by_adabelief()
update, state, found = jax.jit(tx.update), tx.init(jnp.zeros(50)), []
for g in gradients:
    u, state = update(g, state)
    found.append(u)
error = np.max(np.abs(np.array(found) - expected) / np.abs(expected).max(axis=1, keepdims=True))
print(f"greatest error: {error:.1e} of the greatest element")

# %% [markdown]
# ## Compared to Optax, in a training run
#
# The rule goes into a chain like lionax's own: after a clip, before decay that spares
# the biases, with a schedule. The data are scikit-learn's digits. Optax's chain becomes
# lionax's by `lionax.chain`, so the same loop trains both.

# %%
STEPS, BATCH = 300, 256
x_all, y_all = load_digits(return_X_y=True)
x_all, y_all = (x_all / 16).astype(np.float32), y_all.astype(np.int32)


def batch(step):
    chosen = np.random.default_rng([0, step]).integers(0, len(x_all), BATCH)
    return x_all[chosen], y_all[chosen]


def initial(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    sizes = {"hidden": (64, 64), "out": (64, 10)}
    return {name: {"kernel": jnp.asarray(rng.normal(size=size) / np.sqrt(size[0]), dtype),
                   "bias": jnp.zeros(size[1], dtype)} for name, size in sizes.items()}


def loss_of(params, x, y):
    x = x.astype(params["hidden"]["kernel"].dtype)
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = x @ params["out"]["kernel"] + params["out"]["bias"]
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx, params, steps=STEPS, assign=None):
    """The parameters, the state and the losses; `assign` maps a step to new values."""
    def train_step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        params, state = tx.step(params, state, grads)
        return params, state, loss

    train_step = jax.jit(train_step, donate_argnums=(0, 1),
                         compiler_options=lionax.compiler_options())
    state, losses = tx.init(params), []
    for step in range(steps):
        if assign and step in assign:
            state = lionax.set_hyperparams(state, **assign[step])
        params, state, loss = train_step(params, state, *batch(step))
        losses.append(loss)
    print(f"loss {np.mean(jax.device_get(losses[-20:])):.4f} (mean of the last 20 steps), "
          f"compiled {train_step._cache_size()}×")
    return params, state, jax.device_get(losses)


rate = optax.cosine_decay_schedule(3e-3, STEPS)
decayed = lionax.not_matching("bias")


def adabelief(rule, learning_rate=rate):
    return lionax.chain(
        lionax.clip_by_global_norm(1.0), rule,
        lionax.add_decayed_weights(0.01, mask=decayed),
        lionax.scale_by_learning_rate(learning_rate),
    )


ours = adabelief(scale_by_adabelief())
theirs = lionax.chain(optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_belief(),
    optax.add_decayed_weights(0.01, mask=decayed), optax.scale_by_learning_rate(rate),
))
params, state, losses = train(ours, initial())
their_params, _, their_losses = train(theirs, initial())
pairs = zip(jax.tree.leaves(params), jax.tree.leaves(their_params), strict=True)
print(f"greatest difference of a parameter: {max(np.abs(a - b).max() for a, b in pairs):.1e}")

# %%
steps = np.arange(1, STEPS + 1)
fig, ax = plt.subplots(figsize=(6.5, 2.8))
ax.semilogy(steps, their_losses, color=ORANGE, lw=4, alpha=0.4, label="optax.scale_by_belief")
ax.semilogy(steps, losses, color=BLUE, lw=1, label="the rule above")
ax.set(xlabel="step", ylabel="cross entropy (nats)", title="AdaBelief")
ax.legend()
plt.show()

# %% [markdown]
# The curves lie on each other. `summary` knows the rule and its slots:

# %%
lionax.summary(ours, params)

# %% [markdown]
# ## Injected values
#
# Each field made with `lionax.scalar` may be a number, a schedule or
# `lionax.inject(value)`. An injected value is held in the state, and can be assigned
# during training. The step is not compiled again.

# %%
tx = adabelief(scale_by_adabelief(b1=lionax.inject(0.9)), learning_rate=1e-3)
_, state, assigned = train(tx, initial(), assign={150: {"b1": 0.8, "learning_rate": 1e-2}})
_, _, constant = train(tx, initial())
{name: round(float(value), 6) for name, value in lionax.get_hyperparams(state).items()}

# %%
fig, ax = plt.subplots(figsize=(6.5, 2.8))
ax.semilogy(steps, constant, color=GREY, lw=1, label="constant")
ax.semilogy(steps, assigned, color=BLUE, lw=1, label="assigned before step 151")
ax.axvline(150.5, color=GREY, lw=1, ls=":")
ax.set(xlabel="step", ylabel="cross entropy (nats)",
       title="Ten times the learning rate, and a shorter memory")
ax.legend()
plt.show()

# %% [markdown]
# ## bfloat16
#
# A field named `..._dtype` says how a slot is stored. The rule computes in float32
# whatever the dtype of the parameters and the slots: each is rounded once, at the end
# of a step. So nothing in the rule changes.

# %%
kinds = {
    "float32": (scale_by_adabelief(), jnp.float32),
    "m in bfloat16": (scale_by_adabelief(m_dtype="bfloat16"), jnp.float32),
    "all in bfloat16": (scale_by_adabelief(), jnp.bfloat16),
}
curves = {}
for name, (rule, dtype) in kinds.items():
    print(f"{name:16}", end="")
    _, state, curves[name] = train(adabelief(rule), initial(dtype))
    slots = [array for array in jax.tree.leaves(state.rules) if array.ndim]
    print(f"{'':16}slots: {sum(array.nbytes for array in slots):,} bytes")

# %%
fig, ax = plt.subplots(figsize=(6.5, 2.8))
looks = [(ORANGE, 4, 0.4), (BLUE, 1, 1.0), (GREY, 1, 1.0)]
for (name, curve), (color, width, alpha) in zip(curves.items(), looks, strict=True):
    ax.semilogy(steps, curve, color=color, lw=width, alpha=alpha, label=name)
ax.set(xlabel="step", ylabel="cross entropy (nats)", title="What is stored in bfloat16")
ax.legend()
plt.show()

# %% [markdown]
# With `m` in bfloat16 the run ends at the same loss here, and its slots take three
# quarters of the bytes. With everything in bfloat16 they take half, and the loss ends
# higher: a parameter of 8 significant bits does not hold small updates.
#
# ## Masks and partitions
#
# The rule never sees a mask. Here it trains the output layer alone, and Lion the rest:

# %%
mixed = lionax.partition(
    {"belief": adabelief(scale_by_adabelief()), "lion": lionax.lion(1e-3, weight_decay=0.0)},
    lionax.labels({"^out/": "belief"}, default="lion"))
lionax.summary(mixed, params)

# %% [markdown]
# Training works as before:

# %%
_ = train(mixed, initial())

# %% [markdown]
# ## A rule that needs norms
#
# `scope` and `norms_of` ask for norms, which `step.norms` brings. The engine sums them
# over the leaf or the whole tree, over the devices of a mesh, and safe from overflow.
# This rule bounds each leaf's update by a fraction of the parameter's norm:


# %%
@dataclasses.dataclass(frozen=True)
class Bound(lionax.Rule):
    scope = "leaf"
    norms_of = ("update", "param")
    is_memoryless = True
    fraction: lionax.Scalar = lionax.scalar(0.01, low=0)

    def apply(self, update, slots, param, step):
        of_update, of_param = step.norms
        greatest = self.fraction * jnp.maximum(of_param, 1e-3)
        return update * jnp.minimum(1.0, greatest / of_update), slots


bound = lionax.Transformation.of(Bound(0.01))
ones = {"small": jnp.ones(4), "large": jnp.ones(4)}  # parameters of norm 2
grads = {"small": jnp.full(4, 1e-3), "large": jnp.full(4, 1e30)}
updates, _ = bound.update(grads, bound.init(ones), ones)
print({name: f"norm of the update: {jnp.linalg.norm(update):.3f}"
       for name, update in updates.items()})

# %% [markdown]
# ## What comes with it
#
# A rule is data. So a chain with one compares, prints, pickles, and goes through a
# config of JSON. (Optax's schedules are closures, which do not; here the rate is a
# number.)


# %%
def make():
    return adabelief(scale_by_adabelief(b1=0.95), learning_rate=1e-3)


print("equal:  ", make() == make())
print("pickle: ", pickle.loads(pickle.dumps(make())) == make())
print("config: ", lionax.from_config(json.loads(json.dumps(lionax.to_config(make())))) == make())
make()

# %% [markdown]
# And mistakes are refused where they are made, in words:

# %%
mistakes = {
    "a value out of range": lambda: scale_by_adabelief(b2=1.5),
    "a gradient of another shape": lambda: ours.step(
        params, ours.init(params), {**params, "out": {"kernel": jnp.ones((64, 1)),
                                                      "bias": jnp.ones(10)}}),
}
for name, mistake in mistakes.items():
    try:
        mistake()
    except (TypeError, ValueError) as error:
        print(f"{name}:\n    {error}")

# %% [markdown]
# [docs/rules.md](https://github.com/lionax/lionax/blob/main/docs/rules.md) says what else
# the engine promises a rule.
