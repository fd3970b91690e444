"""Keras 3, as it runs on its JAX backend."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lionax.compat import keras_schedules
from lionax.compat.keras2 import momentum_sgd
from lionax.compat.keras_parts import Keras3Arguments, constant
from lionax.core.hyperparameters import Injected, Interval, Scalar, check_scalar
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.transforms.combining import chain, masked
from lionax.transforms.decay import add_decayed_weights
from lionax.transforms.scaling import scale_by_learning_rate
from lionax.transforms.sign_momentum import scale_by_lion

__all__ = ["SGD", "Lamb", "Lion", "Shrunk", "from_config", "to_config"]


@constructor
def Lion(learning_rate: Scalar = 0.001, beta_1: float = 0.9, beta_2: float = 0.99,
         weight_decay: float | None = None, clipnorm: float | None = None,
         clipvalue: float | None = None, global_clipnorm: float | None = None,
         use_ema: bool = False, ema_momentum: float = 0.99,
         ema_overwrite_frequency: int | None = None, loss_scale_factor: float | None = None,
         gradient_accumulation_steps: int | None = None, name: str | None = None, *,
         decay: Any = None, exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None
        ) -> Transformation:
    """``keras.optimizers.Lion`` of Keras 3.

    As in the reference: the average is a copy of the parameters until the first step is complete;
    with accumulation the average moves at every call, while the step that is overwritten is counted
    in windows, so all calls of such a window overwrite; an ``ema_overwrite_frequency`` of 0 is 1;
    schedules are looked up by calls.

    Args:
      learning_rate: a float (an int is refused, as in the reference) or a schedule; a function of
        no arguments is refused.
      beta_1: in (0, 1].
      beta_2: in [0, 1].
      weight_decay: the decay ``lr·weight_decay·p``, or None.
      clipnorm: limit of each leaf's norm; 0 is none.
      clipvalue: limit of each element; 0 is none.
      global_clipnorm: limit of the norm of all leaves; 0 is none.
      use_ema: whether to keep an average of the parameters, see `lionax.averaged_params`.
      ema_momentum: its decay, in [0, 1].
      ema_overwrite_frequency: after how many steps the parameters are set to it, or None.
      loss_scale_factor: what gradients are divided by, or None.
      gradient_accumulation_steps: how many calls make a step, at least 2, or None.
      name: without effect; a string without '/', or None.
      decay: without effect, with the reference's warning.
      exclude_from_weight_decay: ``{"var_names": [regular expressions], "var_list": [paths]}``, what
        the method of that name takes; the expressions are searched for in the last part of a path:
        ``kernel``.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.Lion(1e-4, weight_decay=0.1)
    Lion(learning_rate=0.0001, weight_decay=0.1)
    """
    base = Keras3Arguments("compat.keras3.Lion", learning_rate, weight_decay, clipnorm, clipvalue,
                 global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor,
                 gradient_accumulation_steps, exclude_from_weight_decay, name, decay)
    beta_1, beta_2 = (constant(beta_1, base.owner, "beta_1"),
                      constant(beta_2, base.owner, "beta_2"))
    if not isinstance(beta_1, Injected) and not 0 < beta_1 <= 1:
        raise ValueError(f"{base.owner}: beta_1={beta_1!r} is not accepted; give a number in (0, "
                         "1] (at 0 it would be SignSGD)")
    return base.around(
        chain(scale_by_lion(beta_1, beta_2),
              add_decayed_weights(base.weight_decay or 0.0, base.mask),
              scale_by_learning_rate(base.rate)))


@constructor
def SGD(learning_rate: Scalar = 0.01, momentum: float = 0.0, nesterov: bool = False,
        weight_decay: float | None = None, clipnorm: float | None = None,
        clipvalue: float | None = None, global_clipnorm: float | None = None, use_ema: bool = False,
        ema_momentum: float = 0.99, ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None, gradient_accumulation_steps: int | None = None,
        name: str | None = None, *,
        decay: Any = None, exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None
        ) -> Transformation:
    """``keras.optimizers.SGD`` of Keras 3. Its momentum has the learning rate inside, as
    `lionax.compat.keras2.SGD` says.

    Args:
      learning_rate: as `Lion`.
      momentum: a float in [0, 1]; an int is refused, as in the reference.
      nesterov: whether to look ahead; without effect where momentum is 0.
      weight_decay: as `Lion`.
      clipnorm: as `Lion`.
      clipvalue: as `Lion`.
      global_clipnorm: as `Lion`.
      use_ema: as `Lion`.
      ema_momentum: as `Lion`.
      ema_overwrite_frequency: as `Lion`.
      loss_scale_factor: as `Lion`.
      gradient_accumulation_steps: as `Lion`.
      name: as `Lion`.
      decay: as `Lion`.
      exclude_from_weight_decay: as `Lion`.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.SGD(momentum=0.9)
    SGD(momentum=0.9)
    """
    base = Keras3Arguments("compat.keras3.SGD", learning_rate, weight_decay, clipnorm, clipvalue,
                 global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor,
                 gradient_accumulation_steps, exclude_from_weight_decay, name, decay)
    if not isinstance(momentum, float) or not 0 <= momentum <= 1:
        raise ValueError(f"{base.owner}: momentum={momentum!r} is not accepted; give a float in "
                         "[0, 1]")
    if momentum == 0:
        return base.around(
            chain(add_decayed_weights(base.weight_decay or 0.0, base.mask),
                  scale_by_learning_rate(base.rate)))
    own = momentum_sgd(base.rate, momentum, nesterov, base.weight_decay, base.mask)
    return base.around(own)


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """``1 - lr·weight_decay``: what is left of a parameter when Keras has decayed it."""

    rate: Any
    weight_decay: float

    def __post_init__(self):
        decay = check_scalar(self.weight_decay, Interval(), "Shrunk", "weight_decay", dynamic=False)
        object.__setattr__(self, "weight_decay", decay)

    def __call__(self, step: Any) -> Any:
        return 1.0 - jnp.asarray(
            self.rate(step) if callable(self.rate) else self.rate, jnp.float32) * self.weight_decay


@constructor
def Lamb(learning_rate: Scalar = 0.001, beta_1: float = 0.9, beta_2: float = 0.999,
         epsilon: float = 1e-7, weight_decay: float | None = None, clipnorm: float | None = None,
         clipvalue: float | None = None, global_clipnorm: float | None = None,
         use_ema: bool = False, ema_momentum: float = 0.99,
         ema_overwrite_frequency: int | None = None, loss_scale_factor: float | None = None,
         gradient_accumulation_steps: int | None = None, name: str | None = None, *,
         decay: Any = None, exclude_from_weight_decay: Mapping[str, Sequence[str]] | None = None
        ) -> Transformation:
    """``keras.optimizers.Lamb`` of Keras 3.

    As in the reference, decay is not part of the layer adaptation: the parameter is decayed first,
    and its norm is that of the decayed one.

    Args:
      learning_rate: as `Lion`.
      beta_1: in [0, 1).
      beta_2: in [0, 1).
      epsilon: added to the root, at least 0.
      weight_decay: as `Lion`.
      clipnorm: as `Lion`.
      clipvalue: as `Lion`.
      global_clipnorm: as `Lion`.
      use_ema: as `Lion`.
      ema_momentum: as `Lion`.
      ema_overwrite_frequency: as `Lion`.
      loss_scale_factor: as `Lion`.
      gradient_accumulation_steps: as `Lion`.
      name: as `Lion`.
      decay: as `Lion`.
      exclude_from_weight_decay: as `Lion`.

    Raises:
      ValueError: for what the reference refuses.
      TypeError: for unknown arguments.

    >>> from lionax.compat import keras3
    >>> keras3.Lamb(epsilon=1e-6)
    Lamb(epsilon=1e-06)
    """
    base = Keras3Arguments("compat.keras3.Lamb", learning_rate, weight_decay, clipnorm, clipvalue,
                 global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor,
                 gradient_accumulation_steps, exclude_from_weight_decay, name, decay)
    beta_1, beta_2, epsilon = (constant(beta_1, base.owner, "beta_1"),
                               constant(beta_2, base.owner, "beta_2"),
                               constant(epsilon, base.owner, "epsilon"))
    adapt = scale_by_trust_ratio()
    if base.weight_decay:
        shrunk = scale_by_trust_ratio(trust_coefficient=Shrunk(base.rate, base.weight_decay),
                                      mask=base.mask)
        adapt = chain(shrunk, masked(adapt, base.mask.opposite()))
    return base.around(
        chain(scale_by_adam(beta_1, beta_2, epsilon), adapt,
              add_decayed_weights(base.weight_decay or 0.0, base.mask),
              scale_by_learning_rate(base.rate)))


_OPTIMIZERS = {"Lion": Lion, "SGD": SGD, "Lamb": Lamb}
_SCHEDULES = {
    name: getattr(keras_schedules, name) for name in keras_schedules.__all__ if name != "Schedule"
}


def to_config(tx: Transformation) -> dict[str, Any]:
    """What ``get_config()`` of the Keras optimizer gives that a constructor of this module stands
    for.

    As in Keras, exclusions from weight decay are not part of it.

    Args:
      tx: as `Lion`, `SGD`, `Lamb` or `from_config` gave it.

    Raises:
      TypeError: for another transformation, or a learning rate that Keras has no config for.

    >>> from lionax.compat import keras3
    >>> keras3.to_config(keras3.Lion(0.5))["learning_rate"]
    0.5
    """
    for name, make in _OPTIMIZERS.items():
        given = tx.made_by(make) if isinstance(tx, Transformation) else None
        if given is not None:
            defaults = {
                parameter.name: parameter.default
                for parameter in inspect.signature(make).parameters.values()
            }
            config = {**defaults, "name": name.lower(), **given}
            del config["exclude_from_weight_decay"], config["decay"]
            return {**config, "learning_rate": _rate_to_config(config["learning_rate"])}
    raise TypeError(f"compat.keras3.to_config: {tx!r} was not made by {', '.join(_OPTIMIZERS)} of "
                    "this module; see lionax.to_config")


def _rate_to_config(rate: Any) -> Any:
    if isinstance(rate, keras_schedules.Schedule):
        fields = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(rate).items()
        }
        return {
            "module": "keras.optimizers.schedules", "class_name": type(rate).__name__,
            "config": fields, "registered_name": None
        }
    if callable(rate) or not np.ndim(rate) == 0:
        raise TypeError(f"compat.keras3.to_config: learning_rate={rate!r} has no config in Keras; "
                        "give a number or a schedule of lionax.compat.keras_schedules")
    return float(rate)


def from_config(config: Mapping[str, Any]) -> Transformation:
    """The transformation for a Keras optimizer's config.

    Args:
      config: what ``get_config()`` of Keras's Lion, SGD or Lamb gives, or
        ``keras.optimizers.serialize``. Nothing in it is executed.

    Raises:
      ValueError: for unknown optimizers, schedules and fields, and for unfit values.

    >>> from lionax.compat import keras3
    >>> keras3.from_config({"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})
    SGD(learning_rate=0.1, momentum=0.9, name='sgd')
    """
    owner = "compat.keras3.from_config"
    if not isinstance(config, Mapping):
        raise ValueError(f"{owner}: {config!r} is not a dict")
    if "class_name" in config:
        name, fields = config["class_name"], config.get("config")
    else:  # what get_config() gives does not tell the class, but each has a field of its own
        name = "SGD" if "momentum" in config else "Lamb" if "epsilon" in config else "Lion"
        fields = config
    if not isinstance(name, str) or name not in _OPTIMIZERS or not isinstance(fields, Mapping):
        raise ValueError(f"{owner}: class_name={name!r} with config={fields!r} is not accepted; "
                         f"known are {', '.join(_OPTIMIZERS)}")
    known = set(inspect.signature(_OPTIMIZERS[name]).parameters) - {"exclude_from_weight_decay"}
    arguments = _checked(fields, known, f"{owner}: {name}")
    if isinstance(arguments.get("learning_rate"), Mapping):
        where = f"{owner}: {name}.learning_rate"
        arguments["learning_rate"] = _rate_from_config(arguments["learning_rate"], where)
    try:
        return _OPTIMIZERS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{owner}: {name}: {error}") from None


def _rate_from_config(config: Mapping[str, Any], where: str) -> keras_schedules.Schedule:
    name, fields = config.get("class_name"), config.get("config")
    if not isinstance(name, str) or name not in _SCHEDULES or not isinstance(fields, Mapping):
        raise ValueError(f"{where}: class_name={name!r} with config={fields!r} is not accepted; "
                         f"known are {', '.join(_SCHEDULES)}")
    schedule = _SCHEDULES[name]
    arguments = _checked(fields, {field.name for field in dataclasses.fields(schedule)},
                         f"{where}.{name}")
    try:
        return schedule(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}.{name}: {error}") from None


def _checked(fields: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    """The fields, if they are known and hold numbers, lists of numbers or, for a rate, a dict."""
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{where}.{name} is not accepted; the fields are "
                             f"{', '.join(sorted(known))}")
        plain = value is None or isinstance(
            value, bool | int | float) or (isinstance(value, str) and name == "name")
        numbers = isinstance(value, list | tuple) and all(
            isinstance(item, int | float) for item in value)
        nested = name == "learning_rate" and isinstance(value, Mapping)
        if not plain and not nested and not (numbers and name in ("boundaries", "values")):
            raise ValueError(f"{where}.{name}={value!r} is not accepted")
    return dict(fields)
