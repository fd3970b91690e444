"""An exponential moving average of the parameters, for evaluation or to go on from."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lionax.core.counting import next_count
from lionax.core.hyperparameters import Interval, Scalar, check_count, scalar
from lionax.core.rule import Applied, Observer, Step
from lionax.core.storage import accumulator_dtype
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.momentum import moved, share_of

__all__ = ["ParamsEma", "ParamsEmaState", "averaged_params", "params_ema"]


class ParamsEmaState(NamedTuple):
    """The slots of `ParamsEma`."""

    params_ema: Any  # average of the parameters; the parameter's shape; at least float32


@dataclasses.dataclass(frozen=True)
class ParamsEma(Observer):
    """The rule of `params_ema`."""

    decay: Scalar = scalar(low=0, high=1)
    overwrite_every: int | None = None
    debias: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.overwrite_every is not None:
            accepted = "steps, at least 1, or None"
            check_count(self.overwrite_every, "params_ema", "overwrite_every", accepted)
        if self.debias and callable(self.decay):
            raise ValueError("params_ema: debias=True is not accepted with a schedule as decay; "
                             "let the schedule begin at 0, or give a number")

    def accepted(self, field: str) -> Interval:
        return Interval(0.0, 1.0, open_high=self.debias,
                        remedy="1 is accepted with debias=False" if self.debias else "")

    def init(self, param: jax.Array) -> ParamsEmaState:
        return ParamsEmaState(jnp.array(param, dtype=accumulator_dtype(param), copy=True))

    def prepare(self, count: jax.Array, dtype: Any) -> Any:
        weight = 1.0 - self.decay
        return weight / share_of(weight, count.astype(dtype) + 1, dtype) if self.debias else weight

    def apply(self, update: Any, slots: ParamsEmaState, param: Any, step: Step) -> Applied:
        if update is None:
            return None, slots
        average = moved(slots.params_ema, param + update, step.shared)
        if self.overwrite_every is not None:
            due = next_count(step.count) % self.overwrite_every == 0
            update = jnp.where(due, average - param, update)
        return update, ParamsEmaState(params_ema=average)


@constructor
def params_ema(decay: Scalar, overwrite_every: int | None = None,
               debias: bool = False) -> Transformation:
    """Keeps an exponential moving average of the parameters. Last in a chain, it sees the new ones.

        e_t = e_{t-1} + w·(p_t + u_t - e_{t-1})          e_0 = the parameters at ``init``
        w = 1 - decay, with ``debias`` (1 - decay) / (1 - decay^t)

    With ``debias`` the parameters at ``init`` have no weight. `averaged_params` reads the average
    from the state. It is in float32, for float64 leaves in float64.

    Args:
      decay: in [0, 1], below 1 with ``debias``; without it also a schedule, to warm up.
      overwrite_every: after every so many steps the parameters are set to their average, up to
        2³¹ - 1 steps; or None.
      debias: whether to correct for the start.

    Raises:
      ValueError: for a value out of range, or without the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.sgd(1.0), lionax.params_ema(0.75))
    >>> params, state = tx.step(jnp.array([4.0]), tx.init(jnp.array([4.0])), jnp.array([4.0]))
    >>> params.tolist(), lionax.averaged_params(state).tolist()
    ([0.0], [3.0])

    References:
      Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """
    return Transformation.of(ParamsEma(decay, overwrite_every, bool(debias)))


def averaged_params(state: Any) -> Any:
    """The average that `params_ema` keeps in a state.

    Args:
      state: of a transformation that contains `params_ema`, alone or anywhere inside another's.

    Raises:
      KeyError: if the state holds no average, or several.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.averaged_params(lionax.params_ema(0.9).init(jnp.array([4.0]))).tolist()
    [4.0]
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ParamsEmaState))
    found = [node.params_ema for node in nodes if isinstance(node, ParamsEmaState)]
    if len(found) != 1:
        raise KeyError(f"averaged_params: the state holds {len(found)} averages of parameters; it "
                       "must be that of a transformation with one lionax.params_ema")
    return found[0]
