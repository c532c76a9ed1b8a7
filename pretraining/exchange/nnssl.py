"""Export of a pretraining checkpoint in the format of nnssl, which nnU-Net's finetuning from nnssl reads.

The format is a file that loads with `weights_only=True`: `network_weights`, a state dict, and
`nnssl_adaptation_plan`, which says how to build the network, what it was pretrained on, and under which names its
parts are. Its readers take the tensors under `key_to_encoder` and `key_to_stem` and train a decoder of their own.

- The whole `KAFUNet` is written by default: nothing is lost, `kaf-pretrain --init` takes the keypoint layers as well,
  and readers that keep an architecture of their own find stem and stages under the usual names. Readers that build the
  network from the plan need this package.
- `plain` writes the convolutional part as nnU-Net's own UNet, which every reader can build. It loses the keypoint
  layers; the convolutions were trained beside them, so its features are close to the pretrained ones, not the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_kaf import __version__
from nnunetv2_kaf.architecture import NETWORK_CLASS, build_network
from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.files import file_sha256, replacing
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.exchange.safetensors_file import SUFFIX, write_safetensors
from pretraining.exchange.sources import CHECKPOINT, CONFIG, PLAN

logger = logging.getLogger(__name__)

_DISK = "Free some space or check the permissions, and export again."
CITATIONS = [
    {
        "type": "Pre-Training Method",
        "name": "KAF (keypoint-augmented self-supervised pretraining)",
        "apa_citations": [
            "Yang, Z., Ren, M., Ding, K., Gerig, G., & Wang, Y. (2023). Keypoint-augmented self-supervised learning "
            "for medical image segmentation with limited annotation. Advances in Neural Information Processing "
            "Systems, 36."
        ],
    },
    {
        "type": "Architecture",
        "name": "nnU-Net",
        "apa_citations": [
            "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a "
            "self-configuring method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), "
            "203-211."
        ],
    },
]
"""In the form that nnU-Net's finetuning prints."""
_UNETS = "dynamic_network_architectures.architectures.unet"


