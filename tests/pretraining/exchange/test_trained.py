"""Trained models without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import open_model
from pretraining.exchange import export_cli, trained

Write = Callable[..., Path]


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert export_cli.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def silence(model: Path) -> None:
    """Make the keypoint layers add nothing, as they do before the first step."""
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    network = open_model(model).build(open_model(model).folds[0])
    for level, layer in network.get_submodule("encoder.layers").named_children():
        last = [n for n, m in layer.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))][-1]
        for prefix in ("encoder.layers.", "decoder.encoder.layers."):
            for kind in ("weight", "bias"):
                if (name := f"{prefix}{level}.{last}.{kind}") in content["network_weights"]:
                    content["network_weights"][name] = torch.zeros_like(content["network_weights"][name])
    torch.save(content, file)


@pytest.mark.parametrize("network", ["plain", "kaf"])
def test_a_folder_predicts_without_this_package(network: str, write_model: Write, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model", network=network), tmp_path / "out"
    if network == "kaf":
        silence(model)
    ours = open_model(model)
    image = torch.randn(1, 1, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours.build(ours.folds[0])(image)
    assert export_cli.main([str(model), "--format", "nnunet", "-o", str(out)]) == 0
    assert "nnunetv2_kaf" not in (out / "plans.json").read_text()
    # nnU-Net's own predictor, in a process that cannot import this package
    code = f"""
import sys, importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nnunetv2_kaf", "pretraining", "nnunetv2_kaf_startup"):
            raise ModuleNotFoundError(name)
for name in [n for n in sys.modules if n.startswith("nnunetv2_kaf")]:
    del sys.modules[name]
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "KAFFinder"]
sys.meta_path.insert(0, Blocked())
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder({str(out)!r}, ("0",))
predictor.network.load_state_dict(predictor.list_of_parameters[0])
image = torch.randn(1, 1, 8, 24, 24, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(predictor.network.eval()(image), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_layers_that_take_part_are_a_clear_word(
    write_model: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    error = failing(capsys, model, "--format", "nnunet", "-o", out)
    for word in ("take part", "pip install nnunetv2-kaf", "--format onnx"):
        assert word in error
    assert not out.exists()
    plain = write_model(tmp_path / "plain", network="plain")
    assert "is the model itself" in failing(capsys, plain, "--format", "nnunet", "-o", plain, "--force")
    out.mkdir()
    assert "--force" in failing(capsys, plain, "--format", "nnunet", "-o", out)
    assert "does not exist" in failing(capsys, tmp_path / "none", "--format", "nnunet", "-o", tmp_path / "new")


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("channels", [1, 2])
def test_onnx_computes_what_torch_computes(ndim: int, channels: int, write_model: Write, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model", ndim=ndim, channels=channels, folds=("0", "1")), tmp_path / "net.onnx"
    assert export_cli.main([str(model), "--format", "onnx", "--fold", "1", "-o", str(out)]) == 0
    opened = open_model(model, ["1"])
    network = opened.build(opened.folds[0])
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    patch = [8, 24, 24][-ndim:]
    assert session.get_inputs()[0].shape == [1, channels, *patch]
    for seed in range(3):
        image = torch.randn(1, channels, *patch, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = network(image).numpy()
        found = session.run(None, {"image": image.numpy()})[0]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    constant = np.zeros((1, channels, *patch), np.float32)
    assert np.isfinite(session.run(None, {"image": constant})[0]).all(), "an image without keypoints"


def test_onnx_that_cannot_be_written(
    write_model: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = write_model(tmp_path / "model", network="plain", folds=("0", "1")), tmp_path / "net.onnx"
    assert "Choose with --fold" in failing(capsys, model, "--format", "onnx", "-o", out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        error = failing(capsys, model, "--format", "onnx", "--fold", "0", "-o", out)
        assert "pip install 'nnunetv2-kaf[onnx]'" in error

    class Other:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, *_: Any) -> list[np.ndarray]:
            return [np.zeros((1, 4, 8, 24, 24), np.float32)]

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Other)
        assert "computes something else" in failing(capsys, model, "--format", "onnx", "--fold", "0", "-o", out)
    assert not out.exists()
    out.write_text("of others")
    assert "--force" in failing(capsys, model, "--format", "onnx", "--fold", "0", "-o", out)
    assert out.read_text() == "of others"


def test_the_plans_of_the_folder_are_those_of_the_checkpoint(write_model: Write, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model", network="plain"), tmp_path / "out"
    trained.export_nnunet(model, out)
    content = torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert content["init_args"]["plans"] == json.loads((out / "plans.json").read_text())
    assert content["trainer_name"] == "nnUNetTrainer"
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(out), ("0",))
    assert type(predictor.network).__name__ == "PlainConvUNet"


def test_no_fold_of_an_earlier_export_is_left(write_model: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained.export_nnunet(write_model(tmp_path / "two", network="plain", folds=("0", "1")), out)
    (out / "notes.txt").write_text("mine")
    trained.export_nnunet(write_model(tmp_path / "one", network="plain"), out, force=True)
    assert nnUNetPredictor.auto_detect_available_folds(str(out), "checkpoint_final.pth") == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"], "nothing beside it is left"
    assert (out / "notes.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_the_earlier_one(write_model: Write, tmp_path: Path) -> None:
    out, model = tmp_path / "out", write_model(tmp_path / "two", network="plain", folds=("0", "1"))
    trained.export_nnunet(model, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (model / "fold_1" / "checkpoint_final.pth").write_bytes(b"damaged")
    (model / "plans.json").write_text((model / "plans.json").read_text() + " ")
    with pytest.raises(KAFError):
        trained.export_nnunet(model, out, force=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
