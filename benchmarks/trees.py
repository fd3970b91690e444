"""Parameter trees of the shapes that models have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "QUICK",
    "TREES",
    "Shapes",
    "arrays",
    "elements",
    "filled",
    "gpt2",
    "llama_2",
    "many_small",
    "mlp",
    "of_size",
    "vit"
]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 16_000,
         context: int = 1024) -> dict[str, Any]:
    """Shapes like GPT-2's: 98.1 M elements in 148 leaves, unless told otherwise."""
    norm = {"scale": (width,), "bias": (width,)}

    def dense(inputs: int, outputs: int) -> dict[str, Any]:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    block = {
        "norm_1": norm, "attention": dense(width, 3 * width), "out": dense(width, width),
        "norm_2": norm, "up": dense(width, 4 * width), "down": dense(4 * width, width)
    }
    return {
        "tokens": (vocabulary, width), "positions": (context, width), "norm": norm,
        **{f"block_{i}": block for i in range(layers)}
    }


def llama_2(layers: int = 80, width: int = 8192, hidden: int = 28_672, of_keys: int = 1024,
            vocabulary: int = 32_000) -> dict[str, Any]:
    """Shapes of Llama 2's 69.0 B elements, unless told otherwise, with the layers stacked."""
    layer = {
        "query": (width, width), "key": (width, of_keys), "value": (width, of_keys),
        "out": (width, width), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width), "norm_1": (width,), "norm_2": (width,)
    }
    return {
        "tokens": (vocabulary, width), "norm": (width,), "head": (width, vocabulary),
        "layers": {name: (layers, *shape) for name, shape in layer.items()}
    }


def vit(layers: int = 12, width: int = 384, patch: int = 16, classes: int = 1000) -> dict[str, Any]:
    """Shapes like those of a small vision transformer: 22 M elements."""
    blocks = {
        name: shapes for name, shapes in gpt2(layers, width).items() if name.startswith("block")
    }
    return {
        "patches": {"kernel": (patch, patch, 3, width),
                    "bias": (width,)}, "positions": (197, width), "class": (1, width),
        "head": {"kernel": (width, classes), "bias": (classes,)}, **blocks
    }


def mlp(layers: int = 8, width: int = 2048) -> dict[str, Any]:
    """Shapes of a plain network: 33.6 M elements in 16 leaves."""
    return {f"layer_{i}": {"kernel": (width, width), "bias": (width,)} for i in range(layers)}


def many_small(leaves: int = 2000, size: int = 64) -> dict[str, Any]:
    """Many leaves of a few elements."""
    return {f"leaf_{i}": (size,) for i in range(leaves)}


def of_size(parameters: int, leaves: int) -> dict[str, Any]:
    """So many elements in so many equal leaves."""
    return {f"leaf_{i}": (max(parameters // leaves, 1),) for i in range(leaves)}


Shapes = dict[str, Any]
"""A tree of shapes."""

TREES: dict[str, Callable[[], dict[str, Any]]] = {"gpt2": gpt2, "vit": vit, "mlp": mlp}
QUICK: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt2": lambda: gpt2(4, 256, 4000, 256), "vit": lambda: vit(2, 192),
    "mlp": lambda: mlp(2, 1024)
}


def elements(shapes: Any) -> int:
    """How many numbers a tree of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(arrays(shapes)))


def arrays(shapes: Any) -> Any:
    """The arrays that `filled` would make, without their elements."""
    return jax.eval_shape(lambda: filled(shapes, 0.0))


def filled(shapes: Any, value: float) -> Any:
    """A tree of float32 arrays."""
    return jax.tree.map(lambda shape: jnp.full(shape, value, jnp.float32), shapes,
                        is_leaf=lambda node: isinstance(node, tuple))
