"""The demo's own logic: data preparation, steps, markers, failures and the report; no training here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import demo
import demo_data
import demo_report
import numpy as np
import phantoms
import pytest

from nnunetv2_kaf.errors import KAFError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A raw dataset in ACDC's naming: eight patients with two frames each, two channels."""
    folder = tmp_path / "own" / "Dataset027_ACDC"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for patient in range(8):
        for frame in (1, 12):
            identifier = f"patient{patient:03d}_frame{frame:02d}"
            (folder / "labelsTr" / f"{identifier}.nii.gz").write_text(identifier)
            for channel in range(2):
                (folder / "imagesTr" / f"{identifier}_{channel:04d}.nii.gz").write_text(f"{identifier} {channel}")
    content = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "RV": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 16}))
    return folder


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _patients(cases: list[str]) -> set[str]:
    return {case.rpartition("_")[0] for case in cases}


def test_own_data_is_linked_split_by_patient_and_untouched(source: Path, tmp_path: Path) -> None:
    before = _snapshot(source)
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    assert demo_data.prepare_own_data(source, raw, preprocessed) == "27"
    target = raw / source.name
    train, test = (
        sorted(path.name.removesuffix(".nii.gz") for path in (target / f"labels{split}").iterdir())
        for split in ("Tr", "Ts")
    )
    assert len(test) == 4
    assert len(train) == 12
    assert not _patients(train) & _patients(test)
    for split, cases in (("Tr", train), ("Ts", test)):
        for case in cases:
            assert (target / f"labels{split}" / f"{case}.nii.gz").read_text() == case
            assert (target / f"images{split}" / f"{case}_0001.nii.gz").read_text() == f"{case} 1"
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 12
    splits = json.loads((preprocessed / source.name / "splits_final.json").read_text())
    assert len(splits) == 5
    for split in splits:
        assert not _patients(split["train"]) & _patients(split["val"])
        assert sorted(split["train"] + split["val"]) == train
    assert _snapshot(source) == before


def test_preparing_again_after_an_interruption_gives_the_same(source: Path, tmp_path: Path) -> None:
    demo_data.prepare_own_data(source, tmp_path / "raw", tmp_path / "preprocessed")
    first = _snapshot(tmp_path / "raw")
    (tmp_path / "raw" / source.name / "dataset.json").unlink()
    demo_data.prepare_own_data(source, tmp_path / "raw", tmp_path / "preprocessed")
    assert {name: content for name, (_, content) in _snapshot(tmp_path / "raw").items()} == {
        name: content for name, (_, content) in first.items()
    }


def test_files_listed_in_dataset_json(source: Path) -> None:
    content = json.loads((source / "dataset.json").read_text())
    absolute = str(source / "labelsTr" / "patient000_frame01.nii.gz")
    content["dataset"] = {"x": {"images": ["imagesTr/patient000_frame01_0000.nii.gz"], "label": absolute}}
    cases = demo_data.read_cases(source, content)
    assert cases["x"].label == Path(absolute)
    assert cases["x"].images[0].is_file()


def test_a_name_before_the_underscore_that_is_no_patient_groups_nothing() -> None:
    cases = [f"hippocampus_{index:03d}" for index in range(10)]
    assert demo_data.group_cases(cases) == [[case] for case in cases]
    assert demo_data.group_cases([f"case{index}" for index in range(7)]) == [[f"case{index}"] for index in range(7)]


def test_hold_out_is_bounded_and_reproducible() -> None:
    groups = [[f"case{index}"] for index in range(400)]
    training, test = demo_data.hold_out(groups)
    assert len(test) == demo_data.MAX_TEST_CASES
    assert len(training) + len(test) == 400
    assert demo_data.hold_out(groups) == (training, test)
    with pytest.raises(KAFError, match="at least 6"):
        demo_data.hold_out(groups[:5])


