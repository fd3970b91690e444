"""`lionax.frameworks.nnx.Optimizer` on meshes of the eight CPU devices."""

import cases
import flax.nnx as nnx
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_nnx import gradients, params_of, state_of, train

import lionax
from lionax.frameworks.nnx import Optimizer

pytestmark = pytest.mark.usefixtures("standard_promotion")


def meshes(axis_type=AxisType.Auto):
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    return [Mesh(half, ("data", "model"), axis_types=(axis_type,) * 2) for half in devices]


def partitioned(**metadata):
    initializer = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"),
                                        **metadata)
    return nnx.Linear(4, 8, kernel_init=initializer, rngs=nnx.Rngs(0))


def specs(model, optimizer):
    found = [model.kernel[...], *(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
        state_of(optimizer)) if "kernel" in jax.tree_util.keystr(path))]
    return [(tuple(leaf.sharding.spec) + (None,) * leaf.ndim)[:leaf.ndim] for leaf in found]


@pytest.mark.parametrize("axis_type", cases.but_for_fast([AxisType.Auto, AxisType.Explicit],
                                                         AxisType.Auto))
@pytest.mark.parametrize(("metadata", "of_slots"), [
    pytest.param({}, (None, "model"), marks=pytest.mark.slow),
    ({"optimizer_sharding": ("data", "model")}, ("data", "model"))])
def test_the_sharding_of_the_metadata_holds_before_and_after_a_step(metadata, of_slots, axis_type):
    with jax.set_mesh(meshes(axis_type)[0]):
        model = partitioned(**metadata)
        optimizer = Optimizer(model, lionax.lion(0.01, mu_dtype="bfloat16"), wrt=nnx.Param)
        before, grads = params_of(model), nnx.as_pure(gradients(model))
        expected = [(None, "model"), of_slots]
        assert specs(model, optimizer) == expected
        train(model, optimizer)
        assert specs(model, optimizer) == expected
        after = params_of(model)
    alone = jax.device_get((before, grads))
    tx = lionax.lion(0.01)
    expected = tx.step(alone[0], tx.init(alone[0]), alone[1])[0]
    cases.assert_close(jax.device_get(after), jax.device_get(expected))


@pytest.mark.parametrize("axis_type", cases.but_for_fast([AxisType.Auto, AxisType.Explicit],
                                                         AxisType.Explicit))
@pytest.mark.parametrize("conditional", [
    pytest.param(lambda tx: lionax.accumulate(tx, 1), id="accumulate", marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.skip_nonfinite(tx, 3), id="skip", marks=pytest.mark.slow),
    pytest.param(lambda tx: lionax.monitor(tx, every=2), id="monitor")])
def test_the_shardings_of_parameters_and_slots_hold_in_a_branch(conditional, axis_type):
    with jax.set_mesh(meshes(axis_type)[0]):
        model = partitioned(optimizer_sharding=("data", "model"))
        optimizer = Optimizer(model, conditional(lionax.lion(0.01)), wrt=nnx.Param)
        expected = specs(model, optimizer)
        assert expected[0] == (None, "model")
        assert ("data", "model") in expected[1:]
        before, grads = params_of(model), nnx.as_pure(gradients(model))
        train(model, optimizer)
        assert specs(model, optimizer) == expected
        after = params_of(model)
    alone = jax.device_get((before, grads))
    tx = lionax.lion(0.01)
    cases.assert_close(jax.device_get(after),
                       jax.device_get(tx.step(alone[0], tx.init(alone[0]), alone[1])[0]))


def test_slots_of_a_lower_rank_have_no_sharding_of_the_parameter():
    with jax.set_mesh(meshes()[0]):
        model = partitioned()
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
        optimizer = Optimizer(model, factored, wrt=nnx.Param)
        assert "out_sharding" not in optimizer.opt_state.rules.v_row.kernel.get_metadata()
        train(model, optimizer)
        assert specs(model, optimizer)[0] == (None, "model")


def test_parameters_on_two_meshes():
    halves = [NamedSharding(mesh, PartitionSpec(None, "model")) for mesh in meshes()]
    kernels = [jax.device_put(cases.normal(4, 8, seed=i), half) for i, half in enumerate(halves)]
    model = nnx.Dict(first=nnx.Param(kernels[0]), second=nnx.Param(kernels[1]))
    tx = lionax.lion(0.01)
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    before = params_of(model)
    optimizer.update(model, nnx.state(model, nnx.Param))
    cases.assert_equal(params_of(model), tx.step(before, tx.init(before), before)[0])
    for name, half in zip(("first", "second"), halves, strict=True):
        assert model[name][...].sharding.is_equivalent_to(half, 2)
        slot = optimizer.opt_state.rules[0].mu[name][...]
        assert slot.sharding.is_equivalent_to(half, 2)
