"""Steps that are taken only if the gradients are finite, with or without a loss scale."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lionax.core.counting import next_count
from lionax.core.definition import Conditional, nested
from lionax.core.hyperparameters import Interval, Scalar, check_count, check_scalar, scalar
from lionax.core.programs import Kept
from lionax.core.rule import Applied, Definition, Rule, Step
from lionax.core.state import State, init_state
from lionax.core.storage import compute_dtype, load, promotion_for
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.combining import definition_of

__all__ = ["DynamicLossScale", "DynamicLossScaleState", "SkipIf", "SkipState", "Unscale",
           "dynamic_loss_scale", "is_bool", "refuse_inside", "skip_if", "skip_nonfinite", "unscale"]

LARGEST = 2.0**126  # the reciprocal of a larger loss scale is no normal number


@dataclasses.dataclass(frozen=True)
class Unscale(Rule):
    """The rule of `unscale`."""

    is_memoryless: ClassVar = True

    factor: Scalar = scalar(nonzero=True, remedy="it is what the loss was multiplied by")

    def apply(self, update: jax.Array, slots: Any, param: Any, step: Step) -> Applied:
        return update * (1.0 / self.factor), slots


@constructor
def unscale(factor: Scalar) -> Transformation:
    """Divides by the constant that multiplied the loss: ``u ← u / factor``. First in a chain.

    Args:
      factor: the loss scale; not 0.

    Raises:
      ValueError: for 0.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.unscale(128.0)
    >>> tx.update(jnp.array([256.0]), tx.init(jnp.zeros(1)))[0].tolist()
    [2.0]
    """
    return Transformation.of(Unscale(factor))


class SkipState(NamedTuple):
    """The state of `SkipIf`."""

    consecutive: jax.Array  # int32 []: how many steps were skipped since the last that was taken
    skipped: jax.Array  # int32 []: how many steps were skipped in all
    inner: State  # of the transformation inside


@dataclasses.dataclass(frozen=True)
class SkipIf(Conditional):
    """The definition of `skip_if`, and with no predicate of `skip_nonfinite`."""

    inner_gradients: ClassVar = "accepted_"

    inner: Definition
    max_consecutive: int | None
    predicate: Callable[..., Any] | None = None  # None: whether an element is not finite

    @property
    def name(self) -> str:
        return "skip_nonfinite" if self.predicate is None else "skip_if"

    @property
    def sums(self) -> bool:
        return self.predicate is None

    def __post_init__(self):
        if self.max_consecutive is not None or self.predicate is None:
            check_count(self.max_consecutive, self.name, "max_consecutive")
        if self.predicate is not None and not callable(self.predicate):
            raise TypeError(f"skip_if: predicate={self.predicate!r} is not a function of the "
                            "updates, the parameters and the extra arguments")
        refuse_inside(self.inner, self.name, DynamicLossScale)

    @property
    def takes(self) -> Collection[str]:
        return () if self.predicate is None else ("**",)

    def init(self, params: Any) -> SkipState:
        # Each its own array: a buffer cannot be donated twice.
        return SkipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
                         init_state(self.inner, params))

    def accepts(self, updates: Any, state: SkipState, params: Any,
                extra: Mapping[str, Any]) -> jax.Array:
        if self.predicate is None:
            return super().accepts(updates, state, params, extra)
        try:
            skips = self.predicate(updates, params, **extra)
        except TypeError as error:
            raise TypeError(f"skip_if: predicate={self.predicate!r} fails on the updates, the "
                            f"parameters and the extra arguments {list(extra)}: {error}") from error
        if not is_bool(skips):
            raise TypeError(f"skip_if: the predicate must return one bool; got {skips!r}")
        return ~jnp.asarray(skips, bool)

    def close(self, updates: Any, state: SkipState, due: Any, accepted: jax.Array) -> SkipState:
        return state._replace(consecutive=jnp.where(accepted, 0, next_count(state.consecutive)),
                              skipped=next_count(state.skipped, ~accepted))

    def poisons(self, state: SkipState) -> jax.Array | bool:
        return self.max_consecutive is not None and state.consecutive >= self.max_consecutive


def is_bool(value: Any) -> bool:
    """Whether a value is one bool, or an array of one."""
    is_kind = isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_
    return is_kind and jnp.shape(value) == ()


@constructor
def skip_if(tx: optax.GradientTransformation, predicate: Callable[..., Any],
            max_consecutive: int | None = None) -> Transformation:
    """Skips the steps for which a predicate holds: their updates are zero, the inner state stays.

    Args:
      tx: what runs otherwise; lionax's or Optax's.
      predicate: ``predicate(updates, params, **extra)`` returns one bool, also a traced one, which
        must be the same on all devices; ``extra`` are the extra arguments of the call.
      max_consecutive: after so many skipped steps in a row the updates are NaN; None for never.

    Raises:
      TypeError: for a predicate that is not a function or does not return one bool.
      ValueError: for a limit below 1; for a `dynamic_loss_scale` inside, which sees no overflow.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.skip_if(lionax.sgd(1.0), lambda updates, params, loss: loss > 10.0)
    >>> params, state = jnp.array([1.0]), tx.init(jnp.zeros(1))
    >>> tx.step(params, state, jnp.array([0.5]), loss=99.0)[0].tolist()
    [1.0]
    """
    return Transformation.of(SkipIf(definition_of(tx, "skip_if"), max_consecutive, predicate))


@constructor
def skip_nonfinite(tx: optax.GradientTransformation, max_consecutive: int) -> Transformation:
    """Skips steps whose gradients have a NaN or an infinite element, as `skip_if`.

    All devices decide alike. After ``max_consecutive`` skipped steps in a row the updates are NaN,
    so that a lost run shows. The inner state takes none of the gradients' NaN: it is good to
    restart from. What overflows inside, such as Adam's square of 1e30, is not seen: clip before it.

    Args:
      tx: what runs otherwise; lionax's or Optax's.
      max_consecutive: how many steps in a row may be skipped, at least 1.

    Raises:
      ValueError: for a limit below 1; for a `dynamic_loss_scale` inside, which sees no overflow.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.skip_nonfinite(lionax.sgd(1.0), max_consecutive=5)
    >>> params, state = tx.step(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.array([jnp.nan]))
    >>> params.tolist(), int(state.rules.skipped)
    ([1.0], 1)
    """
    return Transformation.of(SkipIf(definition_of(tx, "skip_nonfinite"), max_consecutive))


class DynamicLossScaleState(NamedTuple):
    """The state of `DynamicLossScale`."""

    loss_scale: jax.Array  # float32 []: what the next loss is to be multiplied by
    good_steps: jax.Array  # int32 []: steps since the scale last changed
    skipped: jax.Array  # int32 []: steps not taken, in all
    inner: State  # of the transformation inside


@dataclasses.dataclass(frozen=True)
class DynamicLossScale(Conditional):
    """The definition of `dynamic_loss_scale`."""

    inner_gradients: ClassVar = "unscaled_"

    inner: Definition
    initial_scale: float
    growth_interval: int
    growth_factor: float
    backoff_factor: float
    min_scale: float
    max_scale: float

    def __post_init__(self):
        check_count(self.growth_interval, self.name, "growth_interval")
        at_least = {"initial_scale": Interval(1e-30, LARGEST), "growth_factor": Interval(1.0),
                    "backoff_factor": Interval(1e-30, 1.0), "min_scale": Interval(1e-30, LARGEST),
                    "max_scale": Interval(float(self.min_scale), LARGEST)}
        for argument, accepted in at_least.items():
            value = getattr(self, argument)
            number = check_scalar(value, accepted, self.name, argument, dynamic=False)
            object.__setattr__(self, argument, number)

    def init(self, params: Any) -> DynamicLossScaleState:
        return DynamicLossScaleState(
            jnp.asarray(self.initial_scale, jnp.float32), jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32), init_state(self.inner, params))

    def inner_updates(self, updates: Any, state: DynamicLossScaleState) -> Any:
        return jax.tree.map(lambda u: _unscaled(u, state.loss_scale), updates)

    def accepts(self, updates: Any, state: DynamicLossScaleState, params: Any,
                extra: Mapping[str, Any]) -> jax.Array:
        # A finite gradient may overflow here, where the scale is below 1.
        if min(self.initial_scale, self.min_scale) < 1:
            updates = self.inner_updates(updates, state)
        return super().accepts(updates, state, params, extra)

    def close(self, updates: Any, state: DynamicLossScaleState, due: Any,
              accepted: jax.Array) -> DynamicLossScaleState:
        good_steps = next_count(state.good_steps)
        grows = good_steps >= self.growth_interval
        larger = jnp.where(grows, state.loss_scale * self.growth_factor, state.loss_scale)
        smaller = jnp.maximum(state.loss_scale * self.backoff_factor, self.min_scale)
        return state._replace(
            loss_scale=jnp.where(accepted, jnp.minimum(larger, self.max_scale), smaller),
            good_steps=jnp.where(accepted & ~grows, good_steps, 0),
            skipped=next_count(state.skipped, ~accepted))


@Kept
def _unscaled(update: jax.Array, loss_scale: jax.Array) -> jax.Array:
    dtype = compute_dtype(update)
    with promotion_for(update):
        return load(update, dtype) * (1 / loss_scale.astype(dtype))


def refuse_inside(inner: Definition, owner: str, *kinds: type[Conditional]) -> None:
    """Refuses conditionals inside of what takes the overflows away that they wait for."""
    for definition in nested(inner):
        if isinstance(definition, kinds):
            name = definition.name
            raise ValueError(f"{owner}: a {name} inside never sees an overflow, since {owner} "
                             f"drops it; write {name}({owner}(tx, ...), ...)")


@constructor
def dynamic_loss_scale(tx: optax.GradientTransformation, initial_scale: float = 2.0**15,
                       growth_interval: int = 2000, *, growth_factor: float = 2.0,
                       backoff_factor: float = 0.5, min_scale: float = 1.0,
                       max_scale: float = 2.0**24) -> Transformation:
    """Divides by a loss scale that grows while gradients are finite, and shrinks when they are not.

    Multiply the loss by ``optax.tree.get(state, "loss_scale")`` before you differentiate it. Here
    the gradients are multiplied by its reciprocal, in float32. Where they overflowed, the updates
    are zero, the inner state stays and the scale shrinks.

    Args:
      tx: what runs on the true gradients; lionax's or Optax's.
      initial_scale: the first scale, in (0, 2^126].
      growth_interval: how many finite steps in a row make the scale grow, at least 1.
      growth_factor: by which it grows, at least 1.
      backoff_factor: by which it shrinks, in (0, 1].
      min_scale: its lower bound, above 0.
      max_scale: its upper bound, at most 2^126.

    Raises:
      ValueError: for a value out of range.

    >>> import jax.numpy as jnp, lionax, optax
    >>> tx = lionax.dynamic_loss_scale(lionax.sgd(1.0), initial_scale=8.0)
    >>> params, state = tx.step(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.array([jnp.inf]))
    >>> params.tolist(), float(optax.tree.get(state, "loss_scale"))
    ([1.0], 4.0)

    References:
      Micikevicius et al., Mixed Precision Training, 2018, arXiv:1710.03740.
    """
    return Transformation.of(DynamicLossScale(
        definition_of(tx, "dynamic_loss_scale"), initial_scale, growth_interval, growth_factor,
        backoff_factor, min_scale, max_scale))
