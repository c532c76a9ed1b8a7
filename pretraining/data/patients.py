"""Which cases belong to one patient."""

from __future__ import annotations

from collections.abc import Iterable

from nnunetv2_kaf.splits import patient_of_case
from pretraining.data.case import Case


def patient_of(identifier: str, pattern: str) -> str:
    """The patient of a case.

    Args:
        identifier: Names the case; `<source>/<case>` is an image of a further source.
        pattern: Regular expression for the whole case; its first group is the patient. A case that it does not fit is
            a patient of its own.

    Returns:
        The patient, with the source in front as in the identifier: equal names in two sources need not be one person,
        so their images are never paired.
    """
    case = Case.of(identifier)
    return case._replace(name=patient_of_case(case.name, pattern)).identifier


def group_by_patient(identifiers: Iterable[str], pattern: str) -> dict[str, tuple[str, ...]]:
    """The cases of every patient, patients and their cases in the order of the identifiers."""
    groups: dict[str, list[str]] = {}
    for identifier in identifiers:
        groups.setdefault(patient_of(identifier, pattern), []).append(identifier)
    return {patient: tuple(cases) for patient, cases in groups.items()}


def split_by_patients(
    identifiers: Iterable[str], without: Iterable[str], pattern: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Separate the images of some patients from all others.

    Here the source does not count: if two sources use the same patient name, both are left out. That may cost an
    image, the opposite could leak one.

    Args:
        identifiers: Cases of all sources.
        without: Cases whose patients are left out.
        pattern: See `patient_of`.

    Returns:
        The cases that stay, and the ones left out by source (`""` is the first dataset), both in order.
    """
    patients = {patient_of(Case.of(case).name, pattern) for case in without}
    kept: list[str] = []
    left_out: dict[str, list[str]] = {}
    for identifier in identifiers:
        source, case = Case.of(identifier)
        if patient_of(case, pattern) in patients:
            left_out.setdefault(source, []).append(case)
        else:
            kept.append(identifier)
    return kept, left_out
