"""One pass over memory on the CPU: a kernel in C++ that is compiled on the machine on which it is first used.

XLA on the CPU makes a loop over memory for each array that is written and each sum. `lionax.kernels.passes` cuts a traced function into
passes that write and sum several arrays at once, and each becomes a call of the kernel (cpu.cc) through JAX's foreign function
interface.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from lionax import ordering
from lionax.kernels import passes

__all__ = ["compiler", "one_pass"]

_SOURCE = pathlib.Path(__file__).with_name("cpu.cc")
_TARGET = "lionax_one_pass"
_LOCK = threading.Lock()
# Sums and products are fused where `passes` says so, and nowhere else.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A training step that reads and writes each large array as few times as it can, on one CPU device.

    There a kernel in C++ writes parameters and state in one pass over memory, where XLA makes a loop for each array; Lion then moves 20
    bytes per parameter instead of 28, LAMB 40 instead of 56, and LAMB keeps no update. Elsewhere, on other platforms, on a mesh, under
    ``vmap``, ``jvp`` and ``grad``, it is the function itself.

    The numbers are those of the function but for roundings: it multiplies, adds and rounds where XLA is known to. In Lion, SGD and Adam no
    bit differs; numbers below 1e-38 aside, which both may take for 0. XLA's choice of which product it fuses into a sum is not always
    known, and norms are summed in float64; there the last bit may differ. What is behind a gate, as in `accumulate`, runs as it does
    in the function.

    The kernel is compiled when it is first used, which takes seconds and a C++17 compiler: ``$CXX``, ``c++``, ``g++`` or ``clang++``. It
    is kept in ``$XDG_CACHE_HOME/lionax``, by default ``~/.cache/lionax``, for each processor type and version of jaxlib. A program that
    calls it cannot be exported, nor loaded by a process that has not compiled one itself.

    Args:
      function: of arrays only, as ``tx.step`` or any other that is mostly elementwise. In ``jit``, donate what it returns anew, and give
        that the same place among the arguments as among the results: ``(params, state, grads) -> (params, state)``.

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
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves((args, kwargs))]  # where jit is disabled they may be Python's
    if not all(map(ordering.is_whole, leaves)) or not jax.sharding.get_abstract_mesh().empty:
        return function(*args, **kwargs)
    with ordering.for_kernels(True):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    if closed.effects:  # as of a debug print, which no pass does
        return function(*args, **kwargs)
    # What the function closes over may belong to an outer trace, and then is an operand like any other.
    results = _one_pass.bind(*leaves, *closed.consts, jaxpr=closed.jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _plain(jaxpr: Any, *operands: jax.Array) -> list[jax.Array]:
    """The function itself."""
    count = len(jaxpr.invars)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, operands[count:]))(*operands[:count])


def _cut(jaxpr: Any, *operands: jax.Array) -> list[jax.Array]:
    with jax.enable_x64(True):  # dtypes are settled; this keeps those that are float64
        return passes.evaluate(jaxpr, operands, _call)


def _call(one: passes.Pass, arguments: Sequence[jax.Array]) -> Sequence[jax.Array]:
    results = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in one.results]
    call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=one.aliases)
    return call(*arguments, program=np.array(one.program, np.int64), constants=np.array(one.constants, np.float32),
                registers=np.int64(one.registers))


_one_pass = Primitive("one_pass")
_one_pass.multiple_results = True
_one_pass.def_impl(lambda *operands, jaxpr: _plain(jaxpr, *operands))
_one_pass.def_abstract_eval(lambda *operands, jaxpr: [var.aval for var in jaxpr.outvars])


def _batched(operands, axes, *, jaxpr):
    results = jax.vmap(functools.partial(_plain, jaxpr), in_axes=axes)(*operands)
    return results, [0] * len(results)


def _with_tangents(primals, tangents, *, jaxpr):
    return jax.jvp(functools.partial(_plain, jaxpr), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


batching.primitive_batchers[_one_pass] = _batched
ad.primitive_jvps[_one_pass] = _with_tangents


def _lower(context, *operands, jaxpr):
    return mlir.lower_fun(functools.partial(_plain, jaxpr))(context, *operands)


def _lower_on_cpu(context, *operands, jaxpr):
    # Several devices, or no number of them, mean a mesh.
    if getattr(context.module_context.axis_context, "num_devices", 0) != 1:
        return _lower(context, *operands, jaxpr=jaxpr)
    with _LOCK:
        _register()
    return mlir.lower_fun(functools.partial(_cut, jaxpr))(context, *operands)


mlir.register_lowering(_one_pass, _lower)
mlir.register_lowering(_one_pass, _lower_on_cpu, platform="cpu")


@functools.cache
def _register() -> None:
    """Makes the kernel known to XLA."""
    library = ctypes.CDLL(os.fspath(_built()))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(getattr(library, _TARGET)), platform="cpu")


def compiler() -> list[str] | None:
    """The command of the C++ compiler that would make the kernel, if there is one."""
    commands = map(shlex.split, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))
    return next((command for command in commands if command and shutil.which(command[0])), None)


def _built() -> pathlib.Path:
    """The kernel as a shared library, compiled for this machine unless it has been."""
    command = compiler()
    if command is None:
        raise RuntimeError("one_pass: found no C++ compiler to make its kernel with; install g++ or clang++, name another in the "
                           "environment variable CXX, or compile the function without one_pass")
    native = ["-march=native"]
    machine = _output([*command, *native, "-dM", "-E", "-x", "c++", os.devnull])  # which instructions it has, and which compiler this is
    if machine is None:
        native, machine = [], _output([*command, "-dM", "-E", "-x", "c++", os.devnull])
    parts = (_SOURCE.read_text(), importlib.metadata.version("jaxlib"), *_FLAGS, str(machine))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lionax"
    library = cache / f"{_TARGET}-{key[:16]}.so"
    if not library.exists():
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):  # nowhere to keep it
            library = pathlib.Path(tempfile.mkdtemp(prefix="lionax-")) / library.name
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # so that another process never sees half a file
            made = pathlib.Path(folder) / library.name
            build = [*command, *_FLAGS, *native, "-isystem", jax.ffi.include_dir(), os.fspath(_SOURCE), "-o", os.fspath(made)]
            done = subprocess.run(build, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"one_pass: its kernel could not be compiled; compile the function without one_pass, or see to this: "
                                   f"{' '.join(build)}\n{done.stderr}")
            os.replace(made, library)
    return library


def _output(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout
