"""A run harms nothing that is there, knows what is wrong before it reads images, and stops when it diverges."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.locking import folder_lock
from nnunetv2_kaf.plans import kaf_plans
from pretraining import cli, distributed, prepare, recorder, run
from pretraining.checkpoint import FINAL, LATEST
from pretraining.loop import Trainer

SMALL = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))
Command = Callable[..., list[str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "a run's folder"


@pytest.fixture
def command(tiny: Any, fast: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(recorder, "plot_progress", lambda _, path: Path(path).write_bytes(b"png"))
    plans = {**kaf_plans(tiny.plans, SMALL), "plans_name": "SmallPlans"}
    (tiny.folder / "SmallPlans.json").write_text(json.dumps(plans))
    tiny.add_cases(5)

    def build(*more: str) -> list[str]:
        fixed = ["-d", "123", "-c", "2d", "-p", "SmallPlans", "--preset", "simclr", *fast, "--output", str(out)]
        return [*fixed, *more]

    return build


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def failing(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


# --- nothing is overwritten ---


def raise_kaf(*_: Any) -> Any:
    raise KAFError("no")


@pytest.mark.parametrize("stage", ["trackers", "first step", "disk full", "killed before the first save"])
def test_a_run_that_fails_before_its_first_save_hides_nothing(
    stage: str, command: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command()) == 0
    before = visible(out)
    assert {FINAL, LATEST, "progress.png", "pretraining.log"} <= before.keys()
    with monkeypatch.context() as patch:
        if stage == "trackers":
            patch.setattr(recorder, "open_trackers", raise_kaf)
        elif stage == "first step":
            patch.setattr(Trainer, "step", raise_kaf)
        elif stage == "disk full":

            def full(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("pretraining.checkpoint.torch.save", full)
        else:

            def killed(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(run._Run, "_save", killed)
        assert cli.main(command()) in (2, 130)
    assert visible(out) == before
    assert cli.main(command()) == 0
    after = visible(out)
    kept = {name: data for name, data in after.items() if ".bak-" in name}
    assert {data for data in before.values()} <= set(kept.values()), "everything of the earlier run is kept"
    assert after[FINAL] != b""
    assert "epoch 0/2" in after["pretraining.log"].decode(), "what happened before the first save is in the log as well"


def test_a_second_run_in_the_folder_is_refused(command: Command, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    with folder_lock(out, ""):
        code = f"import sys; from pretraining import cli; sys.exit(cli.main({command()!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"in use by process {os.getpid()}" in done.stderr
        assert "--output" in done.stderr
        assert visible(out) == {}


def test_an_output_that_is_a_file_or_read_only(
    command: Command, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_text("")
    assert str(out) in failing(capsys, command())
    out.unlink()

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nnunetv2_kaf.locking.FileLock.acquire", read_only)
    assert "cannot be locked or written to" in failing(capsys, command())


# --- divergence ---


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("step", [2, 4])
def test_diverged_weights_are_never_saved(
    value: float, step: int, command: Command, out: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original = Trainer.step

    def diverge(self: Trainer, batches: Any) -> dict[str, float]:
        sums = original(self, batches)
        if self.state.step == step:
            with torch.no_grad():
                next(self.state.model.parameters()).view(-1)[0] = value
        return sums

    monkeypatch.setattr(Trainer, "step", diverge)
    error = failing(capsys, command())
    assert f"diverged by step {step}" in error
    assert "--learning-rate" in error
    assert not (out / FINAL).exists()
    if step == 4:
        saved = torch.load(out / LATEST, weights_only=True)
        assert saved["step"] == 2
        assert all(torch.isfinite(v).all() for v in saved["model"].values())
    else:
        assert not (out / LATEST).exists()


# --- before images are read ---


def test_everything_that_can_be_known_is_known_before_images_are_read(
    command: Command, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command("--epochs", "1")) == 0

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("images were read")

    for place in ("read_whole", "KeypointCache"):
        monkeypatch.setattr(prepare, place, read)
    missing = str(tmp_path / "missing")
    assert "missing" in failing(capsys, command("--init", missing))
    assert "lower" not in failing(capsys, command("--continue", "--epochs", "7", "--seed", "3"))
    (tmp_path / "text.pth").write_text("text")
    assert "text.pth" in failing(capsys, command("--init", str(tmp_path / "text.pth")))
    assert "--fold is 99" in failing(capsys, command("--fold", "99"))
    assert "missing" in failing(capsys, command("--images", missing))
    monkeypatch.setenv("nnUNet_wandb_enabled", "maybe")
    assert "nnUNet_wandb_enabled" in failing(capsys, command())
    monkeypatch.delenv("nnUNet_wandb_enabled")
    (out / LATEST).write_bytes(b"half")
    assert LATEST in failing(capsys, command("--continue"))


@pytest.mark.parametrize(
    "options",
    [
        ("--fold", "\u00b2"), ("--seed", str(2**63)), ("--partitions", str(2**63), "--preset", "gcl"), ("--fold", "-1"),
        ("--seed", "-1"), ("--epochs", str(10**30)), ("--projection-dim", str(10**9)), ("--num-workers", "-1"),
        ("--learning-rate", "nan"), ("--learning-rate", "inf"), ("--weight-decay", "1e999"), ("--batch-size", "0"),
        ("--device", "abacus"), ("--dataset", "\u00b2"), ("--dataset", ""), ("--dataset", "../x"),
        ("--configuration", "../2d"), ("--plans", "../nnUNetPlans"), ("--plans", ""), ("--plans", "x" * 300),
        ("--patient-pattern", "("), ("--configuration", ""), ("--plans", "a\nb"),
    ],
)  # fmt: skip
def test_odd_options(options: tuple[str, ...], command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error" in failing(capsys, command(*options))


@pytest.mark.parametrize("option", ["--output", "--init", "--images"])
def test_empty_paths(option: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(command(option, ""))
    assert done.value.code == 2
    assert f"{option}: found '', expected a path" in capsys.readouterr().err


def test_case_names_as_long_as_the_file_system_takes(
    tiny: Any, command: Command, make_texture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for letter in "ab":
        tiny.add(letter * 225, make_texture((1, 10, 28, 20), 3))
    assert cli.main(command("--fold", "all")) == 0
    assert len(list(tiny.folder.rglob("aaa*.npy"))) == 1


@pytest.mark.parametrize(
    "variables", [{}, {"RANK": "0"}, {"RANK": "5"}, {"RANK": "\u00b2"}, {"RANK": "0", "MASTER_ADDR": "localhost"}]
)
def test_a_left_over_world_size(
    variables: dict[str, str], command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    assert "unset WORLD_SIZE" in failing(capsys, command())
    assert not distributed.is_distributed()


def test_the_printed_command_is_quoted(
    tiny: Any, command: Command, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command()) == 0
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: ")
    words = shlex.split(last)
    assert f"KAF_PRETRAINED={out / FINAL}" in words
