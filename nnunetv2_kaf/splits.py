"""The split of a dataset with fewer than five cases, which nnU-Net's own five-fold split cannot make."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing

SPLITS_FILE = "splits_final.json"
FEWEST = 5
"""Cases that nnU-Net's own split needs."""
PATIENT_PATTERN = r"(.*\d)_[A-Za-z]+\d*"
"""Finds the patient in a case identifier: patient001_frame01 is patient001."""

Splits = list[dict[str, list[str]]]


def patient_of_case(case: str, pattern: str = PATIENT_PATTERN) -> str:
    """The patient of a case.

    Args:
        case: Identifier.
        pattern: Regular expression for the whole identifier; its first group is the patient. A case that it does not
            fit is a patient of its own.
    """
    match = re.fullmatch(pattern, case)
    return (match.group(1) if match else None) or case


def leave_one_patient_out(cases: Iterable[str], pattern: str = PATIENT_PATTERN) -> Splits:
    """One fold per patient, in alphabetical order, that validates on all cases of this patient.

    Args:
        cases: All cases of the dataset.
        pattern: See `patient_of_case`.

    Raises:
        KAFError: All cases are of one patient.
    """
    everything = sorted(cases)
    patients = sorted({patient_of_case(case, pattern) for case in everything})
    if len(patients) < 2:
        raise KAFError(
            f"the dataset has {len(everything)} case(s) of one patient ({', '.join(patients)}): no patient is left to "
            f"validate on. Train with fold 'all', or write your own split to {SPLITS_FILE}."
        )
    return [
        {
            "train": [case for case in everything if patient_of_case(case, pattern) != patient],
            "val": [case for case in everything if patient_of_case(case, pattern) == patient],
        }
        for patient in patients
    ]


def read_splits(path: Path) -> Splits:
    """Read a split file.

    Raises:
        KAFError: It cannot be read, or is none of nnU-Net's.
    """
    # Not at the top: the options of a command, which name the pattern above, need not wait for torch.
    from nnunetv2_kaf import schema_plans
    from nnunetv2_kaf.safe_load import read_json
    from nnunetv2_kaf.schema_check import check

    fix = 'Correct or delete it; expected a list of {"train": [cases], "val": [cases]}.'
    splits: Splits = read_json(path, fix)
    check(schema_plans.Splits, splits, str(path), fix)
    return splits


def split_few_cases(folder: Path, cases: Iterable[str], pattern: str = PATIENT_PATTERN) -> str | None:
    """Write the split of a dataset with fewer than five cases, unless there is a split already.

    Args:
        folder: `$nnUNet_preprocessed/DatasetXXX`; an existing `splits_final.json` in it always wins.
        cases: All cases of the dataset.
        pattern: See `patient_of_case`.

    Returns:
        What was done, in words; `None` if nothing was.

    Raises:
        KAFError: All cases are of one patient, or the file cannot be written.
    """
    cases = list(cases)
    path = folder / SPLITS_FILE
    if len(cases) >= FEWEST or path.is_file():
        return None
    splits = leave_one_patient_out(cases, pattern)
    with replacing(path) as file:
        file.write_text(json.dumps(splits, sort_keys=True, indent=4), encoding="utf-8")
    return (
        f"{len(cases)} cases are too few for nnU-Net's five-fold split: split into {len(splits)} folds instead, each "
        f"of which leaves one patient out ({path})"
    )


def cases_of_no_fold(folder: Path, cases: Iterable[str], pattern: str = PATIENT_PATTERN) -> str | None:
    """Cases that came after this module made the split; of a split made by others nothing is known.

    Args:
        folder: `$nnUNet_preprocessed/DatasetXXX`, with its `splits_final.json`.
        cases: All cases of the dataset.
        pattern: See `patient_of_case`.

    Returns:
        A warning; `None` if there are none.
    """
    path = folder / SPLITS_FILE
    splits = read_splits(path)
    known = {case for fold in splits for case in fold["train"] + fold["val"]}
    new = sorted(set(cases) - known)
    patients = {patient_of_case(case, pattern) for case in known}
    if not new or len(known) >= FEWEST or len(patients) < 2 or splits != leave_one_patient_out(known, pattern):
        return None
    return (
        f"{len(new)} case(s) are in no fold of {path} and take no part: {', '.join(new[:5])}. If they are labelled, "
        "delete that file: the next command makes the split again"
    )


def check_fold(folder: Path, cases: Iterable[str], fold: int, pattern: str = PATIENT_PATTERN) -> None:
    """Check that a fold exists where this module made the split; nnU-Net would draw a random one by file.

    Raises:
        KAFError: There are fewer folds.
    """
    cases = list(cases)
    if len(cases) >= FEWEST:
        return
    splits = read_splits(folder / SPLITS_FILE)
    if fold >= len(splits) and splits == leave_one_patient_out(cases, pattern):
        raise KAFError(
            f"fold {fold}: {folder / SPLITS_FILE} has {len(splits)} folds, one per patient; expected one from 0 to "
            f"{len(splits) - 1}, or 'all'."
        )
