"""Which images a pretraining run uses: of all sources, without the patients that a fold validates on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.splits import cases_of_no_fold, read_splits, split_few_cases
from pretraining.data.bad_images import BadImages
from pretraining.data.case import Case
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import patient_of, split_by_patients
from pretraining.data.preprocess import preprocess_source
from pretraining.data.raw import find_sources
from pretraining.task import Task

logger = logging.getLogger(__name__)


def collect_images(
    task: Task,
    extra_datasets: Sequence[str],
    folders: Sequence[Path],
    *,
    fold: int | str,
    patient_pattern: str,
    bad: BadImages,
    num_workers: int,
) -> tuple[PreprocessedImages, list[str]]:
    """Find all images of a run, and preprocess those that are not.

    The plans of the first dataset govern: its own preprocessed images are used as they are, the raw images of all other
    sources are preprocessed as it was and cached. No file of a left-out patient is opened, and no label at all. With
    several processes, call it in one first: the others then find everything cached.

    Args:
        task: The first dataset with its plans and configuration.
        extra_datasets: Numbers or names of further datasets in `$nnUNet_raw`.
        folders: Folders of further raw images.
        fold: The patients of its validation cases are left out of every source; `"all"` uses all images.
        patient_pattern: Finds the patient in a case identifier.
        bad: The collector of raw images that cannot be used.
        num_workers: Images at a time.

    Returns:
        The images of all sources, and the identifiers of those to train on.

    Raises:
        KAFError: A source is missing, or no case is left.
    """
    own = PreprocessedImages(task.image_folder, task.preprocess_command).identifiers
    sources = find_sources(task, extra_datasets, folders, bad)
    everything = [*own, *(identifier for source in sources for identifier in source.identifiers)]
    cases = training_cases(everything, task.dataset_folder, fold, patient_pattern)
    further: dict[str, Path] = {}
    for source in sources:
        further.update(preprocess_source(task, source.restricted(cases), bad, num_workers))
    images = PreprocessedImages(task.image_folder, task.preprocess_command, further)
    for source in sources:
        logger.info("%s: %d images of %s.", source.key, sum(c in further for c in source.identifiers), source.folder)
    return images, [case for case in cases if Case.of(case).is_own or case in further]


def training_cases(
    identifiers: Iterable[str], dataset_folder: Path, fold: int | str, patient_pattern: str
) -> list[str]:
    """The cases that pretraining may see: all but those of the patients that the fold validates on.

    Args:
        identifiers: All cases of the first dataset, and `<source>/<case>` of further sources.
        dataset_folder: `$nnUNet_preprocessed/DatasetXXX`.
        fold: Fold number, or `"all"` for every case.
        patient_pattern: Finds the patient in a case identifier.

    Returns:
        The first dataset's cases in alphabetical order, then those of the other sources.

    Raises:
        KAFError: If the split file is not usable or no case is left.
    """
    everything = sorted(identifiers, key=lambda case: (not Case.of(case).is_own, case))
    if fold == "all":
        logger.info("Fold all: all %d cases are available, validation cases of every fold included.", len(everything))
        return everything
    own = [case for case in everything if Case.of(case).is_own]
    train, validation = _split(own, dataset_folder / "splits_final.json", int(fold), patient_pattern)
    _warn_of_leak(train, validation, fold, patient_pattern)
    cases, left_out = split_by_patients(everything, validation, patient_pattern)
    patients = len({patient_of(case, patient_pattern) for case in validation})
    if not cases:
        raise KAFError(
            f"Fold {fold} of {dataset_folder / 'splits_final.json'} leaves no case for training: all "
            f"{len(everything)} belong to its {patients} validation patient(s). If these are too many cases per "
            f"patient, correct --patient-pattern (now {patient_pattern!r}); or use --fold all."
        )
    logger.info("Fold %s: %d cases are available; %d validation patients are left out.", fold, len(cases), patients)
    for source, names in left_out.items():
        logger.info("Left out of %s: %d cases: %s", source or dataset_folder.name, len(names), ", ".join(names))
    return cases


def _warn_of_leak(train: Iterable[str], validation: Iterable[str], fold: int | str, pattern: str) -> None:
    """Warn if the split, which nnU-Net makes by case, has a patient on both sides."""
    both = {patient_of(c, pattern) for c in train} & {patient_of(c, pattern) for c in validation}
    if both:
        logger.warning(
            "Fold %s has %d patient(s) both in training and in validation: %s. Pretraining leaves them out, but "
            "nnU-Net's own training sees them: for an honest validation write a split by patient to splits_final.json.",
            fold,
            len(both),
            ", ".join(sorted(both)),
        )


def _split(identifiers: list[str], path: Path, fold: int, patient_pattern: str) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold of the first dataset, as nnU-Net would.

    The split is `splits_final.json` if it exists, otherwise the one that the trainer would create, which is saved so
    that both agree.

    Raises:
        KAFError: If the split file is not usable, has no such fold, or validates on cases that do not exist.
    """
    splits = read_splits(path) if path.is_file() else _create_splits(identifiers, path, patient_pattern)
    if fold >= len(splits):
        raise KAFError(
            f"--fold is {fold}, but {path} has {len(splits)} fold(s); expected one from 0 to {len(splits) - 1}, or "
            "'all'. (nnU-Net would draw a random split for it.)"
        )
    left_out = cases_of_no_fold(path.parent, identifiers, patient_pattern)
    if left_out is not None:
        logger.warning("%s. (Pretraining uses their images.)", left_out)
    train, validation = splits[fold]["train"], splits[fold]["val"]
    unknown = sorted(set(validation) - set(identifiers))
    if unknown:
        raise KAFError(
            f"{path}: fold {fold} validates on {len(unknown)} case(s) that are not among the {len(identifiers)} "
            f"preprocessed ones: {', '.join(unknown[:5])}. Correct the names, or preprocess these cases: a case that "
            "is not recognised could not be left out."
        )
    return train, validation


def _create_splits(identifiers: list[str], path: Path, patient_pattern: str) -> list[dict[str, list[str]]]:
    """Create and save nnU-Net's default split, exactly as nnUNetTrainer.do_split does, but never half a file.

    With fewer than five cases, which is too few for it, each fold leaves one patient out, as in nnUNetTrainerKAF.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    message = split_few_cases(path.parent, identifiers, patient_pattern)
    if message is not None:
        logger.info("%s.", message)
        return read_splits(path)
    splits: list[dict[str, list[str]]] = generate_crossval_split(list(np.sort(identifiers)), seed=12345, n_splits=5)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(splits, sort_keys=True, indent=4), encoding="utf-8")
    logger.info("Created nnU-Net's default five-fold split: %s", path)
    return splits
