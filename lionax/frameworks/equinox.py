"""Training steps for Equinox modules, through `Transformation.step`.

They pass no compiler options. ``equinox.filter_jit`` hands those on to ``jax.jit``:

    @eqx.filter_jit(donate="all-except-first", compiler_options=lionax.compiler_options())
    def train(batch, model, state):
        return equinox.step(tx, model, state, eqx.filter_grad(loss_of)(model, batch))
"""

from typing import Any, TypeVar

import jax
import optax

from lionax.core.tree import Leaves, check_structures
from lionax.frameworks.contract import as_lionax

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError('lionax.frameworks.equinox needs Equinox: '
                      'pip install "lionax[equinox]"') from error

__all__ = ["init", "step"]

M = TypeVar("M")


def init(tx: optax.GradientTransformation, model: Any) -> Any:
    """The state for the floating-point arrays of a module.

    Functions, integers, None and static fields have none. To freeze arrays, too, give the
    trained part: ``init(tx, eqx.filter(model, spec))``.

    Args:
      tx: a transformation of lionax or Optax.
      model: a module, whole or the trained part of it.

    >>> import equinox as eqx, jax, lionax
    >>> from lionax.frameworks import equinox
    >>> model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    >>> state = equinox.init(lionax.lion(1e-3), model)
    >>> int(state.count)
    0
    """
    params = eqx.filter(model, eqx.is_inexact_array)
    return as_lionax(tx).init(params)


def step(tx: optax.GradientTransformation, model: M, state: Any, grads: Any,
         **extra: Any) -> tuple[M, Any]:
    """One training step: the new module and the new state.

    A leaf without a gradient never changes: no step, no decay, no averaging.

    Args:
      tx: as for `init`.
      model: a module, whole or the trained part of it.
      state: as `init` made it.
      grads: as ``eqx.filter_grad`` gives them, of the structure of the model: None where an array
        is frozen.
      **extra: for transformations that take extra arguments.

    Raises:
      TypeError: for an extra argument that no part of ``tx`` takes.
      ValueError: for gradients of another structure.

    >>> import equinox as eqx, jax, jax.numpy as jnp, lionax
    >>> from lionax.frameworks import equinox
    >>> model, tx = eqx.nn.Linear(2, 1, key=jax.random.key(0)), lionax.sgd(0.5)
    >>> grads = eqx.filter_grad(lambda model: model(jnp.ones(2)).sum())(model)
    >>> new, state = equinox.step(tx, model, equinox.init(tx, model), grads)
    >>> (model.bias - new.bias).tolist()
    [0.5]
    """
    params = eqx.filter(model, eqx.is_inexact_array)
    check_structures(Leaves.of(grads, None), Leaves.of(params, None))
    trained = jax.tree.map(lambda grad, param: None if grad is None else param, grads, params,
                           is_leaf=lambda node: node is None)
    params, state = as_lionax(tx).step(trained, state, grads, **extra)
    return eqx.combine(params, model), state
