"""A train state for Flax Linen whose ``apply_gradients`` is one `Transformation.step`.

It passes no compiler options; the outermost ``jax.jit`` takes them:

    train = jax.jit(train, donate_argnums=0, compiler_options=lionax.compiler_options())
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import optax

from lionax.core.state import State
from lionax.frameworks.contract import as_lionax

try:
    from flax import core
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError('lionax.frameworks.linen needs Flax: pip install "lionax[flax]"') from error

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """Flax's ``TrainState``, with parameters and state written in one ``tx.step``.

    What is written for Flax's accepts it, and it is extended alike: by a subclass with more fields.
    A collection ``_overwrite_with_gradient`` beside ``params``, as float8 layers have it, is
    replaced by its gradient. It has no state, and is neither stepped, decayed nor part of a norm.

    >>> import jax.numpy as jnp, lionax
    >>> from lionax.frameworks.linen import TrainState
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> apply = lambda params, x: x @ params["w"]
    >>> state = TrainState.create(apply_fn=apply, params=params, tx=lionax.sgd(0.5))
    >>> state = state.apply_gradients(grads={"w": jnp.array([2.0, 0.0])})
    >>> state.params["w"].tolist(), state.step
    ([0.0, 2.0], 1)
    """

    @classmethod
    def create(cls, *, apply_fn: Callable[..., Any], params: Any,
               tx: optax.GradientTransformation, **kwargs: Any) -> Self:
        """A train state at step 0.

        Args:
          apply_fn: usually ``model.apply``; kept for the training loop.
          params: the parameters, or a mapping of ``params`` and ``_overwrite_with_gradient``.
          tx: a transformation of lionax or Optax; one of Optax's becomes ``lionax.chain(tx)``.
          **kwargs: the fields of a subclass.
        """
        transformation = as_lionax(tx)
        state = transformation.init(_stepped(params))
        return cls(step=0, apply_fn=apply_fn, params=params, tx=transformation, opt_state=state,
                   **kwargs)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """The train state after one step.

        Args:
          grads: the gradients, of the structure of ``params``.
          **kwargs: a field's name replaces the field, as in Flax; any other name is an extra
            argument of ``tx.step``, such as ``value=loss``.

        Raises:
          TypeError: for a name that is neither a field nor taken by a part of ``tx``.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra = {name: value for name, value in kwargs.items() if name not in fields}
        try:
            params, opt_state = as_lionax(self.tx).step(
                _stepped(self.params), cast(State, self.opt_state), _stepped(grads), **extra)
        except TypeError as error:
            if extra:
                error.add_note(f"apply_gradients: {', '.join(extra)} went to the step, since "
                               f"{type(self).__name__} has no such field")
            raise
        if _has_overwritten(grads):
            params = core.copy(self.params, {"params": params, OVERWRITE_WITH_GRADIENT:
                                             grads[OVERWRITE_WITH_GRADIENT]})
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replaced)


def _has_overwritten(tree: Any) -> bool:
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def _stepped(tree: Any) -> Any:
    """The part of the parameters or the gradients that a step changes."""
    return tree["params"] if _has_overwritten(tree) else tree
