"""`KAFEncoder`: nnU-Net's plain or residual encoder with a keypoint-augmented fusion layer after its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from dynamic_network_architectures.building_blocks.helper import maybe_convert_scalar_to_list
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.keypoints import KeypointDetector, Keypoints


class EncoderOutput(NamedTuple):
    """What the encoder knows about a batch.

    Attributes:
        skips: One map per stage, highest resolution first; the last is the bottleneck (B, C_b, *S_b).
        keypoints: The K points detected in the input.
        tokens: One (B, K, token_dim) per level that carries a layer; zero for invalid keypoints.
    """

    skips: list[Tensor]
    keypoints: Keypoints
    tokens: list[Tensor]


class KAFEncoder(nn.Module):
    """nnU-Net's plain or residual encoder with KAF layers.

    Args:
        encoder_class: `PlainConvEncoder` or `ResidualEncoder`.
        input_channels: Image channels, plus a cascade's one-hot channels.
        stages: Arguments of `encoder_class` that differ between stages, one mapping a stage.
        common: Arguments of `encoder_class` that all stages share.
        config: The KAF layers.
        spacing: Voxel spacing of the input in mm, array order.

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
            keypoints: Points in voxels of `x`; `None` detects them.
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
            stage = getattr(stage, "_checkpoint_wrapped_module", stage)
            block = stage[-1] if isinstance(stage, nn.Sequential) else stage
            output += block.compute_conv_feature_map_size(input_size)
            input_size = [i // j for i, j in zip(input_size, self.strides[level], strict=True)]
            if level in self.kaf_levels:
                block = self.layers[str(level)]
                output += block.compute_conv_feature_map_size(input_size)
        return output


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
