"""A run on disk: Orbax's checkpoints of parameters, state and record."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one optimizer's run, of which the newest two are kept."""

    def __init__(self, folder: pathlib.Path, name: str, settings: dict[str, Any]):
        self._settings = settings  # must be those of the run that is gone on with
        self._folder = folder / name
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Writes the arrays and the record of a step; a step is there whole or not at all."""
        self._manager.save(step, args=ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave({"settings": self._settings, "record": record})))

    def latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest arrays, in the structure of ``like``, and their record; None at first.

        Raises:
          ValueError: for a run with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(
            record=ocp.args.JsonRestore()))["record"]
        if saved["settings"] != self._settings:
            raise ValueError(f"{self._folder} holds a run with {_shown(saved['settings'])}; this "
                             f"one has {_shown(self._settings)}. Give the same, or another folder")
        arrays = self._manager.restore(step, args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(like)))["arrays"]
        return arrays, saved["record"]


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())
