"""The keypoint-augmented fusion layer: gather, attend, scatter, fuse (NeurIPS 2023, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf import sparse
from nnunetv2_kaf.attention import PositionEncoding, SelfBlock, attention_mask
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.coordinates import normalize_mm, voxel_index
from nnunetv2_kaf.keypoints import Keypoints
from nnunetv2_kaf.tokens import averaged, gather, scatter


class Diffusion(nn.Module):
    """Spreads the tokens from their voxels over the map.

    With `hidden=None`: one convolution D -> C of the scattered tokens. With a number H, the paper's form: convolution
    D -> H, instance normalisation, ReLU, convolution H -> C.

    The scattered map is zero almost everywhere, so each convolution can be evaluated around the keypoints only
    (`nnunetv2_kaf.sparse`), which is exact: what the normalisation makes of the empty voxels is one vector a sample.
    Where the keypoints fill the map the dense convolution is cheaper; `sparse.is_cheaper` decides from shapes alone.

    Args:
        token_dim: D.
        channels: C of the feature map.
        hidden: H or None.
        kernel_size: The encoder level's own, so that a (1, 3, 3) level of anisotropic data is not mixed across slices.

    Attributes:
        evaluation: "auto", or "sparse" or "dense" for every convolution; the result is the same.
    """

    def __init__(self, token_dim: int, channels: int, hidden: int | None, kernel_size: Sequence[int]) -> None:
        super().__init__()
        conv_op: Any = nn.Conv3d if len(kernel_size) == 3 else nn.Conv2d
        norm_op: Any = nn.InstanceNorm3d if len(kernel_size) == 3 else nn.InstanceNorm2d
        kernel = tuple(kernel_size)
        padding = [k // 2 for k in kernel]
        self.evaluation = "auto"
        # no bias: a constant would reach voxels far from any keypoint
        self.spread = conv_op(token_dim, channels if hidden is None else hidden, kernel, padding=padding, bias=False)
        self.norm = None if hidden is None else norm_op(hidden, affine=True)
        self.refine = None if hidden is None else conv_op(hidden, channels, kernel, padding=padding)

    @property
    def last(self) -> nn.Module:
        """The convolution that writes the output; zero-initialised for `add` fusion."""
        last: nn.Module = self.spread if self.refine is None else self.refine
        return last

    def forward(
        self, tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int], onto: Tensor | None = None
    ) -> Tensor:
        """Spread.

        Args:
            tokens: (B, K, D).
            index: (B, K) flat indices of their voxels.
            valid: (B, K) bool.
            shape: Spatial shape S of the map.
            onto: (B, C, *S) to add the result to; None = zeros.

        Returns:
            (B, C, *S); for a sample without valid keypoints exactly `onto`.
        """
        base = None if onto is None else onto.flatten(2)
        if self.norm is None or self.refine is None:
            return _to_map(self._spread(tokens, index, valid, shape, base), shape)
        if self._use_sparse(self.refine, tokens.shape[1] * self.spread.weight[0, 0].numel(), shape):
            out = self._refine_sparse(tokens, index, valid, shape, self.norm, self.refine)
        else:
            hidden = _to_map(self._spread(tokens, index, valid, shape), shape)
            out = self.refine(functional.relu(_instance_norm(hidden, self.norm))).flatten(2)
            out = torch.where(valid.any(dim=1).view(-1, 1, 1), out, 0.0)
        return _to_map(out if base is None else base + out.to(base.dtype), shape)

    def kept_values(self, num_tokens: int, shape: Sequence[int]) -> int:
        """What is kept for the backward pass, per sample; the output is not counted."""
        num_voxels, taps = math.prod(shape), int(math.prod(self.spread.weight.shape[2:]))
        hidden, dim = self.spread.weight.shape[:2]
        scattered: int = 0 if self._use_sparse(self.spread, num_tokens, shape) else dim * num_voxels
        if self.refine is None:
            return scattered
        if self._use_sparse(self.refine, num_tokens * taps, shape):
            # values before and after the normalisation and the ReLU, at the sites; the sites' own neighbours
            return min(num_tokens * taps, num_voxels + 1) * (6 * int(hidden) + 3 * taps)
        return scattered + 2 * int(hidden) * num_voxels

    def _use_sparse(self, conv: Any, num_values: int, shape: Sequence[int]) -> bool:
        if self.evaluation == "auto":
            return sparse.is_cheaper(num_values, math.prod(shape), conv.in_channels)
        return self.evaluation == "sparse"

    def _spread(
        self, tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int], onto: Tensor | None = None
    ) -> Tensor:
        """The first convolution, (B, H, V)."""
        if self._use_sparse(self.spread, tokens.shape[1], shape):
            values = averaged(tokens, index, valid, math.prod(shape)).transpose(1, 2)
            return sparse.conv_at(values, index, shape, self.spread.weight, onto)
        out: Tensor = self.spread(scatter(tokens, index, valid, shape)).flatten(2)
        return out if onto is None else onto + out.to(onto.dtype)

    def _refine_sparse(
        self, tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int], norm: Any, refine: Any
    ) -> Tensor:
        """Both convolutions around the keypoints, (B, C, V): the map between them exists at the first one's sites."""
        num_voxels = math.prod(shape)
        target, inside = sparse.neighbours(index, shape, self.spread.kernel_size)
        sites = sparse.unique_sites(target.flatten(1), (inside & valid.unsqueeze(1)).flatten(1), num_voxels)
        values = averaged(tokens, index, valid, num_voxels).transpose(1, 2)
        added = sparse.contributions(values, inside, self.spread.weight)
        hidden = sparse.add_at(added.new_zeros(*added.shape[:2], sites.voxel.shape[1]), sites.slot, added)
        hidden, empty = sparse.normalize_sites(hidden, sites.used, num_voxels, norm.weight, norm.bias, norm.eps)
        # the map is the empty voxels' vector everywhere, plus a difference at the sites
        background = functional.relu(empty)
        difference = (functional.relu(hidden) - background) * sites.used.unsqueeze(1)
        everywhere = sparse.conv_constant(background, shape, refine.weight, refine.bias)
        # a sample without keypoints has no sites and gets no background
        everywhere = everywhere * valid.any(dim=1).view(-1, 1, 1)
        return sparse.conv_at(difference, sites.voxel, shape, refine.weight, everywhere)


