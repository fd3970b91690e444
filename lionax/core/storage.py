"""How numbers are stored: the one place where slots are stored and loaded, and results cast.

Arithmetic runs in float32, in float64 for float64 leaves. A slot's dtype is fixed when it is made.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lionax.core.masks import check_regexes, first_match
from lionax.core.quantized import encode, format_of, is_quantized, zeros
from lionax.core.rounding import check_seed, is_low_precision, key_of, random_bits, rounded
from lionax.core.tree import is_float0, is_placeholder
from lionax.core.varying import explicit_sharding

__all__ = ["Storage", "StorageByPath", "StorageLike", "accumulator_dtype", "add",
           "check_storage", "compute_dtype", "in_place_of", "is_complex", "load",
           "loaded", "store", "stored", "zero_slot"]

CODES = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a slot is stored.

    Floats of at most 16 bits and codes are rounded stochastically: the expected value is exact, so
    an average goes on moving where rounding to the nearest would stop it. The random bits are a
    hash of the seed, the step, the leaf, the slot and the element: they are the same in each run
    and, under ``jit``, on each mesh.

    Args:
      dtype: None for the parameter's own; a floating-point or complex dtype; "int8" or "int4" for a
        `QuantizedArray`. A leaf of fewer than 4,096 elements, or whose last axis has no whole
        blocks (a multiple of 64 for "int8", of 32 for "int4"), keeps the parameter's own.
      rounding: "stochastic" or "nearest".
      seed: of the random bits.

    Raises:
      TypeError, ValueError: for another dtype or rounding, or a seed that is not an int.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lion(1e-3, mu_dtype=lionax.Storage("bfloat16", rounding="nearest"))
    >>> tx.init(jnp.zeros(2)).rules[0].mu.dtype
    dtype(bfloat16)
    """

    dtype: Any = None
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "dtype", _checked_dtype(self.dtype, "Storage", "dtype"))
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"Storage: rounding={self.rounding!r} is not accepted; give "
                             "'stochastic' or 'nearest'")
        check_seed(self.seed, "Storage")

    def __repr__(self) -> str:
        given = [repr(self.dtype and self.dtype.name)]
        given += [f"{field.name}={getattr(self, field.name)!r}"
                  for field in dataclasses.fields(self)[1:]
                  if getattr(self, field.name) != field.default]
        return f"Storage({', '.join(given)})"


StorageLike = Any
"""A `Storage`, what it takes as its dtype, or a dict of these by regular expressions over paths."""


@dataclasses.dataclass(frozen=True)
class StorageByPath:
    """A `Storage` for each leaf: that of the first regular expression that its path matches."""

    rules: tuple[tuple[str, Any], ...]  # expression and storage
    dtype: ClassVar[None] = None  # where no path is known

    def __post_init__(self):
        rules = tuple((regex, check_storage(value, "Storage", f"dtype for {regex!r}"))
                      for regex, value in self.rules)
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return repr(dict(self.rules))

    def at(self, path: str) -> Storage | None:
        """How the slots of the leaf with this path are stored."""
        return first_match(self.rules, path)


def check_storage(value: StorageLike, owner: str, argument: str) -> Storage | StorageByPath | None:
    """A storage argument as a `Storage`; refuses what is no dtype of slots."""
    if value is None or isinstance(value, Storage | StorageByPath):
        return value
    if isinstance(value, Mapping):
        check_regexes(value, owner)
        return StorageByPath(tuple((regex, check_storage(one, owner, argument))
                                   for regex, one in value.items()))
    return Storage(_checked_dtype(value, owner, argument))


