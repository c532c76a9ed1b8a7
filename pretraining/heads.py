"""Projection heads; they exist during pretraining only. No normalisation layer couples the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GlobalHead(nn.Sequential):
    """Two-layer MLP from a vector to a global embedding: (N, C) -> (N, E).

    Deviation from the paper: a LayerNorm in front. The average of instance-normalised, rectified maps is nearly the
    same constant in every channel and sample; without it all embeddings start as one point and the bottleneck's loss
    can stay at its value for collapse, log(2B - 1).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Build with a hidden width of ``in_features``."""
        super().__init__(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, in_features),
            nn.ReLU(inplace=True),
            nn.Linear(in_features, out_features),
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
