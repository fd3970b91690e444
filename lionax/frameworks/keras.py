"""`Optimizer`: a transformation as a ``keras.optimizers.Optimizer``, on Keras's JAX backend.

The module wraps `fit`, `train_on_batch` and `save` of ``keras.Model``: for its own optimizer they
refuse before Keras empties the variables or the file.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lionax
from lionax.core.definition import nested
from lionax.frameworks.keras_variables import StateOptimizer, given_rates, keras
from lionax.transforms.conditional import DynamicLossScale, Unscale

__all__ = ["Optimizer"]

_RATE = "lionax.lion(learning_rate), a number or a schedule"
_MASK = "lionax.lion(rate, weight_decay=..., mask=lionax.not_matching('bias'))"
_AVERAGE = "lionax.chain(tx, lionax.params_ema(..., overwrite_every=...))"
_REFUSED = {  # Keras's arguments: the value without effect, and lionax's own
    "learning_rate": (None, _RATE), "decay": (None, _RATE), "weight_decay": (None, _MASK),
    "clipnorm": (None, "lionax.chain(lionax.clip_by_norm(...), tx)"),
    "clipvalue": (None, "lionax.chain(lionax.clip(...), tx)"),
    "global_clipnorm": (None, "lionax.chain(lionax.clip_by_global_norm(...), tx)"),
    "use_ema": (False, _AVERAGE), "ema_momentum": (0.99, _AVERAGE),
    "ema_overwrite_frequency": (None, _AVERAGE),
    "gradient_accumulation_steps": (None, "lionax.accumulate(tx, every=...)")}


@keras.saving.register_keras_serializable("lionax")
class Optimizer(StateOptimizer):
    """Trains a Keras model with a transformation, by ``tx.step``.

    - Masks see the variables' paths, such as ``dense/kernel``. Layers that are frozen after
      ``compile`` stay as they are. ``optimizer.state`` is the transformation's state.
    - A saved model holds the transformation as `lionax.to_config` gives it.
    - ``fit`` donates parameters and state. Keras's ``jit`` takes no compiler options: see
      ``help(lionax.compiler_options)`` for the ``XLA_FLAGS`` to set before JAX starts.

    Args:
      tx: the transformation; one of Optax's as ``lionax.chain(tx)``.
      name: the optimizer's name in Keras.
      loss_scale_factor: what the loss is multiplied and the gradients are divided by, or None.
      **refused: Keras's other arguments; ``tx`` does what they do.

    Raises:
      RuntimeError: for another backend of Keras.
      TypeError: for what is no lionax transformation.
      ValueError: for an argument that is refused; it names lionax's own.

    >>> import keras, lionax, numpy as np
    >>> from lionax.frameworks.keras import Optimizer
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(Optimizer(lionax.lion(0.5)), loss="mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, verbose=0)
    >>> int(model.optimizer.state.count), float(model.optimizer.learning_rate)
    (2, 0.5)
    """

    def __init__(self, tx: lionax.Transformation, name: str | None = None,
                 loss_scale_factor: float | None = None, **refused: Any):
        if keras.backend.backend() != "jax":
            raise RuntimeError(f"keras.Optimizer: the backend {keras.backend.backend()!r} is not "
                               "accepted; set KERAS_BACKEND=jax before Keras is imported")
        if not isinstance(tx, lionax.Transformation):
            raise TypeError(f"keras.Optimizer: tx={tx!r} is not a lionax transformation; give "
                            "lionax.lion(...), or one of Optax's as lionax.chain(tx)")
        for argument, value in refused.items():
            _check_argument(argument, value)
        for part in nested(tx.definition):
            if isinstance(part, Unscale | DynamicLossScale):
                raise ValueError(f"keras.Optimizer: {part.name} is not accepted, as Keras scales "
                                 "the loss; give loss_scale_factor=..., or wrap the optimizer in "
                                 "keras.optimizers.LossScaleOptimizer")
        rates = given_rates(tx)
        is_number = len(set(rates)) == 1 and not callable(rates[0])
        super().__init__(rates[0] if is_number else self._rate_in_state, name=name,
                         loss_scale_factor=loss_scale_factor)
        self.tx = tx

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "learning_rate" and name in _REFUSED:
            _check_argument(name, value)
        super().__setattr__(name, value)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Refused: the transformation has a mask."""
        raise TypeError(f"exclude_from_weight_decay is not accepted; give a mask: {_MASK}")

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        """Steps the variables that have a gradient. The others are None in both trees."""
        absent = {v.path: None for v in self._trainable_variables if not v.overwrite_with_gradient}
        params = absent | {v.path: v.value for v in trainable_variables}
        pairs = zip(trainable_variables, grads, strict=True)
        updates = absent | {v.path: grad for v, grad in pairs}
        params, self.state = self.tx.step(params, self.state, updates)
        for variable in trainable_variables:
            variable.assign(params[variable.path])

    def get_config(self) -> dict[str, Any]:
        """The name, the transformation's config and the loss scale."""
        return {"name": self.name, "transformation": lionax.to_config(self.tx),
                "loss_scale_factor": self.loss_scale_factor}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> "Optimizer":
        """The optimizer of a config."""
        arguments = {**config, "tx": lionax.from_config(config["transformation"])}
        del arguments["transformation"]
        return cls(**arguments)


def _check_argument(argument: str, value: Any) -> None:
    """Refuses an argument or attribute of Keras's that would have an effect."""
    if argument not in _REFUSED:
        raise TypeError(f"keras.Optimizer: there is no argument {argument!r}; the arguments are "
                        "tx, name and loss_scale_factor")
    without_effect, own = _REFUSED[argument]
    if value != without_effect:
        raise ValueError(f"keras.Optimizer: {argument}={value!r} is not accepted; lionax's own is "
                         f"{own}")


def _checked_first(method: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Keras's model that refuses before Keras empties what it would lose."""
    @functools.wraps(method)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = getattr(model, "optimizer", None)
        own = getattr(optimizer, "inner_optimizer", optimizer)
        if isinstance(own, Optimizer):
            check(own, model)
        return method(model, *args, **kwargs)

    return checked


# Keras asks for the config when the file is open, and for a step when the variables are empty.
keras.Model.save = _checked_first(keras.Model.save, lambda own, model: own.get_config())
for _name in ("fit", "train_on_batch"):
    setattr(keras.Model, _name, _checked_first(
        getattr(keras.Model, _name), lambda own, model: own.check_seen(model.trainable_variables)))
