"""The one coordinate convention.

- Coordinates are in array order, (z, y, x) or (y, x), never (x, y).
- Units are voxels of a stated grid; the centre of voxel i is the coordinate i.
- On a grid of stride s, voxel j covers the input voxels [j * s, (j + 1) * s): the convention of nnU-Net's transposed
  convolutions and of its down-sampled deep-supervision targets. Its centre is therefore the input coordinate
  j * s + (s - 1) / 2.
- Millimetres are voxels times the spacing, measured from the centre of voxel 0.

Every function is pure and takes coordinates of shape (..., D): tensors, and where one of the two kinds suffices for a
caller, numpy arrays as well. No other file converts coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError

Coords = TypeVar("Coords", Tensor, np.ndarray)


def rescale(coords: Tensor, from_stride: Sequence[float], to_stride: Sequence[float]) -> Tensor:
    """Express coordinates of a grid of one stride in a grid of another.

    Args:
        coords: (..., D) in voxels of the first grid.
        from_stride: D strides of the first grid, relative to the input.
        to_stride: D strides of the second grid.

    Returns:
        (..., D) in voxels of the second grid.
    """
    ratio = _vector(coords, [a / b for a, b in zip(from_stride, to_stride, strict=True)])
    return (coords + 0.5) * ratio - 0.5


def to_mm(coords: Coords, spacing: Sequence[float]) -> Coords:
    """Voxels to millimetres.

    Args:
        coords: (..., D) in voxels.
        spacing: D spacings in mm per voxel.

    Returns:
        (..., D) in mm from the centre of voxel 0.
    """
    out: Coords = coords * _vector(coords, spacing)
    return out


def from_mm(coords: Coords, spacing: Sequence[float]) -> Coords:
    """Millimetres to voxels: the inverse of `to_mm`.

    Args:
        coords: (..., D) in mm.
        spacing: D spacings in mm per voxel.

    Returns:
        (..., D) in voxels.
    """
    out: Coords = coords / _vector(coords, spacing)
    return out


def from_centre(coords: Coords, shape: Sequence[int]) -> Coords:
    """Positions relative to the centre of an image, in voxels.

    Args:
        coords: (..., D) in voxels.
        shape: D sizes of the image.

    Returns:
        (..., D); 0 is the middle of the image.
    """
    out: Coords = coords - _vector(coords, [(n - 1) / 2 for n in shape])
    return out


def share_of_extent(coords: Coords, shape: Sequence[int]) -> Coords:
    """Positions as shares of an image: the middle is 0.5 for any number of voxels, the outer edges are 0 and 1.

    Args:
        coords: (..., D) in voxels.
        shape: D sizes of the image.
    """
    out: Coords = (coords + 0.5) / _vector(coords, shape)
    return out


def to_grid_sample(coords: Tensor, shape: Sequence[int], *, border: bool) -> Tensor:
    """Coordinates as `torch.nn.functional.grid_sample` takes them: from -1 to 1, last axis of the array first.

    Args:
        coords: (..., D) in voxels.
        shape: D sizes of the image that is sampled.
        border: Whether -1 and 1 are the outer edges of the border voxels (`align_corners=False`) or their centres
            (`align_corners=True`).
    """
    if border:
        return (2 * share_of_extent(coords, shape) - 1).flip(-1)
    return (2 * coords / _vector(coords, [max(1, n - 1) for n in shape]) - 1).flip(-1)


def normalize_mm(coords: Tensor, shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Positions relative to the centre of an image, in units of half its largest physical extent.

    One length for all axes, so that anisotropic spacing and non-square images keep their proportions in millimetres.

    Args:
        coords: (..., D) in voxels.
        shape: D sizes of the image in voxels.
        spacing: D spacings in mm per voxel.

    Returns:
        (..., D); the largest axis runs over [-1, 1].
    """
    half_extent_mm = max(n * float(s) for n, s in zip(shape, spacing, strict=True)) / 2
    return to_mm(from_centre(coords, shape), spacing) / half_extent_mm


def voxel_index(coords: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Flat index of the voxel that holds each coordinate, on a feature map of some stride.

    Args:
        coords: (..., D) in input voxels.
        shape: D sizes of the feature map.
        stride: D strides of the feature map relative to the input.

    Returns:
        (...) int64 in [0, prod(shape)), row-major; coordinates outside are clamped to the border.

    Raises:
        KAFError: The numbers of axes differ.
    """
    if not coords.shape[-1] == len(shape) == len(stride):
        raise KAFError(
            f"coordinates have {coords.shape[-1]} axes, the feature map {len(shape)}, the stride {len(stride)}"
        )
    level = rescale(coords, [1.0] * len(stride), [float(s) for s in stride])
    index = torch.zeros(coords.shape[:-1], dtype=torch.int64, device=coords.device)
    for d, n in enumerate(shape):
        # halves round up, so that coordinate 1 at stride 2 (level 0.25) and coordinate 0.5 at stride 1 are well defined
        voxel = torch.floor(level[..., d] + 0.5).long().clamp(0, n - 1)
        index = index * n + voxel
    return index


def _vector(like: Coords, values: Sequence[float]) -> Coords:
    """(D,) of given values; for a tensor filled on its device: copying a list there would make the host wait."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, dtype=np.float64)
    return torch.stack([like.new_full((), float(value)) for value in values])
