"""Writes in order, so that the CPU's compiler copies no donated buffer.

Lion's update and its new momentum both read the old one. XLA on the CPU makes two loops of the two results, and if the
momentum's buffer is donated it first copies it, lest the loop that overwrites it run before the one that still reads it. The
cure is to make the new momentum depend on the written parameter, by a zero that the compiler cannot see to be one: the bits
of one element as an integer, bounded from above and below by 0, added to the bits of the old momentum. That changes no
bit, and NaN does not spread. Elsewhere one loop writes both, and order would only hurt. A slot in bfloat16 is the same case: the
update is made of the new one before it is rounded, that is of the old one.

A gate's sums are set to zero, likewise, when all that reads them has been written.

Left to itself the CPU's runtime runs the first loop of every leaf before the second of any, which then finds nothing in the cache
that the first has read. So the first waits, by such a zero, for what is written last of a leaf some places before. What waits is what
it reads in any case: the parameter if that is written first, else the gradient, and with it all that is computed from it. If a norm
of each update must be known before it is used, as in LAMB, one leaf is worked on at a time, since its update is kept; and then the
parameter waits, too, if it is not in the dtype of the arithmetic, lest a loaded copy of it is kept from its norm on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ["AT_ONCE", "after", "for_kernels", "is_whole", "rounded", "worth_ordering", "zeros_once_written"]

SMALLEST = 1 << 14  # elements; a smaller buffer is in the cache, and its copy cheaper than the order

AT_ONCE = 3  # leaves that are worked on; with fewer the cores wait for each other where memory is fast, with more the cache is too small

_INTEGERS = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}

for_kernels = jax.make_user_context(default_value=False)
"""Whether what is being traced is for `lionax.kernels`, which write several arrays, and sum them in float64, in one pass."""


def worth_ordering(array: jax.Array) -> bool:
    """Whether an array is being compiled, floating-point, known to be large, and not known to be spread over a mesh."""
    if for_kernels.value or not isinstance(array, Tracer) or not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    return is_whole(array) and array.size >= SMALLEST and jax.sharding.get_abstract_mesh().empty


def is_whole(array: jax.Array) -> bool:
    """Whether an array is of known size and its type does not say that it is spread over a mesh."""
    return isinstance(array.size, int) and jax.typeof(array).sharding.mesh.empty


def _zero_once_written(*written: jax.Array) -> jax.Array:
    """An int32 zero that is there once some arrays are: on one CPU device; elsewhere a plain zero."""
    return _zero.bind(*map(lax.stop_gradient, written))


def _can_be_looked_at(dtype: Any) -> bool:
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else None
    return info is not None and info(dtype).bits >= 8


def zeros_once_written(like: jax.Array, *written: jax.Array) -> jax.Array:
    """Zeros in the place of a floating-point array, made once those of some arrays are whose elements can be looked at."""
    written = tuple(array for array in written if array.size and _can_be_looked_at(array.dtype))
    integer = _INTEGERS[like.dtype.itemsize]
    return lax.bitcast_convert_type(jnp.broadcast_to(_zero_once_written(*written).astype(integer), like.shape), like.dtype)


@jax.jit
def after(written: jax.Array, arrays: Any) -> Any:
    """A tree of arrays, to be read, on one CPU device, only when another is written: a real one with elements.

    To a derivative it is the identity.
    """
    zero = _zero_once_written(written)
    return jax.tree.map(functools.partial(_plus_bits, zero), arrays)


@jax.custom_jvp
def _plus_bits(zero: jax.Array, slot: jax.Array) -> jax.Array:
    if not jnp.issubdtype(slot.dtype, jnp.floating):
        return slot
    integer = _INTEGERS[slot.dtype.itemsize]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(slot, integer) + zero.astype(integer), slot.dtype)


@_plus_bits.defjvp
def _plus_bits_jvp(primals, tangents):
    return _plus_bits(*primals), tangents[1]


@jax.jit
def rounded(value: jax.Array, count: jax.Array) -> jax.Array:
    """A value, to be rounded before it is used: the compiler fuses no product in it with a sum that follows.

    Args:
      value: floating-point.
      count: an int32 scalar, not negative.
    """
    return _plus_bits(jnp.equal(count, jnp.iinfo(jnp.int32).min).astype(jnp.int32), value)


_zero = Primitive("zero_once_written")
_zero.def_impl(lambda *written: jnp.zeros((), jnp.int32))
_zero.def_abstract_eval(lambda *written: ShapedArray((), jnp.dtype(jnp.int32)))
batching.primitive_batchers[_zero] = lambda arguments, axes: (jnp.zeros((), jnp.int32), None)


def _plain(*written: jax.Array) -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _hidden(*written: jax.Array) -> jax.Array:
    if not written:
        return _plain()
    elements = [array[(0,) * array.ndim] for array in written]
    bits = [lax.bitcast_convert_type(element, _INTEGERS[element.dtype.itemsize]).astype(jnp.int32) for element in elements]
    return jnp.maximum(jnp.minimum(functools.reduce(jnp.minimum, bits), 0), 0)


def _lower_on_cpu(context, *written):
    # One element of an array that is spread over devices would have to be sent to all of them.
    alone = getattr(context.module_context.axis_context, "num_devices", 0) == 1
    return mlir.lower_fun(_hidden if alone else _plain, multiple_results=False)(context, *written)


mlir.register_lowering(_zero, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_zero, _lower_on_cpu, platform="cpu")
