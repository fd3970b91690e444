"""An optimizer for Flax NNX whose update is one `Transformation.step`.

``nnx.jit`` takes no compiler options. On a CPU set the ``XLA_FLAGS`` that
``help(lionax.compiler_options)`` names, or split the model and the optimizer around ``jax.jit``:

    graph, state = nnx.split((model, optimizer))

    def train(state, x, y):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(loss_of)(model, x, y))
        return nnx.state((model, optimizer))

    train = jax.jit(train, donate_argnums=0, compiler_options=lionax.compiler_options())
"""

from typing import Any, TypeVar

import jax
import optax

from lionax.core.tree import is_placeholder, named_leaves
from lionax.frameworks.contract import as_lionax, own_buffers

try:
    from flax import nnx
except ImportError as error:
    raise ImportError('lionax.frameworks.nnx needs Flax: pip install "lionax[flax]"') from error

__all__ = ["Optimizer"]

M = TypeVar("M")

_as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # Flax before 0.12.7 has the latter only


class Optimizer(nnx.Optimizer[M]):
    """Flax's ``nnx.Optimizer``, but for three things.

    - ``update`` writes the parameters and the state in one ``tx.step`` and returns None: a step
      makes no updates.
    - ``tx`` is lionax's. One of Optax's becomes ``lionax.chain(tx)``.
    - Gradients or parameters other than those of ``wrt`` at construction are refused.

    The state holds a variable for each array. Those of a parameter's rank have its metadata, and
    so its sharding; with ``optimizer_sharding`` among it, that one. ``wrt=nnx.LoRAParam`` holds
    state for adapters only.

    Args:
      model: a module. Variables outside of ``wrt`` are never touched.
      tx: a transformation of lionax or Optax.
      wrt: the filter of the variables to train: that of ``nnx.grad``, by default ``nnx.Param``.
      graph: whether modules are graphs, with shared variables; where Flax has that argument.

    Raises:
      TypeError: from ``update``, for an extra argument that no part of ``tx`` takes.
      ValueError: from ``update``, for gradients taken with another filter, or a parameter that
        was added or removed since.

    >>> import jax.numpy as jnp, lionax
    >>> from flax import nnx
    >>> from lionax.frameworks.nnx import Optimizer
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, lionax.sgd(0.5), wrt=nnx.Param)
    >>> before = model.kernel[...]
    >>> optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2)).sum())(model))
    >>> (before - model.kernel[...]).tolist()
    [[0.5], [0.5]]
    """

    def __init__(self, model: M, tx: optax.GradientTransformation, *,
                 wrt: nnx.filterlib.Filter, graph: bool | None = None):
        transformation = as_lionax(tx)
        options = {} if graph is None else {"graph": graph}

        def init(params: Any) -> Any:
            return _variables(own_buffers(transformation.init(params), params))

        shown = optax.GradientTransformation(init, transformation.update)
        super().__init__(model, shown, wrt=wrt, **options)
        self.tx = transformation
        self.paths = tuple(named_leaves(self._params(model))[0])

    def update(self, model: M, grads: Any, /, **extra: Any) -> None:
        """Steps the parameters of the model and the state, in place.

        Args:
          model: the module that the optimizer was made for.
          grads: as ``nnx.grad`` gives them, taken with the filter ``wrt``.
          **extra: for transformations that take extra arguments.
        """
        params = self._params(model)
        if isinstance(grads, nnx.State):
            grads = _as_pure(grads)
        else:  # without a graph ``nnx.grad`` gives a module, with all of its variables
            grads = self._params(grads)
        self._check(params, "parameters", "make the optimizer anew and move its state with "
                    "lionax.cast_state")
        self._check(grads, "gradients", f"take them with argnums=nnx.DiffState(0, {self.wrt!r})")
        params, state = self.tx.step(params, _as_pure(self.opt_state), grads, **_as_pure(extra))
        nnx.update(model, params)
        jax.tree.map(nnx.update, self.opt_state, state, is_leaf=_is_variable)
        self.step[...] += 1

    def _params(self, model: Any) -> Any:
        """The arrays of the variables that `wrt` selects."""
        graph = getattr(self, "graph", None)
        options = {} if graph is None else {"graph": graph}
        return _as_pure(nnx.state(model, self.wrt, **options))

    def _check(self, tree: Any, what: str, remedy: str) -> None:
        """Refuses a tree with other leaves than the parameters had at construction."""
        found = named_leaves(tree)[0]
        for path in sorted(set(found) ^ set(self.paths)):
            problem = "also have" if path in found else "lack"
            raise ValueError(f"nnx.Optimizer: the {what} {problem} {path!r}; the optimizer was made "
                             f"for the variables that wrt={self.wrt!r} selected; {remedy}")


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _variables(state: Any) -> Any:
    """A state made for variables, without those whose metadata is not that of their array.

    A masked leaf needs no variable. A sharding for another rank cannot be followed.
    """

    def one(node: Any) -> Any:
        value = node.get_raw_value() if _is_variable(node) else node
        sharding = node.get_metadata().get("out_sharding") if _is_variable(node) else None
        is_other = bool(sharding) and any(leaf.ndim < len(sharding)
                                          for leaf in jax.tree.leaves(value))
        return value if is_placeholder(value) or is_other else node

    return jax.tree.map(one, state, is_leaf=_is_variable)
