from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining import cli
from pretraining.config import PretrainConfig, flag


def test_every_option_has_a_flag_with_help_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for item in fields(PretrainConfig):
        assert flag(item.name) in text
    words = "--dataset --configuration --plans --device --fold --continue --num-workers --images --skip-bad --init"
    for word in (words + " --output --compile --preset").split():
        assert word in text
    assert "(default: 0.1)" in text


def test_flags_reach_the_config() -> None:
    parse = cli.build_parser().parse_args
    parsed = parse(["-d", "4", "27", "-c", "2d", "--batch-size", "7", "--radius-mm", "2.5"])
    assert parsed.dataset == ["4", "27"]
    assert cli._config(parsed) == PretrainConfig(batch_size=7, radius_mm=2.5)


def test_options_beside_a_preset_win() -> None:
    arguments = ["-d", "4", "-c", "2d", "--preset", "gcl", "--partitions", "7", "--weight-local", "0.5"]
    config = cli._config(cli.build_parser().parse_args(arguments))
    assert config == PretrainConfig.from_preset("gcl", {"partitions": 7, "weight_local": 0.5})
    assert config.components == {"bottleneck": 1.0, "local": 0.5}


def test_help_does_not_import_torch() -> None:
    code = "import sys, pretraining.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "999", "-c", "2d"], "Dataset123_Tiny"),
        (["-d", "123", "-c", "4d"], "3d_fullres"),
        (["-d", "123", "-c", "2d", "-p", "Mine"], "found: nnUNetPlans"),
        (["-d", "123", "-c", "2d", "--epochs", "0"], "--epochs"),
        (["-d", "123", "-c", "2d", "--fold", "first"], "--fold"),
        (["-d", "123", "-c", "2d", "--device", "tpu"], "cpu"),
        (["-d", "123", "-c", "2d", "--num-workers", "-1"], "--num-workers"),
        (["-d", "123", "-c", "2d", "--device", "cpu"], "nnUNetv2_preprocess -d 123 -plans_name nnUNetPlans -c 2d"),
        (["-d", "123", "-c", "3d_cascade_fullres"], "non-cascade"),
        (["-d", "123", "-c", "2d", "--network", "plain"], "--preset simclr, gcl or pcl"),
        (["-d", "123", "-c", "2d", "--patient-pattern", "(p"], "--patient-pattern"),
        (["-d", "123", "-c", "2d", "--images", "/no/such/folder"], "nnUNetv2_preprocess"),
    ],
)
def test_bad_input_exits_with_2_and_no_traceback(
    tiny: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "kaf-pretrain: error: " in error
    assert message in error
    assert "Traceback" not in error


def test_devices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with caplog.at_level("INFO"):
        assert cli.choose_device(None) == torch.device("cpu")
    assert "Device: cpu" in caplog.text
    with pytest.raises(KAFError, match="not available"):
        cli.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.choose_device(None) == torch.device("cuda")
    with pytest.raises(KAFError, match="not available"):
        cli.choose_device("cuda:3")


def test_an_interrupt_says_how_to_go_on(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["-d", "123", "-c", "2d"]) == 130
    assert "--continue" in capsys.readouterr().err
