"""Lion, LAMB and SGD as composable gradient transformations for JAX.

To see how it is made, read `lionax.core.rule` first, then `lionax.core.engine`.
"""

from lionax import compat as compat
from lionax.compiler import compiler_options
from lionax.config import from_config, register_rule, register_schedule, to_config
from lionax.core.hyperparameters import Scalar, get_hyperparams, inject, scalar, set_hyperparams
from lionax.core.masks import labels, matching, not_matching
from lionax.core.quantized import QuantizedArray
from lionax.core.rule import Rule, Step
from lionax.core.storage import Storage, zero_slot
from lionax.core.transformation import Transformation, apply_updates
from lionax.core.tree import paths
from lionax.monitoring import metrics, plan, summary
from lionax.optimizers import adam, adamw, lamb, lion, majority_vote_lion, sgd
from lionax.resume import cast_state
from lionax.sharding import sharded, state_sharding
from lionax.transforms.accumulation import accumulate
from lionax.transforms.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.transforms.averaging import averaged_params, params_ema
from lionax.transforms.clipping import clip, clip_by_global_norm, clip_by_norm
from lionax.transforms.combining import (
    chain,
    identity,
    masked,
    named_chain,
    partition,
    set_to_zero,
)
from lionax.transforms.conditional import dynamic_loss_scale, skip_if, skip_nonfinite, unscale
from lionax.transforms.decay import add_decayed_weights
from lionax.transforms.low_precision import master_weights
from lionax.transforms.measuring import monitor
from lionax.transforms.momentum import ema, trace
from lionax.transforms.scaling import scale, scale_by_learning_rate, scale_by_schedule
from lionax.transforms.sign_momentum import scale_by_lion

__version__ = "0.1.0"

__all__ = [
    "QuantizedArray",
    "Rule",
    "Scalar",
    "Step",
    "Storage",
    "Transformation",
    "accumulate",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "averaged_params",
    "cast_state",
    "chain",
    "clip",
    "clip_by_global_norm",
    "clip_by_norm",
    "compiler_options",
    "dynamic_loss_scale",
    "ema",
    "from_config",
    "get_hyperparams",
    "identity",
    "inject",
    "labels",
    "lamb",
    "lion",
    "majority_vote_lion",
    "masked",
    "master_weights",
    "matching",
    "metrics",
    "monitor",
    "named_chain",
    "not_matching",
    "params_ema",
    "partition",
    "paths",
    "plan",
    "register_rule",
    "register_schedule",
    "scalar",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_schedule",
    "scale_by_trust_ratio",
    "set_hyperparams",
    "set_to_zero",
    "sgd",
    "sharded",
    "skip_if",
    "skip_nonfinite",
    "state_sharding",
    "summary",
    "to_config",
    "trace",
    "unscale",
    "zero_slot",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "compat"])
