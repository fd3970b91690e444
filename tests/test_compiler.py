"""The compiler options, on the version of JAX that is installed."""

import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import jaxlib.version
import pytest

import lionax

PARAMS = {"w": cases.normal(64, 32)}
FLAGS = ("--xla_cpu_copy_insertion_use_region_analysis=true "
         "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")


def temporaries(options):
    tx = lionax.lion(1e-3)
    step = jax.jit(tx.step, donate_argnums=(0, 1), compiler_options=options)
    program = step.lower(PARAMS, tx.init(PARAMS), PARAMS).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_a_step_compiles_with_the_options_and_copies_nothing():
    assert lionax.compiler_options(), "the tests run on a version that takes them"
    assert temporaries(lionax.compiler_options()) < 1024
    assert temporaries({}) >= PARAMS["w"].nbytes


@pytest.mark.parametrize(("version", "takes"), [("0.10.2", True), ("0.12.0.1", True),
                                                ("0.9.1", False), ("0.13.0", False),
                                                ("1.0.0.dev1", False)])
def test_the_version_decides(version, takes, monkeypatch):
    monkeypatch.setattr(jaxlib.version, "__version__", version)
    assert bool(lionax.compiler_options()) == takes


def test_each_call_gives_a_mapping_of_its_own():
    lionax.compiler_options().clear()
    assert lionax.compiler_options()


def test_a_nested_jit_takes_none():
    inner = jax.jit(lambda x: x + 1, compiler_options=lionax.compiler_options())
    with pytest.raises(Exception, match="compiler_options"):
        jax.jit(lambda x: inner(x) * 2)(jnp.ones(2))


@pytest.mark.slow
def test_the_flags_of_a_process_do_the_same():
    code = ("import jax, jax.numpy as jnp, lionax\n"
            "p, tx = jnp.ones((64, 32)), lionax.lion(1e-3)\n"
            "step = jax.jit(tx.step, donate_argnums=(0, 1)).lower(p, tx.init(p), p).compile()\n"
            "print(step.memory_analysis().temp_size_in_bytes)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True, env={**os.environ, "XLA_FLAGS": FLAGS})
    assert int(result.stdout) < 1024
    assert all(flag in lionax.compiler_options.__doc__ for flag in FLAGS.split())
