"""`KAFUNet`: nnU-Net's UNet with a keypoint-augmented fusion layer after its encoder levels.

One class for 2D and 3D and for both of nnU-Net's backbones; convolution stages, decoder and deep supervision are those
of dynamic-network-architectures, under the same parameter names, so that plain nnU-Net weights fit by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.encoder import KAFEncoder
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.fusion import KAFLayer


class KAFUNet(AbstractDynamicNetworkArchitectures):  # type: ignore[misc]
    """UNet with keypoint-augmented fusion, built from the JSON types of nnU-Net's plans.

    The arguments are those of `PlainConvUNet` (with `n_conv_per_stage`) or `ResidualEncoderUNet` (with
    `n_blocks_per_stage`), plus:

    Args:
        kaf: A `KAFConfig`, or the `kaf` block of plans, its JSON form.
        spacing: Voxel spacing of the configuration in mm, array order.

    Raises:
        KAFError: The kaf block does not fit the network, or not exactly one backbone is named.

    Examples:
        A small network in 2D, for images of 1 channel and 3 classes:

        >>> import torch
        >>> from nnunetv2_kaf import KAFConfig, KAFUNet
        >>> network = KAFUNet(
        ...     input_channels=1, num_classes=3, n_stages=3, features_per_stage=(8, 16, 32),
        ...     conv_op=torch.nn.Conv2d, kernel_sizes=3, strides=(1, 2, 2), n_conv_per_stage=1,
        ...     n_conv_per_stage_decoder=1, norm_op=torch.nn.InstanceNorm2d, nonlin=torch.nn.LeakyReLU,
        ...     kaf=KAFConfig(num_keypoints=32), spacing=(1.5, 1.0),
        ... ).apply(KAFUNet.initialize)
        >>> image = torch.randn(2, 1, 64, 48)
        >>> network(image).shape
        torch.Size([2, 3, 64, 48])

        The keypoints that its layers used, and their tokens on the two levels that carry a layer:

        >>> output = network.encoder.forward_features(image)
        >>> output.keypoints.coords.shape
        torch.Size([2, 32, 2])
        >>> [tuple(tokens.shape) for tokens in output.tokens]
        [(2, 32, 96), (2, 32, 96)]
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: int | Sequence[Any],
        strides: int | Sequence[Any],
        n_conv_per_stage_decoder: int | Sequence[int],
        kaf: Mapping[str, Any] | KAFConfig,
        spacing: Sequence[float],
        n_conv_per_stage: int | Sequence[int] | None = None,
        n_blocks_per_stage: int | Sequence[int] | None = None,
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        **backbone_options: Any,
    ) -> None:
        super().__init__()
        if (n_conv_per_stage is None) == (n_blocks_per_stage is None):
            raise KAFError(
                "architecture.arch_kwargs: expected n_conv_per_stage (plain) or n_blocks_per_stage (residual)"
            )
        plain = n_conv_per_stage is not None
        depth_name = "n_conv_per_stage" if plain else "n_blocks_per_stage"
        per_stage = {
            "features_per_stage": features_per_stage,
            "kernel_sizes": kernel_sizes,
            "strides": strides,
            depth_name: n_conv_per_stage if plain else n_blocks_per_stage,
        }
        common = {
            "conv_op": conv_op,
            "conv_bias": conv_bias,
            "norm_op": norm_op,
            "norm_op_kwargs": norm_op_kwargs,
            "dropout_op": dropout_op,
            "dropout_op_kwargs": dropout_op_kwargs,
            "nonlin": nonlin,
            "nonlin_kwargs": nonlin_kwargs,
            **backbone_options,
        }
        self.encoder = KAFEncoder(
            PlainConvEncoder if plain else ResidualEncoder,
            input_channels,
            _per_stage(per_stage, n_stages),
            common,
            kaf if isinstance(kaf, KAFConfig) else KAFConfig.from_dict(kaf),
            spacing,
        )
        self.decoder = _decoder(self.encoder, num_classes, n_conv_per_stage_decoder, deep_supervision, backbone_options)
        if self.encoder.config.activation_checkpointing:
            for stages in (self.encoder.stages, self.decoder.stages):
                for i, stage in enumerate(stages):
                    stages[i] = checkpoint_wrapper(stage)  # names in the state dict stay the same
        # where tools that share pretrained encoders look for the parts
        self.key_to_encoder = "encoder.stages"
        self.key_to_stem = "encoder.stages.0" if plain else "encoder.stem"
        stem = "encoder.stages.0.0" if plain else "encoder.stem"
        self.keys_to_in_proj = (f"{stem}.convs.0.conv", f"{stem}.convs.0.all_modules.0")

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, C, *S) -> logits (B, classes, *S), or with deep supervision one per decoder level, largest first."""
        out: Tensor | list[Tensor] = self.decoder(self.encoder(x))
        return out

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """nnU-Net's proxy for GPU memory, KAF layers counted; `input_size` is the patch size."""
        total: np.int64 = self.encoder.compute_conv_feature_map_size(
            input_size
        ) + self.decoder.compute_conv_feature_map_size(input_size)
        return total

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's initialisation; called for every submodule, children first."""
        InitWeights_He(1e-2)(module)
        init_last_bn_before_add_to_0(module)
        if isinstance(module, KAFLayer):
            module.initialize()


def _per_stage(arguments: Mapping[str, Any], n_stages: int) -> list[dict[str, Any]]:
    """Spread per-stage arguments, given once or as one entry a stage."""
    lists = {}
    for name, value in arguments.items():
        lists[name] = list(value) if isinstance(value, (list, tuple)) else [value] * n_stages
        if len(lists[name]) != n_stages:
            raise KAFError(f"architecture.arch_kwargs.{name}: found {len(lists[name])} entries, expected {n_stages}")
    return [{name: values[s] for name, values in lists.items()} for s in range(n_stages)]


def _decoder(
    encoder: KAFEncoder,
    num_classes: int,
    n_conv_per_stage: int | Sequence[int],
    deep_supervision: bool,
    options: Mapping[str, Any],
) -> UNetDecoder:
    """nnU-Net's decoder; where skips are concatenated its convolutions take the wider skip, at unchanged filters."""
    nonlin_first = bool(options.get("nonlin_first", False))
    decoder = UNetDecoder(encoder, num_classes, n_conv_per_stage, deep_supervision, nonlin_first=nonlin_first)
    for s, stage in enumerate(decoder.stages):
        level = len(decoder.stages) - 1 - s
        channels = encoder.output_channels[level]
        if encoder.skip_channels[level] == channels:
            continue
        decoder.stages[s] = StackedConvBlocks(
            len(stage.convs),
            encoder.conv_op,
            channels + encoder.skip_channels[level],
            channels,
            encoder.kernel_sizes[level],
            1,
            encoder.conv_bias,
            encoder.norm_op,
            encoder.norm_op_kwargs,
            encoder.dropout_op,
            encoder.dropout_op_kwargs,
            encoder.nonlin,
            encoder.nonlin_kwargs,
            nonlin_first,
        )
    return decoder
