"""One pass over memory on the CPU: a kernel in C++ that is compiled on the machine on which it is first used.

XLA on the CPU makes a loop over memory for each array that is written and each sum. `lionax.kernels.passes` cuts a traced function into
passes that write and sum several arrays at once, and each becomes a call of the kernel (cpu.cc) through JAX's foreign function
interface.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir

from lionax import ordering
from lionax.kernels import passes

__all__ = ["compiler", "one_pass"]

_SOURCE = pathlib.Path(__file__).with_name("cpu.cc")
_TARGET = "lionax_one_pass"
# Sums and products are fused where `passes` says so, and nowhere else.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A training step that reads and writes each large array as few times as it can, on one CPU device.

    There a kernel in C++ writes parameters and state in one pass over memory, where XLA makes a loop for each array; Lion then moves 20
    bytes per parameter instead of 28, LAMB 40 instead of 56, and LAMB keeps no update. Elsewhere, on other platforms, on a mesh, under
    ``vmap`` and in derivatives, it is the function itself.

    The numbers are those of the function, bit for bit, as long as the compiler fuses the same product into the same sum: in Lion behind a
    clip it takes another, and the momentum may differ in the last bit. Norms are summed in float64, so that they may differ by a
    rounding; what is behind a gate, as in `accumulate`, runs as it does in the function.

    The kernel is compiled when it is first used, which takes seconds and a C++17 compiler: ``$CXX``, ``c++``, ``g++`` or ``clang++``. It
    is kept in ``$XDG_CACHE_HOME/lionax``, by default ``~/.cache/lionax``, for each processor type and version of jaxlib.

    Args:
      function: of arrays, as ``tx.step`` or any other that is mostly elementwise. In ``jit``, donate what it returns anew, and give that
        the same place among the arguments as among the results: ``(params, state, grads) -> (params, state)``.

    Returns:
      A function with the same arguments and results.

    Raises:
      RuntimeError: when it is first compiled on a CPU, if there is no compiler or it fails.

    >>> import jax, jax.numpy as jnp, lionax
    >>> from lionax import kernels
    >>> tx = lionax.lion(0.1, weight_decay=0.0)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> step = jax.jit(kernels.one_pass(tx.step), donate_argnums=(0, 1))
    >>> params, state = step(params, tx.init(params), {"w": jnp.array([3.0, -4.0])})
    >>> [round(w, 3) for w in params["w"].tolist()]
    [0.9, 2.1]
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _run(function, args, kwargs)

    return run


@functools.partial(jax.jit, static_argnums=0)
def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, arguments = jax.tree.flatten((args, kwargs))

    def flat(*leaves: jax.Array) -> Any:
        args, kwargs = jax.tree.unflatten(arguments, leaves)
        return function(*args, **kwargs)

    if not all(map(_is_whole, leaves)) or not jax.sharding.get_abstract_mesh().empty:
        return flat(*leaves)
    with ordering.tracing_for_kernels(True):
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    if closed.effects:  # as of a debug print, which no pass does
        return flat(*leaves)
    results = _one_pass.bind(*leaves, closed=closed, plain=lambda *leaves: jax.tree.leaves(flat(*leaves)))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _is_whole(leaf: Any) -> bool:
    """Whether an array is of known size and not known to be spread over a mesh."""
    return isinstance(leaf.size, int) and jax.typeof(leaf).sharding.mesh.empty


def _cut(closed: ClosedJaxpr, *leaves: jax.Array) -> list[jax.Array]:
    with jax.enable_x64(True):  # dtypes are settled; this keeps those that are float64
        return passes.evaluate(closed, leaves, _call)


def _call(one: passes.Pass, arguments: Sequence[jax.Array]) -> Sequence[jax.Array]:
    results = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in one.results]
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=one.aliases)
    return call(*arguments, program=np.array(one.program, np.int64), constants=np.array(one.constants, np.float32),
                registers=np.int64(one.registers))


_one_pass = Primitive("one_pass")
_one_pass.multiple_results = True
_one_pass.def_abstract_eval(lambda *leaves, closed, plain: closed.out_avals)


def _batched(arguments, axes, *, closed, plain):
    results = jax.vmap(plain, in_axes=axes)(*arguments)
    return results, [0] * len(results)


def _with_tangents(primals, tangents, *, closed, plain):
    return jax.jvp(plain, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


batching.primitive_batchers[_one_pass] = _batched
ad.primitive_jvps[_one_pass] = _with_tangents


def _lower(context, *leaves, closed, plain):
    return mlir.lower_fun(plain)(context, *leaves)


def _lower_on_cpu(context, *leaves, closed, plain):
    if getattr(context.module_context.axis_context, "num_devices", 0) != 1:
        return _lower(context, *leaves, closed=closed, plain=plain)
    _register()
    return mlir.lower_fun(functools.partial(_cut, closed))(context, *leaves)


mlir.register_lowering(_one_pass, _lower)
mlir.register_lowering(_one_pass, _lower_on_cpu, platform="cpu")


@functools.cache
def _register() -> None:
    """Makes the kernel known to XLA."""
    library = ctypes.CDLL(os.fspath(_built()))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(getattr(library, _TARGET)), platform="cpu")


def compiler() -> str | None:
    """The C++ compiler that would make the kernel, if there is one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def _built() -> pathlib.Path:
    """The kernel as a shared library, compiled for this machine unless it has been."""
    command = compiler()
    if command is None:
        raise RuntimeError("one_pass: found no C++ compiler to make its kernel with; install g++ or clang++, name another in the "
                           "environment variable CXX, or compile the function without one_pass")
    native = ["-march=native"]
    machine = _output([command, *native, "-dM", "-E", "-x", "c++", os.devnull])  # which instructions it has, and which compiler this is
    if machine is None:
        native, machine = [], _output([command, "-dM", "-E", "-x", "c++", os.devnull])
    parts = (_SOURCE.read_text(), importlib.metadata.version("jaxlib"), *_FLAGS, str(machine))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lionax"
    library = cache / f"{_TARGET}-{key[:16]}.so"
    if not library.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # nowhere to keep it
            library = pathlib.Path(tempfile.mkdtemp(prefix="lionax-")) / library.name
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # so that another process never sees half a file
            made = pathlib.Path(folder) / library.name
            build = [command, *_FLAGS, *native, "-isystem", jax.ffi.include_dir(), os.fspath(_SOURCE), "-o", os.fspath(made)]
            done = subprocess.run(build, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"one_pass: its kernel could not be compiled; compile the function without one_pass, or see to this: "
                                   f"{' '.join(build)}\n{done.stderr}")
            os.replace(made, library)
    return library


def _output(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout
