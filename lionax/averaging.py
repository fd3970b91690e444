"""An exponential moving average of the parameters, for evaluation or to go on from."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lionax import storage
from lionax.hyperparameters import Scalar, check_count, scalar
from lionax.rule import Rule, Step
from lionax.transformation import Transformation, constructor

__all__ = ["ParamsEma", "ParamsEmaState", "averaged_params", "params_ema"]


class ParamsEmaState(NamedTuple):
    """The slots of `ParamsEma`."""

    params_ema: Any  # average of the parameters after each step; the parameter's shape; at least float32


@dataclasses.dataclass(frozen=True)
class ParamsEma(Rule):
    """The rule of `params_ema`."""

    decay: Scalar = scalar(low=0, high=1)
    overwrite_every: int | None = None
    idle_leaves: bool = False  # whether leaves without a gradient are averaged, too
    calls: int = 1  # how many calls are counted as one step for overwrite_every

    @property
    def needs_params(self) -> bool:
        return True

    @property
    def changes_update(self) -> bool:
        return self.overwrite_every is not None

    @property
    def acts_without_gradient(self) -> bool:
        return self.idle_leaves

    def __post_init__(self):
        super().__post_init__()
        if self.overwrite_every is not None:
            check_count(self.overwrite_every, "params_ema", "overwrite_every", or_none=True)

    def init(self, param: jax.Array) -> ParamsEmaState:
        return ParamsEmaState(params_ema=jnp.array(param, dtype=storage.accumulator(param, None), copy=True))

    def apply(self, update: jax.Array, slots: ParamsEmaState, param: Any, step: Step) -> tuple[jax.Array, ParamsEmaState]:
        average = self.decay * slots.params_ema + (1.0 - self.decay) * (param + update)
        if self.overwrite_every is not None:
            due = (step.count // self.calls + 1) % self.overwrite_every == 0
            update = jnp.where(due, average - param, update)
        return update, ParamsEmaState(params_ema=average)


@constructor
def params_ema(decay: Scalar, overwrite_every: int | None = None) -> Transformation:
    """Keeps an exponential moving average of the parameters. Stands last in a chain, where the updates are final.

        e_t = decay·e_{t-1} + (1 - decay)·(p_t + u_t)          e_0 = the parameters at ``init``

    `averaged_params` reads it from the state. It is kept in float32 at least (float64 for float64 leaves).

    Args:
      decay: in [0, 1].
      overwrite_every: after how many steps the parameters are set to their average, again and again; None for never.

    Raises:
      ValueError: for a value out of range, or an update without the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.chain(lionax.sgd(1.0), lionax.params_ema(0.75))
    >>> params, state = tx.step(jnp.array([4.0]), tx.init(jnp.array([4.0])), jnp.array([4.0]))
    >>> params.tolist(), lionax.averaged_params(state).tolist()
    ([0.0], [3.0])

    References:
      Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """
    return Transformation.of(ParamsEma(decay, overwrite_every))


def averaged_params(state: Any) -> Any:
    """The average that `params_ema` keeps in a state.

    Args:
      state: of a transformation that contains `params_ema`, alone or anywhere inside another's.

    Returns:
      A tree like the parameters, with float32 (float64) leaves.

    Raises:
      KeyError: if the state holds no average, or several.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.averaged_params(lionax.params_ema(0.9).init(jnp.array([4.0]))).tolist()
    [4.0]
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ParamsEmaState))
    found = [node.params_ema for node in nodes if isinstance(node, ParamsEmaState)]
    if len(found) != 1:
        raise KeyError(f"averaged_params: the state holds {len(found)} averages of parameters; it must be that of a "
                       "transformation with one lionax.params_ema")
    return found[0]