def _checked_dtype(value: Any, owner: str, argument: str) -> np.dtype | None:
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not (jnp.issubdtype(dtype, jnp.inexact) or dtype.name in CODES):
        raise ValueError(f"{owner}: {argument}={value!r} is not accepted; give None for the "
                         "parameter's own dtype, a floating-point dtype such as jnp.bfloat16 or "
                         "'float32', 'int8' or 'int4'")
    return dtype


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype of real arithmetic on these arrays: float64 if one is as precise, or float32."""
    is_double = any(array.dtype in (jnp.float64, jnp.complex128) for array in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def accumulator_dtype(param: jax.Array, storage: Storage | None = None) -> StorageLike:
    """How a slot that adds up small amounts is stored: as given, else in at least float32."""
    if storage is not None and storage.dtype is not None:
        return storage
    return param.dtype if is_complex(param) else compute_dtype(param)


def is_complex(array: Any) -> bool:
    """Whether an array has a complex dtype."""
    return jnp.issubdtype(array.dtype, jnp.complexfloating)


def zero_slot(param: jax.Array, dtype: StorageLike = None, *, nonnegative: bool = False) -> Any:
    """An all-zero slot of a parameter's shape and sharding, for `Rule.init`.

    Args:
      param: the parameter.
      dtype: how it is stored, as `Storage` takes it; None for the parameter's own dtype.
      nonnegative: whether its elements are never negative. Codes are then made for an average of
        squares whose root is used.

    Returns:
      An array, or a `QuantizedArray`.

    Raises:
      TypeError: for a complex parameter and a dtype that has no imaginary part.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.zero_slot(jnp.ones(2), jnp.bfloat16)
    Array([0, 0], dtype=bfloat16)
    """
    storage: Any = check_storage(dtype, "zero_slot", "dtype") or Storage()
    dtype = param.dtype if storage.dtype is None else storage.dtype
    if dtype.name in CODES:
        if not is_complex(param) and (
                format := format_of(CODES[dtype.name], param.shape, nonnegative)):
            return zeros(param, format)
        dtype = param.dtype
    if is_complex(param) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"a slot of dtype {dtype} loses the imaginary part of a parameter of dtype "
                        f"{param.dtype}; give None or a complex dtype")
    # An explicit dtype makes the slot strongly typed, so that a scan can carry it.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.zeros_like(param, dtype=dtype)


def load(array: Any, dtype: np.dtype) -> jax.Array:
    """A stored array in the dtype of the arithmetic, or its complex one; integers stay."""
    if is_quantized(array):
        return array.decode(dtype)
    if is_complex(array):
        return array.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def loaded(tree: Any, dtype: np.dtype) -> Any:
    """The arrays of a tree, as `load` gives them."""
    return jax.tree.map(functools.partial(load, dtype=dtype), tree, is_leaf=is_quantized)


def _is_rounded(slot: Any) -> bool:
    """Whether a new value of a slot is rounded to codes or to a float of at most 16 bits."""
    return is_quantized(slot) or is_low_precision(slot.dtype)


def store(value: jax.Array, old: Any, key: jax.Array | None = None) -> Any:
    """A new value in the dtype of the array that it replaces and, if types say it, its sharding.

    With a key codes and floats of at most 16 bits are rounded stochastically, else to the nearest.
    """
    bits = random_bits(key, value) if key is not None and _is_rounded(old) else None
    if is_quantized(old):
        return jax.tree.map(_sharded_as, encode(value, old.format, bits), old)
    return _sharded_as(value.astype(old.dtype) if bits is None else
                       rounded(value, old.dtype, bits), old)


def _sharded_as(value: jax.Array, old: jax.Array) -> jax.Array:
    sharding = explicit_sharding(old)
    if sharding is not None and jax.typeof(value).sharding != sharding:
        return jax.sharding.reshard(value, sharding)
    return value


def stored(new: Any, slots: Any, storage_of: Callable[[str], Storage | None], *numbers: Any) -> Any:
    """The new slots of a rule for one leaf in place of the old; the numbers tell uses apart."""
    each = []
    for field, values, old in zip(new._fields, new, slots, strict=True):
        storage, key = storage_of(field) or Storage(), None
        held = jax.tree.leaves(old, is_leaf=is_quantized)
        if storage.rounding == "stochastic" and any(map(_is_rounded, held)):
            key = key_of(storage.seed, len(each), *numbers)
        each.append(jax.tree.map(functools.partial(store, key=key), values, old))
    return type(new)(*each)


def in_place_of(value: Any, old: Any) -> Any:
    """A value, stored as the array that it replaces: its dtype, shape, sharding and container."""

    def one(array):
        if is_quantized(value) and is_quantized(array) and value.format == array.format:
            return jax.tree.map(_placed_as, value, array)  # the same codes
        numbers = value.decode() if is_quantized(value) else value
        if not is_quantized(array):
            return _placed_as(numbers, array)
        values = jnp.broadcast_to(jnp.asarray(numbers), array.shape)
        return jax.tree.map(_placed_as, encode(values, array.format, None), array)

    # A Flax optimizer wraps each array of the state in a variable.
    return jax.tree.map(one, old, is_leaf=is_quantized)


def _placed_as(value: Any, array: Any) -> jax.Array:
    new, dtype = jnp.asarray(value), jnp.result_type(array)
    is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
    new = jnp.broadcast_to(new if is_key else new.astype(dtype), jnp.shape(array))
    is_placed = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    if is_placed and array.committed and not isinstance(new, Tracer):
        return jax.device_put(new, array.sharding)
    return new


@jax.jit
def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return store(param + update, param)
    dtype = compute_dtype(param, update)
    return store(param.astype(dtype) + update.astype(dtype), param)


def add(param: Any, update: Any) -> Any:
    """A parameter plus its update, rounded once; the parameter where there is no update."""
    if is_placeholder(param) or is_placeholder(update) or is_float0(update):
        return param
    return _sum(param, update)
