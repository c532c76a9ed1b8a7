"""From cases to patients to means, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES = 10000
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over patients.

    Attributes:
        value: the mean.
        low: lower end of its 95 % interval.
        high: upper end.
        patients: how many.
    """

    value: float
    low: float
    high: float
    patients: int


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences over patients, and the p value of a Wilcoxon signed-rank test."""

    mean: Mean
    p: float


def by_patient(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Average a metric over the classes of a case, then the cases of a patient, then the draws.

    Args:
        runs: results of the draws of one arm and one number of labelled patients, all on the same patients.
        metric: "dice" or "hd95".

    Returns:
        By patient. Classes that are absent from prediction and reference are left out, and so is a case or a patient
        for whom nothing remains.
    """
    draws: dict[str, list[float]] = {}
    for run in runs:
        cases: dict[str, list[float]] = {}
        for case, classes in run["cases"].items():
            values = [entry[metric] for entry in classes.values() if entry[metric] is not None]
            if values:
                cases.setdefault(run["patient_of"][case], []).append(float(np.mean(values)))
        for patient, means in cases.items():
            draws.setdefault(patient, []).append(float(np.mean(means)))
    return {patient: float(np.mean(values)) for patient, values in sorted(draws.items())}


def interval(values: FloatArray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean; what is drawn anew are the patients.

    Args:
        values: one per patient (N,).
        rng: source of the draws.
    """
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mean(values: Mapping[str, float], rng: np.random.Generator) -> Mean:
    """Mean over patients with its interval."""
    array = np.array(list(values.values()))
    return Mean(float(array.mean()), *interval(array, rng), len(array))


def difference(ours: Mapping[str, float], theirs: Mapping[str, float], rng: np.random.Generator) -> Difference:
    """Paired difference, ours minus theirs, of the patients that both have."""
    paired = {patient: value - theirs[patient] for patient, value in ours.items() if patient in theirs}
    return Difference(mean(paired, rng), wilcoxon(list(paired.values())))


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p value of the Wilcoxon signed-rank test; 1 if all differences are 0."""
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)
