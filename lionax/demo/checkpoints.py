"""A run on disk: Orbax's checkpoints of parameters, state and record."""

import contextlib
import logging
import os
import pathlib
import platform
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

try:
    import fcntl
except ImportError:  # on Windows, where nothing refuses a second run
    fcntl = None

__all__ = ["HALF_WRITTEN", "CheckpointError", "Checkpoints", "locked"]

_logger = logging.getLogger("lionax")
HALF_WRITTEN = "*.orbax-checkpoint-tmp*"  # how Orbax names a step until it is whole


class CheckpointError(Exception):
    """A folder that cannot be used; the message says why, and what to do."""


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a folder for this process; the kernel releases it, too, when the process is killed.

    Raises:
      CheckpointError: if another process has it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "lock").open("ab", buffering=0))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        except BlockingIOError:
            owner = (folder / "lock").read_text() or "another process"
            raise CheckpointError(f"{owner} trains in it; wait until that ends, stop it, or give "
                                  "another folder") from None
        except OSError as error:
            raise _unwritable(error) from None
        yield


def _unwritable(error: OSError) -> CheckpointError:
    return CheckpointError(f"it cannot be written ({error}); give a folder that you may write to, "
                           "on a disk with free space")


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Orbax's threads log each error with a traceback before the caller gets it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints of one optimizer's run, of which the newest two are kept.

    They are for one process at a time: see `locked`.
    """

    def __init__(self, folder: pathlib.Path, name: str, settings: dict[str, Any]):
        self._settings = settings  # must be those of the run that is gone on with
        self._folder = folder / name
        _check_plain(self._folder)
        try:
            for half in sorted(self._folder.glob(HALF_WRITTEN)):
                _logger.warning("%s is half-written: passed over and removed", half)
                shutil.rmtree(half)
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)
        except OSError as error:
            raise _unwritable(error) from error
        except Exception as error:  # whatever Orbax makes of damaged files
            raise CheckpointError(f"{self._folder} holds damaged files ({_reason(error)}); give "
                                  "another folder, or remove what is damaged") from error

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Writes the arrays and the record of a step; a step is there whole or not at all.

        Raises:
          CheckpointError: if that fails. The earlier checkpoints stay.
        """
        saved = {"settings": self._settings, "record": record, "checksum": _checksum(arrays)}
        try:
            with _without_tracebacks():
                self._manager.save(step, args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(saved)))
        except Exception as error:  # each layer of Orbax has its own for a full disk
            for half in self._folder.glob(HALF_WRITTEN):
                shutil.rmtree(half, ignore_errors=True)
            kept = [old for old in sorted(self._manager.all_steps()) if old != step]
            raise CheckpointError(
                f"step {step} could not be saved in {self._folder} ({_reason(error)}); whole are "
                f"the steps {kept}. Make room, or move the folder to another disk; then the same "
                "command goes on") from error

    def latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest arrays, in the structure of ``like``, and their record; None at first.

        A checkpoint that cannot be read is set aside if an older one can.

        Raises:
          CheckpointError: for a run with other settings; if there are checkpoints and none can be
            read.
        """
        unread: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _without_tracebacks():
                    found = self._restored(step, like)
            except CheckpointError:
                raise
            except Exception as error:  # whatever Orbax makes of damaged files
                unread[step] = error
                continue
            for damaged, error in unread.items():
                self._set_aside(damaged, error)
            return found
        if unread:
            step, error = next(iter(unread.items()))
            raise CheckpointError(
                f"{self._folder} holds the steps {list(unread)}, of which none can be read (step "
                f"{step}: {_reason(error)}); go on with the version of lionax that saved them, "
                "or give another folder") from error
        return None

    def _restored(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        saved = self._manager.restore(step, args=ocp.args.Composite(
            record=ocp.args.JsonRestore()))["record"]
        if saved["settings"] != self._settings:
            raise CheckpointError(f"{self._folder} holds a run with {_shown(saved['settings'])}; "
                                  f"this one has {_shown(self._settings)}. Give the same, or "
                                  "another folder")
        arrays = self._manager.restore(step, args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(like)))["arrays"]
        if saved["checksum"] != _checksum(arrays):
            raise ValueError("its numbers are not those that were saved")
        return arrays, saved["record"]

    def _set_aside(self, step: int, error: Exception) -> None:
        """Renames a checkpoint, so that its number can be written anew."""
        aside = self._folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
        self._manager.reload()
        _logger.warning("step %s cannot be read (%s): passed over, and kept as %s", step,
                        _reason(error), aside)


def _check_plain(folder: pathlib.Path) -> None:
    """Refuses links and devices, which Orbax never writes and would follow."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise CheckpointError(f"{path} is a link or a device, which no checkpoint holds; "
                                  "remove it, or give another folder")


def _checksum(arrays: Any) -> int:
    """Of all bits: Orbax does not notice when a byte on the disk has changed."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return total


def _reason(error: Exception) -> str:
    """The first line of an error; of a long one the ends."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    line = line.partition(" [tensorstore_spec")[0]
    return line if len(line) <= 160 else f"{line[:60]} ... {line[-90:]}"


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())
