"""The versions that `pyproject.toml` allows, and what JAX does not promise to keep."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement
from probes import on_devices

import lionax
from lionax.core import internals

PACKAGE = pathlib.Path(lionax.__file__).parent
SECTION = "Versions"
UNPROMISED = ("What JAX does not promise to keep stands in one module; each thing is there, and is "
              "what the library takes it for.")


@pytest.mark.promise(SECTION, "The installed versions are those that pyproject.toml allows.")
def test_versions(figure):
    for line in importlib.metadata.requires("lionax") or []:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": "flax"}):
            version = importlib.metadata.version(wanted.name)
            assert wanted.specifier.contains(version, prereleases=True), line
            figure("packages", 1)
    assert sys.version_info >= (3, 11)


@pytest.mark.promise(SECTION, UNPROMISED)
def test_tracers_and_types():
    seen = []
    jax.jit(lambda x: seen.append(isinstance(x, internals.Tracer)) or x)(1.0)
    assert seen == [True]
    assert not isinstance(jnp.ones(2), internals.Tracer)
    assert isinstance(jax.typeof(jnp.ones(2)), internals.ShapedArray)


@pytest.mark.promise(SECTION, UNPROMISED)
def test_axes_of_a_mesh():
    seen = []

    def inside(x):
        seen.append((internals.manual_axes(), *map(internals.varying_of, map(
            jax.typeof, (x, jax.lax.psum(x, "x"))))))
        return x

    on_devices(inside, 2, jax.P("x"), jax.P("x"), jnp.ones(2))
    assert seen[-1] == (("x",), {"x"}, set())
    assert not internals.manual_axes()
    assert not internals.varying_of(jax.typeof(jnp.ones(2)))


@pytest.mark.promise(SECTION, UNPROMISED)
def test_memory_spaces():
    seen = []
    jax.jit(lambda x: seen.append(internals.memory_space(x)) or x)(jnp.ones(2))
    assert seen == [internals.memory_space(jnp.ones(2))] == [jax.memory.Space.Device]
    host = jax.device_put(jnp.ones(2), jax.memory.Space.Host)
    assert internals.memory_space(host) == jax.memory.Space.Host


@pytest.mark.promise(SECTION, UNPROMISED)
def test_types_of_a_result():
    first, second = internals.types_of_result(lambda x: (x, jnp.sum(x) > 0), jnp.ones(2))
    assert (first.shape, first.dtype, second.dtype) == ((2,), jnp.float32, jnp.bool_)


@pytest.mark.promise(SECTION, UNPROMISED)
def test_buffers():
    array = jnp.ones(2)
    shard = array.addressable_shards[0].data
    assert internals.buffer_of(array) == internals.buffer_of(shard)
    assert internals.buffer_of(array) != internals.buffer_of(jnp.copy(array))


ATTRIBUTES = {"_src", "core", "extend", "interpreters", "experimental", "linear_util", "lib",
              "manual_axes", "manual_axis_type", "vma", "memory_space", "out_avals", "aval",
              "make_jaxpr", "unsafe_buffer_pointer"}


@pytest.mark.promise(SECTION, UNPROMISED)
def test_no_other_module_uses_what_is_not_promised(figure):
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imported = {part for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                    for part in (node.module or "").split(".")[1:] if (
                        node.module or "").startswith("jax.")}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                     for alias in node.names if re.match(r"jax(lib)?\.(?!numpy)", alias.name)}
        used = (names & ATTRIBUTES) | (imported - {"sharding", "tree_util"})
        if path.name == "internals.py":
            assert used
        elif path.name == "compiler.py":
            assert used == {"jaxlib.version"}  # by which it chooses options of XLA
        else:
            assert not used, path
        figure("modules", 1)
