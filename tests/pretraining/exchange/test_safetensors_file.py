from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans
from nnunetv2_kaf.weights import read_checkpoint, save_pretraining_checkpoint
from pretraining.exchange import export_cli
from pretraining.exchange.interop import initialize_encoder
from pretraining.exchange.safetensors_file import read_safetensors

SMALL = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))


@pytest.fixture
def exported(tiny: Any, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    plans = kaf_plans(tiny.plans, SMALL)
    entry = plans["configurations"]["3d_fullres"]["architecture"]
    source, out = tmp_path / "checkpoint_final.pth", tmp_path / "shared.safetensors"
    save_pretraining_checkpoint(
        source, build_network(entry, 1, 2, where="test"), plans=plans, configuration="3d_fullres", num_input_channels=1,
        dataset_name="Dataset123_Tiny", fold=0, pretraining={"cases": ["patient_jane"]},
    )  # fmt: skip
    assert export_cli.main([str(source), "--format", "safetensors", "-o", str(out)]) == 0
    return source, out, entry


def test_everything_makes_the_round_trip(exported: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, entry = exported
    expected = read_checkpoint(source)["network_weights"]
    found = read_safetensors(out)
    assert found["network_weights"].keys() == expected.keys()
    assert all(torch.equal(found["network_weights"][name], value) for name, value in expected.items())
    assert found["nnssl_adaptation_plan"]["key_to_encoder"] == "encoder.stages"
    assert b"patient_jane" not in out.read_bytes()
    stored = load_file(out)
    assert len(stored) < len(expected), "a tensor with several names is stored once"
    assert out.stat().st_size < 1.3 * source.stat().st_size
    fresh = build_network(entry, 1, 2, where="test")
    report = initialize_encoder(fresh, out, 1)
    assert report.left == {}
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in expected.items() if k.startswith("encoder."))


def test_weights_of_others_without_metadata(exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    source, _, entry = exported
    weights = {k: v for k, v in read_checkpoint(source)["network_weights"].items() if k.startswith("encoder.")}
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "theirs.safetensors")
    assert initialize_encoder(build_network(entry, 1, 2, where="test"), tmp_path / "theirs.safetensors", 1).left == {}


@pytest.mark.parametrize(
    "damage", [lambda d: d[:100], lambda d: b"", lambda d: d[:8] + b"[" + d[9:], lambda d: b"x" * 40]
)
def test_damaged_files(exported: tuple[Path, Path, dict[str, Any]], damage: Any) -> None:
    _, out, entry = exported
    out.write_bytes(damage(out.read_bytes()))
    with pytest.raises(KAFError, match=r"shared\.safetensors cannot be read as safetensors"):
        initialize_encoder(build_network(entry, 1, 2, where="test"), out, 1)
    with pytest.raises(KAFError, match="does not exist"):
        read_safetensors(out.with_name("missing.safetensors"))


def test_aliases_of_nothing(exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"aliases": '{"b": "c"}'})
    with pytest.raises(KAFError, match=r"odd\.safetensors"):
        read_safetensors(path)


def test_without_the_package(
    exported: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, _ = exported
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert export_cli.main([str(source), "--format", "safetensors", "-o", str(out), "--force"]) == 2
    assert "pip install 'nnunetv2-kaf[hub]'" in capsys.readouterr().err
