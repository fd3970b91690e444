"""What the modules of `lionax.frameworks` have in common."""

import importlib.util
import pathlib
import sys

import cases
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lionax
from lionax.core.placement import own_buffers
from lionax.frameworks.contract import as_lionax

FOLDER = pathlib.Path(lionax.__file__).parent / "frameworks"


@pytest.mark.parametrize(("name", "package", "extra"), [
    ("nnx", "flax", "flax"), ("linen", "flax", "flax"), ("equinox", "equinox", "equinox")])
def test_a_missing_framework_is_named_with_its_extra(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.spec_from_file_location("fresh", FOLDER / f"{name}.py")
    with pytest.raises(ImportError, match=rf'pip install "lionax\[{extra}\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_what_is_no_transformation_is_refused():
    tx = lionax.lion(0.1)
    assert as_lionax(tx) is tx
    assert as_lionax(optax.sgd(0.1)).step
    with pytest.raises(TypeError, match="is not a gradient transformation"):
        as_lionax("lionax")


def test_an_array_is_copied_where_its_buffer_came_before():
    shared, own = jnp.ones(3), jnp.zeros(3)
    state = {"param": shared, "first": own, "second": own, "count": np.int32(1)}
    new = own_buffers(state, {"w": shared})
    cases.assert_equal(new, state)
    pointers = {new[name].unsafe_buffer_pointer() for name in ("param", "first", "second")}
    assert len(pointers) == 3
    assert shared.unsafe_buffer_pointer() not in pointers
    assert new["first"] is own
