"""The folder of a run: half-written steps, full disks, read-only folders, two runs on one."""

import logging
import os
import re
import resource
import shutil
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_interruptions import LOCK, processes

from lionax.demo import command
from lionax.demo.checkpoints import CheckpointError, Checkpoints, locked

HALF = pytest.mark.promise(
    "Interrupted runs", "A half-written newest step is passed over with a word, and its number "
    "written anew later. So is a damaged one.")
DISK = pytest.mark.promise(
    "Interrupted runs", "A full disk and a read-only folder give a clear error and lose no earlier "
    "checkpoint.")


# A step that is not whole

def arrays(step):
    return {"w": jnp.arange(1000, dtype=jnp.float32) * step, "n": jnp.asarray(step)}


def check_holds(folder, step):
    found, record = Checkpoints(folder, "lion", {"seed": 0}).latest(arrays(0))
    assert record == {"reached": step}
    np.testing.assert_array_equal(found["w"], arrays(step)["w"])


def saved(folder, *steps):
    checkpoints = Checkpoints(folder, "lion", {"seed": 0})
    for step in steps:
        checkpoints.save(step, arrays(step), {"reached": step})
    return checkpoints


@HALF
def test_a_half_written_step_is_passed_over_with_a_word_and_written_anew(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    half = tmp_path / "lion" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "lion" / "2" / "record", half / "record")
    with caplog.at_level(logging.WARNING, logger="lionax"):
        check_holds(tmp_path, 2)
    assert [record.message for record in caplog.records if record.name == "lionax"] == [
        f"{half} is half-written: passed over and removed"]
    assert not half.exists()
    saved(tmp_path, 3)
    check_holds(tmp_path, 3)


def damaged_copies(folder, target):
    """Copies of a folder, in each of which one file of the newest step lacks or has changed."""
    for path in sorted(file for file in (folder / "lion" / "2").rglob("*") if file.is_file()):
        content = path.read_bytes()
        middle = len(content) // 2
        for damaged in (None, content[:middle], content[:middle] + bytes(
                255 - byte for byte in content[middle:middle + 1]) + content[middle + 1:]):
            copy = target / str(len(list(target.iterdir())))
            shutil.copytree(folder, copy)
            file = copy / path.relative_to(folder)
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            yield copy


@HALF
@pytest.mark.slow
def test_a_damaged_step_is_passed_over_and_kept_aside_and_written_anew(tmp_path, figure, caplog):
    saved(tmp_path / "whole", 1, 2)
    (tmp_path / "copies").mkdir()
    passed_over = 0
    for copy in damaged_copies(tmp_path / "whole", tmp_path / "copies"):
        caplog.clear()
        _, record = Checkpoints(copy, "lion", {"seed": 0}).latest(arrays(0))
        step = record["reached"]
        check_holds(copy, step)
        if step == 1:
            assert re.search(r"step 2 cannot be read .* kept as .*2\.damaged", caplog.text)
            assert (copy / "lion" / "2.damaged").is_dir()
            if not passed_over:
                saved(copy, 2)
                check_holds(copy, 2)
        passed_over += step == 1
        figure("damaged files", 1)
        figure("damaged files passed over", int(step == 1))
    assert passed_over > 10


@HALF
def test_where_no_step_can_be_read_none_is_lost(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"lion holds the steps \[1\], of which none can be "
                                              r"read .*; go on with the version of lionax that"):
        Checkpoints(tmp_path, "lion", {"seed": 0}).latest({"other": jnp.ones(3)})
    check_holds(tmp_path, 1)


# Full disks and read-only folders

def save_with_limit(folder, limit, said):
    """Saves a step while no file may be longer than a limit."""
    output = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    checkpoints = Checkpoints(folder, "lion", {"seed": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoints.save(3, arrays(3), {"reached": 3})
    except CheckpointError as error:
        said.send(str(error))


@DISK
@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 200, 2000])
def test_a_file_that_cannot_be_written_gives_a_clear_error_and_loses_nothing(limit, tmp_path):
    saved(tmp_path / "run", 1, 2)
    heard, said = processes().Pipe(duplex=False)
    process = processes().Process(target=save_with_limit, args=(tmp_path / "run", limit, said))
    process.start()
    said.close()
    assert re.search(r"step 3 could not be saved in .*lion \(.*File too large.*\); whole are the "
                     r"steps \[1, 2\]\. Make room, or move", heard.recv())
    process.join()
    assert process.exitcode == 0
    check_holds(tmp_path / "run", 2)
    saved(tmp_path / "run", 3)
    check_holds(tmp_path / "run", 3)


@pytest.fixture
def disk(tmp_path):
    """A disk of 512 kB; a root may mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refusal_of_demo(folder, out):
    with pytest.raises(SystemExit) as refused:
        command.main(["demo", "--steps", "1", "--resume", str(folder), "--out", str(out)])
    return str(refused.value)


@DISK
@pytest.mark.slow
def test_a_full_disk_gives_a_clear_error_and_loses_nothing(disk, tmp_path):
    checkpoints = saved(disk, 1, 2)
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    for step in (3, 4):
        with pytest.raises(CheckpointError, match=rf"step {step} could not be saved .*No space left"
                                                  r" on device.*whole are the steps \[1, 2\]"):
            checkpoints.save(step, arrays(step), {})
    check_holds(disk, 2)
    (disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free))
    assert re.search(r"--resume .*disk: it cannot be written .*No space left on device.*give a "
                     "folder", refusal_of_demo(disk, tmp_path / "curves.png"))
    (disk / "other").unlink()
    checkpoints.save(3, arrays(3), {"reached": 3})
    check_holds(disk, 3)


@DISK
@pytest.mark.slow
def test_a_read_only_folder_gives_a_clear_error_and_loses_nothing(disk, tmp_path):
    checkpoints = saved(disk, 1, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved .*Read-only.*\[1, 2\]"):
        checkpoints.save(3, arrays(3), {})
    with pytest.raises(CheckpointError, match=r"it cannot be written .*Read-only"):
        Checkpoints(disk, "lamb", {})
    check_holds(disk, 2)
    assert re.search("--resume .*disk: it cannot be written .*Read-only.*give a folder that you "
                     "may write to", refusal_of_demo(disk, tmp_path / "curves.png"))


@DISK
def test_what_is_no_folder_gives_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"it cannot be written .*give a folder that you may"):
        Checkpoints(tmp_path / "file", "lion", {})
    assert "it cannot be written" in refusal_of_demo(tmp_path / "file" / "runs",
                                                     tmp_path / "curves.png")


# Two runs on one folder

def hold(folder, said):
    with locked(folder):
        said.send("held")
        time.sleep(600)


@LOCK
def test_a_second_run_on_a_folder_is_refused_until_the_first_one_ends(tmp_path):
    with locked(tmp_path):
        assert re.search(rf"--resume .*: process {os.getpid()} on .* trains in it; wait until that "
                         "ends, stop it, or give another folder",
                         refusal_of_demo(tmp_path, tmp_path / "curves.png"))
    with locked(tmp_path):
        pass


@LOCK
@pytest.mark.slow
def test_a_run_that_is_killed_holds_no_folder(tmp_path, figure):
    context = processes()
    for _ in range(3):
        heard, said = context.Pipe(duplex=False)
        process = context.Process(target=hold, args=(tmp_path, said))
        process.start()
        assert heard.recv() == "held"
        with pytest.raises(CheckpointError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        process.kill()
        process.join()
        with locked(tmp_path):
            figure("folders taken over from a killed run", 1)
