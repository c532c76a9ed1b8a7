"""Pretraining runs that are killed, told to stop, or shared by several processes, all on the CPU."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.plans import kaf_plans

pytestmark = pytest.mark.integration
TIMEOUT = 300
LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
KILLS = 10

# Imports everything once and then forks: a run starts within milliseconds. Every run counts the calls of some functions
# and, if it is told so, kills itself at one of them: while it detects keypoints, makes pairs, computes, draws or saves.
SERVER = """
import json, os, signal, sys, threading, traceback
import matplotlib.backends.backend_agg, torch, torch._dynamo, torch.distributed, torch.utils.tensorboard
import nnunetv2.utilities.crossval_split
from pretraining import cli, config, loop, recorder, run, task
from pretraining.monitoring import monitor, progress
from pretraining.pairs import keypoint_cache, loader

# What torch and nnU-Net import when they are first used. No backward pass: its threads would not survive the fork.
run.build_state(task.resolve_task("123", "2d", "SmallPlans"), config.PretrainConfig(), torch.device("cpu"))
progress.draw_progress([{"epoch": 0.0, "alignment": 1.0}])
torch.nn.parallel.DistributedDataParallel

PLACES = [(os, "fsync"), (os, "replace"), (torch, "save"), (keypoint_cache.KeypointCache, "_detect"),
          (loader.PairLoader, "sample"), (loop.Trainer, "step"), (monitor.Monitor, "evaluate"),
          (recorder, "plot_progress")]

def count_calls(job):
    lock, calls = threading.Lock(), []
    def counted(function, name):
        def call(*args, **kwargs):
            with lock:
                calls.append(name)
                if [name, calls.count(name)] == job["kill"]:
                    sys.stderr.write(f"killed at {name}\\n")
                    sys.stderr.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for place, name in PLACES:
        setattr(place, name, counted(getattr(place, name), name))
    return calls

def child(job):
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job["env"])
    torch.set_num_threads(1)
    calls = count_calls(job)
    code = cli.main(job["arguments"])
    sys.stdout.write(f"calls: {json.dumps({name: calls.count(name) for name in calls})}\\n")
    sys.stdout.flush()
    return code

