"""Small networks and images, 2D and 3D, non-square and anisotropic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.keypoints import Keypoints
from nnunetv2_kaf.unet import KAFUNet

SHAPES = {2: (24, 40), 3: (8, 16, 24)}
SPACINGS = {2: (1.5, 1.0), 3: (4.0, 1.0, 1.2)}
SMALL = KAFConfig(num_keypoints=12, token_dim=16, num_blocks=1, position_hidden=(8,))


def architecture(ndim: int, backbone: str = "plain") -> dict[str, Any]:
    """Arguments of a three-stage UNet; the slice axis of the 3D one is not pooled at first."""
    strides = {2: [[1, 1], [2, 2], [2, 2]], 3: [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}[ndim]
    kernels = {2: [[3, 3]] * 3, 3: [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}[ndim]
    return {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": nn.Conv3d if ndim == 3 else nn.Conv2d,
        "kernel_sizes": kernels,
        "strides": strides,
        "n_conv_per_stage" if backbone == "plain" else "n_blocks_per_stage": [1, 2, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if ndim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


@pytest.fixture
def build_plain() -> Callable[..., nn.Module]:
    def build(ndim: int, backbone: str = "plain", channels: int = 1, **options: Any) -> nn.Module:
        unet = PlainConvUNet if backbone == "plain" else ResidualEncoderUNet
        network: nn.Module = unet(input_channels=channels, num_classes=3, **architecture(ndim, backbone), **options)
        return network.apply(network.initialize)

    return build


@pytest.fixture
def build_kaf() -> Callable[..., KAFUNet]:
    def build(
        ndim: int, config: KAFConfig = SMALL, backbone: str = "plain", channels: int = 1, **options: Any
    ) -> KAFUNet:
        network = KAFUNet(
            input_channels=channels,
            num_classes=3,
            kaf=config.to_dict(),
            spacing=SPACINGS[ndim],
            **architecture(ndim, backbone),
            **options,
        )
        return network.apply(network.initialize)

    return build


@pytest.fixture
def random_image() -> Callable[..., Tensor]:
    def make(ndim: int, batch: int = 2, channels: int = 1, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, channels, *SHAPES[ndim], generator=generator)

    return make


def random_keypoints(ndim: int, batch: int = 2, count: int = 12, seed: int = 0, invalid: int = 3) -> Keypoints:
    """Integer voxels, with collisions, the last `invalid` of each sample masked."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.randint(0, n, (batch, count), generator=generator) for n in SHAPES[ndim]]
    coords = torch.stack(axes, dim=-1).float()
    coords[:, 1] = coords[:, 0]
    valid = torch.ones(batch, count, dtype=torch.bool)
    if invalid:
        valid[:, -invalid:] = False
    return Keypoints(coords * valid.unsqueeze(-1), valid)


@pytest.fixture
def make_keypoints() -> Callable[..., Keypoints]:
    return random_keypoints


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Every parameter random, so that zero-initialised outputs take part."""

    def apply(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return module

    return apply


def plain_configuration(ndim: int, **changes: Any) -> dict[str, Any]:
    """A configuration of nnU-Net's plans, small."""
    arguments = {
        **architecture(ndim),
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    return {
        "data_identifier": f"nnUNetPlans_{ndim}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(SHAPES[ndim]),
        "spacing": list(SPACINGS[ndim]),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **changes,
    }


@pytest.fixture
def plain_plans() -> dict[str, Any]:
    """Plans as nnU-Net writes them for a dataset with a cascade."""
    return {
        "dataset_name": "Dataset990_Tiny",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            "2d": plain_configuration(2),
            "3d_fullres": plain_configuration(3),
            "3d_lowres": plain_configuration(3, next_stage="3d_cascade_fullres"),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "3d_coarse": {"inherits_from": "3d_fullres", "spacing": [8.0, 2.0, 2.4]},
        },
    }
