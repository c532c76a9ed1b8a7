"""Trained models for machines without this package: as a model folder of nnU-Net alone, or as ONNX."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunetv2_kaf.architecture import NETWORK_CLASS
from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.inspect.model import FINAL, TrainedModel, open_model
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.weights import first_convolution
from pretraining.exchange.nnssl import plain_architecture, plain_weights

logger = logging.getLogger(__name__)

TRAINER = "nnUNetTrainer"
TOLERANCE = 1e-4
"""Largest difference between the outputs of torch and of onnxruntime, as a share of the largest output."""
_DISK = "Free some space or check the permissions, and export again."


def export_nnunet(folder: str | Path, out: str | Path, *, force: bool = False) -> str:
    """Write a model folder that predicts with nnU-Net alone, without this package.

    That is possible for a network without keypoint layers, and for one whose layers add exactly nothing (their last
    convolution is zero, as at the start of a training).

    Args:
        folder: TRAINER__PLANS__CONFIGURATION in nnUNet_results.
        out: Model folder to write.
        force: Replace the model in `out` if it exists, all folds of it.

    Returns:
        What was written, in words.

    Raises:
        KAFError: The model cannot be read, its layers take part, or `out` exists or cannot be written.
    """
    model, out = open_model(folder), Path(out)
    if out.exists() and (out.samefile(model.folder) or not force):
        same = out.samefile(model.folder)
        raise KAFError(f"-o {out} {'is the model itself' if same else 'exists'}. Name another folder{_or_force(same)}.")
    plans = json.loads(json.dumps(dict(model.plans)))
    if model.is_kaf:
        _check_silent(model)
        for name, entry in plans["configurations"].items():
            # what inherits its architecture keeps inheriting it
            if entry.get("architecture", {}).get("network_class_name") == NETWORK_CLASS:
                entry["architecture"] = plain_architecture(entry["architecture"], model.folder / f"plans.json ({name})")
    with _replacing_model(out) as new:
        _write_json(plans, new / "plans.json")
        _write_json(dict(model.dataset_json), new / "dataset.json")
        fingerprint = model.folder / "dataset_fingerprint.json"
        if fingerprint.is_file():
            shutil.copyfile(fingerprint, new / fingerprint.name)
        for fold in model.folds:
            content = load_safely(fold.folder / FINAL)
            content["network_weights"] = plain_weights(content["network_weights"])
            content["trainer_name"] = TRAINER
            content["init_args"] = {**content["init_args"], "plans": plans}
            content.pop("optimizer_state", None)  # of other parameters; prediction needs none
            with replacing(new / f"fold_{fold.name}" / FINAL, _DISK) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
    folds = ", ".join(fold.name for fold in model.folds)
    return f"Model:      {out} (trainer {TRAINER}, fold(s) {folds}); nnU-Net alone predicts with it"


def export_onnx(folder: str | Path, out: str | Path, *, fold: str | None = None, force: bool = False) -> str:
    """Write the network of one fold as ONNX, for one patch at a time, and compare it with torch.

    Input: (1, channels, *patch), normalised and resampled as nnU-Net does it; output: logits (1, classes, *patch). What
    nnU-Net does around the network (sliding window, mirroring, resampling) is not part of it.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION in nnUNet_results.
        out: File to write.
        fold: Fold whose network; None = the only one.
        force: Replace `out` if it exists.

    Returns:
        What was written, in words.

    Raises:
        KAFError: The model cannot be read, a package is missing, the network cannot be exported, its ONNX form computes
            something else, or `out` exists or cannot be written.
    """
    out = Path(out)
    if out.exists() and (out.is_dir() or not force):
        raise KAFError(f"-o {out} {'is a folder' if out.is_dir() else 'exists'}. Name another file{_or_force(False)}.")
    runtime = _onnx_packages()
    model = open_model(folder, None if fold is None else [fold])
    if len(model.folds) != 1:
        raise KAFError(f"{folder} has the folds {[f.name for f in model.folds]}; expected one. Choose with --fold.")
    network = model.build(model.folds[0])
    patch = resolve_configuration(model.plans, model.configuration)["patch_size"]
    channels = _input_channels(network)
    example = torch.randn(1, channels, *patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(example).numpy()
    with replacing(out, _DISK) as temporary:
        try:
            torch.onnx.export(
                network, (example,), str(temporary), input_names=["image"], output_names=["logits"],
                dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
            session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            found = session.run(None, {"image": example.numpy()})[0]
        except Exception as error:  # the exporter and the runtime have many
            raise KAFError(
                f"{folder}: the network cannot be exported as ONNX ({type(error).__name__}: {one_line(error)[:300]}). "
                "Update torch, onnx, onnxscript and onnxruntime."
            ) from error
        difference = float(np.abs(found - expected).max())
        allowed = TOLERANCE * float(np.abs(expected).max())
        if found.shape != expected.shape or not difference <= allowed:
            raise KAFError(
                f"{folder}: the ONNX form computes something else: found a largest difference of {difference:.3g}, "
                f"expected at most {allowed:.3g}. Nothing was written. Update torch, onnx, onnxscript and onnxruntime."
            )
    return (
        f"ONNX:       {out}\n"
        f"Input:      image (1, {channels}, {', '.join(map(str, patch))}), float32; output: logits {expected.shape}\n"
        f"Compared:   onnxruntime differs from torch by at most {difference:.3g} (outputs up to "
        f"{np.abs(expected).max():.3g})"
    )


@contextmanager
def _replacing_model(out: Path) -> Iterator[Path]:
    """A new folder whose files come into `out` when all are written; checkpoints of other folds in there are removed.

    nnU-Net predicts with every fold that it finds: none may be left of an earlier export.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        new = Path(name)
        yield new
        for old in out.glob(f"fold_*/{FINAL}"):
            old.unlink()
        for file in [path for path in new.rglob("*") if path.is_file()]:
            target = out / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def _check_silent(model: TrainedModel) -> None:
    """Raise a KAFError if the keypoint layers of a model take part."""
    for fold in model.folds:
        network = model.build(fold)
        encoder: Any = network.get_submodule("encoder")
        fusion = encoder.config.fusion
        loud = [level for level, layer in encoder.layers.named_children() if not _is_zero(layer)]
        if fusion != "add" or loud:
            raise KAFError(
                f"{model.folder}, fold {fold.name}: its keypoint layers take part in what it predicts (levels "
                f"{', '.join(loud) or 'all'}, {fusion} fusion), and nnU-Net's own networks have no such layers. "
                "Install nnunetv2-kaf where it is to predict (pip install nnunetv2-kaf), or export --format onnx."
            )


def _is_zero(layer: nn.Module) -> bool:
    """Whether a keypoint layer adds exactly nothing: whatever it is given, its last convolution gives zero."""
    last: Any = [module for module in layer.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))][-1]
    return not any(bool(parameter.any()) for parameter in last.parameters())


def _input_channels(network: nn.Module) -> int:
    return int(network.state_dict()[first_convolution(network)[0]].shape[1])


def _onnx_packages() -> Any:
    """The runtime.

    Raises:
        KAFError: A package is missing.
    """
    try:
        import onnx  # noqa: F401 (torch imports it)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise KAFError(
            f"--format onnx needs onnx, onnxscript and onnxruntime ({error}). Run: pip install 'nnunetv2-kaf[onnx]'"
        ) from error
    return onnxruntime


def _or_force(same: bool) -> str:
    return "" if same else ", or replace it with --force"


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    with replacing(path, _DISK) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
