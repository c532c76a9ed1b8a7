"""KAF architectures in nnU-Net's plans: substitute, recognise, check; and the standard place of pretraining runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError

NETWORK_CLASS = "nnunetv2_kaf.unet.KAFUNet"
_REPLACEABLE = ("PlainConvUNet", "ResidualEncoderUNet")


def kaf_architecture(
    architecture: Mapping[str, Any], spacing: Sequence[float], num_image_channels: int, config: KAFConfig
) -> dict[str, Any]:
    """The `architecture` entry of a plan with its UNet replaced by `KAFUNet`.

    Args:
        architecture: nnU-Net's entry for `PlainConvUNet` or `ResidualEncoderUNet`.
        spacing: of the configuration, in mm, array order.
        num_image_channels: channels of the images; keypoints are detected in all of them.
        config: the layers; its `detection_channels` are replaced by the image channels.

    Returns:
        A new entry; every option of the original is kept.
    """
    block = {**config.to_dict(), "detection_channels": list(range(num_image_channels))}
    entry = deepcopy(dict(architecture))
    entry["network_class_name"] = NETWORK_CLASS
    entry["arch_kwargs"] = {**entry["arch_kwargs"], "spacing": [float(s) for s in spacing], "kaf": block}
    return entry


def is_kaf(plans: Mapping[str, Any], configuration: str) -> bool:
    """Whether a configuration's network is a `KAFUNet`."""
    name: str = resolve_configuration(plans, configuration)["architecture"]["network_class_name"]
    return name == NETWORK_CLASS


def kaf_plans(plans: Mapping[str, Any], config: KAFConfig | None = None) -> dict[str, Any]:
    """Plans whose plain or residual-encoder UNets are replaced by `KAFUNet`.

    Args:
        plans: nnU-Net's plans; not changed. Configurations that already name a `KAFUNet` keep it, with every option of
            its kaf block written out; those with a network of another kind stay as they are.
        config: the layers, as given; None = the defaults, as `KAFConfig.planned` suits them to patch and network.

    Returns:
        A deep copy. A configuration that only inherits its architecture keeps inheriting it, unless it changes the
        spacing or the patch size, which the network depends on.

    Raises:
        KAFError: a kaf block that is there already is wrong.
    """
    out = deepcopy(dict(plans))
    for name, own in plans["configurations"].items():
        resolved = resolve_configuration(plans, name)
        if is_kaf(plans, name) and "architecture" in own:
            arguments = out["configurations"][name]["architecture"]["arch_kwargs"]
            arguments["kaf"] = KAFConfig.from_dict(arguments.get("kaf", {})).to_dict()
        replaceable = resolved["architecture"]["network_class_name"].rsplit(".", 1)[-1] in _REPLACEABLE
        if replaceable and own.keys() & {"architecture", "spacing", "patch_size"}:
            out["configurations"][name]["architecture"] = kaf_architecture(
                resolved["architecture"],
                resolved["spacing"],
                len(resolved["normalization_schemes"]),
                config
                or KAFConfig().planned(resolved["patch_size"], resolved["architecture"]["arch_kwargs"]["n_stages"]),
            )
    return out


def check_configuration(plans: Mapping[str, Any], configuration: str) -> KAFConfig:
    """Check that a configuration's KAF network can be built and run on its patch.

    Returns:
        The configuration's layers.

    Raises:
        KAFError: the network is of another kind, the kaf block or its spacing is wrong, the patch cannot be pooled, or
            it has fewer voxels than keypoints.
    """
    where = f"plans {plans['plans_name']}, configuration {configuration}"
    resolved = resolve_configuration(plans, configuration)
    architecture = resolved["architecture"]
    if architecture["network_class_name"] != NETWORK_CLASS:
        raise KAFError(
            f"{where}: found the network {architecture['network_class_name']}, expected one of {_REPLACEABLE} or "
            f"{NETWORK_CLASS}. KAF layers can be put into nnU-Net's plain and residual-encoder UNets only; plan with "
            "nnUNetPlannerKAF, or train with the trainer that belongs to that network."
        )
    options = architecture["arch_kwargs"]
    missing = [key for key in ("kaf", "spacing") if key not in options]
    if missing:
        raise KAFError(f"{where}: architecture.arch_kwargs lacks {missing}. Plan again with nnUNetPlannerKAF.")
    config = KAFConfig.from_dict(options["kaf"])
    spacing = list(resolved["spacing"])
    if len(spacing) != len(options["spacing"]) or not all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(spacing, options["spacing"], strict=True)
    ):
        raise KAFError(
            f"{where}: the network's spacing {options['spacing']} differs from the configuration's {spacing}. Set "
            "architecture.arch_kwargs.spacing to the configuration's spacing."
        )
    patch = list(resolved["patch_size"])
    pooling = [math.prod(s) for s in zip(*options["strides"], strict=True)]
    if any(n % s for n, s in zip(patch, pooling, strict=True)):
        raise KAFError(
            f"{where}: the patch {patch} cannot be pooled by {pooling} in {options['n_stages']} stages. Use a patch "
            "size that is a multiple of it, or fewer stages."
        )
    if math.prod(patch) < config.num_keypoints:
        raise KAFError(
            f"{where}: kaf option num_keypoints: found {config.num_keypoints}, more than the {math.prod(patch)} voxels "
            f"of the patch {patch}. Lower num_keypoints in the plans' kaf block."
        )
    return config


def pretraining_folder(
    dataset_name: str, plans_name: str, configuration: str, fold: int | str, kind: str = "KAFPretraining"
) -> Path:
    """Standard place of a pretraining run: next to nnU-Net's trainings of the same dataset.

    Args:
        dataset_name: DatasetXXX_Name.
        plans_name: plans identifier.
        configuration: 2d, 3d_fullres, ...
        fold: whose validation cases were left out, or "all".
        kind: first part of the folder's name.

    Raises:
        KAFError: nnUNet_results is not set.
    """
    results = os.environ.get("nnUNet_results")  # noqa: SIM112  # nnU-Net's spelling
    if not results:
        raise KAFError("the environment variable nnUNet_results is not set; set it as in nnU-Net's documentation")
    run = f"{kind}__{plans_name}__{configuration}"
    return Path(results) / dataset_name / run / f"fold_{fold}"


def resolve_configuration(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration with its inheritance resolved by nnU-Net."""
    if configuration not in plans["configurations"]:
        raise KAFError(
            f"plans {plans['plans_name']}: found no configuration {configuration!r}, available are "
            f"{list(plans['configurations'])}"
        )
    resolved: dict[str, Any] = PlansManager(dict(plans)).get_configuration(configuration).configuration
    return resolved
