"""The images that a pretraining used, which are unlabelled images of a training by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import pretraining_folder
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.config import PretrainConfig
from pretraining.data.case import Case
from pretraining.data.images import PreprocessedImages
from pretraining.data.preprocess import cache_folder, cached_file
from pretraining.task import Task
from semisupervised.sampling import Images


class PretrainingRun(NamedTuple):
    """A finished pretraining.

    Attributes:
        path: Its checkpoint.
        record: What the checkpoint says about the run.
    """

    path: Path
    record: dict[str, Any]


def find_run(
    loaded: Path | None, dataset_name: str, plans_name: str, configuration: str, fold: int | str
) -> PretrainingRun | None:
    """The pretraining whose images are the default: the loaded one, or one at the standard place, of either network.

    Args:
        loaded: Checkpoint that the training loads.
        dataset_name: DatasetXXX_Name.
        plans_name: Name of the plans.
        configuration: 2d, 3d_fullres, ...
        fold: Fold number or "all".
    """
    candidates = [loaded] if loaded is not None else []
    for kind in ("KAFPretraining", "PlainPretraining"):
        for seen in (fold, "all"):
            place = (dataset_name, plans_name, configuration, seen, kind)
            candidates.append(pretraining_folder(*place) / "checkpoint_final.pth")
    for path in candidates:
        if path.is_file():
            return PretrainingRun(path, dict(read_checkpoint(path)["pretraining"]))
    return None


def patient_pattern(run: PretrainingRun) -> str:
    """The pattern that finds the patient in a case."""
    config = run.record.get("config", {})
    return str(config.get("patient_pattern", PretrainConfig().patient_pattern))


def is_of(task: Task, run: PretrainingRun) -> bool:
    """Whether a pretraining was made on the dataset and configuration of a task."""
    return (run.record.get("dataset"), run.record.get("configuration")) == (task.dataset_name, task.configuration)


def images_of_run(task: Task, run: PretrainingRun) -> Images:
    """The images of a pretraining, which are all preprocessed.

    Args:
        task: What the training is about.
        run: The pretraining.

    Raises:
        KAFError: They are of another dataset, or a file is gone.
    """
    path, record = run
    if not is_of(task, run):
        theirs = (record.get("dataset"), record.get("configuration"))
        raise KAFError(
            f"the pretraining {path} used images of {theirs}, this training is of "
            f"{(task.dataset_name, task.configuration)}: their preprocessed files do not fit. Name the unlabelled "
            "images with KAF_UNLABELLED (folders or datasets), or list them with kaf-unlabelled."
        )
    own = set(PreprocessedImages(task.image_folder, task.preprocess_command).identifiers)
    cases = record.get("cases")
    if not isinstance(cases, list) or not cases or not all(isinstance(case, str) for case in cases):
        raise KAFError(
            f"the pretraining {path} does not say which images it used (expected a list of cases). Run kaf-pretrain "
            f"again, or name the unlabelled images with KAF_UNLABELLED."
        )
    named = [Case.of(case) for case in cases]
    further = {case.identifier: cached_file(cache_folder(task), case) for case in named if not case.is_own}
    missing = [case for case in cases if case not in further and case not in own]
    missing += [case for case, file in further.items() if file is None]
    if missing:
        raise KAFError(
            f"{len(missing)} of {len(cases)} preprocessed images that the pretraining {path} used are gone from "
            f"{task.image_folder.parent}: {', '.join(missing[:5])}. Run the same kaf-pretrain command again with "
            f"--continue, or name the unlabelled images with KAF_UNLABELLED."
        )
    return Images(
        task.image_folder,
        task.preprocess_command,
        tuple(cases),
        {case: file for case, file in further.items() if file is not None},
    )
