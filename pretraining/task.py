"""What is pretrained on: dataset, plans and configuration, resolved from nnU-Net's folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import (
    check_configuration,
    is_kaf,
    kaf_plans,
    pretraining_folder,
    read_description,
    read_plans,
    resolve_configuration,
)
from nnunetv2_kaf.schema_check import check_name


@dataclass(frozen=True)
class Task:
    """One dataset, plan and configuration.

    Attributes:
        dataset_name: e.g. `Dataset004_Hippocampus`.
        dataset_id: Number in the name.
        dataset_folder: Its folder in `$nnUNet_preprocessed`.
        plans_name: e.g. `nnUNetPlans`.
        plans: The plans; with `network` "kaf" with the KAF network in place of a plain one.
        network: "kaf" or "plain" (nnU-Net's own encoder).
        configuration: e.g. `3d_fullres`.
        image_folder: Folder of the preprocessed images.
        patch_size: View shape in voxels.
        spacing: Voxel size in mm, as many axes as the patch.
        batch_size: The plan's batch size.
        channels: Number of image channels.
        outputs: Number of segmentation outputs.
    """

    dataset_name: str
    dataset_id: int
    dataset_folder: Path
    plans_name: str
    plans: Mapping[str, Any]
    network: str
    configuration: str
    image_folder: Path
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    batch_size: int
    channels: int
    outputs: int

    @property
    def preprocess_command(self) -> str:
        """The command that makes the images."""
        return f"nnUNetv2_preprocess -d {self.dataset_id} -plans_name {self.plans_name} -c {self.configuration}"

    @cached_property
    def resolved(self) -> Mapping[str, Any]:
        """The configuration in the plans, with what it inherits."""
        return resolve_configuration(self.plans, self.configuration)

    @property
    def layers(self) -> KAFConfig:
        """The options of the KAF layers; with a plain network the defaults, for the detection of keypoints."""
        arguments = self.resolved["architecture"]["arch_kwargs"]
        block = arguments.get("kaf")
        if block is None:
            default = KAFConfig(detection_channels=tuple(range(self.channels)))
            return default.planned(self.resolved["patch_size"], arguments["n_stages"])
        return KAFConfig.from_dict({"detection_channels": list(range(self.channels)), **block})

    @property
    def folder(self) -> Path:
        """The folder of all pretraining runs of this task, one sub-folder per fold."""
        kind = "KAFPretraining" if self.network == "kaf" else "PlainPretraining"
        return pretraining_folder(self.dataset_name, self.plans_name, self.configuration, "all", kind).parent

    def build_network(self) -> nn.Module:
        """Build the full network that the trainer would build from the same plans (nnU-Net's initialisation)."""
        where = f"plans {self.plans_name}, configuration {self.configuration}"
        return build_network(self.resolved["architecture"], self.channels, self.outputs, where=where)


def resolve_task(dataset: str, configuration: str, plans_name: str, network: str = "kaf") -> Task:
    """Find dataset, plans and configuration.

    Args:
        network: "kaf" or "plain".
        dataset: Number or name.
        configuration: e.g. `2d` or `3d_fullres`.
        plans_name: e.g. `nnUNetPlans`.

    Raises:
        KAFError: If something does not exist (the message lists what does) or the configuration is a cascade stage.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    check_name(plans_name, "-p")
    check_name(configuration, "-c")
    folder = find_dataset(dataset)
    dataset_id = int(folder.name[7:10])
    plans_file = folder / f"{plans_name}.json"
    if not plans_file.is_file():
        found = sorted(p.stem for p in folder.glob("*Plans*.json"))
        raise KAFError(
            f"Plans {plans_name} not found for {folder.name} ({plans_file}); found: {_listing(found)}. Choose with -p, "
            f"or run: nnUNetv2_plan_and_preprocess -d {dataset_id}"
        )
    plans = read_plans(plans_file)
    configurations = plans["configurations"]
    if configuration not in configurations:
        raise KAFError(
            f"Configuration {configuration} not found in {plans_file}; found: {_listing(sorted(configurations))}. "
            "Choose with -c."
        )
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    if config.previous_stage_name is not None:
        raise KAFError(
            f"Configuration {configuration} is the second stage of a cascade: its network also sees a predicted "
            "segmentation, which does not exist for unlabelled images. Pretrain the non-cascade configuration "
            "(e.g. -c 3d_fullres) instead."
        )
    dataset_json = folder / "dataset.json"
    if not dataset_json.is_file():
        raise KAFError(f"{dataset_json} is missing. Run: nnUNetv2_plan_and_preprocess -d {dataset_id}")
    description = read_description(dataset_json)
    if network == "kaf":
        plans = kaf_plans(plans)
        check_configuration(plans, configuration)
    elif is_kaf(plans, configuration):
        raise KAFError(
            f"--network plain: the plans {plans_name} hold a keypoint-augmented network. Choose plans of nnU-Net's own "
            "planners with -p, e.g. nnUNetPlans."
        )
    return Task(
        dataset_name=folder.name,
        dataset_id=dataset_id,
        dataset_folder=folder,
        plans_name=plans_name,
        plans=plans,
        network=network,
        configuration=configuration,
        image_folder=folder / config.data_identifier,
        patch_size=tuple(int(n) for n in config.patch_size),
        spacing=tuple(float(s) for s in config.spacing)[-len(config.patch_size) :],
        batch_size=int(config.batch_size),
        channels=int(determine_num_input_channels(manager, config, description)),
        outputs=int(manager.get_label_manager(description).num_segmentation_heads),
    )


def find_dataset(dataset: str) -> Path:
    """The folder in `$nnUNet_preprocessed` of a dataset given by number or name.

    Raises:
        KAFError: If the variable is not set, or no (or more than one) dataset fits; lists what exists.
    """
    value = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112 - nnU-Net's own spelling
    if not value:
        raise KAFError("The environment variable nnUNet_preprocessed is not set; set nnU-Net's three paths first.")
    root = Path(value)
    if not root.is_dir():
        raise KAFError(f"nnUNet_preprocessed is {root}, which is not a folder. Create it or correct the variable.")
    existing = sorted(p for p in root.iterdir() if p.is_dir() and p.name[:7] == "Dataset" and p.name[7:10].isdecimal())
    if dataset.isdecimal():
        fitting = [p for p in existing if int(p.name[7:10]) == int(dataset)]
    else:
        fitting = [p for p in existing if p.name == dataset]
    if len(fitting) > 1:
        raise KAFError(f"--dataset {dataset} is ambiguous: {_listing([p.name for p in fitting])}. Give the full name.")
    if not fitting:
        number = dataset if dataset.isdecimal() else "<id>"
        raise KAFError(
            f"Dataset {dataset} not found in {root}; found: {_listing([p.name for p in existing])}. "
            f"If it is in nnUNet_raw, run: nnUNetv2_plan_and_preprocess -d {number}"
        )
    return fitting[0]


def _listing(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
