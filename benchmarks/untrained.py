"""Model folders as nnU-Net's training leaves them, with the trainers' first weights: predictions cost the same."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from common import environment
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.trainer import nnUNetTrainerKAFScratch

TRAINERS = {"plain": nnUNetTrainer, "kaf": nnUNetTrainerKAFScratch}
CHECKPOINT = "checkpoint_final.pth"


def folders(work: Path) -> dict[str, str]:
    """nnU-Net's three environment variables for folders inside `work`."""
    return {f"nnUNet_{name}": str(work / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}


def write_model(
    arm: str, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str, work: Path, seed: int
) -> Path:
    """Write a model folder that nnUNetv2_predict accepts, without training.

    Args:
        arm: Name in `TRAINERS`.
        plans: nnU-Net's plans with its own network; `nnUNetTrainerKAF` substitutes its network itself.
        dataset_json: That of the dataset.
        configuration: 2d, 3d_fullres, ...
        work: Holds nnUNet_results.
        seed: Seed of the weights.

    Returns:
        The model folder, with plans.json, dataset.json and fold_0/checkpoint_final.pth.
    """
    own_plans = {**deepcopy(dict(plans)), "continue_training": False}
    name = f"{TRAINERS[arm].__name__}__{plans['plans_name']}__{configuration}"
    model: Path = work / "nnUNet_results" / plans["dataset_name"] / name
    # an old folder would keep its own layers, whatever today's defaults are
    shutil.rmtree(model, ignore_errors=True)
    device = torch.device("cpu")
    with environment(**folders(work)), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = TRAINERS[arm](own_plans, configuration, 0, dict(dataset_json), device)
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        network = trainer.build_network_architecture(
            trainer.plans_manager,
            trainer.configuration_manager,
            determine_num_input_channels(trainer.plans_manager, trainer.configuration_manager, dict(dataset_json)),
            trainer.label_manager.num_segmentation_heads,
            enable_deep_supervision=False,
        )
        activate_fusion(network)
    (model / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (model / "dataset.json").write_text(json.dumps(dataset_json))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": type(trainer).__name__,
        "init_args": trainer.my_init_kwargs,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
    }
    torch.save(checkpoint, model / "fold_0" / CHECKPOINT)
    return model


def activate_fusion(network: nn.Module) -> None:
    """Replace the fusion's first weights, which are zero, by random ones, so that the layers have an effect."""
    for layer in network.modules():
        if isinstance(layer, KAFLayer):
            for parameter in layer.diffusion.last.parameters():
                nn.init.normal_(parameter, std=0.01)
