"""`KAFUNet`: nnU-Net's UNet with a keypoint-augmented fusion layer after its encoder levels.

One class for 2D and 3D and for both of nnU-Net's backbones; convolution stages, decoder and deep supervision are those
of dynamic-network-architectures, under the same parameter names, so that plain nnU-Net weights fit by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.building_blocks.helper import maybe_convert_scalar_to_list
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import Tensor, nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.keypoints import KeypointDetector, Keypoints


class EncoderOutput(NamedTuple):
    """What the encoder knows about a batch.

    Attributes:
        skips: one map per stage, highest resolution first; the last is the bottleneck (B, C_b, *S_b).
        keypoints: the K points detected in the input.
        tokens: one (B, K, token_dim) per level that carries a layer; zero for invalid keypoints.
    """

    skips: list[Tensor]
    keypoints: Keypoints
    tokens: list[Tensor]


class KAFEncoder(nn.Module):
    """nnU-Net's plain or residual encoder with KAF layers.

    Args:
        encoder_class: `PlainConvEncoder` or `ResidualEncoder`.
        input_channels: image channels, plus a cascade's one-hot channels.
        stages: per-stage arguments of `encoder_class`, one mapping a stage.
        common: arguments of `encoder_class` that all stages share.
        config: the KAF layers.
        spacing: voxel spacing of the input in mm, array order.

    Raises:
        KAFError: `config.levels` or `config.detection_channels` do not fit the network.
    """

    def __init__(
        self,
        encoder_class: type[nn.Module],
        input_channels: int,
        stages: Sequence[Mapping[str, Any]],
        common: Mapping[str, Any],
        config: KAFConfig,
        spacing: Sequence[float],
    ) -> None:
        super().__init__()
        self.config = config
        self.input_channels = input_channels
        self.conv_op = common["conv_op"]
        self.output_channels = [int(stage["features_per_stage"]) for stage in stages]
        self.kernel_sizes = [maybe_convert_scalar_to_list(self.conv_op, stage["kernel_sizes"]) for stage in stages]
        self.strides = [maybe_convert_scalar_to_list(self.conv_op, stage["strides"]) for stage in stages]
        self.kaf_levels = _resolve_levels(config, len(stages))
        # a decoder reads these from its encoder
        for name in ("norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs"):
            setattr(self, name, common[name])
        self.conv_bias = common["conv_bias"]
        self.detector = KeypointDetector(config, spacing)
        if max(config.detection_channels) >= input_channels:
            raise KAFError(
                f"kaf option detection_channels: found {config.detection_channels}, expected indices below the "
                f"{input_channels} input channel(s). Correct it in the plans' kaf block."
            )
        self.stem: nn.Module | None = None
        built, self.layers = [], nn.ModuleDict()
        incoming, stride = input_channels, np.ones(len(spacing), dtype=int)
        for level, stage in enumerate(stages):
            encoder = _one_stage(encoder_class, incoming, stage, common, with_stem=level == 0)
            if level == 0:
                self.stem = getattr(encoder, "stem", None)
            built.append(encoder.stages[0])
            stride = stride * self.strides[level]
            if level in self.kaf_levels:
                self.layers[str(level)] = KAFLayer(
                    config, self.output_channels[level], self.kernel_sizes[level], stride.tolist(), spacing
                )
            incoming = self.skip_channels[level]
        self.stages = nn.Sequential(*built)

    @property
    def skip_channels(self) -> list[int]:
        """Channels of each skip: doubled where a layer concatenates."""
        concat = self.config.fusion == "concat"
        return [c * (1 + (concat and i in self.kaf_levels)) for i, c in enumerate(self.output_channels)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> skips, highest resolution first, bottleneck last."""
        return self.forward_features(x).skips

    def forward_features(self, x: Tensor, keypoints: Keypoints | None = None) -> EncoderOutput:
        """Encode and keep what the self-supervision needs.

        Args:
            x: (B, C, *S).
            keypoints: in voxels of `x`; None = detect them.
        """
        keypoints = self.detector(x) if keypoints is None else keypoints
        shape = x.shape[2:]
        skips, tokens = [], []
        if self.stem is not None:
            x = self.stem(x)
        for level, stage in enumerate(self.stages):
            x = stage(x)
            if level in self.kaf_levels:
                x, level_tokens = self.layers[str(level)](x, keypoints, shape)
                tokens.append(level_tokens)
            skips.append(x)
        return EncoderOutput(skips, keypoints, tokens)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Activations per sample of the convolutions and the KAF layers: nnU-Net's proxy for GPU memory."""
        output = np.int64(0)
        if self.stem is not None:
            stem: Any = self.stem
            output += stem.compute_conv_feature_map_size(input_size)
        block: Any
        for level, stage in enumerate(self.stages):
            block = stage[-1] if isinstance(stage, nn.Sequential) else stage
            output += block.compute_conv_feature_map_size(input_size)
            input_size = [i // j for i, j in zip(input_size, self.strides[level], strict=True)]
            if level in self.kaf_levels:
                block = self.layers[str(level)]
                output += block.compute_conv_feature_map_size(input_size)
        return output


class KAFUNet(AbstractDynamicNetworkArchitectures):  # type: ignore[misc]
    """UNet with keypoint-augmented fusion, built from the JSON types of nnU-Net's plans.

    The arguments are those of `PlainConvUNet` (with `n_conv_per_stage`) or `ResidualEncoderUNet` (with
    `n_blocks_per_stage`), plus:

    Args:
        kaf: the `kaf` block, see `KAFConfig`.
        spacing: voxel spacing of the configuration in mm, array order.

    Raises:
        KAFError: the kaf block does not fit the network, or not exactly one backbone is named.
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
        kaf: Mapping[str, Any],
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
            KAFConfig.from_dict(kaf),
            spacing,
        )
        self.decoder = _decoder(self.encoder, num_classes, n_conv_per_stage_decoder, deep_supervision, backbone_options)
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


def _one_stage(
    encoder_class: type[nn.Module], channels: int, stage: Mapping[str, Any], common: Mapping[str, Any], with_stem: bool
) -> Any:
    """One stage of a backbone, built by the backbone's own class, so that its input may be wider than usual."""
    arguments = {name: [value] for name, value in stage.items()}
    if encoder_class is ResidualEncoder:
        arguments["disable_default_stem"] = not with_stem  # type: ignore[assignment]
    return encoder_class(channels, n_stages=1, **arguments, **common)


def _resolve_levels(config: KAFConfig, n_stages: int) -> tuple[int, ...]:
    if n_stages < 2:
        raise KAFError(
            f"the architecture has {n_stages} stage(s); keypoint fusion needs at least 2 (one level and a bottleneck). "
            "The patch is too small to be pooled: plan with a larger patch or a finer spacing."
        )
    levels = config.levels if config.levels is not None else tuple(range(n_stages - 1))
    if max(levels) >= n_stages - 1:
        raise KAFError(
            f"kaf option levels: found {levels}, expected levels from 0 to {n_stages - 2}: the encoder has {n_stages} "
            "stages and the last one, the bottleneck, carries no layer. Correct it in the plans' kaf block."
        )
    return tuple(sorted(levels))


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
