"""What a step keeps on each device of a mesh, and what it sends: ``python -m benchmarks.meshes``.

The compiled program is counted. Nothing runs, and nothing is timed.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import lionax
from benchmarks import report, trees
from lionax.core.placement import split_further

__all__ = ["CASES", "Count", "Estimate", "count", "counts", "estimate_table", "estimates", "main",
           "sent"]

AXIS = "data"
DEVICES = (1, 2, 4, 8)
CASES: dict[str, lionax.Transformation] = {
    "lion": lionax.lion(1e-3), "lion, int8": lionax.lion(1e-3, mu_dtype="int8"),
    "clip, lion": lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3)),
    "lamb": lionax.lamb(1e-3),
}
TRAINING = "lion, with the gradient"
LAYOUTS = ("data", "zero", "fsdp")
"""Parameters and state are replicated; the state is split; both are split."""

# A ring of n devices: what each sends, as a share of the bytes of a collective's result.
SHARES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1, "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0}
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SHARES)})\(")


@dataclasses.dataclass
class Count:
    """What was counted of one step."""

    case: str
    layout: str
    devices: int
    parameters: int
    parameter_bytes: int  # on each device
    state_bytes: int  # on each device
    collectives: dict[str, int]
    sent_bytes: float  # by each device


def sent(program: str, devices: int) -> tuple[dict[str, int], float]:
    """The collectives of a program on a mesh of one axis, and the bytes that each device sends.

    Those in branches are not counted: they run where a norm is out of range.
    """
    found: dict[str, int] = collections.Counter()
    total = 0.0
    for line in program[program.index("\nENTRY"):].splitlines():
        if match := COLLECTIVE.search(line):
            found[match[2]] += 1
            total += SHARES[match[2]](devices) * _bytes(match[1])
    return dict(found), total


def _bytes(shapes: str) -> float:
    """The bytes of the arrays in an HLO type, such as ``(f32[8,2]{1,0}, bf16[])``."""
    return sum(math.prod(map(int, filter(None, axes.split(",")))) *
               (1 if kind == "pred" else int(re.findall(r"\d+", kind)[0]) / 8)
               for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes))


def _on_device(tree: Any) -> int:
    """The bytes of a tree on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _laid_out(tx: lionax.Transformation, arrays: Any, mesh: Mesh | AbstractMesh,
              layout: str) -> tuple[Any, Any]:
    """The shapes of parameters and state, with their shardings."""

    def place(x: Any) -> Any:
        whole = NamedSharding(mesh, PartitionSpec())
        split = split_further(whole, x.shape, AXIS, 128)[0] if layout == "fsdp" else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

    params = jax.tree.map(place, arrays)
    shardings = lionax.state_sharding(tx, params, AXIS if layout == "zero" else None)
    state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), jax.eval_shape(tx.init, arrays), shardings)
    return params, state


def count(case: str, layout: str, devices: int, layers: int, width: int) -> Count:
    """Compiles a step of a perceptron, and counts.

    The gradients lie as the parameters do, and are averaged already. `TRAINING` takes them, too,
    from a batch that is split over the devices.
    """
    tx, shapes = CASES["lion" if case == TRAINING else case], trees.mlp(layers, width)
    mesh = jax.make_mesh((devices,), (AXIS,), devices=jax.devices()[:devices],
                         axis_types=(AxisType.Auto,))
    params, state = _laid_out(tx, trees.arrays(shapes), mesh, layout)
    batch = jax.ShapeDtypeStruct((width, width), jnp.float32,
                                 sharding=NamedSharding(mesh, PartitionSpec(AXIS)))

    def training_step(params: Any, state: Any, batch: jax.Array) -> Any:
        return tx.step(params, state, jax.grad(_loss)(params, batch))

    step, last = (training_step, batch) if case == TRAINING else (tx.step, params)
    program = jax.jit(step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options(),
                      out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
                      ).lower(params, state, last).compile()
    return Count(case, layout, devices, trees.elements(shapes), _on_device(params),
                 _on_device(state), *sent(program.as_text(), devices))


