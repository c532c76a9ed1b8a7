"""From feature map to keypoint tokens and back.

`gather` reads one feature vector per keypoint; `scatter` writes tokens into an empty map. Several keypoints on one
voxel are averaged: the rule does not depend on their order, on the device, or on the other samples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
        num_voxels: Voxels of the map.
        dtype: Type of the result.

    Returns:
        (B, K): the weights of the keypoints of one voxel sum to 1.
    """
    ones = valid.to(dtype)
    count = ones.new_zeros(index.shape[0], num_voxels).scatter_add(1, index, ones)
    return ones / count.gather(1, index).clamp_min(1.0)


def averaged(tokens: Tensor, index: Tensor, valid: Tensor, num_voxels: int) -> Tensor:
    """(B, K, C) tokens times their `collision_weights`: summed up on their voxels they give the mean."""
    return tokens * collision_weights(index, valid, num_voxels, tokens.dtype).unsqueeze(-1)


def scatter(tokens: Tensor, index: Tensor, valid: Tensor, shape: Sequence[int]) -> Tensor:
    """Write tokens into a map of zeros; the mean where several share a voxel.

    Args:
        tokens: (B, K, C).
        index: (B, K) flat voxel indices.
        valid: (B, K) bool; invalid tokens are not written.
        shape: Spatial shape S of the map.

    Returns:
        (B, C, *S).
    """
    batch, _, channels = tokens.shape
    num_voxels = math.prod(shape)
    values = averaged(tokens, index, valid, num_voxels).transpose(1, 2)
    flat = tokens.new_zeros(batch, channels, num_voxels)
    flat = flat.scatter_add(2, index.unsqueeze(1).expand(-1, channels, -1), values)
    return flat.view(batch, channels, *shape)
