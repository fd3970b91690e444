"""Eight CPU devices and strict dtype promotion for every test."""

import os
import zlib

FLAGS = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import chex
import hypothesis
import jax
import pytest
from probes import sized

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("lionax", deadline=None, max_examples=25, derandomize=True,
                                     print_blob=True)
hypothesis.settings.load_profile("lionax")

# The slow tests of these files depend on the version of JAX: `.ci/run` runs them on each Python.
# The others have a sample in the plain command.
ON_EACH = {"accumulation", "compiler", "conditional", "eager", "equinox", "examples", "growth",
           "habits", "integrations", "linen", "nnx", "norms", "resume", "structure", "versions"}


def _is_left_out(item):
    """Whether the long run alone takes this parameter, or the report asks for other promises."""
    one_in, promise = map(item.get_closest_marker, ("one_in", "promise"))
    if (one_in and item.get_closest_marker("slow")
            and zlib.crc32(item.name.encode()) % sized(one_in.args[0], 1)):
        return True
    parts = os.environ.get("LIONAX_PROMISES")
    return bool(parts) and not (promise and any(
        text.startswith(tuple(parts.split(";"))) for text in promise.args))


def pytest_collection_modifyitems(config, items):
    """Leaves tests out, marks the others, and tells the report which promise each proves."""
    left_out = set(filter(_is_left_out, items))
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        item.user_properties += [("promise", mark.args) for mark in item.iter_markers("promise")]
        if item.path.stem.removeprefix("test_") not in ON_EACH:
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True)
def _count_traces_anew():
    """chex tells functions apart by their hash, which a later test may have again."""
    chex.clear_trace_counter()


@pytest.fixture
def figure(record_property):
    """Adds a number to a figure of the report; of a figure called "largest …" it is the largest."""
    return record_property


@pytest.fixture
def standard_promotion():
    """Optax, Keras and their schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
