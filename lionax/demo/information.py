"""What ``lionax info`` prints: versions, devices, compiler options, extras."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import lionax

__all__ = ["describe"]


def describe() -> Iterator[str]:
    """The lines, each as soon as it is known."""
    packages = ("jax", "jaxlib", "optax", "numpy")
    yield f"lionax {lionax.__version__}, Python {platform.python_version()}, {platform.system()}"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    yield from _devices()
    yield "compiler options (lionax.compiler_options()):"
    yield from (f"  {line}" for line in _options())
    yield "extras (pip install 'lionax[...]'):"
    yield from (f"  {line}" for line in _extras())


def _devices() -> Iterator[str]:
    try:
        kinds = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:
        yield f"devices: none ({error})"
        return
    for kind in dict.fromkeys(kinds):
        yield f"devices: {kinds.count(kind)} × {kind}"


def _options() -> Iterator[str]:
    options = lionax.compiler_options()
    if not options:
        yield "none: this jaxlib is not one that they were tested with"
    for name, value in options.items():
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(jnp.ones(1)).compile()
            yield f"{name}={value}: taken"
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            yield f"{name}={value}: refused ({str(error).splitlines()[0]})"


def _extras() -> Iterator[str]:
    """For each extra what is there and what is missing."""
    wanted: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("lionax") or ():
        match = re.match(r"([\w.-]+)[^;]*; *extra == ['\"]([\w-]+)", line)
        if match and match[1] != "lionax":
            wanted.setdefault(match[2], []).append(match[1])
    for extra, names in wanted.items():
        there = [name for name in names if _version(name)]
        missing = [name for name in names if not _version(name)]
        shown = [f"{name} {_version(name)}" for name in there]
        yield f"{extra}: {', '.join(shown) or 'nothing'}" + (
            f"; missing: {', '.join(missing)}" if missing else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
