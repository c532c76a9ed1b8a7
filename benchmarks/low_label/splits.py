"""Who is labelled, who validates, who tests: patients, drawn once with a seed and written to a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_kaf.errors import KAFError
from pretraining.data.patients import group_by_patient

from .config import ALL, Study, Task, digest


@dataclass(frozen=True)
class Fold:
    """One set of labelled patients; the same for all arms.

    Attributes:
        index: Number of the fold in nnU-Net's `splits_final.json`.
        labelled: Number of patients, or "all".
        draw: Which draw of labelled patients, and seed of the weights and the batches.
        patients: The labelled patients.
    """

    index: int
    labelled: int | str
    draw: int
    patients: tuple[str, ...]

    @property
    def name(self) -> str:
        """For folders and logs."""
        return fold_name(self.labelled, self.draw)


def fold_name(labelled: int | str, draw: int) -> str:
    """Name of a number of labelled patients and a draw."""
    return f"M{labelled}_draw{draw}"


def fold_names(study: Study, labelled: Sequence[int | str]) -> list[str]:
    """Names of the folds of a study with some numbers of labelled patients."""
    return [fold_name(number, k) for number in labelled for k in range(study.draws[number])]


@dataclass(frozen=True)
class Split:
    """All patients of a task.

    Attributes:
        cases: Cases of every patient.
        test: Patients that are never used for any choice.
        validation: Patients that choices are made on; never trained on.
        folds: Labelled patients of every run.
    """

    cases: Mapping[str, tuple[str, ...]]
    test: tuple[str, ...]
    validation: tuple[str, ...]
    folds: tuple[Fold, ...]

    @property
    def training(self) -> tuple[str, ...]:
        """Patients for labelling and for pretraining."""
        return tuple(p for p in self.cases if p not in self.test and p not in self.validation)

    def cases_of(self, patients: Iterable[str]) -> list[str]:
        """Cases of some patients, sorted."""
        return sorted(case for patient in patients for case in self.cases[patient])

    def patient_of(self) -> dict[str, str]:
        """Patient of every case."""
        return {case: patient for patient, cases in self.cases.items() for case in cases}

    def nnunet(self) -> list[dict[str, list[str]]]:
        """`splits_final.json`."""
        validation = self.cases_of(self.validation)
        return [{"train": self.cases_of(fold.patients), "val": validation} for fold in self.folds]

    def document(self) -> dict[str, Any]:
        """What is committed with the results."""
        return {
            "cases": {patient: list(cases) for patient, cases in self.cases.items()},
            "test": list(self.test),
            "validation": list(self.validation),
            "training": list(self.training),
            "folds": [
                {"fold": f.index, "labelled": f.labelled, "draw": f.draw, "patients": list(f.patients)}
                for f in self.folds
            ],
        }

    def sha256(self) -> str:
        """Hash of the document."""
        return digest(self.document())


def draw(cases: Iterable[str], study: Study, task: Task) -> Split:
    """Draw test, validation and labelled patients.

    The labelled patients of one draw are nested: the first 2 of the first 6 of one random order of the training
    patients. With "all", the draws differ in their seed only.

    Args:
        cases: Identifiers of all labelled cases.
        study: Seed, shares, numbers of labelled patients.
        task: Number of validation patients, and what a patient is.

    Raises:
        KAFError: There are too few patients.
    """
    groups = group_by_patient(sorted(cases), task.patient_pattern)
    patients = list(groups)
    order = [patients[i] for i in np.random.default_rng([study.seed, 0]).permutation(len(patients))]
    tests = max(1, round(study.test_share * len(patients)))
    test, validation = order[:tests], order[tests : tests + task.validation_patients]
    training = sorted(order[tests + task.validation_patients :])
    most = max([m for m in study.labelled if isinstance(m, int)], default=1)
    if len(training) < most:
        raise KAFError(
            f"labelled: found {most}, but of {len(patients)} patients {len(test)} are for the test, "
            f"{task.validation_patients} for validation (tasks.{task.name}.validation_patients) and {len(training)} "
            "are left. Lower one of them."
        )
    folds: list[Fold] = []
    for number in study.labelled:
        for k in range(study.draws[number]):
            shuffled = np.random.default_rng([study.seed, 1, k]).permutation(len(training))
            labelled = training if number == ALL else [training[i] for i in shuffled[: int(number)]]
            folds.append(Fold(len(folds), number, k, tuple(sorted(labelled))))
    return Split(groups, tuple(sorted(test)), tuple(sorted(validation)), tuple(folds))
