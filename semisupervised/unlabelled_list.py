"""Unlabelled images beside those of the dataset: prepared once, and listed for all trainings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.safe_load import read_json
from nnunetv2_kaf.splits import PATIENT_PATTERN
from pretraining.config import PretrainConfig
from pretraining.data.bad_images import BadImages
from pretraining.data.patients import split_by_patients
from pretraining.data.preprocess import cache_folder, preprocess_source
from pretraining.data.raw import find_sources
from pretraining.task import Task


def prepare(
    task: Task,
    datasets: Sequence[str],
    folders: Sequence[Path],
    num_workers: int,
    without: Sequence[str] = (),
    skip_bad: bool = False,
) -> dict[str, Path]:
    """Check and preprocess the images of further sources, as kaf-pretrain does; what is done already is kept.

    Args:
        task: Task whose plans are used.
        datasets: Numbers or names, of which imagesTr is used.
        folders: Folders in nnU-Net's naming.
        num_workers: Images at a time.
        without: Cases whose patients are left out.
        skip_bad: Warn of images that cannot be used instead of stopping.

    Returns:
        File by identifier `<source>/<case>`.

    Raises:
        KAFError: A source is missing, or images cannot be used; all of them are listed.
    """
    bad = BadImages()
    further: dict[str, Path] = {}
    for source in find_sources(task, datasets, folders, bad):
        kept, _ = split_by_patients(source.identifiers, without, PATIENT_PATTERN)
        further.update(preprocess_source(task, source.restricted(kept), bad, num_workers))
    bad.finish(skip_bad)
    return further


def list_file(task: Task) -> Path:
    """Where kaf-unlabelled lists the images: beside them, for all plans that preprocess alike."""
    return cache_folder(task) / "unlabelled.json"


def write_list(task: Task, files: Mapping[str, Path], patient_pattern: str) -> Path:
    """List prepared images; an earlier list is replaced.

    Args:
        task: dataset, plans and configuration.
        files: Files from `prepare`.
        patient_pattern: Finds the patient in a case.

    Returns:
        The list's file.
    """
    path, root = list_file(task), cache_folder(task)
    with replacing(path) as file:
        content = {case: image.relative_to(root).as_posix() for case, image in files.items()}
        file.write_text(json.dumps({"patient_pattern": patient_pattern, "images": content}, indent=2) + "\n")
    return path


def read_list(task: Task) -> dict[str, Path] | None:
    """Files by identifier, as `write_list` listed them; None if there is no list.

    Raises:
        KAFError: The list is damaged, or an image of it is gone.
    """
    content = _read(task)
    if content is None:
        return None
    path, root, fix = list_file(task), cache_folder(task), _fix(task)
    images = content.get("images")
    names = images.values() if isinstance(images, dict) else [None]
    if not images or not all(isinstance(name, str) for name in names):
        raise KAFError(f'{path}: expected {{"images": {{case: file}}}}, as kaf-unlabelled writes it. {fix}')
    files = {str(case): root / name for case, name in images.items()}
    missing = [
        str(file) for file in files.values() if not file.is_file() or not file.resolve().is_relative_to(root.resolve())
    ]
    if missing:
        raise KAFError(f"{path}: {len(missing)} of {len(files)} images are gone: {', '.join(missing[:3])}. {fix}")
    return files


def listed_pattern(task: Task) -> str | None:
    """The pattern that finds the patient in a case, as it was given to kaf-unlabelled; None if there is no list.

    Raises:
        KAFError: The list is damaged.
    """
    content = _read(task)
    if content is None:
        return None
    try:
        return PretrainConfig(patient_pattern=content.get("patient_pattern", PATIENT_PATTERN)).patient_pattern
    except KAFError as error:
        raise KAFError(f"{list_file(task)}: {error} {_fix(task)}") from error


def _read(task: Task) -> dict[str, Any] | None:
    path = list_file(task)
    if not path.is_file():
        return None
    content = read_json(path, _fix(task))
    return content if isinstance(content, dict) else {}


def _fix(task: Task) -> str:
    return (
        f"Run kaf-unlabelled --dataset {task.dataset_id} --images DIR -p {task.plans_name} again, or delete the list."
    )