@pytest.mark.parametrize(("name", "message"), [("missing", "does not exist"), ("Hippocampus", "DatasetXXX_Name")])
def test_bad_data_is_named(tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name != "missing":
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text("{}")
    assert demo.main(["--data", str(tmp_path / name), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def settings(tmp_path: Path) -> demo.Settings:
    made = demo.Settings("Dataset900_KAFPhantom", "900", "3d_fullres", "cpu", tmp_path)
    made.run.mkdir()
    return made


def test_the_commands_are_nnunets_own(settings: demo.Settings) -> None:
    steps = demo.build_steps(settings)
    assert [step.command[0] for step in steps] == [
        "nnUNetv2_plan_and_preprocess",
        "kaf-pretrain",
        "nnUNetv2_train",
        "nnUNetv2_predict",
        "nnUNetv2_evaluate_folder",
        "kaf-report",
        "kaf-report",
    ]
    assert [step.resume() for step in steps] == [()] * 7
    (settings.model / "fold_0").mkdir(parents=True)
    pretraining = settings.results / "KAFPretraining__nnUNetKAFPlans__3d_fullres" / "fold_all"
    pretraining.mkdir(parents=True)
    (pretraining / "checkpoint_latest.pth").touch()
    assert [step.resume() for step in steps] == [(), ("--continue",), ("--c",), (), (), (), ()]


def test_the_users_settings_do_not_reach_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nnUNet_raw", "nnUNet_extTrainer", "KAF_PRETRAINED"):
        monkeypatch.setenv(name, "/of/the/user")
    made = demo.environment(tmp_path)
    assert "/of/the/user" not in made.values()
    assert made["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert int(made["nnUNet_n_proc_DA"]) >= 1


def _python(code: str) -> demo.Step:
    return demo.Step("try", (sys.executable, "-c", code))


def test_a_finished_step_is_skipped_until_its_command_changes(settings: demo.Settings, tmp_path: Path) -> None:
    count = tmp_path / "count"
    step = _python(f"open({str(count)!r}, 'a').write('x')")
    for _ in range(2):
        demo.run_step(1, step, settings)
    assert count.read_text() == "x"
    demo.run_step(1, _python(f"open({str(count)!r}, 'a').write('y')"), settings)
    assert count.read_text() == "xy"


def test_a_failing_step_names_its_log_and_leaves_no_marker(settings: demo.Settings) -> None:
    with pytest.raises(KAFError, match="exit code 3") as caught:
        demo.run_step(1, _python("print('the reason'); raise SystemExit(3)"), settings)
    assert "the reason" in str(caught.value)
    assert str(settings.run / "1_try.log") in str(caught.value)
    assert not (settings.run / "1_try.done").exists()


def test_an_interruption_ends_the_command(settings: demo.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], log: Path, start: float) -> int:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_step(1, _python("import time; time.sleep(60)"), settings)
    assert started[0].returncode not in (None, 0)
    assert not (settings.run / "1_try.done").exists()


def test_progress_shows_the_last_state_of_a_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n 10%|#\r 20%|##\r\n\n")
    assert demo.last_line(log) == "20%|##"
    log.write_bytes(b"")
    assert demo.last_line(log) == ""


def test_dice_table_has_cases_classes_and_means() -> None:
    def case(name: str, first: float, second: float) -> dict[str, object]:
        return {"metrics": {"1": {"Dice": first}, "(1, 2)": {"Dice": second}}, "reference_file": f"/x/{name}.nii.gz"}

    summary = {"metric_per_case": [case("a", 0.5, 1.0), case("b", float("nan"), 0.0)]}
    table = demo_report.dice_table(summary, {"background": 0, "RV": 1, "heart": [1, 2]})
    lines = [line.split() for line in table.splitlines()]
    assert lines == [
        ["Dice", "RV", "heart", "mean"],
        ["a", "0.500", "1.000", "0.750"],
        ["b", "-", "0.000", "0.000"],
        ["mean", "0.500", "0.500", "0.375"],
    ]


def test_patch_stays_inside_the_image() -> None:
    assert demo_report.patch_around([0, 9, 5], [10, 10, 4], [4, 4, 8]) == (slice(0, 4), slice(6, 10), slice(0, 4))


def test_picture_is_written(tmp_path: Path) -> None:
    phantom = phantoms.make_phantom(phantoms.PhantomConfig(shape=(8, 32, 40)), np.random.default_rng(0))
    labels = phantom.labels[4].astype(int)
    view = demo_report.View(phantom.images[0, 4], np.array([[3.0, 30.0]], np.float32), labels * 0, labels, 1.0)
    demo_report.draw(view, "a case", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
