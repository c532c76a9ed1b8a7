"""Faults in the middle of runs: killed, told to stop, out of disk, without permission, with files that vanish.

Every fault is tried several times at random moments. Afterwards the same command is run without a fault: what comes out
must equal a run that nothing has happened to, and nothing of an earlier run may be lost. Needs no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json

from nnunetv2_kaf.files import versions
from reliability import work as workspace
from reliability.work import FINAL, LATEST, Work

RESULT = Path(__file__).resolve().parents[1] / "results" / "reliability" / "faults.json"
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # of Linux


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: Name of the kind.
        what: The fault in words.
        tries: How often it is tried.
        attempt: Tries it once, with a seed; returns what went wrong, or nothing.
    """

    name: str
    what: str
    tries: int
    attempt: Callable[[Work, int], str]


@dataclass
class Ended:
    """How a command has ended."""

    code: int
    text: str
    wanted: Sequence[int] = field(default_factory=tuple)

    @property
    def wrong(self) -> str:
        """What is wrong with how it ended; nothing if it was as it should be."""
        if "Traceback" in self.text:
            return f"a traceback: {self.text[-500:]}"
        return "" if self.code in self.wanted else f"exit code {self.code}: {self.text[-500:]}"


def ended(process: subprocess.Popen[str], wanted: Sequence[int]) -> Ended:
    """Wait for a command."""
    return Ended(process.returncode if process.poll() is not None else process.wait(), process.communicate()[0], wanted)


def completed(work: Work, output: str) -> str:
    """Go on without a fault, and compare with the run that nothing has happened to."""
    last = ended(work.pretrain(output, "--continue"), (0,))
    if last.wrong:
        return f"going on: {last.wrong}"
    folder = work.folder / output
    found = torch.load(folder / LATEST, weights_only=True)
    expected = torch.load(work.folder / "whole" / LATEST, weights_only=True)
    if repr(found["history"]) != repr(expected["history"]):
        return "the history differs from that of an undisturbed run"
    if not all(torch.equal(found["model"][name], value) for name, value in expected["model"].items()):
        return "the weights differ from those of an undisturbed run"
    left = [path.name for path in folder.glob(".*.tmp")]
    return f"left behind: {left}" if left else ""


def killed(work: Work, seed: int) -> str:
    """Kill -9 at twenty random moments of one run."""
    rng, output = random.Random(seed), f"killed{seed}"
    kills = 0
    for _ in range(200):
        process = work.pretrain(output, "--continue")
        # from the first import to the end of the run
        if rng.random() < 0.7:
            work.wait_for(process, work.folder / output / "pretraining.log")
        time.sleep(rng.random() * work.seconds / 2)
        process.kill()
        kills += ended(process, ()).code == -signal.SIGKILL
        if kills == work.kills:
            return completed(work, output)
        if (work.folder / output / FINAL).exists():
            # it was faster: the next kills hit a new run
            shutil.rmtree(work.folder / output)
    return f"only {kills} kills"


def stopped(work: Work, seed: int) -> str:
    """SIGTERM, SIGHUP or SIGUSR1 at a random moment, in every phase of a run."""
    rng, output = random.Random(seed), f"stopped{seed}"
    number = rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    process = work.pretrain(output, "--continue")
    if rng.random() < 0.7:
        work.wait_for(process, work.folder / output / "pretraining.log")
    time.sleep(rng.random() * work.seconds / 2)
    process.send_signal(number)
    # before the command listens, the signal ends it as any other program
    last = ended(process, (0, -number))
    return last.wrong or completed(work, output)


def out_of_disk(work: Work, seed: int) -> str:
    """Every write fails beyond a random size, beside the result of an earlier run."""
    rng, output = random.Random(seed), f"disk{seed}"
    if rng.random() < 0.5:
        shutil.copytree(work.folder / "whole", work.folder / output)
    before = work.checkpoints(output)
    limit = int(10 ** rng.uniform(0, 5.5))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    last = ended(work.pretrain(output, preexec_fn=limited), (0, 2))
    if last.wrong:
        return f"limit {limit}: {last.wrong}"
    after = work.checkpoints(output)
    if last.code == 2 and not set(before.values()) <= set(after.values()):
        return f"limit {limit}: an earlier result is lost"
    if last.code == 0 and not (work.folder / output / FINAL).exists():
        return f"limit {limit}: exit code 0 without a result"
    shutil.rmtree(work.folder / output, ignore_errors=True)
    return completed(work, output)


def obey_permissions() -> None:
    """Let a command of root obey permissions as everybody else does."""
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def read_only(work: Work, seed: int) -> str:
    """A folder that cannot be written to."""
    rng, output = random.Random(seed), f"read_only{seed}"
    cache = work.dataset / "nnUNetPlans_2d_kaf_keypoints"
    place = rng.choice((work.folder / output, work.folder / output / "deeper", cache, work.dataset))
    fresh = rng.random() < 0.5 and place in (cache, work.dataset)
    if fresh:
        shutil.rmtree(cache, ignore_errors=True)
    (work.folder / output).mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
    locked = [place, *(path for path in place.rglob("*") if path.is_dir())]
    everywhere = [work.folder / output, *(path for path in work.dataset.rglob("*") if path.is_dir()), work.dataset]
    for path in everywhere:
        path.chmod(0o777)
    for path in locked:
        path.chmod(0o555)
    target = output if place != work.folder / output / "deeper" else f"{output}/deeper"
    try:
        last = ended(work.pretrain(target, preexec_fn=obey_permissions), (0, 2))
    finally:
        for path in (*everywhere, *locked):
            path.chmod(0o777)
    if last.wrong:
        return f"{place}: {last.wrong}"
    if last.code == 0 and place.is_relative_to(work.folder / output):
        return f"{place}: exit code 0 although nothing could be written"
    if last.code == 2 and "error: " not in last.text:
        return f"{place}: no message"
    shutil.rmtree(work.folder / output, ignore_errors=True)
    return completed(work, output)


