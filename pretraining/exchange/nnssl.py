"""Export of a pretraining checkpoint in the format of nnssl, which nnU-Net's finetuning from nnssl reads.

The format is a file that loads with ``weights_only=True``: ``network_weights``, a state dict, and
``nnssl_adaptation_plan``, which says how to build the network, what it was pretrained on, and under which names its
parts are. Its readers take the tensors under ``key_to_encoder`` and ``key_to_stem`` and train a decoder of their own.

- The whole `KAFUNet` is written by default: nothing is lost, `kaf-pretrain --init` takes the keypoint layers as well,
  and readers that keep an architecture of their own find stem and stages under the usual names. Readers that build the
  network from the plan need this package.
- ``plain`` writes the convolutional part as nnU-Net's own UNet, which every reader can build. It loses the keypoint
  layers; the convolutions were trained beside them, so its features are close to the pretrained ones, not the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_kaf.architecture import NETWORK_CLASS, build_network
from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.files import file_sha256, replacing
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.weights import read_checkpoint

logger = logging.getLogger(__name__)

_UNETS = "dynamic_network_architectures.architectures.unet"


def export_nnssl(
    checkpoint: str | Path, out: str | Path, *, plain: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write a pretraining checkpoint as an nnssl checkpoint.

    The network is built from the exported plan and loads the exported weights strictly before anything is written.

    Args:
        checkpoint: checkpoint_final.pth of a pretraining run.
        out: file to write, atomically.
        plain: write the convolutional part as nnU-Net's own UNet.
        force: replace ``out`` if it exists.

    Returns:
        The adaptation plan.

    Raises:
        KAFError: the checkpoint cannot be read or is damaged, ``out`` exists or cannot be written, or ``plain`` was
            asked of a network with `concat` fusion.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    _check_output(checkpoint, out, force)
    content = read_checkpoint(checkpoint)
    architecture, weights = content["architecture"], content["network_weights"]
    if plain and architecture["network_class_name"] == NETWORK_CLASS:
        architecture, weights = plain_architecture(architecture, checkpoint), plain_weights(weights)
    network = _build(architecture, weights, content["num_input_channels"], checkpoint)
    plan = adaptation_plan(content, architecture, network)
    if len(plan["recommended_downstream_patchsize"]) != 3:
        logger.warning("The network is 2D; nnssl and nnU-Net's finetuning from nnssl checkpoints are 3D only.")
    provenance = {key: content[key] for key in ("dataset_name", "configuration", "fold", "versions")}
    # the names of the cases stay here: an exported file is made to be passed on
    options = {key: value for key, value in content["pretraining"].items() if key != "cases"}
    exported = {
        "network_weights": weights,
        "nnssl_adaptation_plan": plan,
        "nnunetv2_kaf": {**provenance, "sha256": file_sha256(checkpoint), "pretraining": options},
    }
    with replacing(out) as temporary, temporary.open("wb") as file:
        torch.save(exported, file)
    return plan


def adaptation_plan(content: Mapping[str, Any], architecture: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The adaptation plan, JSON types.

    Args:
        content: our pretraining checkpoint.
        architecture: the ``architecture`` entry of the network that is exported.
        network: built from it.

    Returns:
        Every entry of the format; ``pretrain_plan`` has one configuration, the pretrained one, because readers take the
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
    """The ``architecture`` entry of nnU-Net's own UNet with the same stages.

    Raises:
        KAFError: the fusion is `concat`: the stages take twice the channels.
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
        KAFError: they do not fit each other: the checkpoint is damaged or was written by another version.
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


def _check_output(checkpoint: Path, out: Path, force: bool) -> None:
    """Raise a KAFError if ``out`` must not be written."""
    if out.is_dir():
        raise KAFError(f"-o {out} is a folder; expected a file, e.g. {out / 'checkpoint_final.pth'}.")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise KAFError(f"-o {out} is the checkpoint that is exported. Name another file.")
    if out.exists() and not force:
        raise KAFError(f"-o {out} exists. Name another file, or replace it with --force.")
