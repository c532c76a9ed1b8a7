"""The one coordinate convention.

- Coordinates are in array order, (z, y, x) or (y, x), never (x, y).
- Units are voxels of a stated grid; the centre of voxel i is the coordinate i.
- On a grid of stride s, voxel j covers the input voxels [j * s, (j + 1) * s): the convention of nnU-Net's transposed
  convolutions and of its down-sampled deep-supervision targets. Its centre is therefore the input coordinate
  j * s + (s - 1) / 2.
- Millimetres are voxels times the spacing, measured from the centre of voxel 0.

Every function is pure and takes coordinates of shape (..., D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError


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


def flip(coords: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Coordinates after the image was flipped along `axes`.

    Args:
        coords: (..., D) in voxels.
        shape: D sizes of the image.
        axes: spatial axes, 0 = first.

    Returns:
        (..., D): i becomes shape - 1 - i along each flipped axis.
    """
    sign = _vector(coords, [-1.0 if d in axes else 1.0 for d in range(len(shape))])
    offset = _vector(coords, [float(n - 1) if d in axes else 0.0 for d, n in enumerate(shape)])
    return coords * sign + offset


def affine(coords: Tensor, matrix: Tensor, translation: Tensor) -> Tensor:
    """Apply x -> matrix @ x + translation.

    Args:
        coords: (..., D).
        matrix: (D, D).
        translation: (D,).

    Returns:
        (..., D).
    """
    return coords @ matrix.transpose(-1, -2) + translation


def to_mm(coords: Tensor, spacing: Sequence[float]) -> Tensor:
    """Voxels to millimetres.

    Args:
        coords: (..., D) in voxels.
        spacing: D spacings in mm per voxel.

    Returns:
        (..., D) in mm from the centre of voxel 0.
    """
    return coords * _vector(coords, spacing)


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
    centre = _vector(coords, [(n - 1) / 2 for n in shape])
    return to_mm(coords - centre, spacing) / half_extent_mm


def voxel_index(coords: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Flat index of the voxel that holds each coordinate, on a feature map of some stride.

    Args:
        coords: (..., D) in input voxels.
        shape: D sizes of the feature map.
        stride: D strides of the feature map relative to the input.

    Returns:
        (...) int64 in [0, prod(shape)), row-major; coordinates outside are clamped to the border.

    Raises:
        KAFError: the numbers of axes differ.
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


def _vector(like: Tensor, values: Sequence[float]) -> Tensor:
    """(D,) of given values, filled on the device: copying a list there would make the host wait."""
    return torch.stack([like.new_full((), float(value)) for value in values])
