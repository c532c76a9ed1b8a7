from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from low_label import config, raw, splits
from low_label.layout import Layout

from nnunetv2_kaf.errors import KAFError

CONTENT = {
    "comment": "c",
    "device": "cpu",
    "labelled": [2, 6, "all"],
    "draws": 3,
    "epochs": 1,
    "iterations": 1,
    "tasks": {"heart": {"data": "Dataset001_Heart", "configuration": "2d", "validation_patients": 2}},
    "arms": {"plain": {"trainer": "plain"}},
}
CASES = [f"patient{i:03d}_frame{frame:02d}" for i in range(15) for frame in (1, 9 + i % 3)]


@pytest.fixture
def study(tmp_path: Path) -> config.Study:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(CONTENT))
    return config.load(file)


def test_patients_are_never_on_two_sides(study: config.Study) -> None:
    split = splits.draw(CASES, study, study.tasks[0])
    parts = [set(split.test), set(split.validation), set(split.training)]
    assert [len(part) for part in parts] == [3, 2, 10]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 15
    assert split.cases_of(split.cases) == sorted(CASES)
    for fold, own in zip(split.nnunet(), split.folds, strict=True):
        assert set(own.patients) <= parts[2]
        assert {case.split("_")[0] for case in fold["train"]} == set(own.patients)
        assert len(fold["train"]) == 2 * len(own.patients)
        assert {case.split("_")[0] for case in fold["val"]} == parts[1]


def test_draws_are_nested_and_differ(study: config.Study) -> None:
    folds = {f.name: set(f.patients) for f in splits.draw(CASES, study, study.tasks[0]).folds}
    for k in range(3):
        assert len(folds[f"M2_draw{k}"]) == 2
        assert folds[f"M2_draw{k}"] < folds[f"M6_draw{k}"] < folds[f"Mall_draw{k}"]
        assert len(folds[f"Mall_draw{k}"]) == 10
    assert len({tuple(sorted(folds[f"M6_draw{k}"])) for k in range(3)}) == 3
    assert list(folds) == splits.fold_names(study, study.labelled)


def test_same_seed_same_split_whatever_the_order_of_files(study: config.Study) -> None:
    first = splits.draw(CASES, study, study.tasks[0])
    assert splits.draw(CASES[::-1], study, study.tasks[0]).sha256() == first.sha256()
    assert splits.draw(CASES, replace(study, seed=1), study.tasks[0]).sha256() != first.sha256()


def test_fewer_numbers_keep_the_patients(study: config.Study) -> None:
    full = splits.draw(CASES, study, study.tasks[0])
    fewer = splits.draw(CASES, replace(study, labelled=(6,), draws={6: 1}), study.tasks[0])
    assert (fewer.test, fewer.validation) == (full.test, full.validation)
    assert fewer.folds[0].patients == next(f for f in full.folds if f.name == "M6_draw0").patients


def test_too_few_patients_are_reported(study: config.Study) -> None:
    with pytest.raises(KAFError, match=r"labelled: found 6, but of 10 patients.*validation_patients.* 5"):
        splits.draw(CASES[:20], replace(study, tasks=study.tasks), replace(study.tasks[0], validation_patients=3))


def make_source(folder: Path) -> Path:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    values = np.zeros((2, 4, 6), dtype=np.uint8)
    values[:, :, 3:] = 7
    for case in CASES:
        for array, file in ((values, f"imagesTr/{case}_0000.nii.gz"), (values // 7, f"labelsTr/{case}.nii.gz")):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((1.5, 2.0, 10.0))
            sitk.WriteImage(image, str(folder / file))
    return folder


@pytest.mark.parametrize("factor", [1, 2])
def test_test_patients_are_never_in_the_training_folder(study: config.Study, tmp_path: Path, factor: int) -> None:
    source = make_source(tmp_path / "data" / "Dataset001_Heart")
    task = replace(study.tasks[0], downsample=factor)
    layout = Layout(replace(study, tasks=(task,)), task, tmp_path / "work", tmp_path / "out")
    description, cases = raw.describe(source)
    split = splits.draw(cases, study, task)
    raw.write(layout, source, split)
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        training = {p.name.removesuffix(ending) for p in (layout.raw / f"{kind}Tr").iterdir()}
        test = {p.name.removesuffix(ending) for p in (layout.raw / f"{kind}Ts").iterdir()}
        assert test == set(split.cases_of(split.test))
        assert training == set(CASES) - test
    written = json.loads((layout.raw / "dataset.json").read_text())
    assert written == {**description, "numTraining": 24}


def test_smaller_images_keep_their_extent_and_labels() -> None:
    values = np.zeros((2, 4, 6), dtype=np.uint8)
    values[:, 1:, 3:] = 8
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.5, 2.0, 10.0))
    smaller = raw.downsample(image, 2)
    assert smaller.GetSize() == (3, 2, 2)
    assert smaller.GetSpacing() == (3.0, 4.0, 10.0)
    # blocks of 2 x 2: the middle column of blocks is half inside along x, the upper row half along y
    assert np.allclose(sitk.GetArrayFromImage(smaller)[0], [[0, 2, 4], [0, 4, 8]])
    labels = sitk.GetArrayFromImage(raw.downsample_labels(image, smaller))
    assert set(np.unique(labels)) == {0, 8}
    assert labels[0, 1, 2] == 8
    assert labels[0, 0, 0] == 0


def test_ignore_labels_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match=r"dataset\.json does not exist. --data"):
        raw.describe(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ignore": 2}}))
    with pytest.raises(KAFError, match="ignore label"):
        raw.describe(tmp_path)
