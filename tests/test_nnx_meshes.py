"""`lionax.frameworks.nnx.Optimizer` on meshes of the eight CPU devices."""

import cases
import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_nnx import gradients, loss_of, params_of, state_of, train

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


@pytest.mark.slow
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


@pytest.mark.slow
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


class Stacked(nnx.Module):
    """Layers along an axis of their parameters, and a head that a mesh axis splits."""

    def __init__(self, mesh):
        def layer(key):
            return nnx.Linear(64, 64, rngs=nnx.Rngs(key))

        replicated = NamedSharding(mesh, PartitionSpec())
        self.layers = nnx.vmap(layer)(jax.random.split(jax.random.key(0), 3))
        self.head = nnx.Linear(64, 128, rngs=nnx.Rngs(1))
        nnx.update(self, jax.device_put(nnx.state(self), replicated))
        kernel = NamedSharding(mesh, PartitionSpec(None, "model"))
        self.head.kernel.set_value(jax.device_put(self.head.kernel[...], kernel))

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0),
                       out_axes=nnx.Carry)
        return self.head(run(x, self.layers))


def shardings(model, optimizer):
    return [leaf.sharding for leaf in jax.tree.leaves((params_of(model), state_of(optimizer)))]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("make", "tolerance"), [
    pytest.param(lambda: lionax.lion(0.01), 2e-5, id="lion"),
    # A last bit of a gradient may choose another code.
    pytest.param(lambda: lionax.lamb(0.01, mu_dtype="int8", nu_dtype="int8"), 2e-3, id="lamb_int8"),
    pytest.param(lambda: lionax.accumulate(lionax.lion(0.01), 2), 2e-5, id="accumulate")])
def test_zero_axis_splits_the_state_and_keeps_both_shardings(make, tolerance, axis_type):
    mesh, tx = meshes(axis_type)[0], make()
    with jax.set_mesh(mesh):
        model = Stacked(mesh)
        optimizer = Optimizer(model, tx, wrt=nnx.Param, zero_axis="data")
        before, x = shardings(model, optimizer), cases.normal(8, 64)
        assert model.layers.kernel[...].sharding.is_fully_replicated
        slot = optimizer.opt_state.rules
        slot = (slot.inner.rules if hasattr(slot, "inner") else slot)[0].mu.layers.kernel
        assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(slot))
        alone, steps = jax.device_get((params_of(model), state_of(optimizer))), []
        for _ in range(3):
            grads = nnx.as_pure(gradients(model, x))
            steps.append(jax.device_get(grads))
            train(model, optimizer, x)
        after = shardings(model, optimizer)
    for old, new, leaf in zip(before, after, jax.tree.leaves(alone), strict=True):
        assert new.is_equivalent_to(old, leaf.ndim)
    step = jax.jit(tx.step)
    params, state = alone
    for grads in steps:
        params, state = step(params, state, grads)
    cases.assert_close(jax.device_get(params_of(model)), jax.device_get(params), tolerance)


def test_zero_axis_under_jax_jit_compiles_once():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model),
                                     NamedSharding(meshes()[0], PartitionSpec())))
    optimizer = Optimizer(model, lionax.lion(0.01), wrt=nnx.Param, zero_axis="data")
    graph, state = nnx.split((model, optimizer))

    @chex.assert_max_traces(1)
    def run(state, x):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(loss_of)(model, x))
        return nnx.state((model, optimizer))

    run = jax.jit(run, donate_argnums=0)
    for _ in range(3):
        state = run(state, cases.normal(8, 64))


def test_zero_axis_refuses_what_says_the_same_and_what_is_on_no_mesh():
    with jax.set_mesh(meshes()[0]):
        with pytest.raises(ValueError, match=r"zero_axis= and the metadata of 'kernel', "
                           r"optimizer_sharding=\('data', 'model'\), both say"):
            Optimizer(partitioned(optimizer_sharding=("data", "model")), lionax.lion(0.01),
                      wrt=nnx.Param, zero_axis="data")
        with pytest.raises(ValueError, match="zero_axis='data' splits no parameter"):
            Optimizer(nnx.Dict(w=nnx.Param(jax.device_put(np.ones(3), NamedSharding(
                meshes()[0], PartitionSpec())))), lionax.lion(0.01), wrt=nnx.Param,
                zero_axis="data")
    with pytest.raises(ValueError, match="zero_axis='data' is not an axis of the mesh"):
        Optimizer(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), lionax.lion(0.01), wrt=nnx.Param,
                  zero_axis="data")
