"""Test patients that earlier studies have seen: a dataset has few patients, and every study draws them anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from . import report
from .layout import read_json

REMOVED = "removed.json"
"""Among the results: the patients of studies whose results are in the history of the repository alone."""


class Use(NamedTuple):
    """A study's use of the patients of a dataset.

    Attributes:
        study: Its name.
        patients: Those that it measured on.
        test: As test patients, or for validation.
        when: First use.
    """

    study: str
    patients: frozenset[str]
    test: bool
    when: datetime


def sentences(out: Path, results: report.Results, when: str) -> str:
    """How many test patients of a study were test or validation patients of earlier ones, and what is left without.

    Args:
        out: Folder of all results.
        results: Those on the test patients of the study.
        when: Time of its test, ISO 8601.
    """
    patients = set(results.runs[0]["patient_of"].values())
    data = results.runs[0]["setting"]["task"]["data"]
    opened = datetime.fromisoformat(when)
    earlier = [use for use in _uses(out, data) if use.when < opened and use.study != results.study]
    tested, validated = (_of(earlier, patients, test) for test in (True, False))
    parts = []
    if tested.patients:
        parts.append(f"{len(tested.patients)} of the test patients were those of earlier tests ({tested.studies}).")
    if not validated.patients:
        return " ".join([*parts, "None of them was a validation patient of an earlier study."])
    parts.append(
        f"{len(validated.patients)} of them were validation patients of earlier studies, by whom choices were made "
        f"({validated.studies}). Without these, the differences in mean Dice are: {_without(results, validated)}."
    )
    return " ".join(parts)


class _Overlap(NamedTuple):
    patients: frozenset[str]
    studies: str


def _of(uses: list[Use], patients: set[str], test: bool) -> _Overlap:
    kind = [use for use in uses if use.test is test and use.patients & patients]
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(use.study for use in kind))
    return _Overlap(frozenset(patients & {p for use in kind for p in use.patients}), names)


def _uses(out: Path, data: str) -> Iterator[Use]:
    """All uses of the patients of a dataset, in the order of time."""
    uses = [use for entry in read_json(out / REMOVED) or [] if entry["data"] == data for use in _removed(entry)]
    for file in out.glob("*/*/splits.json"):
        runs = [read_json(run) for run in (file.parent / "runs" / "validation").glob("*.json")]
        if not runs or runs[0]["setting"]["task"]["data"] != data:
            continue
        split, name = read_json(file), file.parents[1].name
        first = min(datetime.fromisoformat(run["when"]) for run in runs)
        uses.append(Use(name, frozenset(split["validation"]), False, first))
        opened = read_json(file.with_name("test_opened.json"))
        if opened is not None:
            uses.append(Use(name, frozenset(split["test"]), True, datetime.fromisoformat(opened["when"])))
    return iter(sorted(uses, key=lambda use: use.when))


def _removed(entry: dict[str, Any]) -> Iterator[Use]:
    for test, key, when in ((False, "validation", "validated"), (True, "test", "tested")):
        if entry[when] is not None:
            yield Use(entry["study"], frozenset(entry[key]), test, datetime.fromisoformat(entry[when]))


def _without(results: report.Results, overlap: _Overlap) -> str:
    runs = []
    for run in results.runs:
        left = {case: patient for case, patient in run["patient_of"].items() if patient not in overlap.patients}
        cases = {case: entry for case, entry in run["cases"].items() if case in left}
        runs.append({**run, "patient_of": left, "cases": cases})
    found = []
    for cell in replace(results, runs=tuple(runs)).cells():
        if "dice" in cell.differences:
            mean = cell.differences["dice"].mean
            found.append(
                f"`{cell.arm}`, {cell.labelled} labelled, {mean.value:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"
            )
    return "; ".join(found)
