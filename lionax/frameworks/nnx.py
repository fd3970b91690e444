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

from lionax.core.placement import on_mesh_of
from lionax.core.tree import named_leaves
from lionax.frameworks.contract import as_lionax
from lionax.sharding import state_sharding

try:
    from flax import nnx
except ImportError as error:
    raise ImportError('lionax.frameworks.nnx needs Flax: pip install "lionax[flax]"') from error

from lionax.frameworks.nnx_variables import (
    check_no_optimizer_sharding,
    constrained,
    is_variable,
    placed,
    unwrapped,
    without_shardings,
)

__all__ = ["Optimizer"]

M = TypeVar("M")


class Optimizer(nnx.Optimizer[M]):
    """Flax's ``nnx.Optimizer``, but for three things.

    - ``update`` writes the parameters and the state in one ``tx.step`` and returns None: a step
      makes no updates.
    - ``tx`` is lionax's. One of Optax's becomes ``lionax.chain(tx)``.
    - Gradients or parameters other than those of ``wrt`` at construction are refused.

    Each array of the state is a variable. One of a parameter's rank has the parameter's metadata,
    with ``optimizer_sharding`` in place of ``out_sharding``. A step keeps the sharding of both.

    Args:
      model: a module. Variables outside of ``wrt`` are never touched.
      tx: a transformation of lionax or Optax.
      wrt: the filter of the variables to train, as in ``nnx.grad``; ``nnx.LoRAParam`` for adapters
        alone.
      graph: whether modules are graphs, with shared variables; where Flax has that argument.
      zero_axis: a mesh axis over which the state is split further than the parameters (ZeRO,
        stage 1), as `lionax.state_sharding` lays it out. A step then keeps the shardings that
        parameters and state have here. The slots have no metadata of shardings.

    Raises:
      ValueError: for a ``zero_axis`` that `lionax.state_sharding` refuses, and beside the metadata
        ``optimizer_sharding``.

    >>> import jax.numpy as jnp, lionax
    >>> from flax import nnx
    >>> from lionax.frameworks.nnx import Optimizer
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer, before = Optimizer(model, lionax.sgd(0.5), wrt=nnx.Param), model.kernel[...]
    >>> optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2)).sum())(model))
    >>> (before - model.kernel[...]).tolist()
    [[0.5], [0.5]]
    """

    def __init__(self, model: M, tx: optax.GradientTransformation, *,
                 wrt: nnx.filterlib.Filter, graph: bool | None = None,
                 zero_axis: str | None = None):
        transformation = as_lionax(tx)

        def init(params: Any) -> Any:
            if zero_axis is None:
                return unwrapped(transformation.init(params))
            check_no_optimizer_sharding(params)
            shardings = state_sharding(transformation, params, zero_axis)
            state = jax.jit(transformation.init, out_shardings=shardings)(params)
            return without_shardings(unwrapped(state))

        shown = optax.GradientTransformation(init, transformation.update)
        super().__init__(model, shown, wrt=wrt, **({} if graph is None else {"graph": graph}))
        self.tx = transformation
        params = nnx.as_pure(self._selected(model))
        self.step.set_value(on_mesh_of(params, self.step[...]))
        self.paths = tuple(named_leaves(params)[0])
        self.shardings = None if zero_axis is None else tuple(
            array.sharding for array in jax.tree.leaves((params, nnx.as_pure(self.opt_state))))

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]  # there are no updates
            self, model: M, grads: Any, /, **extra: Any) -> None:
        """Steps the parameters of the model and the state, in place.

        Args:
          model: the module that the optimizer was made for.
          grads: as ``nnx.grad`` gives them, taken with the filter ``wrt``.
          **extra: for transformations that take extra arguments.

        Raises:
          TypeError: for an extra argument that no part of ``tx`` takes.
          ValueError: for gradients taken with another filter, and for a model with a parameter
            more or less than at construction.
        """
        variables = self._selected(model)
        params = nnx.as_pure(variables)
        # Without a graph ``nnx.grad`` gives a module, with all of its variables.
        grads = nnx.as_pure(grads if isinstance(grads, nnx.State) else self._selected(grads))
        self._check(params, "parameters", "make another and take its state over: "
                    "lionax.cast_state(old, new)")
        self._check(grads, "gradients", f"take them with argnums=nnx.DiffState(0, {self.wrt!r})")
        arrays = nnx.as_pure(self.opt_state)
        params, arrays = self.tx.step(params, arrays, grads, **nnx.as_pure(extra))
        if self.shardings is not None:
            params, arrays = constrained((params, arrays), self.shardings)
        nnx.update(model, jax.tree.map(placed, variables, params, is_leaf=is_variable))
        jax.tree.map(lambda variable, array: nnx.update(variable, placed(variable, array)),
                     self.opt_state, arrays, is_leaf=is_variable)
        self.step[...] += 1

    def _selected(self, model: Any) -> nnx.State:
        """The variables that ``wrt`` selects."""
        graph = getattr(self, "graph", None)
        return nnx.state(model, self.wrt, **({} if graph is None else {"graph": graph}))

    def _check(self, tree: Any, what: str, remedy: str) -> None:
        """Refuses a tree with other leaves than the parameters had at construction."""
        found = named_leaves(tree)[0]
        for path in sorted(set(found) ^ set(self.paths)):
            problem = "also have" if path in found else "lack"
            raise ValueError(f"nnx.Optimizer: the {what} {problem} {path!r}; accepted is what "
                             f"wrt={self.wrt!r} selected at construction; {remedy}")
