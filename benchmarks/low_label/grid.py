"""What there is to do: preparation of every task, pretrainings, trainings, and the test at the end."""

from __future__ import annotations

import datetime
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

from common import write_json

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.config import PretrainConfig

from . import commands, plans, raw, trainers
from .config import Arm, digest
from .jobs import ROOT, Job, Launch, run_jobs
from .layout import Layout, read_json
from .splits import Fold, Split, draw, fold_names
from .worker import is_done, state

ONS = ("validation", "test")


def finished(layout: Layout, on: str) -> tuple[int, int]:
    """Count the results that are there.

    Returns:
        How many there are and how many there should be.

    Raises:
        KAFError: A result is that of other options.
    """
    study, there, names = layout.study, 0, 0
    for arm in layout.arms:
        for name in fold_names(study, arm.labelled):
            file, names = layout.run_file(on, arm, name), names + 1
            run = read_json(file)
            if run is None:
                continue
            there += 1
            setting = study.setting(layout.task)
            if (run["setting"], run["definition"]) != (setting, arm.definition()):
                raise KAFError(
                    f"{file} is the result of other options than those of the config. Give the arm another name, or "
                    "the results another folder with --out."
                )
    return there, names


def prepare(layout: Layout, data: Path, threads: int, launch: Launch) -> Split:
    """Draw the patients, write the study's dataset, plans and trainers.

    Args:
        layout: Layout of the task.
        data: Folder of raw datasets.
        threads: Threads for planning.
        launch: Starts a worker.

    Raises:
        KAFError: The data are not those of an earlier start, or planning failed.
    """
    study, source = layout.study, data / layout.task.data
    split = draw(raw.describe(source)[1], study, layout.task)
    known = read_json(layout.split_file)
    if known is not None and known["sha256"] != split.sha256():
        raise KAFError(
            f"{layout.split_file} holds other patients than {source} with this config gives. The split of a study "
            "never changes: restore the config or the data, or copy the config under another name."
        )
    write_json({"sha256": split.sha256(), "seed": study.seed, **split.document()}, layout.split_file)
    raw.write(layout, source, split)
    failures = run_jobs([Job("plan", layout, lambda: commands.plan(layout, split))], 1, threads, launch)
    if failures:
        raise KAFError(f"planning: {failures[0]}")
    plans.write(layout)
    (layout.preprocessed / "splits_final.json").write_text(json.dumps(split.nnunet(), indent=2) + "\n")
    common = {
        "epochs": study.epochs,
        "iterations": study.iterations,
        "validation_iterations": study.validation_iterations,
        "mirror_predictions": study.mirror_predictions,
        "seeds": tuple(study.seed + fold.draw for fold in split.folds),
    }
    classes = {layout.trainer_name(arm): (arm.trainer, dict(arm.training)) for arm in layout.arms}
    trainers.write(layout.scratch / "trainers" / "study_trainers.py", classes, common)
    return split


def training_jobs(layout: Layout, split: Split) -> list[Job]:
    """The pretrainings, and the trainings with their validation, draw by draw.

    So a study that is not finished yet compares its arms on the same draws.
    """
    pretrainings: dict[str, Job] = {}
    runs = []
    for arm, fold in sorted(layout.runs(split), key=lambda run: run[1].draw):
        needs = None
        if arm.pretraining is not None:
            needs = f"pretrain_{layout.pretraining(arm, fold).name}"
            steps = functools.partial(_pretraining, layout, arm, fold, split)
            pretrainings.setdefault(needs, Job(needs, layout, steps))
        runs.append(
            Job(
                f"{arm.name}_{fold.name}",
                layout,
                functools.partial(_training, layout, arm, fold, split),
                needs,
                functools.partial(write_run, layout, "validation", arm, fold, split),
            )
        )
    # A job that waits for its pretraining holds a place: those that need none go first.
    return [*pretrainings.values(), *sorted(runs, key=lambda job: job.needs is not None)]


def test_jobs(layout: Layout, split: Split) -> list[Job]:
    """Predictions and measurements of the test cases."""
    return [
        Job(
            f"test_{arm.name}_{fold.name}",
            layout,
            functools.partial(_testing, layout, arm, fold, split),
            finish=functools.partial(write_run, layout, "test", arm, fold, split),
        )
        for arm, fold in layout.runs(split)
    ]


