"""The stock commands of a study, as steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import ALL, PLANNER, SEMI_TRAINERS, Arm, digest
from .layout import NUMBER, Layout
from .plans import planned
from .splits import Fold, Split
from .worker import INTERNAL, Step

FINAL = "checkpoint_final.pth"
LATEST = "checkpoint_latest.pth"


def plan(layout: Layout, split: Split) -> list[Step]:
    """Plan and preprocess with nnU-Net's default planner; plan with those of the arms."""
    configuration = layout.task.configuration
    flags = ["-d", NUMBER, "-c", configuration, "-npfp", "2", "-np", "2"]
    first = ["nnUNetv2_plan_and_preprocess", *flags]
    planners = sorted({arm.planner for arm in layout.arms} - {PLANNER})
    others = [
        ["nnUNetv2_plan_experiment", "-d", NUMBER, "-pl", planner, "-overwrite_plans_name", planned(planner)]
        for planner in planners
    ]
    identity = digest([layout.study.setting(layout.task), split.sha256()])
    steps = []
    for name, command in zip(["plan", *(f"plan_{p}" for p in planners)], [first, *others], strict=True):
        product = layout.preprocessed / (f"{planned(PLANNER)}_{configuration}" if command is first else "")
        product = product if command is first else layout.preprocessed / f"{command[-1]}.json"
        # Planning crashes without a process of its own.
        more = {"nnUNet_n_proc_DA": "1"}
        steps.append(Step(str(layout.record(name)), identity, command, str(product), more))
    return steps


def pretrain(layout: Layout, arm: Arm, fold: Fold, split: Split) -> Step:
    """Pretrain on all training patients; any fold leaves out the validation patients, the same in all."""
    assert arm.pretraining is not None
    folder = layout.pretraining(arm, fold)
    most = max(split.folds, key=lambda f: (f.labelled == ALL, len(f.patients)))
    options = {"patient_pattern": layout.task.patient_pattern, **arm.pretraining}
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [
        *("kaf-pretrain", "--dataset", NUMBER, "-c", layout.task.configuration, "-p", layout.plans_name(arm)),
        *("--fold", str(most.index), "--network", arm.network, *flags),
        *("--seed", str(layout.pretraining_seed(fold)), "--device", layout.study.device),
        *("--num-workers", "1", "--output", str(folder), "--continue"),
    ]
    identity = digest([layout.study.setting(layout.task), arm.pretraining, split.sha256()])
    return Step(str(layout.record(f"pretrain_{folder.name}")), identity, command, str(folder / FINAL), {})


def run_identity(layout: Layout, arm: Arm, fold: Fold, split: Split) -> str:
    """Hash of everything that decides about a run."""
    seed = None if arm.pretraining is None else layout.pretraining_seed(fold)
    return digest([layout.study.setting(layout.task), arm.definition(), seed, fold.name, split.sha256()])


def train(layout: Layout, arm: Arm, fold: Fold, split: Split) -> Step:
    """Train, or go on: nnU-Net takes pretrained weights at the beginning only."""
    folder = layout.fold_folder(arm, fold)
    command = [
        *("nnUNetv2_train", NUMBER, layout.task.configuration, str(fold.index), "-tr", layout.trainer_name(arm)),
        *("-p", layout.plans_name(arm), "-device", layout.study.device),
    ]
    environment = {}
    if arm.trainer in SEMI_TRAINERS:
        # The training patients that are not labelled in this fold.
        environment["KAF_UNLABELLED"] = NUMBER
    if arm.pretraining is not None and arm.network == "kaf":
        environment["KAF_PRETRAINED"] = str(layout.pretraining(arm, fold) / FINAL)
    if (folder / FINAL).is_file():
        command.append("--val")
    elif (folder / LATEST).is_file():
        command.append("--c")
    elif arm.pretraining is not None and arm.network == "plain":
        command += ["-pretrained_weights", str(layout.pretraining(arm, fold) / FINAL)]
    product = folder / "validation" / "summary.json"
    return Step(*_named(layout, "train", arm, fold, split), command, str(product), environment)


def predict(layout: Layout, arm: Arm, fold: Fold, split: Split) -> list[Step]:
    """Predict the test cases and compare them with their labels."""
    folder = layout.predictions(arm, fold)
    model = ["-tr", layout.trainer_name(arm), "-p", layout.plans_name(arm), "-c", layout.task.configuration]
    files = ["-djfile", str(folder / "dataset.json"), "-pfile", str(folder / "plans.json")]
    commands = {
        "predict": [
            *("nnUNetv2_predict", "-i", str(layout.raw / "imagesTs"), "-o", str(folder), "-d", NUMBER),
            *(*model, "-f", str(fold.index), "-device", layout.study.device, "-npp", "0", "-nps", "0"),
            "--disable_progress_bar",
        ],
        "evaluate": [
            *("nnUNetv2_evaluate_folder", str(layout.raw / "labelsTs"), str(folder), *files, "-np", "1"),
        ],
    }
    products = {"predict": folder / "plans.json", "evaluate": folder / "summary.json"}
    return [
        Step(*_named(layout, name, arm, fold, split), command, str(products[name]), {})
        for name, command in commands.items()
    ]


def measure(layout: Layout, on: str, arm: Arm, fold: Fold, split: Split) -> Step:
    """Collect Dice from nnU-Net's summary, add distances, machine and seconds."""
    model = layout.fold_folder(arm, fold)
    summary = model / "validation" if on == "validation" else layout.predictions(arm, fold)
    out = measured_file(layout, on, arm, fold)
    command = [f"{INTERNAL}measure", str(summary / "summary.json"), str(model / FINAL), layout.study.device, str(out)]
    return Step(*_named(layout, f"measure_{on}", arm, fold, split), command, str(out), {})


def measured_file(layout: Layout, on: str, arm: Arm, fold: Fold) -> Path:
    """Product of `measure`."""
    return layout.scratch / "measured" / on / f"{arm.name}_{fold.name}.json"


def _named(layout: Layout, kind: str, *run: Any) -> tuple[str, str]:
    """Record and identity of a step of a run."""
    arm, fold, _ = run
    return str(layout.record(f"{kind}_{arm.name}_{fold.name}")), run_identity(layout, *run)