def export_nnssl(
    checkpoint: str | Path, out: str | Path, *, plain: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write a pretraining checkpoint as an nnssl checkpoint, a file.

    The network is built from the exported plan and loads the exported weights strictly before anything is written.

    Args:
        checkpoint: checkpoint_final.pth of a pretraining run.
        out: File to write, atomically; one that ends in .safetensors is written as such.
        plain: Write the convolutional part as nnU-Net's own UNet.
        force: Replace `out` if it exists.

    Returns:
        The adaptation plan.

    Raises:
        KAFError: The checkpoint cannot be read or is damaged, `out` exists or cannot be written, or `plain` was
            asked of a network with `concat` fusion.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_output(checkpoint, out, force)
    content = exported(checkpoint, plain)
    if len(content["nnssl_adaptation_plan"]["recommended_downstream_patchsize"]) != 3:
        logger.warning("The network is 2D; nnssl and nnU-Net's finetuning from nnssl checkpoints are 3D only.")
    if out.suffix == SUFFIX:
        write_safetensors(content, out)
    else:
        _save(content, out)
    plan: dict[str, Any] = content["nnssl_adaptation_plan"]
    return plan


def export_folder(checkpoint: str | Path, out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write the folder of three files that nnU-Net's finetuning from nnssl expects, also from the Hugging Face hub.

    That finetuning builds nnU-Net's own UNets and nothing else, so the convolutional part is written as one of these.

    Args:
        checkpoint: checkpoint_final.pth of a pretraining run.
        out: Folder to write.
        force: Replace the files if they exist.

    Returns:
        The adaptation plan.

    Raises:
        KAFError: As `export_nnssl`; the fusion is `concat`, or the network is 2D: that finetuning knows neither.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists() and not out.is_dir():
        raise KAFError(f"-o {out} is a file; expected a folder for {CHECKPOINT}, {PLAN} and {CONFIG}.")
    there = [name for name in (CHECKPOINT, PLAN, CONFIG) if (out / name).exists()]
    check_output(checkpoint, out / CHECKPOINT, force)
    if there and not force:
        raise KAFError(f"-o {out} holds {', '.join(there)} already. Name another folder, or replace them with --force.")
    content = exported(checkpoint, plain=True)
    plan: dict[str, Any] = content["nnssl_adaptation_plan"]
    if len(plan["recommended_downstream_patchsize"]) != 3:
        raise KAFError(
            f"{checkpoint} holds a 2D network; nnU-Net's finetuning from nnssl checkpoints is 3D only. Export a file "
            "instead (-o FILE.pth), or pretrain a 3D configuration."
        )
    card = {
        "architecture": plan["architecture_plans"]["arch_class_name"],
        "pretrain_num_input_channels": plan["pretrain_num_input_channels"],
        "recommended_downstream_patchsize": plan["recommended_downstream_patchsize"],
        "citations": CITATIONS,
        "nnunetv2_kaf": {"version": __version__, "sha256": content["nnunetv2_kaf"]["sha256"]},
    }
    for name, entry in ((PLAN, plan), (CONFIG, card)):
        with replacing(out / name, _DISK) as temporary:
            temporary.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    _save(content, out / CHECKPOINT)  # last: a folder with a checkpoint is complete
    return plan


def exported(checkpoint: Path, plain: bool) -> dict[str, Any]:
    """The content of an nnssl checkpoint, checked against the network that its plan describes.

    Raises:
        KAFError: As `export_nnssl`.
    """
    content = read_checkpoint(checkpoint)
    architecture, weights = content["architecture"], content["network_weights"]
    if plain and architecture["network_class_name"] == NETWORK_CLASS:
        architecture, weights = plain_architecture(architecture, checkpoint), plain_weights(weights)
    network = _build(architecture, weights, content["num_input_channels"], checkpoint)
    plan = adaptation_plan(content, architecture, network)
    provenance = {key: content[key] for key in ("dataset_name", "configuration", "fold", "versions")}
    # the names of the cases stay here: an exported file is made to be passed on
    options = {key: value for key, value in content["pretraining"].items() if key != "cases"}
    return {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan,
        "citations": CITATIONS,
        "nnunetv2_kaf": {**provenance, "sha256": file_sha256(checkpoint), "pretraining": options},
    }


def _save(content: Mapping[str, Any], out: Path) -> None:
    with replacing(out, _DISK) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def adaptation_plan(content: Mapping[str, Any], architecture: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The adaptation plan, JSON types.

    Args:
        content: Our pretraining checkpoint.
        architecture: The `architecture` entry of the network that is exported.
        network: Built from it.

    Returns:
        Every entry of the format; `pretrain_plan` has one configuration, the pretrained one, because readers take the
        first.
    """
    name = content["configuration"]
    configuration = {**resolve_configuration(content["plans"], name), "architecture": dict(architecture)}
    configuration.pop("inherits_from", None)
    parts: Any = network
    plan = {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {**content["plans"], "configurations": {name: configuration}},
        "pretrain_num_input_channels": content["num_input_channels"],
        "recommended_downstream_patchsize": configuration["patch_size"],
        "key_to_encoder": parts.key_to_encoder,
        "key_to_stem": parts.key_to_stem,
        "keys_to_in_proj": list(parts.keys_to_in_proj),
        "key_to_lpe": None,
    }
    return deepcopy(plan)


def plain_architecture(architecture: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The `architecture` entry of nnU-Net's own UNet with the same stages.

    Raises:
        KAFError: The fusion is `concat`: the stages take twice the channels.
    """
    arguments = dict(architecture["arch_kwargs"])
    if arguments["kaf"].get("fusion", "add") != "add":
        raise KAFError(
            f"--plain: {path} holds a network with {arguments['kaf']['fusion']} fusion, whose stages take twice the "
            "channels of nnU-Net's UNet. Only add fusion can be written as a plain network; leave out --plain."
        )
    for key in ("kaf", "spacing"):
        del arguments[key]
    unet = "PlainConvUNet" if "n_conv_per_stage" in arguments else "ResidualEncoderUNet"
    return {**architecture, "network_class_name": f"{_UNETS}.{unet}", "arch_kwargs": arguments}


def plain_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the keypoint layers (the decoder's second names of them included)."""
    return {name: tensor for name, tensor in weights.items() if "encoder.layers." not in name}


def _build(architecture: Mapping[str, Any], weights: Mapping[str, Tensor], channels: int, path: Path) -> nn.Module:
    """Build the network that the plan names, with the weights.

    Raises:
        KAFError: They do not fit each other: the checkpoint is damaged or was written by another version.
    """
    classes = next((v.shape[0] for k, v in weights.items() if ".seg_layers." in k and k.endswith(".weight")), 2)
    network = build_network(architecture, channels, classes, where=str(path), initialize=False)
    try:
        network.load_state_dict(dict(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise KAFError(
            f"{path}: its weights do not fit the network that it describes ({one_line(error)}). Pretrain again, or "
            "export with the nnunetv2-kaf version that wrote it."
        ) from error
    return network


def check_output(checkpoint: Path, out: Path, force: bool) -> None:
    """Raise a KAFError if `out` must not be written."""
    if out.is_dir():
        raise KAFError(f"-o {out} is a folder; expected a file, e.g. {out / 'checkpoint_final.pth'}.")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise KAFError(f"-o {out} is the checkpoint that is exported. Name another file.")
    if out.exists() and not force:
        raise KAFError(f"-o {out} exists. Name another file, or replace it with --force.")
