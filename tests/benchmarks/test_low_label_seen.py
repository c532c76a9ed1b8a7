"""Test patients that earlier studies have seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from low_label import evidence, report, seen
from low_label.layout import RESULTS

BEFORE, TEST, AFTER = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))


def run(study: str, on: str, arm: str, patients: dict[str, float], when: str) -> dict[str, Any]:
    return {
        "study": study, "task": "heart", "on": on, "arm": arm, "labelled": 2, "draw": 0, "when": when,
        "split_sha256": study, "setting_sha256": "t", "setting": {"task": {"data": "Dataset001_Heart"}},
        "cost": {}, "patient_of": {f"{p}_1": p for p in patients},
        "cases": {f"{p}_1": {"1": {"dice": dice, "hd95": 1.0}} for p, dice in patients.items()},
    }  # fmt: skip


def write(out: Path, study: str, validation: list[str], test: list[str], when: str, tested: str | None) -> None:
    folder = out / study / "heart"
    (folder / "runs" / "validation").mkdir(parents=True)
    (folder / "splits.json").write_text(json.dumps({"validation": validation, "test": test}))
    content = json.dumps(run(study, "validation", "plain", dict.fromkeys(validation, 0.5), when))
    (folder / "runs" / "validation" / "plain_M2_draw0.json").write_text(content)
    if tested is not None:
        (folder / "test_opened.json").write_text(json.dumps({"when": tested, "runs": {}}))


def results() -> report.Results:
    base = {"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.5}
    better = {p: dice + (0.5 if p == "a" else 0.1) for p, dice in base.items()}
    runs = (run("new", "test", "plain", base, TEST), run("new", "test", "semi", better, TEST))
    return report.Results("new", "heart", "test", runs, "plain")


def test_earlier_tests_and_choices_are_counted_and_what_is_left_without_them(tmp_path: Path) -> None:
    write(tmp_path, "first", ["a", "x"], ["b", "y"], BEFORE, BEFORE)
    write(tmp_path, "validated_only", ["z"], ["c"], BEFORE, None)
    write(tmp_path, "later", ["c"], ["d"], AFTER, AFTER)
    write(tmp_path, "new", ["v"], ["a", "b", "c", "d"], BEFORE, TEST)
    text = seen.sentences(tmp_path, results(), TEST)
    assert text.startswith("1 of the test patients were those of earlier tests (`first`). 1 of them were validation")
    assert "(`first`). Without these, the differences in mean Dice are: `semi`, 2 labelled, +0.100 (" in text


def test_studies_that_were_removed_count(tmp_path: Path) -> None:
    assert seen.sentences(tmp_path, results(), TEST) == "None of them was a validation patient of an earlier study."
    entry = {"study": "gone", "data": "Dataset001_Heart", "validated": BEFORE, "validation": ["b"], "tested": None,
             "test": []}  # fmt: skip
    others = [{**entry, "data": "Dataset002_Other", "validation": ["c"]}, {**entry, "validated": AFTER}]
    (tmp_path / seen.REMOVED).write_text(json.dumps([entry, *others]))
    text = seen.sentences(tmp_path, results(), TEST)
    assert text.startswith("1 of them were validation patients of earlier studies, by whom choices were made (`gone`).")


def test_an_arm_that_was_left_out_after_a_test_is_named_on_the_page() -> None:
    page = evidence.EVIDENCE.read_text()
    assert "Measured on them as well, and left out afterwards: `semi_tried`" in page
    assert len(json.loads((RESULTS / seen.REMOVED).read_text())) > 5
