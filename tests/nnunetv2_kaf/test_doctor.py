"""kaf-doctor: each check on good and bad findings, the table, and the exit code."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_kaf import doctor
from nnunetv2_kaf.doctor import Check
from nnunetv2_kaf.probes import Probe, run_probe

FOUND: dict[str, Any] = {
    "startup": True,
    "finder": True,
    "nnUNetTrainerKAF": {"module": "nnunetv2_kaf.trainer"},
    "nnUNetTrainerKAFSemi": {"module": "semisupervised.trainer"},
    "nnUNetPlannerKAF": {"module": "nnunetv2_kaf.planner"},
}
TORCH: dict[str, Any] = {"cuda": [], "mps": False, "cpu_build": False, "torchvision": "0.20"}


@pytest.fixture(autouse=True)
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in doctor.PATH_VARIABLES:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    return tmp_path


def test_probe_answers_although_the_child_prints() -> None:
    assert run_probe("print('nnU-Net says hello')\nanswer['x'] = [1, None]", 60) == Probe(answer={"x": [1, None]})


def test_probe_returns_the_error_and_not_the_advice_after_it() -> None:
    code = "sys.stderr.write('ValueError: first\\n')\nsys.stderr.write('set VERBOSE for more\\n')\nsys.exit(3)"
    assert run_probe(code, 60).error == "ValueError: first"
    assert "status 3" in run_probe("sys.exit(3)", 60).error
    assert run_probe("import no_such_package", 60).error == "ModuleNotFoundError: No module named 'no_such_package'"


def test_probe_ends_a_child_that_hangs() -> None:
    slow = run_probe("import time\ntime.sleep(60)", 0.5)
    assert slow.error == "no answer within 0.5 s"
    # nothing has to be installed again for that
    for check in (doctor.check_torchvision(slow), doctor.check_device(slow), doctor.check_discovery(slow, "X")):
        assert (check.status, check.fix) == ("fail", "give it more time: kaf-doctor --timeout 1000")


def test_probe_does_not_see_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "only_here" in run_probe("import only_here", 60).error


@pytest.mark.parametrize(
    ("answer", "status", "found", "fix"),
    [
        (FOUND, "ok", "nnunetv2_kaf.trainer", ""),
        ({**FOUND, "nnUNetTrainerKAF": {"error": "ImportError: x"}}, "fail", "ImportError: x", "import fails"),
        ({**FOUND, "nnUNetTrainerKAF": {"module": "nnunetv2.copy"}}, "fail", "nnunetv2.copy", "rename or remove"),
        ({**FOUND, "nnUNetTrainerKAF": {"module": None}}, "fail", "not found", "--force-reinstall"),
        ({**FOUND, "nnUNetTrainerKAF": {"module": None}, "finder": False}, "fail", ".pth was not read", "activate()"),
        (
            {"nnUNetTrainerKAF": {"module": None}, "finder": False, "startup": False},
            "fail",
            "not installed",
            "pip install",
        ),
    ],
)
def test_discovery(answer: dict[str, Any], status: str, found: str, fix: str) -> None:
    check = doctor.check_discovery(Probe(answer), "nnUNetTrainerKAF")
    assert check.status == status
    assert found in check.found
    assert fix in check.fix


def test_discovery_shows_the_error_of_nnunets_own_search() -> None:
    check = doctor.check_discovery(Probe(error="RuntimeError: operator torchvision::nms does not exist"), "X")
    assert (check.status, check.found) == ("fail", "RuntimeError: operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("installed", "status"), [("2.7", "ok"), ("2.8.1", "ok"), ("2.10.0", "ok"), ("2.6.4", "fail"), ("2.7+local", "ok")]
)
def test_package_versions(monkeypatch: pytest.MonkeyPatch, installed: str, status: str) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: installed)
    assert doctor.check_package("nnunetv2", "2.7", "upgrade").status == status


def test_package_that_is_not_installed() -> None:
    check = doctor.check_package("no-such-distribution", fix="install it")
    assert (check.status, check.fix) == ("fail", "install it")


def test_torchvision_that_does_not_fit() -> None:
    broken = {"cuda": [], "mps": False, "cpu_build": True, "torchvision_error": "RuntimeError: torchvision::nms"}
    check = doctor.check_torchvision(Probe(broken))
    assert check.status == "fail"
    assert "CPU-only build" in check.fix
    assert doctor.check_torchvision(Probe(TORCH)).status == "ok"
    assert doctor.check_torchvision(Probe(error="ImportError: libcudart")).status == "fail"


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "A100" in doctor.check_device(Probe({**TORCH, "cuda": ["A100"]})).found
    assert "mps" in doctor.check_device(Probe({**TORCH, "mps": True})).found
    assert doctor.check_device(Probe(TORCH)).status == "ok"
    assert doctor.check_device(Probe(error="no torch")).status == "fail"
    driver = doctor.check_device(Probe({"cuda_error": "RuntimeError: CUDA error: unknown error", "mps": False}))
    assert (driver.status, "driver" in driver.fix) == ("fail", True)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.check_device(Probe(TORCH)).status == "warn"


def test_compile_matters_only_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, died = Probe({**TORCH, "cuda": ["A100"]}), Probe(error="ImportError: libcudart")
    assert doctor.check_compile(Probe({"device": "cuda"}), gpu).status == "ok"
    failed = Probe(error="RuntimeError: no C++ compiler")
    assert doctor.check_compile(failed, Probe(TORCH)).status == "warn"
    assert doctor.check_compile(failed, died).status == "warn"
    assert doctor.check_compile(failed, gpu).status == "fail", "also where there is no nvidia-smi"
    assert "nnUNet_compile=f" in doctor.check_compile(failed, gpu).fix
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.check_compile(failed, died).status == "fail"
    assert doctor.check_compile(failed, Probe(TORCH)).status == "warn", "torch knows better"
    monkeypatch.setenv("nnUNet_compile", "f")
    assert doctor.check_compile(failed, gpu).status == "warn"


def test_path_variables(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_path_variable("nnUNet_raw") == Check("nnUNet_raw", "ok", str(paths / "nnUNet_raw"))
    assert not list((paths / "nnUNet_raw").iterdir()), "the test of writing must leave nothing"
    monkeypatch.delenv("nnUNet_raw")
    assert "export nnUNet_raw=" in doctor.check_path_variable("nnUNet_raw").fix
    monkeypatch.setenv("nnUNet_raw", str(paths / "missing"))
    assert "mkdir -p" in doctor.check_path_variable("nnUNet_raw").fix


def test_a_folder_that_may_not_be_entered_is_a_finding(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", denied)
    monkeypatch.setattr(Path, "is_dir", denied)
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: False)  # what it says of such a folder
    check = doctor.check_path_variable("nnUNet_results")
    assert (check.status, "can be entered" in check.found) == ("fail", True)
    assert doctor.check_disk_space("nnUNet_results").status == "warn"
    assert [check.status for check in doctor.check_checkpoints()] == ["ok"]


def test_read_only_folder_is_an_error_except_for_raw_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    assert doctor.check_path_variable("nnUNet_raw").status == "warn"
    assert doctor.check_path_variable("nnUNet_results").status == "fail"


@pytest.mark.parametrize(("free_gb", "status"), [(50, "ok"), (5, "warn"), (0.5, "fail")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, free_gb: float, status: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, free_gb * 1e9))
    assert doctor.check_disk_space("nnUNet_results").status == status


def test_checkpoints(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nothing,) = doctor.check_checkpoints()
    assert nothing.status == "ok"
    folder = paths / "nnUNet_results" / "Dataset004_X" / "KAFPretraining__nnUNetPlans__2d" / "fold_all"
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.pth").write_bytes(b"not a checkpoint")
    (check,) = doctor.check_checkpoints()
    assert check.status == "fail"
    assert "Dataset004_X" in check.found
    assert "kaf-pretrain" in check.fix
    monkeypatch.setattr("nnunetv2_kaf.weights.read_checkpoint", lambda path: {})
    (check,) = doctor.check_checkpoints()
    assert check.status == "ok"
    monkeypatch.delenv("nnUNet_results")
    assert len(doctor.check_checkpoints()) == 1


def test_table_aligns_and_shows_the_fix_only_where_something_is_wrong() -> None:
    table = doctor.format_table([Check("a", "ok", "1", "unused"), Check("long name", "fail", "2", "do this")])
    lines = table.splitlines()
    assert lines[0] == "OK    a          1"
    assert lines[1] == "FAIL  long name  2"
    assert lines[2].strip() == "-> do this"
    assert "unused" not in table
    assert lines[-1] == "1 of 2 checks failed."


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Any, code: int) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda *_: [Check("x", status, "y", "z")])
    assert doctor.main(["--no-compile"]) == code
    assert status.upper() in capsys.readouterr().out


def test_json_holds_every_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Check("a", "ok", "1"), Check('"b"', "fail", "<2>", "do this")]
    monkeypatch.setattr(doctor, "run_checks", lambda *_: found)
    assert doctor.main(["--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["failed"] == 1
    assert [Check(**check) for check in answer["checks"]] == found


def test_run_checks_asks_three_interpreters_and_two_without_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def probe(code: str, timeout_s: float) -> Probe:
        asked.append(code)
        return Probe({**FOUND, **TORCH, "device": "cpu"})

    monkeypatch.setattr(doctor, "run_probe", probe)
    names = [check.name for check in doctor.run_checks(1.0, with_compile=True)]
    assert len(asked) == 3
    assert "torch.compile" in names
    assert "torch.compile" not in [check.name for check in doctor.run_checks(1.0, with_compile=False)]


def test_help_explains_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--help"])
    assert stopped.value.code == 0
    assert "Exit status" in capsys.readouterr().out


def test_doctor_runs_where_torch_cannot_be_imported() -> None:
    """The doctor's own import must not need what it examines."""
    code = "sys.modules.update(torch=None, nnunetv2=None)\nimport nnunetv2_kaf.doctor\nanswer['ok'] = True"
    assert run_probe(f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{code}", 60).answer == {"ok": True}