for line in sys.stdin:
    pids = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(job)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Runs:
    """A tiny dataset, and ways to pretrain on it.

    Attributes:
        folder: of everything.
        log: what all runs wrote to stdout and stderr.
    """

    def __init__(self, folder: Path) -> None:
        conftest = Path(__file__).parents[1] / "pretraining" / "conftest.py"
        dataset = runpy.run_path(str(conftest))["TinyDataset"](folder)
        plans = kaf_plans(
            {**dataset.plans, "plans_name": "SmallPlans"}, KAFConfig(num_keypoints=24, token_dim=16, num_blocks=1)
        )
        (dataset.folder / "SmallPlans.json").write_text(json.dumps(plans))
        dataset.add_cases(6)
        self.keypoints = dataset.folder / "nnUNetPlans_2d_kaf_keypoints"
        self.folder = folder
        self.log = folder / "log.txt"
        paths = {"nnUNet_preprocessed": dataset.root, "nnUNet_results": dataset.results, "nnUNet_raw": folder / "raw"}
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.environment = {**{key: str(path) for key, path in paths.items()}, **threads}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **self.environment},
        )  # fmt: skip

    def arguments(self, output: str, *more: str) -> list[str]:
        small = ("--sinkhorn-iterations", "5", "--transport-layers", "1", "--descriptor-dim", "16", "--batch-size", "4")
        where = ("--dataset", "123", "-c", "2d", "-p", "SmallPlans", "--device", "cpu", "--num-workers", "2")
        return [*where, *small, "--output", str(self.folder / output), *more]

    def run(self, arguments: Sequence[str], kill: tuple[str, int] | None = None, processes: int = 1) -> list[int]:
        """Run the command in one or several forked processes; returns their exit codes.

        Args:
            arguments: of kaf-pretrain.
            kill: function and number of the call at which the run kills itself.
            processes: that share the run.
        """
        jobs = []
        for rank in range(processes):
            environment: dict[str, str] = {}
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
                environment = {key: str(value) for key, value in place.items()}
            jobs.append({"arguments": list(arguments), "kill": kill, "env": environment, "log": str(self.log)})
        port = str(free_port())
        for job in jobs:
            job["env"]["MASTER_PORT"] = port
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        codes: list[int] = json.loads(self.server.stdout.readline())
        return codes

    def latest(self, output: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / output / LATEST, weights_only=True)
        return found

    def torchrun(self, arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start the command that the documentation names, with two processes."""
        port = str(free_port())
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
        return subprocess.Popen(
            [sys.executable, *launcher, "--master-port", port, "-m", "pretraining", *arguments],
            env={**os.environ, **self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=self.folder, start_new_session=True,
        )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a command and its processes; returns what they wrote."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    finally:
        if process.poll() is None:  # it hangs: leave nothing behind
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("processes"))
    yield made
    assert made.server.stdin is not None
    made.server.stdin.close()
    made.server.wait(TIMEOUT)


def close(found: dict[str, Any], expected: dict[str, Any], weights: float = 1e-4) -> None:
    """Compare two runs, up to the order in which numbers are added."""
    assert found["step"] == expected["step"]
    assert len(found["history"]) == len(expected["history"])
    for one, two in zip(found["history"], expected["history"], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5, nan_ok=True)
    for name, value in expected["model"].items():
        assert torch.allclose(found["model"][name], value, atol=weights), name


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(runs: Runs) -> None:
    options = ("--epochs", "3", "--iterations", "3", "--save-every", "2")
    assert runs.run(runs.arguments("whole", *options)) == [0]
    expected = runs.latest("whole")
    calls: dict[str, int] = json.loads(runs.log.read_text().rsplit("calls: ", 1)[1])
    assert len(calls) == 8
    for path in runs.keypoints.rglob("*.npy"):
        path.unlink()

    generator = np.random.default_rng(0)
    # every step is saved: the run may be continued from within an epoch and from the end of one
    command = runs.arguments("killed", *options, "--save-minutes", "0", "--continue")
    folder = runs.folder / "killed"
    kills, leftovers = 0, 0
    # first while keypoints are being detected, then at random moments of every kind
    kinds = ["_detect"]
    while kills < KILLS:
        kinds = kinds or [str(kind) for kind in generator.permutation(sorted(calls))]
        kind = kinds.pop()
        moment = (kind, int(generator.integers(1, calls[kind] + 1)))
        (code,) = runs.run(command, kill=moment)
        assert code in (0, -signal.SIGKILL), runs.log.read_text()[-3000:]
        kills += code != 0
        leftovers += len(list(folder.glob(".*.tmp")))
        if code == 0:  # it was done before that moment came: once more
            assert repr(runs.latest("killed")["history"]) == repr(expected["history"])
            for name in (LATEST, FINAL):
                (folder / name).unlink()
    assert runs.run(command) == [0]
    found = runs.latest("killed")
    assert repr(found["history"]) == repr(expected["history"])
    assert found["step"] == expected["step"] == 9
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    final = torch.load(folder / FINAL, weights_only=True)["network_weights"]
    whole = torch.load(runs.folder / "whole" / FINAL, weights_only=True)["network_weights"]
    assert all(torch.equal(final[k], v) for k, v in whole.items())
    places = {line.split()[-1] for line in runs.log.read_text().splitlines() if line.startswith("killed at")}
    assert len(places) > 3, places
    assert leftovers > 0
    assert list(folder.glob(".*.tmp")) == []


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_processes_compute_what_one_does(runs: Runs, accumulate: str) -> None:
    options = ("--epochs", "2", "--iterations", "3", "--optimizer", "sgd", "--learning-rate", "0.02")
    options = (*options, "--accumulate", accumulate)
    one, two = f"one{accumulate}", f"two{accumulate}"
    assert runs.run(runs.arguments(one, *options)) == [0]
    assert runs.run(runs.arguments(two, *options), processes=2) == [0, 0], runs.log.read_text()[-3000:]
    expected = runs.latest(one)
    close(runs.latest(two), expected)
    assert expected["history"][2]["total"] != pytest.approx(expected["history"][1]["total"], rel=1e-3)
    # one writer
    folder = runs.folder / two
    text = (folder / "pretraining.log").read_text()
    assert [text.count(f"epoch {epoch}/2: ") for epoch in (0, 1, 2)] == [1, 1, 1]
    assert "2 process(es) on cpu" in text
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert list(folder.glob("*.bak-*")) == []
    # what two processes began one can finish
    assert runs.run([*runs.arguments(two, *options), "--continue"]) == [0]


def test_every_loss_alone_on_two_processes(runs: Runs) -> None:
    """Without the bottleneck's loss some parameters have no gradient, which must not stop the others."""
    off = {name: (f"--weight-{name}", "0") for name in ("bottleneck", "keypoints", "local", "transport")}
    for kept in ("local", "transport"):
        weights = [word for name, words in off.items() if name != kept for word in words]
        options = ("--epochs", "1", "--iterations", "2", "--optimizer", "sgd", *weights)
        assert runs.run(runs.arguments(f"alone_{kept}", *options)) == [0]
        assert runs.run(runs.arguments(f"both_{kept}", *options), processes=2) == [0, 0], runs.log.read_text()[-3000:]
        close(runs.latest(f"both_{kept}"), runs.latest(f"alone_{kept}"))


def test_a_batch_that_cannot_be_shared_ends_both_processes(runs: Runs) -> None:
    before = len(runs.log.read_text()) if runs.log.exists() else 0
    assert runs.run(runs.arguments("uneven", "--batch-size", "5"), processes=2) == [2, 2]
    assert "--batch-size is 5, which 2 processes cannot share equally" in runs.log.read_text()[before:]
    assert not (runs.folder / "uneven").exists()


def test_torchrun_saves_when_it_is_told_to_stop_and_goes_on(runs: Runs) -> None:
    options = ("--epochs", "2", "--iterations", "40", "--optimizer", "sgd", "--preset", "pcl")
    command = runs.arguments("torchrun", *options)
    folder = runs.folder / "torchrun"
    process = runs.torchrun(command)
    deadline = time.monotonic() + TIMEOUT
    while not (folder / LATEST).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finished(process)
    found = runs.latest("torchrun")
    assert 40 < found["step"] < 80, output[-3000:]
    assert len(found["history"]) == 2
    assert f"SIGTERM: stopped after step {found['step']} of 80" in output
    assert not (folder / FINAL).exists()

    process = runs.torchrun([*command, "--continue"])
    output = finished(process)
    assert process.returncode == 0, output[-3000:]
    assert output.count("Checkpoint: ") == output.count("Next: ") == 1
    assert (folder / "pretraining.log").read_text().count("epoch 2/2: ") == 1
    assert runs.run(runs.arguments("one_process", *options)) == [0]
    close(runs.latest("torchrun"), runs.latest("one_process"), weights=1e-3)


def test_an_error_of_the_first_process_ends_the_command(runs: Runs) -> None:
    """Only process 0 opens the trackers; the other one waits for it in the first step."""
    process = runs.torchrun(runs.arguments("error", "--epochs", "2"), nnUNet_wandb_enabled="perhaps")
    output = finished(process)
    assert process.returncode not in (0, None)
    assert output.count("kaf-pretrain: error: The environment variable nnUNet_wandb_enabled is 'perhaps'") == 1
    assert not (runs.folder / "error" / LATEST).exists()