def _loss(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.square(x).mean()


def counts(layers: int, width: int, devices: Iterable[int] = DEVICES) -> Iterator[Count]:
    """Each case in each layout on each number of devices."""
    for number in devices:
        for case in (*CASES, TRAINING):
            for layout in LAYOUTS:
                yield count(case, layout, number, layers, width)


# On paper.

ESTIMATED = {
    "lion": lionax.lion(1e-3), "lion, bfloat16": lionax.lion(1e-3, mu_dtype="bfloat16"),
    "lion, int8": lionax.lion(1e-3, mu_dtype="int8"), "lamb": lionax.lamb(1e-3)}
MANY = 512
TRAINING_SHARES: dict[str, Callable[[int], float]] = {
    "data": SHARES["all-reduce"],
    "zero": lambda n: 2 * (n - 1) / n,  # reduce-scatter of gradients, all-gather of parameters
    "fsdp": lambda n: 3 * (n - 1) / n}  # the same, and all-gather for the backward pass
"""What each of n devices sends in a training step, as a share of the bytes of the parameters."""
VOTE = 3 / 8
"""The bytes of a parameter's vote: one bit to the device that counts it, two bits back."""


@dataclasses.dataclass
class Estimate:
    """What a training step would keep on each of `MANY` devices, and send."""

    case: str
    layout: str
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    sent_bytes: float


def estimates(shapes: trees.Shapes, devices: int = MANY) -> Iterator[Estimate]:
    """Each case in each layout: the state from its shapes, what is sent from formulas."""
    mesh = AbstractMesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    arrays = trees.arrays(shapes)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    for case, tx in ESTIMATED.items():
        for layout, share in TRAINING_SHARES.items():
            params, state = _laid_out(tx, arrays, mesh, layout)
            own = _on_device(params)
            yield Estimate(case, layout, own, own, _on_device(state), share(devices) * whole)
    vote = VOTE * trees.elements(shapes) * (devices - 1) / devices
    yield Estimate("lion, majority vote", "data", whole, whole, whole, vote)


# The page.

HEAD = """# What a step sends

```
python -m benchmarks.meshes --out docs/benchmarks
```

{date}: Python {python}, JAX {jax}, lionax {lionax}, 8 virtual CPU devices. Programs are compiled
and counted, not run. [meshes.json](meshes.json) holds each number.

- data: parameters and state are replicated.
- zero: the state is split, by `lionax.state_sharding(tx, params, "data")`.
- fsdp: parameters and state are split.

The parameters are those of a perceptron, {parameters:,} in float32. The gradients lie as the
parameters do, averaged already. The steps of the last rows take the gradient, too.

Collectives are those outside of branches. Bytes are those of a ring of n devices: each sends
2(n - 1)/n of the bytes of an all-reduce, and (n - 1)/n of those of an all-gather.

"""
LARGE = """
## 70 B parameters on 512 devices

The shapes are Llama 2's, 69.0 B parameters, all in float32. Bytes of the state come from
`state_sharding`, sent bytes from formulas over the bytes P of all parameters: 2(n - 1)/n · P for
data and zero, 3(n - 1)/n · P for fsdp. These are of compilers that reduce-scatter gradients. Above,
XLA for CPUs all-reduces them in each layout, and gathers the parameters of fsdp once. A majority
vote of Lion's signs sends 3/8 of a byte for each parameter, in place of gradients. Activations are
not counted.

"""


def counts_table(rows: Iterable[Count]) -> str:
    """Markdown: the bytes by the number of devices, the collectives of the most."""
    groups: dict[tuple[str, str], list[Count]] = collections.defaultdict(list)
    for row in rows:
        groups[row.case, row.layout].append(row)
    numbers = [row.devices for row in next(iter(groups.values()))]
    shown = ", ".join(map(str, numbers))
    lines = [f"| step | layout | state, MB a device, on {shown} | collectives on {numbers[-1]} | "
             f"sent, MB a device, on {shown} |", "| --- | --- | --- | --- | --- |"]
    for (case, layout), group in groups.items():
        collectives = ", ".join(f"{number} {name}" for name, number in
                                group[-1].collectives.items()) or "none"
        lines.append(f"| {case} | {layout} | "
                     f"{', '.join(f'{row.state_bytes / 1e6:.1f}' for row in group)} | "
                     f"{collectives} | {', '.join(_megabytes(row.sent_bytes) for row in group)} |")
    return "\n".join(lines) + "\n"


def _megabytes(number: float) -> str:
    return "0" if not number else f"{number / 1e6:.1f}" if number >= 5e4 else f"{number:.0f} B"


def estimate_table(rows: Iterable[Estimate]) -> str:
    """Markdown, in GB on each device."""
    lines = ["| optimizer | layout | parameters | gradients | state | sent a step |",
             "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {row.case} | {row.layout} | " + " | ".join(
        f"{number / 1e9:.2f}" for number in (row.parameter_bytes, row.gradient_bytes,
                                             row.state_bytes, row.sent_bytes)) + " |"
              for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meshes", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small tree, on 2 devices")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"),
                        help="the folder for the JSON and the page")
    options = parser.parse_args(arguments)
    rows = list(counts(2, 128, (2,)) if options.quick else counts(8, 2048))
    large = list(estimates(trees.llama_2()))
    machine = report.machine()
    head = HEAD.format(date=machine["date"], python=machine["python"], **machine["versions"],
                       parameters=rows[0].parameters)
    page = head + counts_table(rows) + LARGE + estimate_table(large)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "counts": [dataclasses.asdict(row) for row in rows],
              "estimates": [dataclasses.asdict(row) for row in large]}
    (options.out / "meshes.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "meshes.md").write_text(page)
    print(page)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    main()
