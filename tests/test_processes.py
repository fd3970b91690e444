"""Real processes that train together, lose one, and go on as another number of processes.

They run `run_process.py` and, as SLURM would start it, `examples/cluster.py`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import run_process

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 400  # for a group of processes; on 2 free cores they take 60 at most
# One group of processes after another. A number after a run is the step after which one is killed.
GROUPS = {1: ["data:alone"], 2: ["data:data-2", "fsdp:fsdp-2", "zero:zero-2-4:6"],
          4: ["data:data-4", "zero:zero-2-4", "fsdp:fsdp-4-1:6"]}
EXAMPLE = ["--layout", "fsdp", "--steps", run_process.STEPS,
           *(x for name, value in run_process.SIZES.items()
             for x in (f"--{name.replace('_', '-')}", value))]
TRAINED = ["data-2", "fsdp-2", "data-4", "zero-2-4"]  # to the end, by `run_process.py`
RTOL = 1e-5  # sums over devices have another order

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.promise(
    "Meshes", "2 and 4 processes train as one does, and go on after SIGKILL with another number")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *arguments, log, devices=1, **environment):
    # XLA would take half of the time to optimize what runs a few steps.
    flags = ("--xla_backend_optimization_level=0 "
             f"--xla_force_host_platform_device_count={devices}")
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, script, *map(str, arguments)], cwd=ROOT, stdout=output,
            stderr=subprocess.STDOUT, env=os.environ | environment | {
                "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})


def run_group(number, folder):
    """Starts a group, and waits as ``srun --kill-on-bad-exit`` does: one failure ends all."""
    port, deadline = free_port(), time.monotonic() + SECONDS
    logs = [folder / f"log-{number}-{process}" for process in range(number)]
    group = [start("tests/run_process.py", process, number, port, folder, *GROUPS[number], log=log,
                   devices=2 if number == 2 else 1) for process, log in enumerate(logs)]
    try:
        while any(process.poll() is None for process in group) and not any(
                process.poll() for process in group) and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = [process.poll() for process in group]
    finally:
        for process in group:
            process.kill()
            process.wait()
    expected = [0] if number == 1 else [None] * (number - 1) + [-signal.SIGKILL]
    assert codes == expected, "\n".join(log.read_text()[-3000:] for log in logs)
    return logs[0].read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all groups left behind: 1, then 2, then 4 processes, then the example alone."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "losses").write_text("".join(run_group(number, folder) for number in GROUPS))
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost",
             "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    example = start("examples/cluster.py", *EXAMPLE, "--checkpoints", folder / "fsdp-4-1",
                    log=folder / "example", **slurm)
    assert example.wait(timeout=SECONDS) == 0, (folder / "example").read_text()
    return folder


def losses(folder):
    """By run, the loss of each step."""
    found = {}
    for line in (folder / "losses").read_text().splitlines():
        name, *numbers = line.split(" ")
        if name in ("alone", "fsdp-4-1", *TRAINED):
            found.setdefault(name, {})[int(numbers[0])] = float(numbers[1])
    return found


def found_by(folder, processes):
    return [json.loads((folder / f"{processes}-{process}.json").read_text())
            for process in range(processes)]


def arrays(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return np.concatenate([np.ravel(file[key]) for key in file])


def test_each_layout_has_the_losses_of_one_process(folder):
    by_run = losses(folder)
    alone = by_run.pop("alone")
    assert list(alone) == list(range(1, run_process.STEPS + 1))
    assert set(by_run) == {"fsdp-4-1", *TRAINED}
    for steps in by_run.values():
        assert steps == pytest.approx({step: alone[step] for step in steps}, rel=RTOL)


@pytest.mark.parametrize("name", TRAINED)
def test_each_layout_ends_with_the_parameters_of_one_process(folder, name, figure):
    ours, alone = arrays(folder, name), arrays(folder, "alone")
    error = np.linalg.norm(ours - alone) / np.linalg.norm(alone)
    figure("largest error", float(error))
    assert error <= RTOL


def test_two_were_killed_and_four_went_on_from_the_last_checkpoint(folder, figure):
    figure("groups killed", 1)
    text = (folder / "losses").read_text()
    steps = [int(line.split(" ")[1]) for line in text.splitlines() if line.startswith("zero-2-4 ")]
    before = len(steps) - (run_process.STEPS - 4)  # process 0 may lag behind the one that dies
    assert steps[:before] == list(range(1, before + 1))
    assert 4 <= before <= 6
    assert steps[before:] == list(range(5, run_process.STEPS + 1))


def test_four_were_killed_and_one_that_slurm_started_went_on(folder, figure):
    figure("groups killed", 1)
    assert max(losses(folder)["fsdp-4-1"]) < run_process.STEPS
    printed = (folder / "example").read_text().splitlines()
    assert [line.split(":")[0] for line in printed if line.startswith("step ")] == [
        "step 10", f"step {run_process.STEPS}"]
    last = float(printed[-1].split("loss ")[1].split(",")[0])
    assert last == pytest.approx(losses(folder)["alone"][run_process.STEPS], rel=RTOL)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_state_that_no_process_holds_whole_is_read_and_assigned(folder, processes):
    (alone,), found = found_by(folder, 1), found_by(folder, processes)
    assert found[0].pop("metrics") == pytest.approx(alone.pop("metrics"), rel=RTOL)
    for one in found:
        error = one.pop("pickle")
        assert "of the state is spread over the devices of several processes" in error
        assert "Orbax" in error
        for name in ("summary", "repr", "learning rate"):
            assert one[name] == alone[name]
        assert all(one["shardings stay"])
        assert one["programs"][0] == one["programs"][1], "assigning a value retraced"
        assert one["moved"] == 0, "the assigned learning rate is 0"
        assert one["bytes"] > 0


@pytest.mark.parametrize("processes", [2, 4])
def test_the_first_state_of_several_processes_restores_on_one(folder, processes):
    params = run_process.small_params()
    like = params, run_process.small().init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / f"small-{processes}", like)
    jax.tree.map(np.testing.assert_array_equal, restored, like)
