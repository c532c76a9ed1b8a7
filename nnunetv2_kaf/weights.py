"""The pretraining checkpoint: what is in it, writing, strict loading with a report.

A checkpoint holds tensors and primitives only, so it loads with `weights_only=True`. Its `network_weights` are the full
state dict of the network that the plans describe, a `KAFUNet` or one of nnU-Net's own: nnU-Net's `-pretrained_weights`
accepts it too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_kaf.architecture import resolve
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256, replacing, versions
from nnunetv2_kaf.fitting import fit
from nnunetv2_kaf.plans import check_plans, is_kaf, resolve_configuration
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.schema_check import brief, check
from nnunetv2_kaf.schema_checkpoints import PretrainingCheckpoint
from nnunetv2_kaf.tensors import check_weights
from nnunetv2_kaf.unet import KAFUNet

_DAMAGED = "The file is damaged: pretrain again, or name another one."
FORMAT = "nnunetv2_kaf.pretraining"
FORMAT_VERSION = 1
# what may differ between pretraining and fine-tuning, because no weight of the encoder depends on it: the decoder,
# voxel size and number of keypoints (they follow the dataset and its patch), how activations are kept
_NOT_ENCODER = (
    "n_conv_per_stage_decoder",
    "deep_supervision",
    "spacing",
    "kaf.num_keypoints",
    "kaf.activation_checkpointing",
)


@dataclass(frozen=True)
class LoadReport:
    """What initialised a network.

    Attributes:
        source: Checkpoint path, or None for random initialisation.
        sha256: Hash of the file.
        tensors: Tensors that the file determined, by module.
        note: Why, in words.
        adapted: Tensors that were not copied as they are, by name, and the rule that made them fit (or why one of the
            file is not used).
        left: Tensors of the encoder that stayed at their random initialisation, by module.
    """

    source: str | None
    sha256: str | None
    tensors: dict[str, int]
    note: str
    adapted: dict[str, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "tensors_loaded": sum(self.tensors.values()), "versions": versions()}


def save_pretraining_checkpoint(
    path: str | Path,
    network: nn.Module,
    *,
    plans: Mapping[str, Any],
    configuration: str,
    num_input_channels: int,
    dataset_name: str,
    fold: int | str,
    pretraining: Mapping[str, Any],
) -> None:
    """Write a checkpoint that nnU-Net's `-pretrained_weights` accepts, and, for a `KAFUNet`, `load_encoder`.

    Args:
        path: File to write, atomically.
        network: The full network, a `KAFUNet` or nnU-Net's own; its encoder is what was trained.
        plans: Plans (JSON types) that the network was built from.
        configuration: Configuration of the plans.
        num_input_channels: Input channels of the network.
        dataset_name: DatasetXXX_Name.
        fold: The fold whose validation cases were left out, or "all".
        pretraining: Options and results of the pretraining, JSON types.

    Raises:
        KAFError: The file could not be written.
        ValueError: The plans describe a `KAFUNet` and the network is none, or the other way round.
    """
    if is_kaf(plans, configuration) != isinstance(network, KAFUNet):
        raise ValueError(f"the plans' configuration {configuration} does not describe a {type(network).__name__}")
    checkpoint = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network_weights": _copied(network.state_dict()),
        "architecture": _architecture(plans, configuration),
        "num_input_channels": num_input_channels,
        "trained_modules": ["encoder"],
        "dataset_name": dataset_name,
        "configuration": configuration,
        "fold": fold,
        "plans": dict(plans),
        "pretraining": dict(pretraining),
        "versions": versions(),
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and check a pretraining checkpoint.

    Raises:
        KAFError: The file is missing, truncated, unsafe, not a pretraining checkpoint of a known format, or an entry of
            it is missing or wrong.
    """
    checkpoint = load_safely(path, what="pretraining checkpoint", fix="Run kaf-pretrain, or correct the path.")
    check_checkpoint(checkpoint, str(path))
    return checkpoint


def check_checkpoint(checkpoint: Mapping[str, Any], where: str) -> None:
    """Check everything that is used of a pretraining checkpoint.

    Args:
        checkpoint: Content of the file.
        where: Its name, for messages.

    Raises:
        KAFError: It is of another kind or format version, or an entry is missing or wrong.
    """
    check_format(checkpoint, where)
    check(PretrainingCheckpoint, checkpoint, where, _DAMAGED)
    check_plans(checkpoint["plans"], f"{where}: plans")
    resolve(checkpoint["architecture"], where)
    check_weights(checkpoint["network_weights"], f"{where}: network_weights", _DAMAGED)
    planned = resolve_configuration(checkpoint["plans"], checkpoint["configuration"], f"{where}: plans")
    if planned["architecture"] != checkpoint["architecture"]:
        raise KAFError(
            f"{where}: architecture: found another network than its plans have for {checkpoint['configuration']}, "
            f"expected the same. {_DAMAGED}"
        )


