from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.config import PretrainConfig
from pretraining.data.bad_images import BadImages, read_whole
from pretraining.data.cases import collect_images, training_cases
from pretraining.data.images import PreprocessedImages
from pretraining.prepare import DataOptions, prepare
from pretraining.task import Task, resolve_task

Texture = Callable[[tuple[int, ...], int], np.ndarray]
PATTERN = PretrainConfig().patient_pattern
SHAPE = (1, 5, 20, 18)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = sitk.GetImageFromArray(image[0])
    volume.SetSpacing([1.0, 1.0, 4.0])
    sitk.WriteImage(volume, str(path))
    return path


@pytest.fixture
def task(tiny: Any) -> Task:
    """Plans that nnU-Net's preprocessor can use, and three patients with two frames each."""
    for configuration in tiny.plans["configurations"].values():
        configuration["preprocessor_name"] = "DefaultPreprocessor"
        for kind in ("data", "seg"):
            configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            kwargs = {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
            configuration[f"resampling_fn_{kind}_kwargs"] = kwargs
    tiny.plans.update(
        image_reader_writer="SimpleITKIO",
        transpose_forward=[0, 1, 2],
        foreground_intensity_properties_per_channel={"0": {}},
    )
    tiny.write_plans()
    return resolve_task("123", "2d", "nnUNetPlans")


@pytest.fixture
def patients(tiny: Any, make_texture: Texture) -> list[str]:
    names = [f"patient{p}_frame{f}" for p in (1, 2, 3) for f in (1, 2)]
    for i, name in enumerate(names):
        tiny.add(name, make_texture(SHAPE, i))
    return names


def write_split(tiny: Any, train: list[str], validation: list[str]) -> None:
    (tiny.folder / "splits_final.json").write_text(json.dumps([{"train": train, "val": validation}]))


def collect(
    task: Task, *folders: Path, datasets: tuple[str, ...] = (), fold: int | str = "all", skip_bad: bool = False
) -> tuple[PreprocessedImages, tuple[str, ...]]:
    bad = BadImages()
    images, cases = collect_images(task, datasets, folders, fold=fold, patient_pattern=PATTERN, bad=bad, num_workers=2)
    usable = tuple(case for case in cases if read_whole(images, case, task.channels, bad) is not None)
    bad.finish(skip_bad)
    return images, usable


@contextmanager
def opened_below(*roots: Path) -> Iterator[list[str]]:
    """Record every file under some folders that Python or blosc2 opens, labels included."""
    opened: list[str] = []
    state = {"on": True}
    original = blosc2.open

    def note(path: Any) -> None:
        resolved = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if any(resolved.startswith(os.path.realpath(root) + os.sep) for root in roots):
            opened.append(resolved)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if state["on"] and event == "open":
            note(arguments[0])

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        note(kwargs.get("urlpath", args[0] if args else ""))
        return original(*args, **kwargs)

    sys.addaudithook(audit)
    blosc2.open = wrapped
    try:
        yield opened
    finally:
        blosc2.open = original
        state["on"] = False


# --- the split ---


def test_split_is_the_one_nnunet_makes(tiny: Any, tmp_path: Path) -> None:
    from batchgenerators.utilities.file_and_folder_operations import save_json
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = [f"case_{i:03d}" for i in range(7)]
    expected = generate_crossval_split(cases, seed=12345, n_splits=5)
    for fold in range(5):
        assert training_cases(cases[::-1], tiny.folder, fold, PATTERN) == sorted(expected[fold]["train"])
    save_json(expected, str(tmp_path / "splits_final.json"))
    ours = tiny.folder / "splits_final.json"
    assert ours.read_bytes() == (tmp_path / "splits_final.json").read_bytes()
    assert [p.name for p in tiny.folder.iterdir() if "splits" in p.name] == [ours.name]


def test_further_sources_do_not_change_the_split(tiny: Any) -> None:
    cases = [f"case_{i:03d}" for i in range(7)]
    extra = [f"more-1/other_{i}" for i in range(5)]
    alone = training_cases(cases, tiny.folder, 1, PATTERN)
    saved = (tiny.folder / "splits_final.json").read_bytes()
    (tiny.folder / "splits_final.json").unlink()
    assert training_cases(extra + cases, tiny.folder, 1, PATTERN) == alone + extra
    assert (tiny.folder / "splits_final.json").read_bytes() == saved


def test_a_split_killed_while_it_is_written_is_not_there(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [f"case_{i:03d}" for i in range(7)]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            training_cases(cases, tiny.folder, 0, PATTERN)
    assert not (tiny.folder / "splits_final.json").exists()
    assert len(training_cases(cases, tiny.folder, 0, PATTERN)) == 5


def test_existing_split_and_folds_beyond_it(tiny: Any) -> None:
    keys = [f"case_{i:03d}" for i in range(6)]
    write_split(tiny, ["case_000"], ["case_003", "case_004"])
    # cases that the fold does not name at all are unlabelled extra cases: they may be used
    assert training_cases(keys, tiny.folder, 0, PATTERN) == ["case_000", "case_001", "case_002", "case_005"]
    with pytest.raises(KAFError, match=r"--fold is 3, but .*splits_final\.json has 1 fold.*0 to 0, or 'all'"):
        training_cases(keys, tiny.folder, 3, PATTERN)
    write_split(tiny, ["case_000"], ["case_003", "case_04"])
    with pytest.raises(KAFError, match=r"splits_final\.json: fold 0 validates on 1 case.*not among the 6.*case_04"):
        training_cases(keys, tiny.folder, 0, PATTERN)


def test_fold_all_says_that_it_uses_everything(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert len(training_cases(["a", "b", "more-1/c"], tiny.folder, "all", PATTERN)) == 3
    assert "all 3 cases are available, validation cases of every fold included" in caplog.text
    assert not (tiny.folder / "splits_final.json").exists()


def test_fewer_than_five_cases_are_split_by_patient(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    cases = ["patient1_frame1", "patient1_frame9", "patient2_frame1"]
    with caplog.at_level(logging.INFO):
        assert training_cases([*cases, "more-1/patient2_frame3", "more-1/x"], tiny.folder, 1, PATTERN) == [
            *cases[:2],
            "more-1/x",
        ]
    assert "3 cases are too few for nnU-Net's five-fold split: split into 2 folds" in caplog.text
    with pytest.raises(KAFError, match=r"--fold is 2.*has 2 fold\(s\)"):
        training_cases(cases, tiny.folder, 2, PATTERN)
    (tiny.folder / "splits_final.json").unlink()
    with pytest.raises(KAFError, match=r"2 case\(s\) of one patient.*fold 'all'"):
        training_cases(cases[:2], tiny.folder, 0, PATTERN)


def test_bad_splits(tiny: Any) -> None:
    cases = ["a", "b", "c"]
    for content in (
        "[{", "[]", "{}", '[{"train": []}]', "[3]", "3", "null", '"text"', '[{"train": ["a"], "val": "a"}]',
        '[{"train": ["a"], "val": [3]}]', '[{"train": {"a": 1}, "val": ["b"]}]', '[{"val": ["a"]}]', "[" * 10**5,
        '[{"train": [""], "val": ["a"]}]', "[[]]", "1" * 10**5,
    ):  # fmt: skip
        (tiny.folder / "splits_final.json").write_text(content)
        with pytest.raises(KAFError, match=r"splits_final\.json.*Correct or delete it"):
            training_cases(cases, tiny.folder, 0, PATTERN)
    write_split(tiny, [], cases)
    with pytest.raises(KAFError, match="leaves no case"):
        training_cases(cases, tiny.folder, 0, PATTERN)


# --- patients ---


def test_every_case_of_a_validation_patient_is_left_out(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    cases = [f"patient{p}_frame{f}" for p in (1, 2, 3) for f in (1, 2)]
    extra = ["more-1/patient2_frame9", "more-1/patient4_frame1", "else-2/patient2"]
    write_split(tiny, ["patient1_frame1", "patient2_frame1"], ["patient2_frame2"])
    with caplog.at_level(logging.INFO):
        kept = training_cases([*extra, *cases], tiny.folder, 0, PATTERN)
    assert kept == [*(c for c in cases if "patient2" not in c), "more-1/patient4_frame1"]
    assert "Left out of Dataset123_Tiny: 2 cases: patient2_frame1, patient2_frame2" in caplog.text
    assert "Left out of more-1: 1 cases: patient2_frame9" in caplog.text
    assert "Left out of else-2: 1 cases: patient2" in caplog.text
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "1 patient(s) both in training and in validation: patient2." in warning
    # another pattern: every case is a patient of its own
    assert len(training_cases(cases, tiny.folder, 0, r"(.*)")) == 5


def test_a_split_by_patient_gives_no_warning(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    cases = [f"patient{p}_frame{f}" for p in (1, 2) for f in (1, 2)]
    write_split(tiny, cases[:2], cases[2:])
    assert training_cases(cases, tiny.folder, 0, PATTERN) == cases[:2]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_pattern_that_fits_too_much_is_named(tiny: Any) -> None:
    cases = ["study_a", "study_b", "study_c"]
    write_split(tiny, cases[:2], cases[2:])
    with pytest.raises(KAFError, match=r"--patient-pattern \(now '\(study\)_\.\*'\)"):
        training_cases(cases, tiny.folder, 0, "(study)_.*")


# --- all sources together ---


def test_all_sources_are_collected(
    task: Task, tiny: Any, patients: list[str], make_texture: Texture, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    write(folder / "patient1_frame1_0000.nii.gz", make_texture(SHAPE, 20))
    other = tmp_path / "raw" / "Dataset004_Other"
    write(other / "imagesTr" / "x_0000.nrrd", make_texture((1, 3, 30, 18), 21))
    (other / "dataset.json").write_text(json.dumps({"file_ending": ".nrrd"}))
    images, cases = collect(task, folder, datasets=("4",))
    assert list(cases[:6]) == patients
    assert [case.split("-")[0] for case in cases[6:]] == ["Dataset004_Other", "images"]
    assert [case.split("/")[1] for case in cases[6:]] == ["x", "patient1_frame1"]
    assert len(set(cases)) == 8
    assert sorted(cases) == sorted(images.identifiers)
    assert [images.shape(case) for case in cases] == [SHAPE] * 6 + [(1, 3, 30, 18), SHAPE]
    normalised = images.read(cases[7], (slice(None),) * 3)
    assert (float(normalised.mean()), float(normalised.std())) == pytest.approx((0, 1), abs=1e-4)
    again, same = collect(task, folder, datasets=("4",))
    assert same == cases
    assert all(again.path(case) == images.path(case) for case in cases)


def test_bad_images_of_all_sources_come_in_one_list(
    task: Task, tiny: Any, patients: list[str], make_texture: Texture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    for i in range(4):
        write(folder / f"new_{i}_0000.nii.gz", make_texture(SHAPE, 30 + i))
    truncated, empty = folder / "new_0_0000.nii.gz", folder / "new_2_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    empty.write_bytes(b"")
    (folder / "new_4.nii.gz").write_bytes(b"")
    broken = tiny.images["2d"] / "patient2_frame1.b2nd"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(KAFError) as caught:
        collect(task, folder)
    message = str(caught.value)
    assert message.startswith("4 bad image(s), nothing was trained:")
    assert all(str(path) in message for path in (truncated, empty, folder / "new_4.nii.gz", broken))
    assert "truncated gzip stream" in message
    assert "empty file (0 bytes)" in message
    assert message.endswith("--skip-bad")
    with caplog.at_level(logging.WARNING):
        images, cases = collect(task, folder, skip_bad=True)
    assert sum("Bad image skipped" in r.getMessage() for r in caplog.records) == 4
    assert [c.rpartition("/")[2] for c in cases] == [*(p for p in patients if p != "patient2_frame1"), "new_1", "new_3"]
    assert all(np.isfinite(images.read(case, (slice(None),) * 3)).all() for case in cases)


def test_wrong_channels_in_the_first_dataset_are_bad(
    task: Task, tiny: Any, patients: list[str], make_texture: Texture
) -> None:
    tiny.add("patient4_frame1", make_texture((2, *SHAPE[1:]), 0))
    with pytest.raises(KAFError, match=r"patient4_frame1\.b2nd: found shape \(2, 5, 20, 18\); expected \(1, z"):
        collect(task)
    assert collect(task, skip_bad=True)[1] == tuple(patients)


def test_nothing_left_after_skipping(task: Task, tiny: Any) -> None:
    tiny.add("case_0", np.full(SHAPE, np.nan, np.float32))
    options = DataOptions(fold="all", skip_bad=True)
    with pytest.raises(KAFError, match="nothing is left to train on"):
        prepare(task, PretrainConfig(), options, torch.device("cpu"), 2)


def test_no_file_of_a_validation_patient_is_opened(
    task: Task, tiny: Any, patients: list[str], make_texture: Texture, tmp_path: Path
) -> None:
    """Not even to check it, and not in another source; bad files of left-out patients therefore do not matter."""
    folder = tmp_path / "images"
    for name in ("patient2_frame7", "patient3_frame7", "patient5_frame1"):
        write(folder / f"{name}_0000.nii.gz", make_texture(SHAPE, 40))
    (folder / "patient2_frame8_0000.nii.gz").write_bytes(b"")
    (tiny.images["2d"] / "patient2_frame2.b2nd").write_bytes(b"broken")
    write_split(tiny, ["patient1_frame1", "patient1_frame2"], ["patient2_frame1"])
    with opened_below(tmp_path) as opened:
        images, cases = collect(task, folder, fold=0)
        for case in cases:
            images.read(case, (slice(None),) * 3)
    assert [c.rpartition("/")[2] for c in cases] == [
        *(p for p in patients if "patient2" not in p),
        "patient3_frame7",
        "patient5_frame1",
    ]
    names = {Path(path).name for path in opened}
    # what is opened is recorded at all: preprocessed images, and raw ones by the check of their gzip streams
    assert {"patient1_frame1.b2nd", "patient3_frame7_0000.nii.gz"} < names
    assert not [name for name in names if "patient2" in name]
    assert not [name for name in names if "_seg" in name or name.endswith(".pkl") or "labelsTr" in name]
    assert not list(task.dataset_folder.rglob("*patient2_frame7*"))
