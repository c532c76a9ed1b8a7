from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunetv2_kaf import doctor
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.model_needs import Needs, needs_of
from nnunetv2_kaf.probes import Probe, discovery_of, run_probe

Write = Callable[..., Path]
NAME = "nnUNetTrainerKAF__nnUNetPlans__3d_fullres"


@pytest.fixture
def zipped(write_model: Write, tmp_path: Path) -> Path:
    model = write_model(tmp_path / "Dataset900_Phantom" / NAME)
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in model.rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
    return path


def test_a_zip_and_a_folder_name_what_they_need(zipped: Path, tmp_path: Path, write_model: Write) -> None:
    needed = Needs(NAME, "nnUNetTrainerKAF", ("nnunetv2_kaf.unet.KAFUNet",))
    assert needs_of(zipped) == needs_of(tmp_path / "Dataset900_Phantom") == [needed]
    assert needs_of(tmp_path / "Dataset900_Phantom" / NAME) == [needed]
    assert needed.package
    plain = write_model(tmp_path / "plain" / "nnUNetTrainer__nnUNetPlans__3d_fullres", network="plain")
    assert not needs_of(plain)[0].package


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04half", b"text"])
def test_files_that_are_no_models(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    with pytest.raises(KAFError, match=r"--model .*model\.zip"):
        needs_of(path)
    for missing in (tmp_path / "missing.zip", tmp_path):
        with pytest.raises(KAFError, match="--model"):
            needs_of(missing)


@pytest.mark.parametrize(
    "plans", ["[]", "3", "{", '{"configurations": 3}', '{"configurations": {"a": 3}}', "[" * 10**5]
)
def test_odd_plans(plans: str, tmp_path: Path) -> None:
    folder = tmp_path / "nnUNetTrainer__P__2d"
    folder.mkdir()
    (folder / "plans.json").write_text(plans)
    try:
        assert needs_of(folder)[0].networks == ()
    except KAFError as error:
        assert str(folder) in str(error)  # noqa: PT017 (either is right)


def test_a_folder_cannot_name_code(tmp_path: Path) -> None:
    folder = tmp_path / "x'); import os; os.system('touch y') #__P__2d"
    folder.mkdir()
    (folder / "plans.json").write_text(json.dumps({"configurations": {}}))
    with pytest.raises(KAFError, match="names no trainer"):
        needs_of(folder)


OURS = Needs(NAME, "nnUNetTrainerKAF", ("nnunetv2_kaf.unet.KAFUNet",))
THEIRS = Needs("MyTrainer__P__2d", "MyTrainer", ())


def test_what_is_there_and_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Probe({"nnUNetTrainerKAF": {"module": "nnunetv2_kaf.trainer"}, "MyTrainer": {"module": None}})
    ok, fail = doctor.check_models([OURS, THEIRS], here)
    assert (ok.status, fail.status) == ("ok", "fail")
    assert "where it predicts: pip install 'nnunetv2-kaf" in ok.found
    assert "Could not find requested nnunet trainer MyTrainer" in fail.found
    assert "nnUNet_extTrainer" in fail.fix
    missing = doctor.check_models([OURS], Probe({"nnUNetTrainerKAF": {"module": None}}))[0]
    assert missing.fix.startswith("pip install")
    subclass = Needs("MyKAFTrainer__P__2d", "MyKAFTrainer", OURS.networks)
    fix = doctor.check_models([subclass], Probe({"MyKAFTrainer": {"module": None}}))[0].fix
    assert fix.startswith("copy the trainer's file"), "the package is here"
    monkeypatch.setattr(doctor, "_installed", lambda: False)
    fix = doctor.check_models([subclass], Probe({"MyKAFTrainer": {"module": None}}))[0].fix
    assert fix.startswith("pip install nnunetv2-kaf; copy the trainer's file")
    assert doctor.check_models([OURS], Probe(error="torch is broken"))[0].found == "torch is broken"
    broken = doctor.check_models([OURS], Probe({"nnUNetTrainerKAF": {"error": "ImportError: x"}}))[0]
    assert "ImportError: x" in broken.found


def test_the_command(zipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def answer(code: str, timeout_s: float) -> Probe:
        asked.append(code)
        return Probe(error="not asked in this test")

    monkeypatch.setattr(doctor, "run_probe", answer)
    assert doctor.main(["--model", str(zipped), "--no-compile"]) == 1
    assert f"model {NAME}" in capsys.readouterr().out
    assert any("places.update({'nnUNetTrainerKAF'" in code for code in asked)
    assert doctor.main(["--model", str(zipped) + "x"]) == 2
    assert "kaf-doctor: error: --model" in capsys.readouterr().err


@pytest.mark.integration
def test_the_probe_is_asked_for_more_trainers() -> None:
    probe = run_probe(discovery_of(["nnUNetTrainerNoMirroring", "MyTrainer"]), 300)
    assert probe.error == ""
    assert "nnunetv2" in probe.answer["nnUNetTrainerNoMirroring"]["module"]
    assert probe.answer["MyTrainer"] == {"module": None}


def test_trainers_in_a_folder_of_the_users_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnunetv2 looks there from 2.8 on")
    (tmp_path / "mine.py").write_text(
        "from nnunetv2_kaf.trainer import nnUNetTrainerKAF\n\n\nclass MyKAFTrainer(nnUNetTrainerKAF):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    answer = run_probe(discovery_of(["MyKAFTrainer", "NoSuchTrainer"]), 300).answer
    assert answer["MyKAFTrainer"] == {"module": "mine"}
    assert answer["NoSuchTrainer"] == {"module": None}
