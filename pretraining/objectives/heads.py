"""Projection heads; they exist during pretraining only. No normalisation layer couples the samples of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf.attention import SelfBlock, attention_mask


def pool_grid(features: Tensor, cells: int) -> Tensor:
    """Average a map over a coarse grid, which keeps where something is: (N, C, *S) -> (N, C * G).

    After instance normalisation the average of a channel over the whole map is nearly the same in every sample; what
    differs is where the channel is active.

    Args:
        features: Map of any spatial shape; on an axis with fewer voxels than cells, cells share voxels.
        cells: Grid cells along each of the D axes, G = cells ** D. 1 averages everything.
    """
    if features.device.type == "mps":  # lacks the pooling of 3D maps, and of sizes that are no multiple of the cells
        return _pool_by_products(features, cells).flatten(1)
    pool = functional.adaptive_avg_pool2d if features.ndim == 4 else functional.adaptive_avg_pool3d
    pooled: Tensor = pool(features, cells)
    return pooled.flatten(1)


def _pool_by_products(features: Tensor, cells: int) -> Tensor:
    """Torch's adaptive average pooling, (N, C, *S) -> (N, C, cells, ...), as one matrix product per axis."""
    for axis, size in enumerate(features.shape[2:], start=2):
        weights = torch.zeros(size, cells)
        for cell in range(cells):
            first, last = cell * size // cells, -(-(cell + 1) * size // cells)
            weights[first:last, cell] = 1 / (last - first)
        features = (features.movedim(axis, -1) @ weights.to(features)).movedim(-1, axis)
    return features


class GlobalHead(nn.Sequential):
    """Two-layer MLP from a vector to a global embedding: (N, C) -> (N, E).

    Deviation from the paper: a LayerNorm in front. The average of instance-normalised, rectified maps is nearly the
    same constant in every channel and sample; without it all embeddings start as one point and the bottleneck's loss
    can stay at its value for collapse, log(2B - 1).

    Args:
        in_features: C.
        hidden: Width of the hidden layer.
        out_features: E.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_features),
        )


class DescriptorHead(nn.Module):
    """Multi-scale keypoint descriptor: the tokens of all levels, concatenated and projected."""

    def __init__(self, token_dims: list[int], out_features: int) -> None:
        """Build for one token width per KAF level."""
        super().__init__()
        self.projection = nn.Linear(sum(token_dims), out_features)

    def forward(self, tokens: list[Tensor]) -> Tensor:
        """Map tokens, each (N, K, D_l), to descriptors (N, K, E)."""
        out: Tensor = self.projection(torch.cat(tokens, dim=2))
        return out


def masked_mean(descriptors: Tensor, valid: Tensor) -> Tensor:
    """Average the valid descriptors: (N, K, E), (N, K) bool -> (N, E); zero where no keypoint is valid."""
    total = descriptors.masked_fill(~valid.unsqueeze(2), 0).sum(1)
    return total / valid.sum(1, keepdim=True).clamp_min(1)


class CrossBlock(nn.Module):
    """Pre-norm transformer block in which the points of one view attend to those of the other (Vaswani et al., 2017).

    Args:
        features: Width F.
        num_heads: Attention heads.
        mlp_ratio: Width of the residual MLP in multiples of F.
    """

    def __init__(self, features: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(features * mlp_ratio)
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(features)
        self.query = nn.Linear(features, features)
        self.key_value = nn.Linear(features, 2 * features)
        self.out = nn.Linear(features, features)
        self.mlp = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features)
        )

    def forward(self, tokens: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            tokens: (B, K, F) of one view.
            others: (B, K2, F) of the other view.
            mask: (B, 1, 1, K2) bool from `attention_mask`, True for tokens of the other view that may be attended to.

        Returns:
            (B, K, F).
        """
        query = self.query(self.attention_norm(tokens)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_value = self.key_value(self.attention_norm(others)).unflatten(-1, (2, self.num_heads, -1))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = tokens + self.mlp(tokens)
        return out


class Matcher(nn.Module):
    """Descriptors that know both views, for the matching by optimal transport (NeurIPS 2023, local matching loss).

    Layers of self-attention within each view and of cross-attention between the two, with the same weights for both
    views, so that exchanging the views exchanges the results.

    Args:
        features: Width F of the descriptors.
        layers: Pairs of a self and a cross block; with none only the projection is learned.
        num_heads: Attention heads; if F is no multiple of it, their greatest common divisor.
        mlp_ratio: Width of the residual MLPs in multiples of F.

    Attributes:
        dustbin: Scalar, the score of matching a point with nothing. It starts at 0, the expected score of two unrelated
            descriptors.
    """

    def __init__(self, features: int, layers: int, num_heads: int = 4, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        heads = math.gcd(features, num_heads)
        self.self_blocks = nn.ModuleList(SelfBlock(features, heads, mlp_ratio) for _ in range(layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(features, heads, mlp_ratio) for _ in range(layers))
        self.projection = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, features))
        self.dustbin = nn.Parameter(torch.zeros(()))

    def forward(
        self, first: Tensor, second: Tensor, valid_first: Tensor, valid_second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map the descriptors of pairs of views.

        Args:
            first: (B, K, F); entries that are not valid may hold anything and influence nothing.
            second: (B, K2, F).
            valid_first: (B, K) bool.
            valid_second: (B, K2) bool.

        Returns:
            (B, K, F) and (B, K2, F), finite everywhere; meaningless where not valid, or where the other view has no
            valid point.
        """
        # A weight of zero in the attention does not remove a NaN.
        first = first.masked_fill(~valid_first.unsqueeze(2), 0)
        second = second.masked_fill(~valid_second.unsqueeze(2), 0)
        mask_first, mask_second = attention_mask(valid_first), attention_mask(valid_second)
        for self_block, cross_block in zip(self.self_blocks, self.cross_blocks, strict=True):
            first, second = self_block(first, mask_first), self_block(second, mask_second)
            first, second = cross_block(first, second, mask_second), cross_block(second, first, mask_first)
        return self.projection(first), self.projection(second)