def vanishing(work: Work, seed: int) -> str:
    """A file that is gone between check and use."""
    rng, output = random.Random(seed), f"vanished{seed}"
    kept = work.folder / "kept"
    shutil.copytree(work.dataset, kept)
    files = sorted(path for path in work.dataset.rglob("*") if path.is_file())
    victim = rng.choice(files)
    process = work.pretrain(output)
    time.sleep(rng.random() * work.seconds)
    victim.unlink()
    try:
        last = ended(process, (0, 2))
    finally:
        shutil.rmtree(work.dataset)
        shutil.move(kept, work.dataset)
    if last.wrong:
        return f"{victim.name}: {last.wrong}"
    shutil.rmtree(work.folder / output, ignore_errors=True)
    return completed(work, output)


def two_at_once(work: Work, seed: int) -> str:
    """Two runs into one folder at the same time."""
    output = f"two{seed}"
    processes = [work.pretrain(output) for _ in range(2)]
    ends = [ended(process, (0, 2)) for process in processes]
    wrong = next((end.wrong for end in ends if end.wrong), "")
    if wrong:
        return wrong
    refused = [end.text for end in ends if end.code == 2]
    if any("in use by process" not in text for text in refused):
        return f"refused without the owner: {refused}"
    if not any(end.code == 0 for end in ends):
        return "none of the two has finished"
    # one after the other is no fault: the first may have finished before the second began
    return completed(work, output)


def killed_training(work: Work, seed: int) -> str:
    """Kill -9 of nnUNetv2_train -tr nnUNetTrainerKAF at random moments, then --c."""
    rng = random.Random(seed)
    shutil.rmtree(work.training_folder, ignore_errors=True)
    for _ in range(4):
        process = work.train("--c")
        work.wait_for(process, work.training_folder / LATEST if rng.random() < 0.7 else work.training_folder)
        time.sleep(rng.random() * 5)
        process.kill()
        ended(process, ())
        if (work.training_folder / FINAL).exists():
            break
    last = ended(work.train("--c"), (0,))
    if last.wrong:
        return last.wrong
    content = torch.load(work.training_folder / FINAL, weights_only=False)
    if content["current_epoch"] != work.training_epochs:
        return f"ended after {content['current_epoch']} epochs"
    left = [path.name for path in work.training_folder.glob(".*.tmp")]
    return f"left behind: {left}" if left else ""


FAULTS = (
    Fault("killed", "`kaf-pretrain`: kill -9 at 20 random moments of one run, then `--continue`", 1, killed),
    Fault("stopped", "`kaf-pretrain`: SIGTERM, SIGHUP or SIGUSR1 in any phase, then `--continue`", 10, stopped),
    Fault("out_of_disk", "`kaf-pretrain`: every write fails beyond a random size", 10, out_of_disk),
    Fault("read_only", "`kaf-pretrain`: a read-only folder", 8, read_only),
    Fault("vanishing", "`kaf-pretrain`: a file of the dataset vanishes at a random moment", 8, vanishing),
    Fault("two_at_once", "`kaf-pretrain`: two runs into one folder at once", 4, two_at_once),
    Fault("killed_training", "`nnUNetv2_train -tr nnUNetTrainerKAF`: four times kill -9, `--c`", 3, killed_training),
)


def repeat(fault: Fault, work: Work) -> dict[str, Any]:
    """Try a fault as often as it says."""
    found = [fault.attempt(work, seed) for seed in range(fault.tries)]
    failures = [f"try {seed}: {text}" for seed, text in enumerate(found) if text]
    return {"what": fault.what, "tries": fault.tries, "passed": fault.tries - len(failures), "failures": failures}


def main() -> int:
    """Run all faults, write the figures, and return 1 if one broke something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="these kinds only")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"figures (default: {RESULT.name})")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work = workspace.prepare(Path(folder), with_training=any(f.attempt is killed_training for f in chosen))
        for fault in chosen:
            found = repeat(fault, work)
            sys.stdout.write(f"{fault.name}: {found}\n")
            sys.stdout.flush()
            write_figure(fault.name, found, options.out)
            failed |= bool(found["failures"])
    return int(failed)


def write_figure(name: str, found: dict[str, Any], out: Path) -> None:
    """Put the figures of one kind of fault into the file; those of the others stay."""
    before = json.loads(out.read_text(encoding="utf-8"))["faults"] if out.is_file() else {}
    every = {**before, name: found}
    ordered = {fault.name: every[fault.name] for fault in FAULTS if fault.name in every}
    write_json({"faults": ordered, "machine": machine(torch.device("cpu")), "versions": versions()}, out)


if __name__ == "__main__":
    sys.exit(main())
