from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from low_label import measure, stats


def run(values: dict[str, dict[str, float | None]], draw: int = 0) -> dict[str, Any]:
    """Fabricate a run: cases ``<patient>_<frame>`` with the Dice of every class."""
    cases = {c: {k: {"dice": v, "hd95": None} for k, v in classes.items()} for c, classes in values.items()}
    return {"cases": cases, "patient_of": {case: case.split("_")[0] for case in values}, "draw": draw}


def test_classes_then_cases_are_averaged_for_every_draw() -> None:
    first = run({"p_1": {"1": 0.2, "2": 0.4}, "p_2": {"1": 0.9, "2": None}, "q_1": {"1": 0.5, "2": 0.5}})
    second = run({"p_1": {"1": 0.6, "2": 0.6}, "p_2": {"1": 0.8, "2": 0.8}, "q_1": {"1": None, "2": None}}, 4)
    values = stats.collect([second, first], "dice")
    assert (values.draws, values.patients) == ((0, 4), ("p", "q"))
    # p: (0.3 + 0.9) / 2 and (0.6 + 0.8) / 2; q is not defined in the second draw
    assert values.array == pytest.approx(np.array([[0.6, 0.5], [0.7, np.nan]]), nan_ok=True)
    assert values.means() == pytest.approx([0.65, 0.5])
    assert stats.collect([first], "hd95").patients == ()


def test_interval_of_one_draw_is_that_over_patients_and_reproducible() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, (1, 400))
    low, high = stats.interval(values, np.random.default_rng(1))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=2e-3)
    assert high == pytest.approx(values.mean() + half, abs=2e-3)
    assert stats.interval(values, np.random.default_rng(1)) == (low, high)
    assert stats.interval(np.array([[0.5, 0.5]]), np.random.default_rng(1)) == (0.5, 0.5)


def test_interval_covers_draws_and_patients_together() -> None:
    """Independent effects of draw and patient: the variances of the two means add up."""
    generator = np.random.default_rng(2)
    draws, patients = generator.normal(0, 0.1, (30, 1)), generator.normal(0, 0.2, (1, 100))
    array = draws + patients
    low, high = stats.interval(array, np.random.default_rng(3))
    expected = 2 * 1.96 * math.sqrt(draws.var() / 30 + patients.var() / 100)
    assert high - low == pytest.approx(expected, rel=0.08)
    assert stats.mean(array, np.random.default_rng(3)).value == pytest.approx(array.mean())


def test_difference_is_paired_by_draw_and_patient() -> None:
    ours = stats.Values((0, 1), ("a", "b", "new"), np.array([[0.6, 0.9, 0.0], [0.5, np.nan, 0.0]]))
    theirs = stats.Values((1, 0, 2), ("b", "a"), np.array([[0.1, 0.4], [0.8, 0.5], [0.0, 0.0]]))
    found = stats.difference(ours, theirs, np.random.default_rng(0))
    assert found is not None
    assert found.mean.patients == 2
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx((0.1, 0.1, 0.1))
    nobody = stats.Values((0,), (), np.zeros((1, 0)))
    assert stats.difference(ours, nobody, np.random.default_rng(0)) is None


def test_wilcoxon_by_hand() -> None:
    # Five differences of one sign: 2 of the 2^5 signs are as extreme.
    assert stats.wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 32)
    # Ranks 1 to 4, the smallest is negative: rank sums 1 and 9; P(W <= 1) = 2 / 16, two-sided 4 / 16.
    assert stats.wilcoxon([-0.1, 0.2, 0.3, 0.4]) == pytest.approx(4 / 16)
    assert stats.wilcoxon([0.0, 0.0, 0.0]) == 1.0


def masks(*boxes: tuple[slice, ...]) -> list[Any]:
    out = []
    for box in boxes:
        mask = np.zeros((6, 8, 10), dtype=bool)
        mask[box] = True
        out.append(mask)
    return out


@pytest.mark.parametrize(("axis", "expected"), [(0, 6.0), (1, 4.0), (2, 2.0)])
def test_distance_is_in_mm_on_every_axis(axis: int, expected: float) -> None:
    boxes = [[slice(1, 2)] * 3, [slice(1, 2)] * 3]
    boxes[1][axis] = slice(3, 4)
    ours, theirs = masks(*(tuple(box) for box in boxes))
    assert measure.hausdorff95(ours, theirs, (3.0, 2.0, 1.0)) == pytest.approx(expected)
    assert measure.hausdorff95(theirs, ours, (3.0, 2.0, 1.0)) == pytest.approx(expected)
    assert measure.hausdorff95(ours, ours, (3.0, 2.0, 1.0)) == 0.0


def test_distance_ignores_the_farthest_twentieth() -> None:
    (ours,) = masks((slice(1, 2), slice(0, 8), slice(0, 10)))
    theirs = ours.copy()
    theirs[4, 0, 0] = True  # one voxel of 81, 3 slices of 5 mm away
    assert measure.hausdorff95(ours, theirs, (5.0, 1.0, 1.0)) == 0.0
    theirs[4, 0:5, 0] = True
    # Of 80 zeros and 5 times 15 mm in order, the 95th percentile is at 0.95 * 84 = 79.8: 0.8 of the way to 15.
    assert measure.hausdorff95(ours, theirs, (5.0, 1.0, 1.0)) == pytest.approx(12.0, abs=1e-3)


def test_absent_classes() -> None:
    (some,) = masks((slice(1, 2), slice(1, 2), slice(1, 2)))
    none = np.zeros_like(some)
    diagonal = math.sqrt(18**2 + 16**2 + 10**2)
    assert measure.hausdorff95(none, none, (3.0, 2.0, 1.0)) is None
    assert measure.hausdorff95(some, none, (3.0, 2.0, 1.0)) == pytest.approx(diagonal)
    assert measure.hausdorff95(none, some, (3.0, 2.0, 1.0)) == pytest.approx(diagonal)


def test_measure_reads_nnunets_summary(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    ours, theirs = masks((slice(1, 2), slice(1, 2), slice(1, 2)), (slice(1, 2), slice(1, 2), slice(5, 6)))
    for name, mask in (("prediction", ours), ("reference", theirs)):
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing((1.5, 2.0, 3.0))  # x, y, z
        (tmp_path / name).mkdir()
        sitk.WriteImage(image, str(tmp_path / name / "case.nii.gz"))
    files = {f"{name}_file": str(tmp_path / name / "case.nii.gz") for name in ("prediction", "reference")}
    metrics = {"1": {"Dice": 0.0}, "2": {"Dice": math.nan}}
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [{**files, "metrics": metrics}]}))
    logging = {"epoch_start_timestamps": [10.0, 20.0], "epoch_end_timestamps": [12.0, 25.5]}
    torch.save({"logging": logging}, tmp_path / "checkpoint.pth")
    measure.measure(*(str(tmp_path / f) for f in ("summary.json", "checkpoint.pth")), "cpu", str(tmp_path / "out.json"))
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["cases"] == {"case": {"1": {"dice": 0.0, "hd95": 6.0}, "2": {"dice": None, "hd95": None}}}
    assert document["training_seconds"] == 7.5
    assert {"machine", "versions", "load_average", "torch_threads"} <= set(document)
