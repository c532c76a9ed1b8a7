"""The pretraining checkpoint: what is in it, atomic writing, strict loading with a report.

A checkpoint holds tensors and primitives only, so it loads with `weights_only=True`. Its `network_weights` are the full
state dict of the `KAFUNet` that the plans describe: nnU-Net's own `-pretrained_weights` accepts it too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.unet import KAFUNet

FORMAT = "nnunetv2_kaf.pretraining"
FORMAT_VERSION = 1
# what may differ between pretraining and fine-tuning: the decoder, and the voxel size of another dataset
_NOT_ENCODER = ("n_conv_per_stage_decoder", "deep_supervision", "spacing")


@dataclass(frozen=True)
class LoadReport:
    """What initialised a network.

    Attributes:
        source: checkpoint path, or None for random initialisation.
        sha256: of the file.
        tensors: tensors copied, by module.
        note: why, in words.
    """

    source: str | None
    sha256: str | None
    tensors: dict[str, int]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "tensors_loaded": sum(self.tensors.values()), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("nnunetv2-kaf", "nnunetv2", "dynamic-network-architectures"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def atomic_save(obj: object, path: str | Path) -> None:
    """`torch.save` to a temporary file beside `path`, flushed to disk, then renamed over it.

    Raises:
        KAFError: the file could not be written; a file that was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            torch.save(obj, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise KAFError(
            f"could not save {path}: {error}. Free on that disk: {_free_space(path.parent)}. The previous file of this "
            "name, if there was one, is untouched. Free some space or check the permissions, then continue the run."
        ) from error


def save_pretraining_checkpoint(
    path: str | Path,
    network: KAFUNet,
    *,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_name: str,
    fold: int | str,
    pretraining: Mapping[str, Any],
) -> None:
    """Write a checkpoint that `load_encoder` and nnU-Net's `-pretrained_weights` accept.

    Args:
        path: file to write, atomically.
        network: the full network; its encoder is what was trained.
        plans: KAF plans (JSON types) that the network was built from.
        configuration: configuration of the plans.
        dataset_name: DatasetXXX_Name.
        fold: whose validation cases were left out, or "all".
        pretraining: options and results of the pretraining, JSON types.

    Raises:
        KAFError: the file could not be written.
    """
    checkpoint = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network_weights": {k: v.detach().cpu().clone() for k, v in network.state_dict().items()},
        "architecture": _architecture(plans, configuration),
        "num_input_channels": _input_channels(network),
        "trained_modules": ["encoder"],
        "dataset_name": dataset_name,
        "configuration": configuration,
        "fold": fold,
        "plans": dict(plans),
        "pretraining": dict(pretraining),
        "versions": versions(),
    }
    atomic_save(checkpoint, path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and check a pretraining checkpoint.

    Raises:
        KAFError: the file is missing, truncated, or not a pretraining checkpoint of a known format.
    """
    path = Path(path)
    if not path.is_file():
        raise KAFError(f"pretraining checkpoint {path} does not exist. Run kaf-pretrain, or correct the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise KAFError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint; it is truncated or of another kind "
            f"({type(error).__name__}). Run kaf-pretrain again, or name another file."
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise KAFError(
            f"{path} is not a pretraining checkpoint of nnunetv2-kaf. Expected a file written by kaf-pretrain "
            "(checkpoint_final.pth); a checkpoint of an nnU-Net training is given with -pretrained_weights instead."
        )
    if checkpoint.get("format_version") != FORMAT_VERSION:
        raise KAFError(
            f"{path} has format version {checkpoint.get('format_version')}, this nnunetv2-kaf reads {FORMAT_VERSION}. "
            "Install the version that wrote it, or pretrain again."
        )
    return checkpoint


def load_encoder(network: nn.Module, path: str | Path, plans: Mapping[str, Any], configuration: str) -> LoadReport:
    """Initialise the encoder of `network` from a pretraining checkpoint, completely or not at all.

    Args:
        network: the `KAFUNet` of `plans`, not wrapped.
        path: pretraining checkpoint.
        plans: KAF plans that the network was built from.
        configuration: its configuration.

    Returns:
        How many tensors of which modules were loaded.

    Raises:
        KAFError: the checkpoint cannot be read or was made for another network; both configurations are named.
    """
    checkpoint = read_checkpoint(path)
    theirs = f"{checkpoint['dataset_name']}, {checkpoint['plans']['plans_name']}, {checkpoint['configuration']}"
    ours = f"{plans['dataset_name']}, {plans['plans_name']}, {configuration}"
    differences = _differences(checkpoint, network, plans, configuration)
    source = checkpoint["network_weights"]
    target = {k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    if not differences:
        keys = set(target) ^ {k for k in source if k.startswith("encoder.")}
        shapes = [k for k in target if k in source and source[k].shape != target[k].shape]
        differences = [f"tensor {k}" for k in sorted([*keys, *shapes])[:5]]
    if differences:
        raise KAFError(
            f"the pretraining checkpoint {path} does not fit. It was made for ({theirs}), this training is ({ours}); "
            f"they differ in: {'; '.join(differences)}. Pretrain for these plans (kaf-pretrain --dataset ... "
            f"-c {configuration} -p {plans['plans_name']}), or set KAF_PRETRAINED=none to start from scratch."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
    modules = Counter(".".join(name.split(".")[:2]) for name in target)
    return LoadReport(str(path), _sha256(path), dict(modules), f"pretrained on ({theirs}), fold {checkpoint['fold']}")


def _architecture(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    architecture: dict[str, Any] = resolve_configuration(plans, configuration)["architecture"]
    return architecture


def _input_channels(network: nn.Module) -> int:
    channels: int = network.get_submodule("encoder").input_channels  # type: ignore[assignment]
    return channels


def _differences(
    checkpoint: Mapping[str, Any], network: nn.Module, plans: Mapping[str, Any], configuration: str
) -> list[str]:
    """Options of the encoder in which a checkpoint and a network differ, as 'option: theirs / ours'."""
    theirs, ours = checkpoint["architecture"]["arch_kwargs"], _architecture(plans, configuration)["arch_kwargs"]
    theirs = {**theirs, **{f"kaf.{k}": v for k, v in theirs["kaf"].items()}, "kaf": None}
    ours = {**ours, **{f"kaf.{k}": v for k, v in ours["kaf"].items()}, "kaf": None}
    found = [
        f"{key}: checkpoint {_plain(theirs.get(key))}, training {_plain(ours.get(key))}"
        for key in sorted(set(theirs) | set(ours))
        if key not in _NOT_ENCODER and _plain(theirs.get(key)) != _plain(ours.get(key))
    ]
    channels = _input_channels(network)
    if checkpoint["num_input_channels"] != channels:
        found.append(f"input channels: checkpoint {checkpoint['num_input_channels']}, training {channels}")
    return found


def _plain(value: Any) -> Any:
    """Tuples as lists, so that plans compare equal before and after JSON."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _sha256(path: str | Path) -> str:
    with Path(path).open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"