def open_test(layout: Layout, split: Split) -> None:
    """Record that the test set is used, for exactly these runs; later only what it was opened for may be measured.

    Raises:
        KAFError: A training is missing, or the test set was opened for other runs.
    """
    runs = {
        f"{arm.name}_{fold.name}": commands.run_identity(layout, arm, fold, split) for arm, fold in layout.runs(split)
    }
    missing = [
        f"{arm.name}_{fold.name}"
        for arm, fold in layout.runs(split)
        if not is_done(commands.train(layout, arm, fold, split))
    ]
    opened = read_json(layout.opened_file)
    if opened is not None:
        others = sorted(name for name in runs if opened["runs"].get(name) != runs[name])
        if others:
            raise KAFError(
                f"{layout.opened_file}: the test set was opened on {opened['when']} for other runs; not among them: "
                f"{', '.join(others[:5])}. Use --on validation for choices, and a new config with another seed for a "
                "new test."
            )
        return
    if missing:
        raise KAFError(
            f"--on test: {layout.task.name} lacks {len(missing)} trainings, first {missing[0]}. The test set is used "
            "once, after all trainings: finish them with --on validation, or remove the arm from the config."
        )
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json({"when": when, "commit": commit(), "split_sha256": split.sha256(), "runs": runs}, layout.opened_file)


def write_run(layout: Layout, on: str, arm: Arm, fold: Fold, split: Split) -> None:
    """Write the result of a run; one of the same measurement stays as it is, with the commit that it was made at."""
    file, identity = layout.run_file(on, arm, fold.name), commands.run_identity(layout, arm, fold, split)
    if arm.pretraining is not None and not layout.curves_file(arm, fold).is_file():
        write_curves(layout, arm, fold)
    known = read_json(file)
    measured = read_json(commands.measured_file(layout, on, arm, fold))
    if known is not None and (known["identity"], known["when"]) == (identity, measured["when"]):
        return
    setting = layout.study.setting(layout.task)
    write_json(
        {
            "study": layout.study.name,
            "task": layout.task.name,
            "on": on,
            "arm": arm.name,
            "definition": arm.definition(),
            "labelled": fold.labelled,
            "draw": fold.draw,
            "fold": fold.index,
            "patients": list(fold.patients),
            "identity": identity,
            "split_sha256": split.sha256(),
            "setting": setting,
            "setting_sha256": digest(setting),
            "label_names": read_json(layout.raw / "dataset.json")["labels"],
            "commit": commit(),
            "cost": cost(layout, arm, fold, split, measured["training_seconds"]),
            "patient_of": {case: patient for case, patient in split.patient_of().items() if case in measured["cases"]},
            **{key: value for key, value in measured.items() if key != "training_seconds"},
        },
        file,
    )


def write_curves(layout: Layout, arm: Arm, fold: Fold) -> None:
    """Keep what a pretraining learned: one record before it and one per epoch, beside the results."""
    summary = read_checkpoint(layout.pretraining(arm, fold) / commands.FINAL)["pretraining"]
    kept = {"arm": arm.name, "network": arm.network, "options": dict(arm.pretraining or {})}
    write_json({**kept, "history": summary["history"]}, layout.curves_file(arm, fold))


def cost(layout: Layout, arm: Arm, fold: Fold, split: Split, training_seconds: float) -> dict[str, Any]:
    """Iterations and seconds; seconds of a pretraining that was killed in between are unknown."""
    study = layout.study
    out = {
        "training_iterations": study.epochs * study.iterations,
        "training_seconds": training_seconds,
        "pretraining_iterations": 0,
        "pretraining_seconds": 0.0,
    }
    if arm.pretraining is not None:
        given = {key: value for key, value in arm.pretraining.items() if key != "preset"}
        config = PretrainConfig.from_preset(arm.pretraining["preset"], {**given, "network": arm.network})
        out["pretraining_iterations"] = config.epochs * config.iterations
        out["pretraining_seconds"] = state(commands.pretrain(layout, arm, fold, split))["seconds"]
    return out


def commit() -> str:
    """Commit of the repository, with a mark if files differ from it."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    found = git(["git", "rev-parse", "HEAD"])
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return "unknown" if found.returncode else found.stdout.strip() + ("-dirty" if changed else "")


def _pretraining(layout: Layout, arm: Arm, fold: Fold, split: Split) -> list[Any]:
    return [commands.pretrain(layout, arm, fold, split)]


def _training(layout: Layout, arm: Arm, fold: Fold, split: Split) -> list[Any]:
    run = (arm, fold, split)
    return [commands.train(layout, *run), commands.measure(layout, "validation", *run)]


def _testing(layout: Layout, arm: Arm, fold: Fold, split: Split) -> list[Any]:
    run = (arm, fold, split)
    return [*commands.predict(layout, *run), commands.measure(layout, "test", *run)]
