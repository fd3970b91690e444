"""How numbers are stored: the one place where slots are stored and loaded, and results cast.

Arithmetic runs in float32, in float64 for float64 leaves. A slot's dtype is fixed when it is made.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lionax.core.internals import Tracer, memory_space
from lionax.core.masks import check_regexes, first_match
from lionax.core.programs import Kept
from lionax.core.quantized import encode, format_of, is_quantized, zeros
from lionax.core.rounding import check_seed, is_low_precision, key_of, lifted, random_bits, rounded
from lionax.core.table import shown
from lionax.core.tree import is_beyond, is_float0, is_placeholder
from lionax.core.varying import Split, explicit_sharding

__all__ = ["Storage", "StorageByPath", "StorageLike", "accumulator_dtype", "add", "aligned",
           "are_rounded", "check_storage", "compute_dtype", "in_place_of", "is_complex", "load",
           "loaded", "on_device", "promotion_for", "sharded_as", "store", "stored", "zero_slot"]

CODES = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a slot is stored.

    Floats of at most 16 bits and codes are rounded stochastically: the expected value is exact, so
    an average goes on moving where rounding to the nearest would stop it. The random bits are a
    hash of the seed, the step, the leaf, the slot and the element: they are the same in each run
    and, under ``jit``, on each mesh. After 2³¹ - 1 steps the count stands, and the bits repeat.

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
        check_regexes((regex for regex, _ in self.rules), "Storage")
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
        if not value or any(isinstance(one, Mapping | StorageByPath) for one in value.values()):
            raise ValueError(f"{owner}: {argument}={value!r} is not accepted; give at least one "
                             "regular expression, and a dtype or a Storage for each")
        check_regexes(value, owner)
        return StorageByPath(tuple((regex, check_storage(one, owner, argument))
                                   for regex, one in value.items()))
    return Storage(_checked_dtype(value, owner, argument))


def _checked_dtype(value: Any, owner: str, argument: str) -> np.dtype | None:
    if value is None:
        return None
    try:  # NumPy would evaluate the brackets in a name
        dtype = None if isinstance(value, str) and not value.isidentifier() else jnp.dtype(value)
    except (TypeError, ValueError, OverflowError):
        dtype = None
    if dtype is None or np.zeros((), dtype) != 0 or not (  # float8_e8m0fnu has no zero
            jnp.issubdtype(dtype, jnp.inexact) or dtype.name in CODES):
        raise ValueError(f"{owner}: {argument}={shown(value)} is not accepted; give None for the "
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


def promotion_for(*arrays: Any) -> AbstractContextManager[Any]:
    """In what a complex array meets the real numbers of a step, also under strict promotion."""
    is_mixed = any(array is not None and is_complex(array) for array in arrays)
    return jax.numpy_dtype_promotion("standard") if is_mixed else contextlib.nullcontext()


def zero_slot(param: jax.Array, dtype: StorageLike = None, *, nonnegative: bool = False) -> Any:
    """An all-zero slot of a parameter's shape and sharding, for `Rule.init`.

    Args:
      param: the parameter.
      dtype: how it is stored, as `Storage` takes it; None for the parameter's own dtype.
      nonnegative: whether its elements are real and never negative. Codes are then made for an
        average of squares whose root is used. Name the slot in `Rule.nonnegative`, too.

    Returns:
      An array, or a `QuantizedArray`.

    Raises:
      TypeError: for a complex parameter and a dtype that has no imaginary part.

    >>> import jax.numpy as jnp, lionax
    >>> lionax.zero_slot(jnp.ones(2), jnp.bfloat16)
    Array([0, 0], dtype=bfloat16)
    """
    storage: Any = check_storage(dtype, "zero_slot", "dtype") or Storage()
    is_real = nonnegative or not is_complex(param)
    own = jnp.finfo(param.dtype).dtype if is_real and is_complex(param) else param.dtype
    dtype = own if storage.dtype is None else storage.dtype
    if dtype.name in CODES:
        if is_real and (format := format_of(CODES[dtype.name], param.shape, nonnegative)):
            return zeros(param, format)
        dtype = own
    if not is_real and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"a slot of dtype {dtype} loses the imaginary part of a parameter of dtype "
                        f"{param.dtype}; give None or a complex dtype")
    # An explicit dtype makes the slot strongly typed, so that a scan can carry it.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.zeros_like(param, dtype=dtype)


def load(array: Any, dtype: np.dtype, split: Split | None = None) -> jax.Array:
    """A stored array in the dtype of the arithmetic, or its complex one; integers stay."""
    array = jax.tree.map(on_device, array)
    if is_quantized(array):
        return array.decode(dtype, split)
    if is_complex(array):
        return array.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def on_device(array: jax.Array) -> jax.Array:
    """An array that may be kept in the memory of the host."""
    is_kept = memory_space(array) == jax.memory.Space.Host
    return jax.device_put(array, jax.memory.Space.Device) if is_kept else array


def aligned(update: Any, slots: Any, param: Any) -> tuple[Any, Any]:
    """On an explicit mesh, the update and the parameter in the sharding of the slots.

    Slots may be split further than their parameter. Without slots it is the update's.
    """
    shape = jnp.shape(param if update is None else update)
    wanted = [x.codes if is_quantized(x) else x
              for x in jax.tree.leaves(slots, is_leaf=is_quantized) if x.shape == shape]
    like = next((x for x in (*wanted, update) if x is not None), param)
    return sharded_as(update, like), sharded_as(param, like)


def loaded(tree: Any, dtype: np.dtype, split: Split | None) -> Any:
    """The arrays of a tree, as `load` gives them."""
    return jax.tree.map(lambda array: load(array, dtype, split), tree, is_leaf=is_quantized)


def are_rounded(slots: Any) -> list[bool]:
    """Whether new values of slots are rounded to codes or to floats of at most 16 bits."""
    return [is_quantized(slot) or is_low_precision(slot.dtype)
            for slot in jax.tree.leaves(slots, is_leaf=is_quantized)]


def store(value: jax.Array, old: Any, key: jax.Array | None = None,
          split: Split | None = None, nonnegative: bool = False) -> Any:
    """A new value in the dtype of the array that it replaces and, if types say it, its sharding.

    With a key codes and floats of at most 16 bits are rounded stochastically, else to the nearest.
    Of a nonnegative array no positive number becomes 0.
    """
    bits = random_bits(key, value, split) if key is not None and all(are_rounded(old)) else None
    if is_quantized(old):
        return jax.tree.map(_kept_as, encode(value, old.format, bits, split), old)
    dtype = jax.dtypes.canonicalize_dtype(old.dtype)  # of an array of NumPy, too
    value = lifted(value, dtype) if nonnegative else value
    return _kept_as(value.astype(dtype) if bits is None else rounded(value, dtype, bits), old)


def _kept_as(value: jax.Array, old: jax.Array) -> jax.Array:
    value, space = sharded_as(value, old), memory_space(old)
    return value if memory_space(value) == space else jax.device_put(value, space)


def sharded_as(value: Any, like: Any) -> Any:
    """On an explicit mesh, a value in the sharding of an array; any other value as it is."""
    sharding = None if value is None or like is None else explicit_sharding(like)
    if sharding is not None and jax.typeof(value).sharding != sharding:
        return jax.sharding.reshard(value, sharding)
    return value


def stored(new: Any, slots: Any, storage_of: Callable[[str], Storage | None],
           split: Split | None, nonnegative: Sequence[str], *numbers: Any) -> Any:
    """The new slots of a rule for one leaf in place of the old; the numbers tell uses apart."""
    each = []
    for field, values, old in zip(new._fields, new, slots, strict=True):
        _check_kinds(f"{type(new).__name__}.{field}", values, old)
        storage, key = storage_of(field) or Storage(), None
        if storage.rounding == "stochastic" and any(are_rounded(old)):
            key = key_of(storage.seed, len(each), *numbers)
        one = functools.partial(store, key=key, split=split, nonnegative=field in nonnegative)
        each.append(jax.tree.map(one, values, old))
    return type(new)(*each)


def _check_kinds(name: str, values: Any, old: Any) -> None:
    """Refuses to store numbers in a slot that would lose their fractions or imaginary parts."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(old, is_leaf=is_quantized), strict=False)
    for value, slot in pairs:
        if not is_quantized(slot) and _loses(value.dtype, slot.dtype):
            raise TypeError(f"{name} has dtype {slot.dtype}, which cannot hold numbers of dtype "
                            f"{value.dtype}; make the state with tx.init(params)")


