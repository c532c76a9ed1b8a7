"""What the integration tests share: workspaces with their own nnU-Net folders and an otherwise empty environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import phantoms
import pytest
from phantoms import PhantomConfig

HERE = Path(__file__).parent
TIMEOUT = 1200
SMALL = PhantomConfig(training=6, test=2, shape=(12, 40, 40))

# nnU-Net's own way to shorten an epoch: a trainer of the user, found through nnUNet_extTrainer.
SHORT_TRAINERS = '''
import torch
from nnunetv2_kaf.trainer import nnUNetTrainerKAF, nnUNetTrainerKAFScratch


class Short:
    epochs = 1

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = self.epochs, 3, 1


class KAFShort(Short, nnUNetTrainerKAF):
    epochs = 2


class KAFStart(Short, nnUNetTrainerKAF):
    def perform_actual_validation(self, save_probabilities=False):
        """Not needed to see how a training starts."""


class KAFStartScratch(Short, nnUNetTrainerKAFScratch):
    def perform_actual_validation(self, save_probabilities=False):
        """Not needed to see how a training starts."""
'''


@dataclass(frozen=True)
class Workspace:
    """One dataset in its own nnU-Net folders.

    Attributes:
        folder: holds nnUNet_raw, nnUNet_preprocessed, nnUNet_results and the short trainers.
        name: dataset folder name.
        results_name: name of the results folder, to look at a zip installed elsewhere.
        variables: environment variables of the commands beyond the fixed ones.
    """

    folder: Path
    name: str
    results_name: str = "nnUNet_results"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> str:
        return self.name[7:10]

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / self.name

    @property
    def results(self) -> Path:
        return self.folder / self.results_name / self.name

    def model(self, trainer: str, plans: str, configuration: str) -> Path:
        return self.results / f"{trainer}__{plans}__{configuration}"

    def pretraining(self, plans: str, configuration: str) -> Path:
        """The final checkpoint of the only pretraining run of these plans."""
        folder = self.results / f"KAFPretraining__{plans}__{configuration}"
        (found,) = folder.glob("fold_*/checkpoint_final.pth")
        return found

    def with_results(self, name: str) -> Workspace:
        return replace(self, results_name=name)

    def environment(self) -> dict[str, str]:
        own = {
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(self.folder),
            "nnUNet_raw": str(self.folder / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.folder / self.results_name),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            # nnU-Net on the CPU starts a thread per core whatever OMP_NUM_THREADS says; let idle ones sleep.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        return own | self.variables

    def run(self, *commands: Sequence[object]) -> str:
        """Run several commands in one process; the short trainers are in reach."""
        lines = json.dumps([[str(word) for word in command] for command in commands])
        extra = {"nnUNet_extTrainer": str(self.folder / "trainers")}
        return self._call([sys.executable, str(HERE / "run_commands.py"), lines], extra)

    def run_script(self, *command: object) -> str:
        """Run one command as a shell would, with nothing but nnU-Net's own variables."""
        return self._call([str(word) for word in command], {})

    def _call(self, command: list[str], extra: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            env=self.environment() | extra,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def read(self, path: Path) -> Any:
        """Read a JSON file."""
        return json.loads(path.read_text(encoding="utf-8"))

    def initialization(self, trainer: str, plans: str, configuration: str, fold: str = "0") -> Any:
        """What the trainer says about its first weights."""
        return self.read(self.model(trainer, plans, configuration) / f"fold_{fold}" / "kaf_initialization.json")

    def network(self, trainer: str, plans: str, configuration: str) -> str:
        """The network class that the model's saved plans name."""
        plan = self.read(self.model(trainer, plans, configuration) / "plans.json")["configurations"][configuration]
        return str(plan["architecture"]["network_class_name"])

    def logs(self, trainer: str, plans: str, configuration: str, fold: str = "0") -> str:
        """The training logs, in the order in which they were written."""
        folder = self.model(trainer, plans, configuration) / f"fold_{fold}"
        return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("training_log_*.txt")))

    def plan(self, *configurations: str) -> str:
        options = ("-pl", "nnUNetPlannerKAF", "-c", *configurations, "--verify_dataset_integrity", "-npfp", "1")
        return self.run_script(
            "nnUNetv2_plan_and_preprocess", "-d", self.number, *options, "-np", *["1"] * len(configurations)
        )

    def pretrain(self, plans: str, configuration: str) -> list[str]:
        """A command line of two steps."""
        size = ("--epochs", "1", "--iterations", "2", "--batch-size", "2", "--device", "cpu")
        return ["kaf-pretrain", "--dataset", self.number, "-c", configuration, "-p", plans, *size]

    def train(self, trainer: str, plans: str, configuration: str, *options: object, fold: str = "0") -> list[object]:
        model = ("-tr", trainer, "-p", plans, "-device", "cpu")
        return ["nnUNetv2_train", self.number, configuration, fold, *model, *options]

    def predict(self, trainer: str, plans: str, configuration: str, output: Path, *options: object) -> list[object]:
        """Sequential prediction of the test images without mirroring."""
        model = ("-d", self.number, "-c", configuration, "-tr", trainer, "-p", plans)
        fast = ("-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta")
        folds = () if "-f" in options else ("-f", "0")
        return ["nnUNetv2_predict", "-i", self.raw / "imagesTs", "-o", output, *model, *folds, *fast, *options]


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    def make(number: int, **changes: Any) -> Workspace:
        folder = tmp_path_factory.mktemp(f"workspace_{number}")
        (folder / "trainers").mkdir()
        (folder / "trainers" / "short_trainers.py").write_text(SHORT_TRAINERS)
        workspace = Workspace(folder, f"Dataset{number:03d}_Phantom")
        for name in ("nnUNet_preprocessed", "nnUNet_results"):
            (folder / name).mkdir()
        phantoms.write_dataset(workspace.raw, replace(SMALL, seed=number, **changes))
        return workspace

    return make


@pytest.fixture(scope="session")
def planned(make_workspace: Any) -> Workspace:
    """One channel, plain labels, planned and preprocessed for 2d and 3d_fullres; shared and never written to again."""
    workspace: Workspace = make_workspace(901)
    workspace.plan("2d", "3d_fullres")
    return workspace
