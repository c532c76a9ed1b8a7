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
    """A mean over draws and patients.

    Attributes:
        value: The mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
        patients: How many.
    """

    value: float
    low: float
    high: float
    patients: int


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and the p value of a Wilcoxon signed-rank test over patients."""

    mean: Mean
    p: float


@dataclass(frozen=True)
class Values:
    """A metric of one arm with one number of labelled patients.

    Attributes:
        draws: Draws of labelled patients, D.
        patients: Patients that were measured, P.
        array: (D, P); NaN where the metric is not defined.
    """

    draws: tuple[int, ...]
    patients: tuple[str, ...]
    array: FloatArray

    def means(self) -> FloatArray:
        """Mean over the draws of every patient (P,)."""
        means: FloatArray = np.nanmean(self.array, 0)
        return means

    def part(self, draws: Sequence[int], patients: Sequence[str]) -> FloatArray:
        """The values of some draws and patients, in that order (len(draws), len(patients))."""
        rows = [self.draws.index(draw) for draw in draws]
        return self.array[np.ix_(rows, [self.patients.index(patient) for patient in patients])]


def collect(runs: Sequence[Mapping[str, Any]], metric: str) -> Values:
    """Average a metric over the classes of a case, then over the cases of a patient, for every draw.

    Args:
        runs: Results of the draws of one arm and one number of labelled patients, all on the same patients.
        metric: "dice" or "hd95".

    Returns:
        Classes that are absent from prediction and reference are left out, and so is a case or a patient for whom
        nothing remains in any draw.
    """
    found: dict[int, dict[str, float]] = {}
    for run in runs:
        cases: dict[str, list[float]] = {}
        for case, classes in run["cases"].items():
            values = [entry[metric] for entry in classes.values() if entry[metric] is not None]
            if values:
                cases.setdefault(run["patient_of"][case], []).append(float(np.mean(values)))
        found[run["draw"]] = {patient: float(np.mean(means)) for patient, means in cases.items()}
    draws = tuple(sorted(found))
    patients = tuple(sorted({patient for values in found.values() for patient in values}))
    rows = [[found[draw].get(patient, np.nan) for patient in patients] for draw in draws]
    return Values(draws, patients, np.array(rows, dtype=float).reshape(len(draws), len(patients)))


def interval(array: FloatArray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean; what is drawn anew are the draws and, in each, the patients.

    The two are crossed: every draw was measured on the same patients, so that a resample takes some draws and some
    patients, and all values of both (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007).

    Args:
        array: (D, P) by draw and patient.
        rng: Source of the draws.
    """
    draws, patients = array.shape
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 1000):
        rows = rng.integers(0, draws, (1000, draws, 1))
        columns = rng.integers(0, patients, (1000, 1, patients))
        drawn = array[rows, columns]
        counts = (~np.isnan(drawn)).sum((1, 2))
        # A resample of undefined values alone has no mean.
        means[start : start + 1000] = np.where(counts > 0, np.nansum(drawn, (1, 2)) / np.maximum(counts, 1), np.nan)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def mean(array: FloatArray, rng: np.random.Generator) -> Mean:
    """Mean over the draws of every patient, then over patients, with its interval.

    Args:
        array: (D, P) by draw and patient.
        rng: Source of the draws.
    """
    return Mean(float(np.nanmean(array, 0).mean()), *interval(array, rng), array.shape[1])


def difference(ours: Values, theirs: Values, rng: np.random.Generator) -> Difference | None:
    """Paired difference, ours minus theirs, of the draws and patients that both have; None if there are none."""
    draws = [draw for draw in ours.draws if draw in theirs.draws]
    patients = [patient for patient in ours.patients if patient in theirs.patients]
    if not draws or not patients:
        return None
    paired = ours.part(draws, patients) - theirs.part(draws, patients)
    paired = paired[:, ~np.isnan(paired).all(0)]
    if not paired.size:
        return None
    return Difference(mean(paired, rng), wilcoxon(np.nanmean(paired, 0).tolist()))


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p value of the Wilcoxon signed-rank test; 1 if all differences are 0."""
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)
