"""The options of XLA with which a step copies no buffer that it could write in place."""

import re
from typing import Any

import jaxlib.version

__all__ = ["compiler_options"]

FIRST, LAST = (0, 10), (0, 12)  # the versions of jaxlib with which the tests compile

_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True,
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options() -> dict[str, Any]:
    """The ``compiler_options`` for the outermost ``jax.jit`` around a step.

    - ``xla_cpu_copy_insertion_use_region_analysis``: XLA analyses where a buffer is read and
      written before it copies one. Else it copies Lion's donated momentum in every step.
    - ``xla_cpu_scheduler_type``: XLA orders loops for little memory, not for concurrency. A loop
      follows the one whose result it reads; each still uses all cores.

    They are for CPUs, elsewhere without effect, and for the whole jitted function. Measured with
    JAX 0.10.2 and 0.12.0 on 2 cores: ``python -m benchmarks``. The rest of a transformer's step is
    neither slower nor faster there (±3 %). Many cores, and collectives, were not measured.

    JAX takes options on the outermost ``jit`` only, ``nnx.jit`` and Keras take none. There
    ``XLA_FLAGS="--xla_cpu_copy_insertion_use_region_analysis=true
    --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"`` sets the same for a process.

    Returns:
      The options by name; ``{}`` for an untested jaxlib, since an unknown option fails the
      compilation. The version alone decides; no backend is started.

    >>> import jax, jax.numpy as jnp, lionax
    >>> tx = lionax.lion(0.1, weight_decay=0.0)
    >>> step = jax.jit(tx.step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    >>> params, state = step(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    >>> [round(p, 3) for p in params.tolist()]
    [0.9, 0.9]
    """
    return dict(_OPTIONS) if FIRST <= _version(jaxlib.version.__version__) <= LAST else {}


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
