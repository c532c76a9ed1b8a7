"""A tiny dataset, and the commands that run on it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import blosc2
import numpy as np

from nnunetv2_kaf.plans import kaf_plans
from reliability.readers import DESCRIPTION, LAYERS, plans

LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
TRAINER = """
import torch
from nnunetv2_kaf.trainer import nnUNetTrainerKAF


class KAFFaults(nnUNetTrainerKAF):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 12, 2, 1
        self.save_every = 1
"""


@dataclass
class Work:
    """Where everything is, and how the commands are started.

    Attributes:
        folder: Folder of everything; the undisturbed run is in `whole`.
        environment: Variables of the commands.
        seconds: Seconds that the undisturbed run took.
        kills: Kills of one run.
        training_epochs: Epochs of a training.
    """

    folder: Path
    environment: dict[str, str]
    seconds: float = 1.0
    kills: int = 20
    training_epochs: int = 12
    options: list[str] = field(default_factory=lambda: ["--epochs", "4", "--iterations", "6", "--batch-size", "3"])

    @property
    def dataset(self) -> Path:
        """The preprocessed dataset of the pretraining."""
        return self.folder / "nnUNet_preprocessed" / "Dataset900_Fuzz"

    @property
    def training_folder(self) -> Path:
        """Of the fold that is trained."""
        return self.folder / "nnUNet_results" / "Dataset901_Phantom" / "KAFFaults__nnUNetPlans__2d" / "fold_0"

    def pretrain(self, output: str, *more: str, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """Start kaf-pretrain."""
        what = ["-d", "900", "-c", "2d", "-p", "SmallPlans", "--fold", "all", "--device", "cpu", "--preset", "simclr"]
        where = ["--output", str(self.folder / output), "--num-workers", "1", "--save-minutes", "0"]
        command = [sys.executable, "-m", "pretraining", *what, *where, *self.options, *more]
        return self._start(command, preexec_fn)

    def train(self, *more: str) -> subprocess.Popen[str]:
        """Start nnUNetv2_train."""
        entry = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
        return self._start([sys.executable, "-c", entry, "901", "2d", "0", "-tr", "KAFFaults", "-device", "cpu", *more])

    def _start(self, command: list[str], preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=self.folder, preexec_fn=preexec_fn,
        )  # fmt: skip

    def wait_for(self, process: subprocess.Popen[str], path: Path) -> None:
        """Wait until a file is there or the command has ended."""
        end = time.monotonic() + 300
        while not path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)

    def checkpoints(self, output: str) -> dict[str, bytes]:
        """Checkpoints in a folder, those that were set aside included."""
        return {path.name: path.read_bytes() for path in (self.folder / output).glob("checkpoint_*")}


def prepare(folder: Path, with_training: bool) -> Work:
    """Write the datasets, and run the pretraining that nothing happens to.

    Raises:
        RuntimeError: One of these commands fails.
    """
    folder.chmod(0o777)
    variables = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for path in variables.values():
        Path(path).mkdir()
    (folder / "trainers").mkdir()
    (folder / "trainers" / "faults_trainer.py").write_text(TRAINER, encoding="utf-8")
    environment = {
        **variables, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "HOME": str(folder),
        "nnUNet_extTrainer": str(folder / "trainers"), "MPLCONFIGDIR": str(folder / "matplotlib"),
    }  # fmt: skip
    work = Work(folder, environment)
    images = work.dataset / "nnUNetPlans_2d"
    images.mkdir(parents=True)
    small = {**kaf_plans(plans(), LAYERS), "plans_name": "SmallPlans"}
    (work.dataset / "SmallPlans.json").write_text(json.dumps(small), encoding="utf-8")
    (work.dataset / "dataset.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    for i in range(4):
        noise = np.random.default_rng(i).standard_normal((1, 6, 24, 20)).astype(np.float32)
        blosc2.asarray(noise, urlpath=str(images / f"case_{i}.b2nd"))
    if with_training:
        _plan(folder, environment)
    _checked(work.pretrain("whole"))  # fills the cache of keypoints
    started = time.monotonic()
    _checked(work.pretrain("second"))
    work.seconds = time.monotonic() - started
    return work


def _plan(folder: Path, environment: dict[str, str]) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
    phantoms = importlib.import_module("phantoms")
    raw = folder / "nnUNet_raw" / "Dataset901_Phantom"
    phantoms.write_dataset(raw, phantoms.PhantomConfig(training=6, test=1, shape=(6, 32, 32), seed=1))
    entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import *; plan_and_preprocess_entry()"
    command = [sys.executable, "-c", entry, "-d", "901", "-c", "2d", "-np", "1", "-npfp", "1"]
    variables = {**os.environ, **environment, "nnUNet_n_proc_DA": "1"}  # 0 is for training only
    _checked(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def _checked(process: subprocess.Popen[str]) -> None:
    text = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"the command without a fault has failed: {text[-2000:]}")
