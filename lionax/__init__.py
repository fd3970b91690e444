"""Lion, LAMB and SGD as composable gradient transformations for JAX: exact, lean, and the same everywhere.

How it is made: `lionax.rule` first, then `lionax.engine`.
"""

from lionax import compat as compat
from lionax.accumulation import accumulate
from lionax.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.averaging import averaged_params, params_ema
from lionax.clipping import clip, clip_by_global_norm, clip_by_norm
from lionax.combining import chain, identity, masked, named_chain, partition, set_to_zero
from lionax.config import from_config, register_schedule, to_config
from lionax.decay import add_decayed_weights
from lionax.hyperparameters import get_hyperparams, inject, set_hyperparams
from lionax.masks import matching, not_matching, paths
from lionax.momentum import ema, trace
from lionax.monitoring import plan
from lionax.optimizers import lamb, lion, sgd
from lionax.rule import Rule
from lionax.safety import dynamic_loss_scale, skip_nonfinite, unscale
from lionax.scaling import scale, scale_by_learning_rate, scale_by_schedule
from lionax.sign_momentum import scale_by_lion
from lionax.transformation import Transformation, apply_updates

__version__ = "0.1.0"

__all__ = [
    "Rule",
    "Transformation",
    "accumulate",
    "add_decayed_weights",
    "apply_updates",
    "averaged_params",
    "chain",
    "clip",
    "clip_by_global_norm",
    "clip_by_norm",
    "dynamic_loss_scale",
    "ema",
    "from_config",
    "get_hyperparams",
    "identity",
    "inject",
    "lamb",
    "lion",
    "masked",
    "matching",
    "named_chain",
    "not_matching",
    "params_ema",
    "partition",
    "paths",
    "plan",
    "register_schedule",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_schedule",
    "scale_by_trust_ratio",
    "set_hyperparams",
    "set_to_zero",
    "sgd",
    "skip_nonfinite",
    "to_config",
    "trace",
    "unscale",
]
