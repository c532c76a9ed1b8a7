"""docs/few-labels.md with stock commands: two labelled patients, a folder of unlabelled ones, predictions."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.integration
PLANS = "nnUNetPlans"
TRAINERS = """
import os
import signal

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from semisupervised.trainer import nnUNetTrainerKAFSemi, nnUNetTrainerSemi


class FewLabels:
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 3, 1
        self.save_every = 1
        torch.manual_seed(0)
        np.random.seed(0)

    def train_step(self, batch):
        if os.environ.get("DIE") and self.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch)


class SemiFew(FewLabels, nnUNetTrainerSemi):
    pass


class KAFSemiFew(FewLabels, nnUNetTrainerKAFSemi):
    pass


class PlainFew(FewLabels, nnUNetTrainer):
    pass
"""


def only_two_labelled(workspace: Any) -> Path:
    """Move the images of all patients but two to a folder of unlabelled ones, and throw their labels away."""
    unlabelled = Path(workspace.folder / "unlabelled")
    unlabelled.mkdir()
    for label in sorted((workspace.raw / "labelsTr").iterdir())[2:]:
        case = label.name.removesuffix(".nii.gz")
        shutil.move(workspace.raw / "imagesTr" / f"{case}_0000.nii.gz", unlabelled)
        label.unlink()
    description = workspace.read(workspace.raw / "dataset.json")
    (workspace.raw / "dataset.json").write_text(json.dumps({**description, "numTraining": 2}))
    return unlabelled


@pytest.fixture(scope="module")
def prepared(make_workspace: Any) -> Any:
    workspace = make_workspace(906)
    (workspace.folder / "trainers" / "few_labels.py").write_text(TRAINERS)
    unlabelled = only_two_labelled(workspace)
    number = workspace.number
    plan = ("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "--verify_dataset_integrity", "-npfp", "1")
    workspace.run_script(*plan, "-np", "1")
    file = workspace.preprocessed / f"{PLANS}.json"
    plans = workspace.read(file)
    plans["configurations"]["2d"]["batch_size"] = 4
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8, 8]
    file.write_text(json.dumps(plans))
    listed = workspace.run_script(
        sys.executable, "-m", "semisupervised.cli", "--dataset", number, "--images", unlabelled
    )
    assert "2d: 4 unlabelled images, listed in" in listed
    return workspace


def train(trainer: str, workspace: Any, fold: str, *options: str) -> list[object]:
    command: list[object] = workspace.train(trainer, PLANS, "2d", *options, fold=fold)
    return command


@pytest.fixture(scope="module")
def trained(prepared: Any) -> Any:
    prepared.run(
        *[train("KAFSemiFew", prepared, fold) for fold in "01"],
        *[train("PlainFew", prepared, fold) for fold in "01"],
        prepared.predict("KAFSemiFew", PLANS, "2d", prepared.folder / "predictions", "-f", "0", "1"),
    )
    return prepared


def test_two_patients_give_two_folds_that_leave_one_out(trained: Any) -> None:
    splits = trained.read(trained.preprocessed / "splits_final.json")
    assert [len(split["train"]) for split in splits] == [1, 1]
    assert splits[0]["val"] == splits[1]["train"]
    assert "2 cases are too few for nnU-Net's five-fold split" in trained.logs("KAFSemiFew", PLANS, "2d")


def test_the_listed_images_are_used_and_all_test_images_are_predicted(trained: Any) -> None:
    record = trained.read(trained.model("KAFSemiFew", PLANS, "2d") / "fold_1" / "semi_unlabelled.json")
    assert record["count"] == 4
    assert "the list of kaf-unlabelled" in record["origin"]
    assert len(list((trained.folder / "predictions").glob("*.nii.gz"))) == 2


def test_nnunet_compares_the_trainers(trained: Any) -> None:
    command = f"nnUNetv2_find_best_configuration {trained.number} -c 2d -p {PLANS} -f 0 1 -np 1 --disable_ensembling"
    trained.run([*command.split(), "-tr", "PlainFew", "KAFSemiFew"])
    information = trained.read(trained.results / "inference_information.json")
    assert len(information["all_results"]) == 2
    assert any("KAFSemiFew" in name for name in information["all_results"])


@pytest.mark.parametrize("trainer", ["SemiFew", "KAFSemiFew"])
def test_a_killed_training_goes_on_to_the_same_weights(trainer: str, prepared: Any) -> None:
    whole, broken = prepared.with_results("whole"), prepared.with_results("broken")
    whole.run(train(trainer, whole, "0"))
    dying = replace(broken, variables={**broken.variables, "DIE": "1"})
    with pytest.raises(AssertionError, match=rf"exited with -{signal.SIGKILL.value}"):
        dying.run(train(trainer, broken, "0"))
    broken.run(train(trainer, broken, "0", "--c"))
    weights = [
        torch.load(w.model(trainer, PLANS, "2d") / "fold_0" / "checkpoint_final.pth", weights_only=False)
        for w in (whole, broken)
    ]
    for name, tensor in weights[0]["network_weights"].items():
        assert torch.equal(tensor, weights[1]["network_weights"][name]), name
    for key in ("train_losses", "val_losses"):
        assert weights[0]["logging"][key] == weights[1]["logging"][key]


def test_a_finished_model_validates_again_and_is_exported(trained: Any) -> None:
    archive = trained.folder / "model.zip"
    export = f"nnUNetv2_export_model_to_zip -d {trained.number} -c 2d -tr KAFSemiFew -p {PLANS} -f 0 --not_strict -o"
    trained.run(train("KAFSemiFew", trained, "0", "--val"), [*export.split(), archive])
    assert archive.stat().st_size > 0


def test_without_unlabelled_images_the_training_says_what_to_do(prepared: Any) -> None:
    elsewhere = prepared.with_results("nothing")
    hidden = elsewhere.preprocessed / "nnUNetPlans_2d_kaf_images"
    shutil.move(hidden, elsewhere.folder / "hidden")
    try:
        done = subprocess.run(
            ["nnUNetv2_train", elsewhere.number, "2d", "0", "-tr", "SemiFew", "-device", "cpu"],
            env=elsewhere.environment() | {"nnUNet_extTrainer": str(elsewhere.folder / "trainers")},
            cwd=elsewhere.folder, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    finally:
        shutil.move(elsewhere.folder / "hidden", hidden)
    assert done.returncode != 0
    assert "no unlabelled image for Dataset906_Phantom, 2d, fold 0" in done.stderr
    assert "kaf-unlabelled --dataset Dataset906_Phantom --images DIR" in done.stderr
