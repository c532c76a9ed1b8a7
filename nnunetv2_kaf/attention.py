"""Self-attention among the keypoint tokens of one sample, with a validity mask and fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class PositionEncoding(nn.Module):
    """Learned encoding of a keypoint's position in millimetres (NeurIPS 2023, section 3.1).

    Args:
        ndim: Spatial axes D.
        hidden: Hidden widths of the MLP.
        token_dim: Output width.
    """

    def __init__(self, ndim: int, hidden: Sequence[int], token_dim: int) -> None:
        super().__init__()
        widths = [ndim, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], token_dim))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, K, D) positions from `coordinates.normalize_mm` -> (B, K, token_dim)."""
        out: Tensor = self.mlp(positions)
        return out


class SelfBlock(nn.Module):
    """Pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020) over masked tokens.

    LayerNorm does not couple samples or tokens, unlike a batch normalisation over keypoints.

    Args:
        token_dim: Width D.
        num_heads: Attention heads.
        mlp_ratio: Width of the residual MLP in multiples of D.
    """

    def __init__(self, token_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(token_dim * mlp_ratio)
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(token_dim)
        self.qkv = nn.Linear(token_dim, 3 * token_dim)
        self.out = nn.Linear(token_dim, token_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(token_dim), nn.Linear(token_dim, hidden), nn.GELU(), nn.Linear(hidden, token_dim)
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            tokens: (B, K, D).
            mask: (B, 1, 1, K) bool from `attention_mask`, True for tokens that may be attended to.

        Returns:
            (B, K, D).
        """
        qkv = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = tokens + self.mlp(tokens)
        return out


def attention_mask(valid: Tensor) -> Tensor:
    """Mask for `SelfBlock`.

    Args:
        valid: (B, K) bool.

    Returns:
        (B, 1, 1, K) bool. A sample without any valid token attends to all of them: a softmax over nothing would be NaN,
        and the result of such a sample is never written anywhere.
    """
    return torch.logical_or(valid, ~valid.any(dim=1, keepdim=True))[:, None, None, :]
