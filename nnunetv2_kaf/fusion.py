"""The keypoint-augmented fusion layer: gather, attend, scatter, fuse (NeurIPS 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_kaf import tokens as token_ops
from nnunetv2_kaf.attention import PositionEncoding, SelfBlock, attention_mask
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.coordinates import normalize_mm, voxel_index
from nnunetv2_kaf.keypoints import Keypoints


class Diffusion(nn.Module):
    """Spreads the tokens from their voxels over the map.

    With `hidden=None`: one convolution D -> C of the scattered tokens. With a number H, the paper's form: convolution
    D -> H, normalisation, ReLU, convolution H -> C. The first convolution runs on the keypoints' neighbourhoods only
    (`tokens.scatter_conv`).

    Args:
        token_dim: D.
        channels: C of the feature map.
        hidden: H or None.
        kernel_size: the encoder level's own, so that a (1, 3, 3) level of anisotropic data is not mixed across slices.
    """

    def __init__(self, token_dim: int, channels: int, hidden: int | None, kernel_size: Sequence[int]) -> None:
        super().__init__()
        conv_op: Any = nn.Conv3d if len(kernel_size) == 3 else nn.Conv2d
        norm_op: Any = nn.InstanceNorm3d if len(kernel_size) == 3 else nn.InstanceNorm2d
        kernel = tuple(kernel_size)
        padding = [k // 2 for k in kernel]
        first = channels if hidden is None else hidden
        # no bias: a constant would reach voxels far from any keypoint
        self.spread = conv_op(token_dim, first, kernel, padding=padding, bias=False)
        self.refine: nn.Module | None = None
        if hidden is not None:
            self.refine = nn.Sequential(
                norm_op(hidden, affine=True), nn.ReLU(), conv_op(hidden, channels, kernel, padding=padding)
            )

    @property
    def last(self) -> nn.Module:
        """The convolution that writes the output; zero-initialised for `add` fusion."""
        return self.spread if not isinstance(self.refine, nn.Sequential) else self.refine[-1]

    def forward(self, tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, K, D) tokens on their voxels -> (B, C, *shape); exactly zero for a sample without valid keypoints."""
        out = token_ops.scatter_conv(tokens, index, valid, shape, self.spread.weight)
        if self.refine is not None:
            present = valid.any(dim=1).view(-1, *[1] * (out.ndim - 1))
            out = torch.where(present, self.refine(out), 0.0)
        return out


class KAFLayer(nn.Module):
    """One keypoint-augmented fusion layer, after one encoder level.

    Args:
        config: widths, depths and fusion.
        channels: C of the level.
        kernel_size: convolution kernel of the level.
        stride: stride of the level relative to the input.
        spacing: input voxel spacing in mm, array order.
    """

    def __init__(
        self,
        config: KAFConfig,
        channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        spacing: Sequence[float],
    ) -> None:
        super().__init__()
        dim = config.token_dim
        self.fusion = config.fusion
        self.stride = tuple(stride)
        self.spacing = tuple(spacing)
        self.project = nn.Linear(channels, dim)
        self.position = PositionEncoding(len(self.spacing), config.position_hidden, dim)
        self.blocks = nn.ModuleList(
            SelfBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.diffusion = Diffusion(dim, channels, config.diffusion_channels, kernel_size)
        self.initialize()

    def initialize(self) -> None:
        """With `add` fusion the layer starts as the identity; called again after nnU-Net's own initialisation."""
        if self.fusion == "add":
            last = self.diffusion.last
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, features: Tensor, keypoints: Keypoints, input_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: (B, C, *S_l).
            keypoints: K keypoints in input voxels.
            input_shape: spatial shape of the network's input.

        Returns:
            fused: (B, C, *S_l) with `add`, (B, 2C, *S_l) with `concat`; tokens: (B, K, D), 0 for invalid keypoints.
        """
        shape = features.shape[2:]
        index = voxel_index(keypoints.coords, shape, self.stride)
        coords = keypoints.coords.to(self.project.weight.dtype)
        positions = normalize_mm(coords, input_shape, self.spacing)
        tokens = self.project(token_ops.gather(features, index)) + self.position(positions)
        mask = attention_mask(keypoints.valid)
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens) * keypoints.valid.unsqueeze(-1)
        diffused = self.diffusion(tokens, index, keypoints.valid, shape).to(features.dtype)
        fused = features + diffused if self.fusion == "add" else torch.cat((features, diffused), dim=1)
        return fused, tokens

    def compute_conv_feature_map_size(self, level_shape: Sequence[int]) -> int:
        """Activations of the layer per sample, in values: nnU-Net's proxy for GPU memory."""
        voxels = 1
        for n in level_shape:
            voxels *= int(n)
        maps = sum(m.out_channels for m in self.diffusion.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        return voxels * maps