def check_format(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that a loaded file is a pretraining checkpoint.

    Raises:
        KAFError: It is of another kind or another format version.
    """
    if checkpoint.get("format") != FORMAT:
        raise KAFError(
            f"{path} is not a pretraining checkpoint of nnunetv2-kaf. Expected a file written by kaf-pretrain "
            "(checkpoint_final.pth); a checkpoint of an nnU-Net training is given with -pretrained_weights instead."
        )
    found = checkpoint.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise KAFError(
            f"{path} has format version {brief(found)}, this nnunetv2-kaf reads "
            f"{FORMAT_VERSION}. Install the version that wrote it, or pretrain again."
        )


def first_convolution(network: nn.Module) -> list[str]:
    """Names in the state dict of the weights that see the input (one tensor, which has several names)."""
    keys: Any = network.keys_to_in_proj
    return [f"{key}.weight" for key in keys]


def load_encoder(network: nn.Module, path: str | Path, plans: Mapping[str, Any], configuration: str) -> LoadReport:
    """Initialise the encoder of `network` from a pretraining checkpoint, completely or not at all.

    Args:
        network: The `KAFUNet` of `plans`, not wrapped.
        path: Pretraining checkpoint.
        plans: KAF plans that the network was built from.
        configuration: Its configuration.

    Returns:
        How many tensors of which modules were loaded. A pretraining on one image channel is adapted to a training on
        several (`repeat_input_channels`); the report says so.

    Raises:
        KAFError: The checkpoint cannot be read, holds a plain encoder or was made for another network; both
            configurations are named.
    """
    checkpoint = read_checkpoint(path)
    if "kaf" not in checkpoint["architecture"]["arch_kwargs"]:
        raise KAFError(
            f"{path} holds a plain encoder (kaf-pretrain --network plain), which nnUNetTrainerKAF does not use. It is "
            f"for nnUNetv2_train ... -tr nnUNetTrainer -pretrained_weights {path}; for this trainer pretrain with "
            "--network kaf, or set KAF_PRETRAINED=none to start from scratch."
        )
    theirs = f"{checkpoint['dataset_name']}, {checkpoint['plans']['plans_name']}, {checkpoint['configuration']}"
    ours = f"{plans['dataset_name']}, {plans['plans_name']}, {configuration}"
    differences = _differences(checkpoint, network, plans, configuration)
    source = {k: v for k, v in checkpoint["network_weights"].items() if k.startswith("encoder.")}
    target = {k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    found = fit(source, target, first_convolution(network), ())
    if not differences:
        differences = [f"tensor {text}" for text in (*found.misfits, *found.left)][:5]
    if differences:
        raise KAFError(
            f"the pretraining checkpoint {path} does not fit. It was made for ({theirs}), this training is ({ours}); "
            f"they differ in: {'; '.join(differences)}. Pretrain for these plans (kaf-pretrain --dataset ... "
            f"-c {configuration} -p {plans['plans_name']}), or set KAF_PRETRAINED=none to start from scratch."
        )
    with torch.no_grad():
        for name, value in found.values.items():
            target[name].copy_(value)
    note = f"pretrained on ({theirs}), fold {checkpoint['fold']}"
    return LoadReport(str(path), file_sha256(path), count_by_module(found.values), note, found.adapted)


def count_by_module(names: Iterable[str]) -> dict[str, int]:
    """Tensors per module, e.g. {"encoder.stages": 36}."""
    return dict(Counter(".".join(name.split(".")[:2]) for name in names))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory; a parameter with several names (an encoder convolution has four) is copied once."""
    copies = {(v.data_ptr(), v.shape): v.detach().cpu().clone() for v in state.values()}
    return {k: copies[v.data_ptr(), v.shape] for k, v in state.items()}


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
    repeats = _repeats_channels(checkpoint, network, plans, configuration)
    # the detector has no weights: in which channels it looks for keypoints follows the images
    ignored = (*_NOT_ENCODER, "kaf.detection_channels") if repeats else _NOT_ENCODER
    found = [
        f"{key}: checkpoint {_plain(theirs.get(key))}, training {_plain(ours.get(key))}"
        for key in sorted(set(theirs) | set(ours))
        if key not in ignored and _plain(theirs.get(key)) != _plain(ours.get(key))
    ]
    channels = _input_channels(network)
    if checkpoint["num_input_channels"] != channels and not repeats:
        found.append(f"input channels: checkpoint {checkpoint['num_input_channels']}, training {channels}")
    return found


def _repeats_channels(
    checkpoint: Mapping[str, Any], network: nn.Module, plans: Mapping[str, Any], configuration: str
) -> bool:
    """Whether one-channel weights meet several image channels. A cascade's one-hot channels are no images: False."""
    images = len(resolve_configuration(plans, configuration)["normalization_schemes"])
    return bool(checkpoint["num_input_channels"] == 1 < images == _input_channels(network))


def _plain(value: Any) -> Any:
    """Tuples as lists, so that plans compare equal before and after JSON."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