def _to_map(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, C, V) -> (B, C, *S)."""
    return flat.view(*flat.shape[:2], *shape)


def _instance_norm(x: Tensor, norm: Any) -> Tensor:
    """`norm(x)`, also of a map of one voxel, which the module refuses."""
    return torch.instance_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps, torch.backends.cudnn.enabled)


class KAFLayer(nn.Module):
    """One keypoint-augmented fusion layer, after one encoder level.

    Args:
        config: Widths, depths and fusion.
        channels: C of the level.
        kernel_size: Convolution kernel of the level.
        stride: Stride of the level relative to the input.
        spacing: Input voxel spacing in mm, array order.
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
        self.num_keypoints = config.num_keypoints
        # Per token for the backward pass. A block keeps what its two normalisations, queries, keys, values, attention,
        # output and two sums write (8 D), and its MLP before and after the activation.
        self.kept_per_token = channels + round(dim * (3 + config.num_blocks * (8 + 2 * config.mlp_ratio)))
        self.kept_per_token += 2 * sum(config.position_hidden)
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
            input_shape: Spatial shape of the network's input.

        Returns:
            fused: (B, C, *S_l) with `add`, (B, 2C, *S_l) with `concat`; tokens: (B, K, D), 0 for invalid keypoints.
        """
        shape = features.shape[2:]
        index = voxel_index(keypoints.coords, shape, self.stride)
        coords = keypoints.coords.to(self.project.weight.dtype)
        positions = normalize_mm(coords, input_shape, self.spacing)
        tokens = self.project(gather(features, index)) + self.position(positions)
        mask = attention_mask(keypoints.valid)
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens) * keypoints.valid.unsqueeze(-1)
        if self.fusion == "add":
            return self.diffusion(tokens, index, keypoints.valid, shape, onto=features), tokens
        diffused = self.diffusion(tokens, index, keypoints.valid, shape).to(features.dtype)
        return torch.cat((features, diffused), dim=1), tokens

    def compute_conv_feature_map_size(self, level_shape: Sequence[int]) -> int:
        """What the layer keeps for the backward pass, per sample: nnU-Net's proxy for GPU memory.

        nnU-Net counts the output of every convolution. Its networks keep about two values for each of them, because
        those of normalisations and transposed convolutions are kept but not counted; so half of what is kept counts.
        """
        channels, shape = self.project.in_features, [int(n) for n in level_shape]
        maps = math.prod(shape) * channels * (1 if self.fusion == "add" else 2)
        return (
            maps + self.num_keypoints * self.kept_per_token + self.diffusion.kept_values(self.num_keypoints, shape)
        ) // 2
