from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.data.bad_images import BadImages
from pretraining.data.raw import find_sources
from pretraining.task import Task, resolve_task


@pytest.fixture
def task(tiny: Any) -> Task:
    return resolve_task("123", "3d_fullres", "nnUNetPlans")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def raw_dataset(root: Path, name: str, ending: str, *names: str) -> Path:
    folder = make(root / "raw" / name / "imagesTr", *names)
    (folder.parent / "dataset.json").write_text(json.dumps({"file_ending": ending}))
    return folder


def test_cases_are_grouped_by_name(task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "my images", "b_0000.nii.gz", "a_1_0001.nii.gz", "a_1_0000.nii.gz")
    make(folder, "dataset.json", "notes.txt", ".hidden_0000.nii.gz", "preview.png", "c_0000.nii.gz.part")
    make(folder / "old.nii.gz")
    bad = BadImages()
    with caplog.at_level(logging.INFO):
        (source,) = find_sources(task, [], [folder], bad)
    bad.finish(skip_bad=False)
    assert dict(source.cases) == {
        "a_1": (folder / "a_1_0000.nii.gz", folder / "a_1_0001.nii.gz"),
        "b": (folder / "b_0000.nii.gz",),
    }
    assert source.key.startswith("my_images-")
    assert source.identifiers == [f"{source.key}/a_1", f"{source.key}/b"]
    assert dict(source.restricted([f"{source.key}/b", "a_1"]).cases) == {"b": (folder / "b_0000.nii.gz",)}
    assert "6 file(s) or folder(s) that are no images are ignored" in caplog.text


def test_images_with_other_names_are_bad(task: Task, tmp_path: Path) -> None:
    wrong = ["case.nii.gz", "case_000.nii.gz", "case_0000.nii", "case_0000.mha", "CASE_0000.NII.GZ", "_0000.nii.gz"]
    folder = make(tmp_path / "images", "good_0000.nii.gz", *wrong)
    bad = BadImages()
    (source,) = find_sources(task, [], [folder], bad)
    assert list(source.cases) == ["good"]
    with pytest.raises(KAFError, match=rf"^{len(wrong)} bad image") as caught:
        bad.finish(skip_bad=False)
    assert all(str(folder / name) in str(caught.value) for name in wrong)
    assert "expected case_0000.nii.gz" in str(caught.value)


def test_further_datasets_have_their_own_ending(task: Task, tmp_path: Path) -> None:
    four = raw_dataset(tmp_path, "Dataset004_Other", ".nrrd", "x_0000.nrrd")
    five = raw_dataset(tmp_path, "Dataset005_Third", ".nii.gz", "x_0000.nii.gz")
    sources = find_sources(task, ["4", "Dataset005_Third"], [], BadImages())
    assert [source.folder for source in sources] == [four, five]
    assert [list(source.cases) for source in sources] == [["x"], ["x"]]
    assert [source.key.split("-")[0] for source in sources] == ["Dataset004_Other", "Dataset005_Third"]


def test_equal_folder_names_have_different_keys_and_twice_is_once(
    task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [make(tmp_path / where / "images", "x_0000.nii.gz") for where in ("one", "two")]
    link = tmp_path / "link"
    link.symlink_to(folders[0])
    sources = find_sources(task, [], [*folders, link, tmp_path / "two" / ".." / "two" / "images"], BadImages())
    assert len({source.key for source in sources}) == len(sources) == 2
    assert caplog.text.count("given twice") == 2
    again = find_sources(task, [], [link], BadImages())
    assert again[0].key == sources[0].key


def test_the_first_datasets_own_images_are_refused(task: Task, tmp_path: Path) -> None:
    own = raw_dataset(tmp_path, "Dataset123_Tiny", ".nii.gz", "x_0000.nii.gz")
    for datasets, folders in ((["123"], []), ([], [own])):
        with pytest.raises(KAFError, match="the first dataset, which are used anyway"):
            find_sources(task, datasets, folders, BadImages())


def test_missing_and_empty_places(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KAFError, match=r"--images .*nowhere: found no folder"):
        find_sources(task, [], [tmp_path / "nowhere"], BadImages())
    with pytest.raises(KAFError, match=r"holds no image: found 1 other .*case_0000\.nii\.gz"):
        find_sources(task, [], [make(tmp_path / "empty", "readme.txt")], BadImages())
    with pytest.raises(KAFError, match="nnUNet_raw is"):
        find_sources(task, ["4"], [], BadImages())
    raw_dataset(tmp_path, "Dataset007_A", ".nii.gz")
    raw_dataset(tmp_path, "Dataset007_B", ".nii.gz")
    with pytest.raises(KAFError, match=r"--dataset 4 not found .* found: Dataset007_A, Dataset007_B"):
        find_sources(task, ["4"], [], BadImages())
    with pytest.raises(KAFError, match="--dataset 7 is ambiguous"):
        find_sources(task, ["7"], [], BadImages())
    (tmp_path / "raw" / "Dataset007_A" / "dataset.json").write_text("{")
    with pytest.raises(KAFError, match=r"dataset\.json is not valid JSON"):
        find_sources(task, ["Dataset007_A"], [], BadImages())
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(KAFError, match="nnUNet_raw is not set"):
        find_sources(task, ["7"], [], BadImages())
