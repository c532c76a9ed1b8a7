"""What happens to the images before the first step of a run: which are opened, which are refused, who is held out."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans
from nnunetv2_kaf.weights import read_checkpoint
from pretraining import cli
from pretraining.config import PretrainConfig
from pretraining.prepare import Data, DataOptions, prepare
from pretraining.task import resolve_task

Texture = Callable[[tuple[int, ...], int], np.ndarray]
CPU = torch.device("cpu")
OPENED: list[str] = []
LISTENING = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if LISTENING and event == "open" and arguments and isinstance(arguments[0], (str, bytes, Path)):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names of all files that are opened from now on, by Python, blosc2 or SimpleITK."""
    global LISTENING

    def recording(function: Any, name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            OPENED.append(str(kwargs.get(name, args[0] if args else "")))
            return function(*args, **kwargs)

        return record

    monkeypatch.setattr(blosc2, "open", recording(blosc2.open, "urlpath"))
    monkeypatch.setattr(sitk, "ReadImage", recording(sitk.ReadImage, "fileName"))
    OPENED.clear()
    LISTENING = True
    yield OPENED
    LISTENING = False


@pytest.fixture
def command(tiny: Any, fast: list[str]) -> Callable[..., list[str]]:
    """Build a command line of a short run; the plans can preprocess and have small keypoint layers."""
    tiny.preprocess_raw_images()
    tiny.plans["plans_name"] = "SmallPlans"
    small = kaf_plans(tiny.plans, KAFConfig(num_keypoints=32, token_dim=16, num_blocks=1))
    (tiny.folder / "SmallPlans.json").write_text(json.dumps(small))

    def build(*more: str, configuration: str = "2d", others: tuple[str, ...] = ()) -> list[str]:
        quick = ("--preset", "simclr", "--epochs", "1", "-p", "SmallPlans")
        return ["--dataset", "123", *others, "-c", configuration, *fast, *quick, *more]

    return build


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = sitk.GetImageFromArray(image[0])
    volume.SetSpacing([1.0, 1.0, 4.0])
    sitk.WriteImage(volume, str(path))
    return path


def summary(tiny: Any, configuration: str = "2d") -> dict[str, Any]:
    folder = tiny.results / "Dataset123_Tiny" / f"KAFPretraining__SmallPlans__{configuration}" / "fold_0"
    found: dict[str, Any] = read_checkpoint(folder / "checkpoint_final.pth")["pretraining"]
    return found


def raw_dataset(tiny: Any, name: str, images: dict[str, np.ndarray]) -> Path:
    """A further dataset in nnUNet_raw; whoever opens one of its labels fails."""
    root: Path = tiny.root.parent / "raw" / name
    for case, image in images.items():
        write(root / "imagesTr" / f"{case}_0000.nii.gz", image)
        (root / "labelsTr" / f"{case}.nii.gz").mkdir(parents=True)
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_no_image_of_a_validation_patient_and_no_label_is_opened(
    tiny: Any, command: Any, make_texture: Texture, opened: list[str], configuration: str
) -> None:
    """Neither the case that validates, nor its patient's other frames, nor those of the same name elsewhere."""
    names = [f"patient{patient:03d}_frame{frame:02d}" for patient in range(1, 7) for frame in (1, 9)]
    for i, name in enumerate(names):
        tiny.add(name, make_texture((1, 9, 26, 20), i))
    ground_truth = tiny.folder / "gt_segmentations"
    ground_truth.mkdir()
    for name in names:
        (ground_truth / f"{name}.nii.gz").write_text("")
    validation = ["patient002_frame01", "patient005_frame09"]
    split = {"train": [n for n in names if n not in validation], "val": validation}
    (tiny.folder / "splits_final.json").write_text(json.dumps([split]))
    other = {name: make_texture((1, 8, 24, 20), 50 + i) for i, name in enumerate(["patient002_frame05", "patient077"])}
    raw_dataset(tiny, "Dataset124_Other", other)
    extra = tiny.root.parent / "extra"
    for i, name in enumerate(["patient005_frame03", "volunteer"]):
        write(extra / f"{name}_0000.nii.gz", make_texture((1, 8, 24, 20), 60 + i))
    opened.clear()
    more = ("--images", str(extra), "--across", "1", "--iterations", "6")
    assert cli.main(command(*more, configuration=configuration, others=("124",))) == 0
    seen = [Path(name).name for name in opened]
    forbidden = ("patient002", "patient005")
    assert [name for name in seen if name.startswith(forbidden)] == []
    assert [name for name in opened if "gt_segmentations" in name or "labelsTr" in name] == []
    assert [name for name in seen if name.endswith((".pkl", "_seg.b2nd"))] == []
    # the record would have seen them: every other patient was opened
    for name in ("patient001_frame01", "patient001_frame09", "patient006_frame09", "patient077_0000", "volunteer_0000"):
        assert any(found.startswith(name) for found in seen), name
    cases = summary(tiny, configuration)["cases"]
    assert not any(case.rpartition("/")[2].startswith(forbidden) for case in cases)
    # 8 frames of 4 patients and 2 further images: 6 patients, one of which is held out
    assert len(cases) in (8, 9)


@pytest.fixture
def mixed(tmp_path: Path, make_texture: Texture) -> Path:
    """A folder with two good images and every kind of bad one."""
    folder = tmp_path / "mixed"
    for i, name in enumerate(["good_a", "good_b", "cut", "nan", "two", "two_channels"]):
        write(folder / f"{name}_0000.nii.gz", make_texture((1, 8, 24, 20), 30 + i))
    cut = folder / "cut_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    # complete as a gzip file, but the image in it is cut
    whole = gzip.decompress((folder / "two_0000.nii.gz").read_bytes())
    (folder / "short_0000.nii.gz").write_bytes(gzip.compress(whole[: len(whole) // 2]))
    (folder / "two_0000.nii.gz").unlink()
    write(folder / "nan_0000.nii.gz", np.full((1, 8, 24, 20), np.nan, np.float32))
    write(folder / "two_channels_0001.nii.gz", make_texture((1, 8, 24, 20), 40))
    (folder / "empty_0000.nii.gz").write_bytes(b"")
    return folder


BAD = ("cut_0000", "short_0000", "nan_0000", "two_channels_0000", "empty_0000")


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_bad_images_stop_with_the_full_list_or_are_skipped(
    tiny: Any, command: Any, mixed: Path, capsys: pytest.CaptureFixture[str], configuration: str
) -> None:
    tiny.add_cases(5)
    folder = tiny.images[configuration]
    (folder / "case_004.b2nd").write_bytes((folder / "case_004.b2nd").read_bytes()[:300])
    tiny.add("wide", np.zeros((2, 9, 28, 20), np.float32))
    tiny.add("endless", np.full((1, 9, 28, 20), np.inf, np.float32))
    (tiny.folder / "splits_final.json").write_text(json.dumps([{"train": [], "val": ["case_000"]}]))
    options = command("--images", str(mixed), configuration=configuration)
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert "8 bad image(s), nothing was trained:" in error
    for name in BAD:
        assert f"{mixed / name}.nii.gz: found " in error
    for name, found in (("case_004", "unreadable"), ("wide", "shape (2, 9, 28, 20)"), ("endless", "NaN or infinite")):
        assert f"{folder / name}.b2nd: found {found}" in error
    assert "nnUNetv2_preprocess -d 123" in error
    assert "--skip-bad" in error
    assert "Traceback" not in error
    assert list(tiny.results.rglob("*.pth")) == []

    assert cli.main([*options, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert error.count("Bad image skipped: ") == 8
    found = summary(tiny, configuration)
    cases = {case.rpartition("/")[2] for case in found["cases"]}
    # case_001 to 003, good_a and good_b, one of which is held out
    usable = {"case_001", "case_002", "case_003", "good_a", "good_b"}
    assert cases < usable
    assert len(cases) == 4
    assert {case.rpartition("/")[0][:6] for case in found["cases"]} == {"", "mixed-"}


def test_nothing_but_bad_images(tiny: Any, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add("two_channels", np.zeros((2, 9, 28, 20), np.float32))
    assert cli.main(command("--fold", "all")) == 2
    error = capsys.readouterr().err
    assert "two_channels.b2nd: found shape (2, 9, 28, 20); expected (1, z, y, x)" in error
    assert cli.main(command("--fold", "all", "--skip-bad")) == 2
    assert "nothing is left to train on" in capsys.readouterr().err


def test_several_datasets_and_missing_ones(
    tiny: Any, command: Any, make_texture: Texture, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.add_cases(5)
    raw_dataset(tiny, "Dataset124_Other", {"a": make_texture((1, 8, 24, 20), 1), "b": make_texture((1, 8, 24, 20), 2)})
    raw_dataset(tiny, "Dataset125_Third", {"a": make_texture((1, 8, 24, 20), 3)})
    assert cli.main(command(others=("124", "Dataset125_Third"))) == 0
    cases = summary(tiny)["cases"]
    # 4 of the first (case 5 validates) and 3 further ones, one patient of these 7 held out
    assert len(cases) == 6
    sources = {case.rpartition("/")[0].rpartition("-")[0] for case in cases}
    assert sources <= {"", "Dataset124_Other", "Dataset125_Third"}
    assert len(sources) > 1
    capsys.readouterr()
    assert cli.main(command(others=("126",))) == 2
    assert "--dataset 126 not found" in capsys.readouterr().err
    assert cli.main(command("--images", str(tiny.root / "nowhere"))) == 2
    assert f"--images {tiny.root / 'nowhere'}" in capsys.readouterr().err


def make(tiny: Any, command: Any, **changes: Any) -> Data:
    options: dict[str, Any] = {"fold": "all", "datasets": (), "folders": (), "skip_bad": False, "num_workers": 2}
    config = PretrainConfig(patient_pattern=changes.pop("patient_pattern", PretrainConfig().patient_pattern))
    task = resolve_task("123", "2d", "SmallPlans")
    return prepare(task, config, DataOptions(**{**options, **changes}), CPU, 4)


def test_held_out_patients_are_not_trained_on(tiny: Any, command: Any, make_texture: Texture) -> None:
    for patient in range(6):
        for frame in (1, 2):
            tiny.add(f"p{patient}_frame{frame}", make_texture((1, 6, 24, 20), patient))
    data = make(tiny, command)
    assert len(data.cases) == 10
    (held_out,) = data.held_out.patients.values()
    assert len(held_out) == 2
    assert len({case.split("_")[0] for case in held_out}) == 1
    assert not set(held_out) & set(data.cases)
    trained = {case for step in range(6) for pair in [data.loader.batch(step).cases] for case in pair}
    measured = {case for step in range(2) for case in data.held_out.batch(step).cases}
    assert trained <= set(data.cases)
    assert measured <= set(held_out)
    # without a pattern every frame is somebody: still only one of 12 is held out
    single = make(tiny, command, patient_pattern="(.*)")
    assert len(single.cases) == 11
    assert list(single.held_out.patients.values()) != [held_out]


def test_few_patients_are_all_trained_on(tiny: Any, command: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny.add_cases(4)
    with caplog.at_level("INFO", "pretraining"):
        data = make(tiny, command)
    assert len(data.cases) == 4
    assert data.held_out.patients == data.loader.patients
    assert data.held_out.stream != data.loader.stream
    assert "none is held out" in caplog.text


def test_keypoints_are_detected_once_and_again_for_a_changed_image(
    tiny: Any, command: Any, make_texture: Texture, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.add_cases(5)
    cache = tiny.folder / "nnUNetPlans_2d_kaf_keypoints"
    with caplog.at_level("INFO", "pretraining"):
        make(tiny, command)
        assert "keypoints of 5 of 5 cases" in caplog.text
        caplog.clear()
        make(tiny, command)
        assert "Detecting" not in caplog.text
        path = tiny.images["2d"] / "case_002.b2nd"
        path.unlink()
        blosc2.asarray(make_texture((1, 10, 28, 20), 99), urlpath=str(path))
        (folder,) = cache.iterdir()
        old, young = (folder / f".case_000.{name}.npy.1-1.tmp" for name in ("old", "young"))
        for leftover in (old, young):
            leftover.write_bytes(b"half")
        os.utime(old, (time.time() - 7200,) * 2)
        make(tiny, command)
        assert "keypoints of 1 of 5 cases" in caplog.text
    assert sorted(p.name.split(".")[0] for p in folder.glob("*.npy")) == [f"case_{i:03d}" for i in range(5)]
    # another run may be writing the young one
    assert (old.exists(), young.exists()) == (False, True)


def test_an_error_of_the_first_process_reaches_the_others(
    tiny: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever: the first process meets the others at the barrier also when it fails."""
    from pretraining import distributed

    tiny.add("two_channels", np.zeros((2, 9, 28, 20), np.float32))
    events: list[str] = []
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    original = blosc2.open
    monkeypatch.setattr(blosc2, "open", lambda *a, **k: events.append("open") or original(*a, **k))
    with pytest.raises(KAFError, match="1 bad image"):
        make(tiny, command)
    assert events[-1] == "barrier"
    assert events.count("barrier") == 1
    events.clear()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(KAFError, match="1 bad image"):
        make(tiny, command)
    assert events[0] == "barrier"
    assert events.count("barrier") == 1