def _loses(new: Any, old: Any) -> bool:
    """Whether numbers lose their fractions or imaginary parts in an array of another dtype."""
    return any(jnp.issubdtype(new, kind) and not jnp.issubdtype(old, kind)
               for kind in (jnp.inexact, jnp.complexfloating, jax.dtypes.extended))


def in_place_of(value: Any, old: Any) -> Any:
    """A value, stored as the array that it replaces: its dtype, shape, sharding and container."""

    def one(array):
        for codes in filter(is_quantized, (value, array)):
            codes.check()
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
    try:
        new, dtype, shape = jnp.asarray(value), jnp.result_type(array), jnp.shape(array)
    except Exception as error:  # JAX has many for what is no array
        raise TypeError(f"{shown(value)} cannot take the place of {shown(array)}: both must be "
                        f"arrays of numbers ({error})") from None
    is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
    is_other = new.dtype != dtype if is_key else _loses(new.dtype, dtype)
    fits = new.ndim <= len(shape) and all(
        a in (1, b) for a, b in zip(new.shape[::-1], shape[::-1], strict=False))
    if is_other or is_beyond(value) or not fits:
        raise TypeError(f"{shown(value)} of dtype {new.dtype} and shape {new.shape} cannot take "
                        f"the place of an array of dtype {dtype} and shape {shape}")
    if not is_key:  # no slot becomes 0, by whose root a step divides
        new = (new if new.dtype == dtype else lifted(new, dtype)).astype(dtype)
    new = jnp.broadcast_to(new, shape)
    is_placed = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    if is_placed and array.committed and not isinstance(new, Tracer):
        return jax.device_put(new, array.sharding)
    return new


@Kept
def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    old = sharded_as(param, update)
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return store(old + update, param)
    dtype = compute_dtype(param, update)
    return store(old.astype(dtype) + update.astype(dtype), param)


def add(param: Any, update: Any) -> Any:
    """A parameter plus its update, rounded once; the parameter where there is no update."""
    if is_placeholder(param) or is_placeholder(update) or is_float0(update):
        return param
    return _sum(param, update)
