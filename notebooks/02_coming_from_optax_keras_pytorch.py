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
# # Coming from Optax, Keras or PyTorch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lionax/lionax/blob/main/notebooks/02_coming_from_optax_keras_pytorch.ipynb)
#
# You have a training run in another system. Here such runs are moved to lionax in the
# middle of the training, with the state of the optimizer, and moved back. If lionax
# computes the same numbers, nobody can see the switch in the curves.

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
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
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
# All runs see the same batches of handwritten digits, and train for 300 steps. From
# step 100 to step 200 lionax is at work.

# %%
STEPS, TO_LIONAX, BACK, BATCH = 300, 100, 200, 256
x_all, y_all = load_digits(return_X_y=True)
x_all, y_all = (x_all / 16).astype(np.float32), y_all.astype(np.int32)


def batch(step):
    chosen = np.random.default_rng([0, step]).integers(0, len(x_all), BATCH)
    return x_all[chosen], y_all[chosen]


def is_ours(step):
    return TO_LIONAX <= step < BACK


def draw(ax, alone, switched, name):
    """The run in one system, and over it the one that is switched."""
    steps = np.arange(1, STEPS + 1)
    ax.plot(steps, alone, color=ORANGE, lw=4, alpha=0.4, label=f"{name} alone")
    theirs = np.ma.masked_where([is_ours(s) for s in range(STEPS)], switched)
    ours = np.ma.masked_where([not is_ours(s) for s in range(STEPS)], switched)
    ax.plot(steps, theirs, color=GREY, lw=1, label=f"switched: {name}")
    ax.plot(steps, ours, color=BLUE, lw=1, label="switched: lionax")
    for step in (TO_LIONAX, BACK):
        ax.axvline(step + 0.5, color=GREY, lw=1, ls=":")
    ax.set(xlabel="step", ylabel="cross entropy (nats)", yscale="log")


# %% [markdown]
# ## From Optax
#
# lionax speaks Optax's contract, with Optax's names and arguments. So `tx = lionax.lion(...)`
# works in place of `tx = optax.lion(...)`, and all else stays as it is. One call is
# better than before: `step` in place of `update` and `apply_updates`.
#
# | Optax | lionax |
# | --- | --- |
# | `tx = optax.lion(rate, weight_decay=0.1)` | `tx = lionax.lion(rate, weight_decay=0.1)` |
# | `tx.update(grads, state, params)`, `optax.apply_updates` | `tx.step(params, state, grads)` |
# | `optax.inject_hyperparams(optax.lion)` | `lionax.set_hyperparams(state, ...)` |
# | `optax.MultiSteps(tx, 8)` | `lionax.accumulate(tx, 8)` |
# | `optax.apply_if_finite(tx, 5)` | `lionax.skip_nonfinite(tx, 5)` |


# %%
def initial():
    rng = np.random.default_rng(1)
    sizes = {"hidden": (64, 64), "out": (64, 10)}
    return {name: {"kernel": jnp.asarray(rng.normal(size=size) / np.sqrt(size[0]), jnp.float32),
                   "bias": jnp.zeros(size[1])} for name, size in sizes.items()}


def loss_of(params, x, y):
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = x @ params["out"]["kernel"] + params["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def optax_step(tx):
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def lionax_step(tx):
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        params, state = tx.step(params, state, grads)
        return params, state, loss

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())


# %% [markdown]
# `from_optax` moves the moments and the count of Optax's state into lionax's, and
# `to_optax` moves them back. The schedule goes on where it was, since the count does.


# %%
def switched_run(theirs, ours):
    params = initial()
    state, their_step, our_step = theirs.init(params), optax_step(theirs), lionax_step(ours)
    losses = []
    for step in range(STEPS):
        if step == TO_LIONAX:
            state = lionax.compat.from_optax(state, ours.init(params), count=step)
        if step == BACK:
            state = lionax.compat.to_optax(state, theirs.init(params))
        train = our_step if is_ours(step) else their_step
        params, state, loss = train(params, state, *batch(step))
        losses.append(loss)
    return params, jax.device_get(losses)


