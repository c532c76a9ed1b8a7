"""Where a task keeps its files: scratch in the work folder, results in the repository."""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Arm, Study, Task, digest
from .splits import Fold, Split

NUMBER = "950"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "low_label"


@dataclass(frozen=True)
class Layout:
    """Folders of one task of a study.

    Attributes:
        study: The config.
        task: One of its tasks.
        work: Scratch folder of all studies.
        out: Folder of the results of all studies.
    """

    study: Study
    task: Task
    work: Path
    out: Path

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Arms of this task."""
        return tuple(arm for arm in self.study.arms if self.task.name in arm.tasks)

    def runs(self, split: Split) -> list[tuple[Arm, Fold]]:
        """Trainings of this task, those with few labelled patients first."""
        return [(arm, fold) for fold in split.folds for arm in self.arms if fold.labelled in arm.labelled]

    @property
    def scratch(self) -> Path:
        """Scratch of this task; each task has nnU-Net folders of its own."""
        return self.work / self.study.name / self.task.name

    @property
    def results(self) -> Path:
        """Results of this task."""
        return self.out / self.study.name / self.task.name

    @property
    def dataset(self) -> str:
        """Name of the study's dataset."""
        return f"Dataset{NUMBER}_{self.task.name}"

    @property
    def raw(self) -> Path:
        """Raw dataset."""
        return self.scratch / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """Preprocessed dataset."""
        return self.scratch / "nnUNet_preprocessed" / self.dataset

    def plans_name(self, arm: Arm) -> str:
        """Plans that arms with the same network share."""
        return f"study_{arm.network}_{digest([arm.planner, arm.network, arm.kaf])[:8]}"

    def trainer_name(self, arm: Arm) -> str:
        """Trainer class of an arm."""
        return f"Study_{arm.name}"

    def pretraining(self, arm: Arm, fold: Fold) -> Path:
        """Folder of the pretraining that a run starts from; arms with equal networks and options share it."""
        seed = self.pretraining_seed(fold)
        assert arm.pretraining is not None
        key = digest([self.plans_name(arm), arm.network, arm.pretraining, seed])[:8]
        return self.scratch / "pretraining" / f"{arm.pretraining['preset']}_{arm.network}_seed{seed}_{key}"

    def pretraining_seed(self, fold: Fold) -> int:
        """Seed of the pretraining that a fold starts from."""
        return self.study.seed + fold.draw % self.study.pretraining_seeds

    def fold_folder(self, arm: Arm, fold: Fold) -> Path:
        """Where nnU-Net writes a training."""
        model = f"{self.trainer_name(arm)}__{self.plans_name(arm)}__{self.task.configuration}"
        return self.scratch / "nnUNet_results" / self.dataset / model / f"fold_{fold.index}"

    def predictions(self, arm: Arm, fold: Fold) -> Path:
        """Predictions of the test cases."""
        return self.scratch / "predictions" / f"{arm.name}_{fold.name}"

    def record(self, name: str) -> Path:
        """Whether and how long a step ran."""
        return self.scratch / "steps" / f"{name}.json"

    def log(self, name: str) -> Path:
        """Output of a job."""
        return self.scratch / "logs" / f"{name}.log"

    def run_file(self, on: str, arm: Arm, fold_name: str) -> Path:
        """Result of a run."""
        return self.results / "runs" / on / f"{arm.name}_{fold_name}.json"

    def curves_file(self, arm: Arm, fold: Fold) -> Path:
        """Curves of the pretraining that a run starts from."""
        return self.results / "pretraining" / f"{self.pretraining(arm, fold).name}.json"

    @property
    def split_file(self) -> Path:
        """Patients of test, validation and every draw."""
        return self.results / "splits.json"

    @property
    def opened_file(self) -> Path:
        """Marker: the test set has been used, for these runs."""
        return self.results / "test_opened.json"

    def environment(self, threads: int, **more: str) -> dict[str, str]:
        """Environment of the commands.

        Args:
            threads: Threads of torch, per process.
            more: Further variables.
        """
        folders = {f"nnUNet_{n}": str(self.scratch / f"nnUNet_{n}") for n in ("raw", "preprocessed", "results")}
        return {
            **os.environ,
            **folders,
            "nnUNet_extTrainer": str(self.scratch / "trainers"),
            "nnUNet_n_proc_DA": str(self.study.augmentation_processes),
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "t" if self.study.compile else "f",
            "KAF_PRETRAINED": "none",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            # nnU-Net's checkpoints hold numpy numbers, which its Primus trainer cannot read back otherwise
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
            "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", ""),
            **more,
        }


def read_json(path: Path) -> Any:
    """Read a file, None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None
