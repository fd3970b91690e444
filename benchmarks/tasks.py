"""Small trainings whose weights are mostly in leaves that can be stored as codes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import lionax
from lionax.core.storage import StorageLike
from lionax.demo import model, text

__all__ = ["TASKS", "Task"]

Optimizer = Callable[[Callable[[Any], Any], StorageLike], lionax.Transformation]
"""From a schedule and the storage of the moments to a transformation."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and its optimizer."""

    title: str
    optimizer: Optimizer
    decay: float  # of the first moment
    weight: float | None  # of the momentum in Lion's sign; None for another optimizer
    rates: tuple[float, ...]  # the sweep
    steps: int
    init: Callable[[jax.Array], Any]  # from a key to the parameters
    batch: Callable[[jax.Array], Any]  # from a key to what a step trains on
    loss: Callable[[Any, Any], jax.Array]  # from parameters and a batch
    validation: Any  # a batch


def _lion(rate: Any, dtype: StorageLike) -> lionax.Transformation:
    return lionax.lion(rate, b1=0.9, b2=0.99, mu_dtype=dtype, weight_decay=0.1)


def _lamb(rate: Any, dtype: StorageLike) -> lionax.Transformation:
    return lionax.lamb(rate, weight_decay=0.01, mu_dtype=dtype, nu_dtype=dtype)


def _adamw(rate: Any, dtype: StorageLike) -> lionax.Transformation:
    return lionax.adamw(rate, weight_decay=0.01, mu_dtype=dtype, nu_dtype=dtype)


Images = tuple[jax.Array, jax.Array]
"""Digits, float32 [images, 64] from -0.5 to 0.5, and int32 [images] what they show."""


@functools.cache
def _digits() -> tuple[Images, Images]:
    """1,024 images to train on and the other 773."""
    images, shown = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, shown = (images[order] / 16 - 0.5).astype(np.float32), shown[order].astype(np.int32)
    train, held_out = ((jnp.asarray(images[part]), jnp.asarray(shown[part]))
                       for part in (slice(1024), slice(1024, None)))
    return train, held_out


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -jnp.mean(chosen)


def _dense(key: jax.Array, *shape: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
    return {"kernel": kernel, "bias": jnp.zeros(shape[-1])}


def _perceptron(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, 3)
    return [_dense(keys[0], 64, 128), _dense(keys[1], 128, 128), _dense(keys[2], 128, 10)]


def _perceptron_loss(layers: list[dict[str, jax.Array]], batch: Images) -> jax.Array:
    x, targets = batch
    for layer in layers[:-1]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return _cross_entropy(x @ layers[-1]["kernel"] + layers[-1]["bias"], targets)


def _convolutions(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, 3)
    return [_dense(keys[0], 3, 3, 1, 64), _dense(keys[1], 3, 3, 64, 64), _dense(keys[2], 64, 10)]


def _convolved(x: jax.Array, layer: dict[str, jax.Array], stride: int) -> jax.Array:
    # One product of matrices: under vmap XLA makes a grouped convolution, which is slow on a CPU.
    high, wide = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate([padded[:, i:i + high:stride, j:j + wide:stride]
                               for i in range(3) for j in range(3)], axis=-1)
    kernel = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    return jax.nn.gelu(patches @ kernel + layer["bias"])


def _convolutions_loss(layers: list[dict[str, jax.Array]], batch: Images) -> jax.Array:
    x, targets = batch
    x = _convolved(x.reshape(-1, 8, 8, 1), layers[0], 2)
    x = _convolved(x, layers[1], 1).mean(axis=(1, 2))
    return _cross_entropy(x @ layers[2]["kernel"] + layers[2]["bias"], targets)


def _images(size: int, key: jax.Array) -> Images:
    (images, shown), _ = _digits()
    chosen = jax.random.randint(key, (size,), 0, len(images))
    return images[chosen], shown[chosen]


def _digits_task(title: str, optimizer: Optimizer, rates: tuple[float, ...], steps: int,
                 batch: Callable[[jax.Array], Images], is_convolutional: bool = False) -> Task:
    is_lion = optimizer is _lion
    init, loss = ((_convolutions, _convolutions_loss) if is_convolutional else
                  (_perceptron, _perceptron_loss))
    return Task(title, optimizer, 0.99 if is_lion else 0.9, 0.9 if is_lion else None, rates, steps,
                init, batch, loss, _digits()[1])


def _full_batch() -> Task:
    def batch(key: jax.Array) -> Images:
        (images, shown), _ = _digits()
        return images[:512], shown[:512]

    return _digits_task("digits, perceptron, Lion, full batch of 512", _lion, (1e-4, 2e-4, 3e-4),
                        1000, batch)


def _conv() -> Task:
    return _digits_task("digits, convolutions, Lion, batch 32", _lion, (2e-3, 3e-3, 5e-3), 400,
                        functools.partial(_images, 32), is_convolutional=True)


def _large_batch() -> Task:
    return _digits_task("digits, perceptron, LAMB, batch 512", _lamb, (7e-3, 1.4e-2, 2.8e-2), 400,
                        functools.partial(_images, 512))


def _small_batch() -> Task:
    return _digits_task("digits, perceptron, AdamW, batch 64", _adamw, (1e-2, 2e-2, 3e-2), 600,
                        functools.partial(_images, 64))


LENGTH = 32  # of a window of text


def _text() -> Task:
    corpus = text.load()
    train = jnp.asarray(corpus.train)

    def split(key: Any) -> Any:
        # Widths of 64: the last axis of each weight but the head's has whole blocks of codes.
        return nnx.split(model.Transformer(len(corpus.vocabulary), LENGTH, width=64, heads=1,
                                           layers=1, rngs=nnx.Rngs(key)))

    def batch(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (16, 1), 0, len(train) - LENGTH)
        return train[starts + jnp.arange(LENGTH + 1)]

    graph, _ = split(0)
    return Task("text, transformer, Lion, batch 16", _lion, 0.99, 0.9, (1e-3, 3e-3, 6e-3), 200,
                lambda key: split(key)[1], batch,
                lambda params, batch: model.bits_per_character(nnx.merge(graph, params), batch),
                jnp.asarray(corpus.batch(corpus.validation, 256, LENGTH, (0,))))


TASKS: dict[str, Callable[[], Task]] = {
    "digits_full_batch": _full_batch, "digits_adamw": _small_batch, "digits_lamb": _large_batch,
    "digits_conv": _conv, "text": _text
}