def optax_run(tx):
    params = initial()
    state, train, losses = tx.init(params), optax_step(tx), []
    for step in range(STEPS):
        params, state, loss = train(params, state, *batch(step))
        losses.append(loss)
    return params, jax.device_get(losses)


def greatest_difference(params, others):
    """Relative to the greatest element of each leaf."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


cosine = optax.cosine_decay_schedule
makers = {
    "lion": lambda system: system.lion(cosine(2e-3, STEPS), weight_decay=0.1),
    "lamb": lambda system: system.lamb(cosine(2e-2, STEPS), weight_decay=0.1),
    "adamw": lambda system: system.adamw(cosine(5e-3, STEPS), weight_decay=0.1),
    "sgd": lambda system: system.sgd(cosine(0.2, STEPS), momentum=0.9, nesterov=True),
}
fig, axes = plt.subplots(1, 4, figsize=(11, 2.8), sharey=True)
for ax, (name, make) in zip(axes, makers.items(), strict=True):
    params, alone = optax_run(make(optax))
    moved, switched = switched_run(make(optax), make(lionax))
    draw(ax, alone, switched, "Optax")
    ax.set_title(name)
    ax.label_outer()
    print(f"{name:6} parameters after {STEPS} steps differ by "
          f"{greatest_difference(moved, params):.1e} of a leaf's greatest element")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# The orange line is Optax alone. The run that is switched lies on it before, between and
# after the two switches. What is left is in the last bits of float32.
#
# ## From Keras
#
# The constructors of `lionax.compat.keras3` have Keras's names, arguments and defaults.
# `from_config` reads them from a running optimizer.

# %%
keras.utils.set_random_seed(0)
schedules = keras.optimizers.schedules


def keras_model():
    model = keras.Sequential([
        keras.Input((64,)), keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dense(10, name="out")])
    rate = schedules.CosineDecay(2e-3, decay_steps=STEPS)
    optimizer = keras.optimizers.Lion(rate, weight_decay=0.1, global_clipnorm=1.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    return model


alone, moving = keras_model(), keras_model()
moving.set_weights(alone.get_weights())
alone_losses = [float(alone.train_on_batch(*batch(step))) for step in range(STEPS)]
tx = lionax.compat.keras3.from_config(moving.optimizer.get_config())
tx

# %% [markdown]
# `from_weights` makes the state from the optimizer's variables, and `to_weights` gives
# them back. Keras lists variables in the model's order, JAX sorts a dict by its keys,
# so the paths are given in Keras's order.


# %%
paths = [variable.path for variable in moving.trainable_variables]


def keras_loss(params, x, y):
    logits, _ = moving.stateless_call([params[path] for path in paths], [], x)
    return moving.loss(y, logits)


@jax.jit
def train(params, state, x, y):
    loss, grads = jax.value_and_grad(keras_loss)(params, x, y)
    params, state = tx.step(params, state, grads)
    return params, state, loss


losses = [moving.train_on_batch(*batch(step)) for step in range(TO_LIONAX)]

weights = [variable.numpy() for variable in moving.optimizer.variables]
params = dict(zip(paths, moving.get_weights(), strict=True))
state = lionax.compat.from_weights(tx, params, weights, paths)

for step in range(TO_LIONAX, BACK):
    params, state, loss = train(params, state, *batch(step))
    losses.append(loss)

moving.set_weights([params[path] for path in paths])
weights = lionax.compat.to_weights(tx, state, paths)
moving.optimizer.load_own_variables({str(i): value for i, value in enumerate(weights)})
losses += [moving.train_on_batch(*batch(step)) for step in range(BACK, STEPS)]

fig, ax = plt.subplots(figsize=(6.5, 2.8))
draw(ax, alone_losses, [float(loss) for loss in losses], "Keras")
ax.set_title("keras.optimizers.Lion, clipped, with a cosine decay")
ax.legend(fontsize=9)
plt.show()
difference = greatest_difference(moving.get_weights(), alone.get_weights())
print(f"parameters after {STEPS} steps differ by {difference:.1e} of a leaf's greatest element")

# %% [markdown]
# Both systems round alike up to the last bits. With Lion such a bit can decide the sign
# of a momentum near zero, so a difference of one step in one element would be no error.
#
# ## From PyTorch
#
# | PyTorch | lionax |
# | --- | --- |
# | `torch.optim.AdamW(parameters, lr, weight_decay=0.01)` | `lionax.adamw(lr, weight_decay=0.01)` |
# | `torch.optim.SGD(parameters, lr, momentum=0.9)` | `lionax.sgd(lr, momentum=0.9)` |
# | `lion_pytorch.Lion(parameters, lr)` | `lionax.lion(lr, weight_decay=0.0)` |
# | `torch.optim.lr_scheduler.…` | a function of the step as `learning_rate` |
# | `clip_grad_norm_(parameters, 1.0)` | `lionax.chain(lionax.clip_by_global_norm(1.0), ...)` |
# | parameter groups | `lionax.partition`, or `mask=lionax.matching(...)` |
#
# PyTorch's state is a dict for each parameter, with the moments and the count of
# Optax's Adam. So `from_optax` and `to_optax` move it, too. A matrix of PyTorch's
# `Linear` is the transpose of a Flax kernel; here the trees keep PyTorch's layout.


# %%
def torch_loss(params, x, y):
    x = jax.nn.relu(x @ params["0.weight"].T + params["0.bias"])
    logits = x @ params["2.weight"].T + params["2.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def torch_runs(torch):
    """PyTorch alone, and PyTorch with lionax in the middle."""
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(),
                                torch.nn.Linear(64, 10)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1) for net in nets]
    tx = lionax.adamw(3e-3, weight_decay=0.1)

    def torch_step(net, optimizer, step):
        x, y = (torch.from_numpy(array) for array in batch(step))
        loss = torch.nn.functional.cross_entropy(net(x), y.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @jax.jit
    def train(params, state, x, y):
        loss, grads = jax.value_and_grad(torch_loss)(params, x, y)
        params, state = tx.step(params, state, grads)
        return params, state, loss

    alone = [torch_step(nets[0], optimizers[0], step) for step in range(STEPS)]
    switched = [torch_step(nets[1], optimizers[1], step) for step in range(TO_LIONAX)]

    named = dict(nets[1].named_parameters())
    slots = {name: optimizers[1].state[value] for name, value in named.items()}
    params = {name: jnp.array(value.detach().numpy()) for name, value in named.items()}
    moments = [{name: jnp.array(slot[key].numpy()) for name, slot in slots.items()}
               for key in ("exp_avg", "exp_avg_sq")]
    adam = optax.ScaleByAdamState(jnp.int32(TO_LIONAX), *moments)
    state = lionax.compat.from_optax(adam, tx.init(params))

    for step in range(TO_LIONAX, BACK):
        params, state, loss = train(params, state, *batch(step))
        switched.append(float(loss))

    adam = lionax.compat.to_optax(state, adam)
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(torch.tensor(np.asarray(params[name])))
            slots[name]["step"].fill_(BACK)
            slots[name]["exp_avg"].copy_(torch.tensor(np.asarray(adam.mu[name])))
            slots[name]["exp_avg_sq"].copy_(torch.tensor(np.asarray(adam.nu[name])))
    switched += [torch_step(nets[1], optimizers[1], step) for step in range(BACK, STEPS)]
    weights = [[value.detach().numpy() for value in net.parameters()] for net in nets]
    return alone, switched, greatest_difference(weights[1], weights[0])


try:
    import torch
except ImportError:
    print("PyTorch is not installed; this run is left out.")
else:
    alone, switched, difference = torch_runs(torch)
    fig, ax = plt.subplots(figsize=(6.5, 2.8))
    draw(ax, alone, switched, "PyTorch")
    ax.set_title("torch.optim.AdamW")
    ax.legend(fontsize=9)
    plt.show()
    print(f"parameters after {STEPS} steps differ by {difference:.1e} of a leaf's greatest "
          "element")

# %% [markdown]
# ## What else there is
#
# [docs/compat.md](https://github.com/lionax/lionax/blob/main/docs/compat.md) lists, for
# Optax, Keras 2 and 3, DTensor and TensorFlow's Model Garden, each argument, its
# counterpart in lionax, and the recorded run that proves it.
# [docs/differences.md](https://github.com/lionax/lionax/blob/main/docs/differences.md)
# lists where lionax differs from Optax on purpose.
