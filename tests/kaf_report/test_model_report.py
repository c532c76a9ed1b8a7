from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaf_report import case_report, cli
from nnunetv2_kaf.inspect import open_model, view_case

Write = Callable[..., Path]
LAYOUT = (("images", "_0000"), ("labels", ""))


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def report(model: Path, out: Path, *options: object) -> Page:
    assert cli.main([str(model), "-o", str(out), *map(str, options)]) == 0
    return Page(out / "report.html")


def data_of(folder: Path) -> tuple[object, ...]:
    return "-i", folder / "imagesTs", "-l", folder / "labelsTs"


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_model_of_ours(ndim: int, write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", ndim, folds=("0", "1"))
    page = report(model, tmp_path / "out", *data_of(phantom_data), "--keypoints", 3, "--disable-mirroring")
    pictures = sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir())
    assert len(page.all("img")) == len(pictures) == 2 + 2 * (3 + 3)  # curves; per case 3 pictures and 3 keypoints
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert [entry["max"] for entry in page.all("input")] == ["2", "2"]
    assert len([f for f in page.all("figure") if f.get("class") == "frame"]) == 6
    for text in (
        "nnUNetTrainerKAF",
        "KAFUNet",
        "num_keypoints",
        "Fold 1",
        "Folds disagree in",
        "RV",
        "180 s (0:03:00)",
    ):
        assert text in page.text
    assert (tmp_path / "out" / "report.html").stat().st_size < 10_000_000
    anchors = {a["id"] for _, a in page.tags if a.get("id")}
    assert {str(a["href"])[1:] for a in page.all("a")} <= anchors


def test_the_worst_case_comes_first_and_scores_are_those_of_the_files(
    write_model: Write, phantom_data: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m")
    page = report(model, tmp_path / "out", *data_of(phantom_data), "--keypoints", 1, "--disable-mirroring")
    html = (tmp_path / "out" / "report.html").read_text()
    means = [float(value) for value in re.findall(r'<td class="value">(0\.\d{3})</td></tr>', html)]
    assert page.text.index("phantom_t00") < page.text.index("mean Dice")
    opened = open_model(model)
    expected = []
    for case in ("phantom_t000", "phantom_t001"):
        label = phantom_data / "labelsTs" / f"{case}.nii.gz"
        view = view_case(opened, [phantom_data / "imagesTs" / f"{case}_0000.nii.gz"], label, mirror=False)
        assert view.original_reference is not None
        dice = []
        for value in (1, 2, 3):
            ours, theirs = view.original_prediction == value, view.original_reference == value
            dice.append(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
        expected.append(float(np.mean(dice)))
    assert means == pytest.approx(sorted(expected), abs=6e-4)


def test_a_plain_model_shows_what_it_has_and_says_why_not(
    write_model: Write, phantom_data: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m", network="plain")
    page = report(model, tmp_path / "out", *data_of(phantom_data), "--disable-mirroring")
    assert "This network has no keypoint layers" in page.text
    assert "PlainConvUNet" in page.text
    assert "not recorded: only nnUNetTrainerKAF writes it down" in page.text
    assert len(page.all("img")) == 1 + 2  # curves, a result per case
    assert not page.all("input")
    assert "mean Dice" in page.text


def test_regions_have_their_own_scores(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", style="regions")
    page = report(model, tmp_path / "out", *data_of(phantom_data), "--keypoints", 1, "--disable-mirroring")
    header = page.text[page.text.index("95 % Hausdorff") : page.text.index("mean Dice")]
    assert [name in header for name in ("heart", "left_heart", "LV")] == [True] * 3


def test_an_image_without_a_label(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    page = report(write_model(tmp_path / "m"), tmp_path / "out", "-i", phantom_data / "imagesTs", "--keypoints", 1)
    assert "No label file" in page.text
    assert "mean Dice" not in page.text
    assert len(page.all("img")) == 1 + 2 * 4


def test_without_images_the_model_is_shown(write_model: Write, tmp_path: Path) -> None:
    page = report(write_model(tmp_path / "m"), tmp_path / "out")
    assert "No images were given" in page.text
    assert len(page.all("img")) == 1


def test_what_a_training_started_from(write_model: Write, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", folds=("0", "1"))
    gone = tmp_path / "pretraining" / "checkpoint_final.pth"
    start = {"source": str(gone), "sha256": "ab" * 32, "note": "found at its standard place", "tensors_loaded": 3}
    (model / "fold_0" / "kaf_initialization.json").write_text(json.dumps({**start, "tensors": {"encoder": 3}}))
    (model / "fold_1" / "kaf_initialization.json").write_text(
        json.dumps({"source": None, "note": "KAF_PRETRAINED=none"})
    )
    gone.parent.mkdir()
    log = "2026-11-26 08:00:00,123 INFO a\nmore\n2026-11-26 09:01:05,000 INFO b\n"
    (gone.parent / "pretraining.log").write_text(log)
    page = report(model, tmp_path / "out")
    for text in ("ab" * 32, "is not there any more", "random weights: KAF_PRETRAINED=none", "3665 s (1:01:05)"):
        assert text in page.text


def test_one_bad_image_does_not_hide_the_others(
    write_model: Write, phantom_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(phantom_data / "imagesTs", images)
    (images / "broken_0000.nii.gz").write_text("no image")
    model = write_model(tmp_path / "m")
    page = report(model, tmp_path / "out", "-i", images, "--keypoints", 1)
    assert "broken_0000.nii.gz cannot be preprocessed" in page.text
    assert "phantom_t001" in page.text
    for name in ("phantom_t000", "phantom_t001"):
        (images / f"{name}_0000.nii.gz").unlink()
    assert cli.main([str(model), "-i", str(images), "-o", str(tmp_path / "out")]) == 2
    assert "none of the 1 case(s)" in capsys.readouterr().err


def test_a_keypoint_of_every_structure_is_chosen_first(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    images, label = (
        [phantom_data / "imagesTs" / "phantom_t000_0000.nii.gz"],
        phantom_data / "labelsTs" / "phantom_t000.nii.gz",
    )
    view = view_case(open_model(write_model(tmp_path / "m")), images, label, mirror=False)
    assert view.keypoints is not None
    under = case_report.labels_at(view)
    chosen = case_report.choose(view, 8)
    assert len(chosen) == len(set(chosen)) == 8
    structures = set(under[under > 0].tolist())
    assert structures
    assert {int(under[q]) for q in chosen[: len(structures)]} == structures


def test_bad_folders_and_options_are_errors_in_words(
    write_model: Write, phantom_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "out")]
    calls: list[tuple[list[Any], str]] = [
        ([tmp_path / "empty"], "the folder is empty"),
        ([tmp_path / "missing"], "does not exist"),
        ([model / "fold_0"], "is one fold of a model"),
        ([model, "-i", tmp_path / "empty"], "found no *_0000.nii.gz file in it"),
        ([model, "-i", tmp_path / "missing"], "no such folder"),
        ([model, "-l", tmp_path / "empty"], "-l was given without -i"),
        ([model, "-i", phantom_data / "imagesTs", "-l", tmp_path / "empty"], "found no label file"),
        ([model, "--folds", "7"], "Choose with --folds"),
        ([model, "--keypoints", "0"], "expected 1 or more"),
        ([model, "--device", "tpu"], "--device is tpu"),
    ]
    for arguments, message in calls:
        assert cli.main([*map(str, arguments), *out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
