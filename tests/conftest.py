"""Shared by every test: the marker of the slow tests, one thread per process, and small model folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Set before torch is imported: several small networks at once are slower with a thread pool each.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "integration: runs nnU-Net's stock commands in subprocesses (minutes)")


RESAMPLING = {
    f"resampling_fn_{name}{suffix}": value
    for name, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False))
    for suffix, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}),
    )
}


def model_plans(ndim: int, channels: int, network: str) -> dict[str, Any]:
    """Plans of a two-level UNet for phantoms of 3 x 1.5 x 1.5 mm, as nnU-Net saves them with a model."""
    from nnunetv2_kaf.config import KAFConfig
    from nnunetv2_kaf.plans import kaf_plans

    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    arguments = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": [[3] * ndim] * 3,
        "strides": [s[-ndim:] for s in strides],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 24, 24][-ndim:],
        "spacing": [3.0, 1.5, 1.5][-ndim:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
        **RESAMPLING,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    plans = {
        "dataset_name": "Dataset900_Phantom",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {str(c): {} for c in range(channels)},
        "configurations": {"2d" if ndim == 2 else "3d_fullres": configuration},
    }
    if network == "plain":
        return plans
    config = KAFConfig(num_keypoints=48, token_dim=8, num_blocks=2, num_heads=2, position_hidden=(4,), levels=(0, 1))
    return kaf_plans(plans, config)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Write a model folder in nnU-Net's layout, with random weights that the fusion takes part in."""

    def write(
        folder: Path,
        ndim: int = 3,
        network: str = "kaf",
        folds: tuple[str, ...] = ("0",),
        channels: int = 1,
        style: Any = "plain",
    ) -> Path:
        import phantoms
        import torch
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        plans = model_plans(ndim, channels, network)
        ((name, configuration),) = plans["configurations"].items()
        description = phantoms.dataset_json(phantoms.PhantomConfig(channels=channels, style=style))
        heads = LabelManager(description["labels"], description.get("regions_class_order")).num_segmentation_heads
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(description))
        for seed, fold in enumerate(folds):
            torch.manual_seed(seed)
            architecture = configuration["architecture"]
            net = get_network_from_plans(
                architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
                channels, heads, allow_init=True, deep_supervision=True,
            )  # fmt: skip
            for parameter in net.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
            epochs = [1000.0 + 60 * i for i in range(4)]
            curve = [np.float64(1 / (i + 1)) for i in range(3)]
            checkpoint = {
                "network_weights": net.state_dict(),
                "trainer_name": "nnUNetTrainerKAF" if network == "kaf" else "nnUNetTrainer",
                "init_args": {"configuration": name, "fold": fold, "plans": plans, "dataset_json": description},
                "inference_allowed_mirroring_axes": tuple(range(ndim)),
                "logging": {
                    "train_losses": curve,
                    "val_losses": curve,
                    "ema_fg_dice": [0.1, 0.2, 0.3],
                    "mean_fg_dice": [0.1, 0.2, 0.3],
                    "lrs": [0.01, 0.006, 0.003],
                    "epoch_start_timestamps": epochs[:3],
                    "epoch_end_timestamps": epochs[1:],
                },
            }
            (folder / f"fold_{fold}").mkdir()
            torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        return folder

    return write


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test phantoms of one channel, a little larger than the patch of `write_model`, with labels."""
    import phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.write_dataset(folder, phantoms.PhantomConfig(training=1, test=2, shape=(10, 32, 28)))
    return folder
