"""From feature map to keypoint tokens and back.

`gather` reads one feature vector per keypoint; `scatter` writes tokens into an empty map. Several keypoints on one
voxel are averaged: the rule does not depend on their order, on the device, or on the other samples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Read the feature vector of each keypoint's voxel.

    Args:
        features: (B, C, *S).
        index: (B, K) flat voxel indices (see `coordinates.voxel_index`).

    Returns:
        (B, K, C).
    """
    flat = features.flatten(2)
    return flat.gather(2, index.unsqueeze(1).expand(-1, flat.shape[1], -1)).transpose(1, 2)


def collision_weights(index: Tensor, valid: Tensor, num_voxels: int, dtype: torch.dtype) -> Tensor:
    """1 / (number of valid keypoints on the same voxel), 0 for invalid keypoints.

    Args:
        index: (B, K) flat voxel indices.
        valid: (B, K) bool.
        num_voxels: voxels of the map.
        dtype: of the result.

    Returns:
        (B, K): the weights of the keypoints of one voxel sum to 1.
    """
    ones = valid.to(dtype)
    count = ones.new_zeros(index.shape[0], num_voxels).scatter_add(1, index, ones)
    return ones / count.gather(1, index).clamp_min(1.0)


def scatter(tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int]) -> Tensor:
    """Write tokens into a map of zeros; the mean where several share a voxel.

    Args:
        tokens: (B, K, C).
        index: (B, K) flat voxel indices.
        valid: (B, K) bool; invalid tokens are not written.
        shape: spatial shape S of the map.

    Returns:
        (B, C, *S).
    """
    batch, _, channels = tokens.shape
    num_voxels = math.prod(shape)
    weights = collision_weights(index, valid, num_voxels, tokens.dtype)
    values = (tokens * weights.unsqueeze(-1)).transpose(1, 2)
    flat = tokens.new_zeros(batch, channels, num_voxels)
    flat = flat.scatter_add(2, index.unsqueeze(1).expand(-1, channels, -1), values)
    return flat.view(batch, channels, *shape)


def scatter_conv(tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int], weight: Tensor) -> Tensor:
    """`conv(scatter(tokens), weight)` with zero padding, without touching the empty voxels.

    The convolution of a map that is zero outside K voxels is non-zero only around them: each token is multiplied with
    the kernel once and added to its neighbours, K * |kernel| vectors instead of a dense pass. Where the map has no more
    voxels than tokens, the dense form is the cheaper one and is taken.

    Args:
        tokens: (B, K, D).
        index: (B, K) flat voxel indices.
        valid: (B, K) bool.
        shape: spatial shape S of the map.
        weight: (C, D, *kernel), odd kernel sizes, as of `torch.nn.Conv2d` / `Conv3d`.

    Returns:
        (B, C, *S).
    """
    kernel = weight.shape[2:]
    num_voxels = math.prod(shape)
    if num_voxels <= tokens.shape[1]:
        conv = functional.conv3d if len(shape) == 3 else functional.conv2d
        return conv(scatter(tokens, index, valid, shape), weight.to(tokens.dtype), padding=[k // 2 for k in kernel])
    batch, num_tokens, _ = tokens.shape
    channels = weight.shape[0]
    weights = collision_weights(index, valid, num_voxels, tokens.dtype)
    # (B, K, D) x (D, taps * C) -> one vector per token and kernel tap
    taps = weight.flatten(2).permute(1, 2, 0).flatten(1).to(tokens.dtype)
    values = ((tokens * weights.unsqueeze(-1)) @ taps).view(batch, num_tokens * math.prod(kernel), channels)
    target, inside = _neighbours(index, shape, kernel)
    values = values * inside.flatten(1).unsqueeze(-1)
    flat = values.new_zeros(batch, num_voxels, channels)
    flat = flat.scatter_add(1, target.flatten(1).unsqueeze(-1).expand(-1, -1, channels), values)
    return flat.transpose(1, 2).reshape(batch, channels, *shape)


def _neighbours(index: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Voxels that each kernel tap of each keypoint writes to.

    Returns:
        target: (B, K, taps) flat indices, clamped into the map; inside: (B, K, taps) bool, False where clamped.
    """
    target = torch.zeros_like(index).unsqueeze(-1)
    inside = torch.ones_like(target, dtype=torch.bool)
    remaining = math.prod(shape)
    for n, k in zip(shape, kernel, strict=True):
        remaining //= n
        position = torch.div(index, remaining, rounding_mode="floor") % n
        # tap t of a convolution reads voxel i + t - k // 2, so a token at p reaches i = p - (t - k // 2)
        offset = k // 2 - torch.arange(k, device=index.device)
        voxel = position.unsqueeze(-1) + offset
        ok = (voxel >= 0) & (voxel < n)
        target = (target.unsqueeze(-1) * n + voxel.clamp(0, n - 1).unsqueeze(-2)).flatten(2)
        inside = (inside.unsqueeze(-1) & ok.unsqueeze(-2)).flatten(2)
    return target, inside
