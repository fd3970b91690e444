"""Eight CPU devices and strict dtype promotion for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from lionax.kernels.cpu import compiler

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("lionax", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("lionax")


def pytest_collection_modifyitems(items):
    """Leaves the kernel out where there is nothing to compile it with."""
    if compiler() is None:
        for item in items:
            if item.nodeid.startswith(("lionax/kernels/", "tests/test_kernels.py")):
                item.add_marker(pytest.mark.skip("needs a C++ compiler"))
