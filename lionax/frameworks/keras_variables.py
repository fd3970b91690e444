"""A Keras optimizer whose state is that of a transformation: one Keras variable for each array."""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lionax
from lionax.core.definition import Foreign, nested
from lionax.core.hyperparameters import Injected
from lionax.transforms.decay import AddDecayedWeights
from lionax.transforms.scaling import ScaleByLearningRate

try:
    import keras
except ImportError as error:
    raise ImportError('lionax.frameworks.keras needs Keras 3 on JAX: pip install "lionax[keras]", '
                      f"and set KERAS_BACKEND=jax before it is imported ({error})") from error

__all__ = ["StateOptimizer", "given_rates", "keras"]


class StateOptimizer(keras.optimizers.Optimizer):
    """What Keras asks of an optimizer about its variables and the model's."""

    tx: lionax.Transformation

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":  # Keras would put containers of its own in place of the state's
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the state, for the variables that are not overwritten by their gradients."""
        params = {}
        for variable in variables:
            if params.setdefault(variable.path, variable) is not variable:
                raise ValueError(f"{self.name}: two variables have the path {variable.path!r}; "
                                 "give their layers different names")
        params = {path: v for path, v in params.items() if not v.overwrite_with_gradient}
        state, rates = self.tx.init({path: v.value for path, v in params.items()}), []
        if isinstance(self._learning_rate, keras.Variable):
            # Assigned, so that the variable counts, also where Keras or the caller writes it.
            state = _with_rate(state, self._learning_rate.value)
            rates = list(_rates(state).values())
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        slots = {keys: self._learning_rate if any(leaf is rate for rate in rates) else
                 self._slot(keys, leaf, params) for keys, leaf in _in_order_of(params, leaves)}
        self._slots = [slots[keys] for keys, _ in leaves]
        super().build(variables)

    def _slot(self, keys: Any, leaf: jax.Array, params: Mapping[str, Any]) -> Any:
        """A variable for an array of the state, laid out as the parameter it belongs to."""
        param = params.get(getattr(keys[-1], "key", ""))
        layout = param._layout if param is not None and param.shape == leaf.shape else None
        name = re.sub("[/ ]", "_", jax.tree_util.keystr(keys, simple=True, separator="_"))
        copy: Any = functools.partial(_copy_of, leaf)
        return self.add_variable(leaf.shape, copy, leaf.dtype.name, layout=layout, name=name)

    @property
    def state(self) -> Any:
        """The state of the transformation, to read and to assign."""
        if not self.built:
            raise ValueError(f"{self.name}: there is no state before build(variables)")
        try:
            return self._treedef.unflatten([slot.value for slot in self._slots])
        except TypeError as error:  # Keras has emptied the variables
            raise RuntimeError(f"{self.name}: fit holds the state until the epoch ends; in a "
                               "callback, take the optimizer from self.model") from error

    @state.setter
    def state(self, state: Any) -> None:
        if jax.tree.structure(state) != self._treedef:
            raise ValueError(f"{self.name}: the state has another structure; give "
                             "lionax.cast_state(state, optimizer.state)")
        for slot, leaf in zip(self._slots, jax.tree.leaves(state), strict=True):
            slot.assign(leaf)

    @property
    def learning_rate(self) -> Any:
        """A variable, to read and to assign; with a schedule, the rate of the last step."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if not isinstance(self._learning_rate, keras.Variable):
            raise TypeError(f"{self.name}: learning_rate={value!r} cannot be assigned over "
                            f"{given_rates(self.tx)}; give the transformation one number, or assign"
                            " to optimizer.state what lionax.set_hyperparams returns")
        # For its refusals: of what is no rate, and of a state that fit holds.
        _with_rate(self.state if self.built else self.tx.init({}), value)
        self._learning_rate.assign(value)

    def _rate_in_state(self) -> jax.Array:
        if len(set(given_rates(self.tx))) != 1:
            raise ValueError(f"{self.name}: the transformation has the learning rates "
                             f"{given_rates(self.tx)}; see lionax.get_hyperparams(optimizer.state)")
        return next(iter(_rates(self.state if self.built else self.tx.init({})).values()))

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """One step; refuses variables that ``build`` never saw."""
        self.check_seen(trainable_variables or ())
        super().apply(grads, trainable_variables)

    def check_seen(self, variables: Sequence[Any]) -> None:
        """Refuses variables that ``build`` never saw, and frozen ones where Optax needs them."""
        seen = set(map(id, self._trainable_variables))
        frozen = [v.path for v in self._trainable_variables if not v.trainable]
        if frozen and any(isinstance(part, Foreign) for part in nested(self.tx.definition)):
            raise ValueError(f"{self.name}: {frozen[0]!r} was frozen after compile, and Optax's "
                             "transformations need all gradients; compile again, with a new "
                             "Optimizer")
        for variable in variables if self.built else ():
            if id(variable) not in seen:
                raise ValueError(f"{self.name}: build never saw the variable {variable.path!r}; "
                                 "compile again, with a new Optimizer")

    def stateless_apply(self, optimizer_variables: Sequence[Any], grads: Sequence[Any],
                        trainable_variables: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """One step from arrays to arrays, those of the variables that are trainable now."""
        seen = [v for v in self._trainable_variables if v.trainable]
        if [v.shape for v in seen] != [tuple(array.shape) for array in trainable_variables]:
            raise ValueError(f"{self.name}: of the model's {len(trainable_variables)} trainable "
                             f"variables build saw {[v.path for v in seen]}; compile again, with "
                             "a new Optimizer")
        own = self.variables
        with keras.StatelessScope([*zip(seen, trainable_variables, strict=True),
                                   *zip(own, optimizer_variables, strict=True)]) as scope:
            self.apply(grads, seen)
        return ([scope.get_current_value(v) for v in seen],
                [scope.get_current_value(v) for v in own])

    def load_own_variables(self, store: Any) -> None:
        """Takes over what was saved; refuses another number of variables, and other shapes."""
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        ours = {str(i): variable for i, variable in enumerate(self.variables)}
        first = 1 + isinstance(self._learning_rate, keras.Variable)  # before `build` there are
        if len(saved) == first and saved["0"] == 0:
            ours = dict(itertools.islice(ours.items(), first))
        for key in sorted(ours | saved, key=int):
            here, there = (None if array is None else tuple(array.shape)
                           for array in (ours.get(key), saved.get(key)))
            if here != there:
                name = ours[key].path if key in ours else "none"
                raise ValueError(f"{self.name}: variable {key} ({name}) has shape {here}, in the "
                                 f"file {there}; load with the transformation and the model that "
                                 "were saved, or leave the optimizer out: "
                                 "keras.saving.load_model(path, compile=False)")
        for key, variable in ours.items():
            variable.assign(saved[key])


def _in_order_of(params: Mapping[str, Any], leaves: list[Any]) -> list[Any]:
    """The arrays of each field in the order of the model, as Keras saves variables by number.

    The paths, and so their order in the state, are others after the model was loaded.
    """
    numbers, fields = {path: i for i, path in enumerate(params)}, {}

    def place(pair: Any) -> tuple[int, int]:
        *above, last = pair[0]
        path = getattr(last, "key", "")
        field = tuple(above) if path in numbers else pair[0]
        return fields.setdefault(field, len(fields)), numbers.get(path, 0)

    return sorted(leaves, key=place)


def _copy_of(leaf: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    """What Keras calls to initialize a variable; a copy, for it is donated."""
    return jnp.array(leaf)


def given_rates(tx: lionax.Transformation) -> list[Any]:
    """The learning rates that a transformation was given: numbers and schedules."""
    given = [part.learning_rate for part in nested(tx.definition)
             if isinstance(part, ScaleByLearningRate | AddDecayedWeights)]
    return [rate.value if isinstance(rate, Injected) else rate for rate in given
            if rate is not None]


def _rates(state: Any) -> dict[str, jax.Array]:
    """The learning rates in a state, by name."""
    return {name: value for name, value in lionax.get_hyperparams(state).items()
            if name.rpartition("/")[2] == "learning_rate"}


def _with_rate(state: Any, value: Any) -> Any:
    """The state with a value assigned to all its learning rates."""
    return lionax.set_hyperparams(state, **dict.fromkeys(_rates(state), value))
