"""The steps that are compared: lionax's, and those of the peers that are installed.

A contender is built for a tree of shapes and then runs one step at a time. All of them train with
the same hyperparameters.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lionax
from benchmarks.trees import arrays, filled

__all__ = [
    "CASES", "OPTAX_OPTIONS", "Case", "Contender", "available", "compiled", "of_jax", "optax_step",
    "with_optax"
]

RATE = 1e-3
NEAREST = lionax.Storage("bfloat16", rounding="nearest")  # as Optax rounds
OPTAX_OPTIONS = "Optax, options"  # with `lionax.compiler_options`


@dataclasses.dataclass
class Contender:
    """A step that is ready to run."""

    run: Callable[[], None]  # one step, waited for
    temporary_bytes: int | None = None  # beside parameters, state and gradients; None if not known
    seconds_to_compile: float | None = None  # lowering and compiling
    lines: int | None = None  # of StableHLO


Build = Callable[[Any], Contender]  # from a tree of shapes


def optax_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The step as users of Optax write it."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(step: Callable[..., Any], params: Any, state: Any, grads: Any, calls: int = 1,
             options: dict[str, Any] | None = None) -> Contender:
    """A jitted step whose parameters and state are donated."""
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1), compiler_options=options or
                      {}).lower(params, state, grads)
    program = lowered.compile()
    seconds = time.perf_counter() - start
    carry = [params, state]

    def run() -> None:
        for _ in range(calls):
            carry[:] = program(*carry, grads)
        jax.block_until_ready(carry)

    memory = program.memory_analysis()
    return Contender(run, None if memory is None else memory.temp_size_in_bytes, seconds,
                     len(lowered.as_text().splitlines()))


def of_jax(step: Callable[..., Any], init: Callable[..., Any], calls: int = 1,
           options: dict[str, Any] | None = None) -> Build:
    """A contender from a step and its ``init``."""

    def build(shapes: Any) -> Contender:
        params = filled(shapes, 0.5)
        return compiled(step, params, init(params), filled(shapes, 1e-3), calls, options)

    return build


def with_and_without_options(name: str, step: Callable[..., Any], init: Callable[..., Any],
                             calls: int = 1) -> dict[str, Build]:
    """Two contenders of one step: as JAX compiles it by itself, and with the options."""
    return {name: of_jax(step, init, calls),
            f"{name}, options": of_jax(step, init, calls, lionax.compiler_options())}


def keras(name: str, **arguments: Any) -> Build:
    """Keras 3 on its JAX backend: what its training step runs."""

    def build(shapes: Any) -> Contender:
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        variables = [keras.Variable(leaf) for leaf in jax.tree.leaves(filled(shapes, 0.5))]
        optimizer = getattr(keras.optimizers, name)(RATE, **arguments)
        optimizer.build(variables)

        def step(params, state, grads):
            return optimizer.stateless_apply(state, grads, params)

        state = [jnp.copy(variable.value) for variable in optimizer.variables]
        return compiled(step, [variable.value for variable in variables], state,
                        jax.tree.leaves(filled(shapes, 1e-3)))

    return build


def torch(make: Callable[..., Any]) -> Build:
    """An optimizer of PyTorch."""

    def build(shapes: Any) -> Contender:
        import torch

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        params = [
            torch.nn.Parameter(torch.full(leaf.shape, 0.5, device=device))
            for leaf in jax.tree.leaves(arrays(shapes))
        ]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizer = make(torch, params)

        def run() -> None:
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return Contender(run)

    return build


def torch_optim(name: str, **arguments: Any) -> Build:
    return torch(lambda module, params: getattr(module.optim, name)(params, lr=RATE, **arguments))


def lion_pytorch(torch: Any, params: Any) -> Any:
    from lion_pytorch import Lion

    return Lion(params, lr=RATE)


def flash(name: str, **arguments: Any) -> Build:
    """``flashoptim-jax``, whose kernels are for GPUs. Its state is less precise."""

    def build(shapes: Any) -> Contender:
        import flashoptim_jax

        tx = getattr(flashoptim_jax, name)(learning_rate=RATE, **arguments)
        return of_jax(tx.step, tx.init)(shapes)

    return build


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    fewest_bytes: int | None  # that a step can move for each parameter; None if calls differ
    why: str
    contenders: dict[str, Build]

    def available(self) -> dict[str, Build]:
        return available(self.contenders)


def available(contenders: dict[str, Build]) -> dict[str, Build]:
    """Those whose packages, device and compiler are there."""
    needs = {
        "Keras 3": ("keras",), "PyTorch": ("torch",), "lion-pytorch": ("torch", "lion_pytorch"),
        "flashoptim": ("flashoptim_jax",)
    }
    on_gpu = jax.default_backend() == "gpu"
    return {name: build for name, build in contenders.items()
            if (on_gpu or name != "flashoptim")
            and all(map(importlib.util.find_spec, needs.get(name.split(",")[0], ())))}


def with_optax(tx: lionax.Transformation, peer: optax.GradientTransformation,
               calls: int = 1) -> dict[str, Build]:
    """A step of lionax and the same of Optax, each without and with the options."""
    return (with_and_without_options("lionax", tx.step, tx.init, calls)
            | with_and_without_options("Optax", optax_step(peer), peer.init, calls))


CASES: dict[str, Case] = {
    "lion": Case(20, "reads gradient, parameter, momentum; writes parameter, momentum", {
        **with_optax(lionax.lion(RATE), optax.lion(RATE)),
        **{f"lionax, {dtype}": of_jax(tx.step, tx.init, options=lionax.compiler_options())
           for dtype in ("bfloat16", "int8", "int4")
           for tx in [lionax.lion(RATE, mu_dtype=dtype)]},
        "Keras 3": keras("Lion", weight_decay=1e-3),
        "lion-pytorch": torch(lion_pytorch),
        "flashoptim": flash("flash_lion")}),
    "clip_by_global_norm, lion": Case(24, "reads the gradient once more, for the norm", {
        **with_optax(lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(RATE)),
                     optax.chain(optax.clip_by_global_norm(1.0), optax.lion(RATE))),
        "Keras 3": keras("Lion", weight_decay=1e-3, global_clipnorm=1.0)}),
    "lion, mu_dtype=bfloat16": Case(16, "does as lion, with two bytes for the momentum", {
        **with_optax(lionax.lion(RATE, mu_dtype=NEAREST),
                     optax.lion(RATE, mu_dtype="bfloat16"))}),
    "lamb": Case(40, "reads gradient, parameter and moments and writes the moments, while it sums; "
                 "then reads parameter and moments again and writes the parameter", {
        **with_optax(lionax.lamb(RATE), optax.lamb(RATE)),
        "Keras 3": keras("Lamb"),
        "PyTorch, fused AdamW": torch_optim("AdamW", fused=True),
        "PyTorch, foreach AdamW": torch_optim("AdamW", foreach=True)}),
    "sgd, momentum": Case(20, "reads gradient, parameter, momentum; writes parameter, momentum", {
        **with_optax(lionax.sgd(RATE, 0.9), optax.sgd(RATE, 0.9)),
        "Keras 3": keras("SGD", momentum=0.9),
        "PyTorch, fused SGD": torch_optim("SGD", momentum=0.9, fused=True),
        "PyTorch, foreach SGD": torch_optim("SGD", momentum=0.9, foreach=True),
        "flashoptim": flash("flash_sgd", momentum=0.9)}),
    "accumulation of 4": Case(None, "makes four calls; lionax around lion and an average", {
        **with_optax(lionax.accumulate(lionax.chain(lionax.lion(RATE), lionax.params_ema(0.99)), 4),
                     optax.MultiSteps(optax.lion(RATE), 4).gradient_transformation(), calls=4)}),
}
