"""Eight CPU devices and strict dtype promotion for every test."""

import os

FLAGS = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import chex
import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("lionax", deadline=None, max_examples=25, derandomize=True,
                                     print_blob=True)
hypothesis.settings.load_profile("lionax")

# What they show does not depend on the version of JAX; `.ci/run` runs their slow tests once.
ONCE = ("benchmarks", "compat", "demo", "golden", "keras", "keras_optimizer", "notebooks",
        "optax_files", "release", "switching")


def pytest_collection_modifyitems(items):
    """Marks the tests of these files."""
    for item in items:
        if item.path.stem.removeprefix("test_") in ONCE:
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True)
def _count_traces_anew():
    """chex tells functions apart by their hash, which a later test may have again."""
    chex.clear_trace_counter()


@pytest.fixture
def standard_promotion():
    """Optax, Keras and their schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
