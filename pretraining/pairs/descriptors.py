"""What the surroundings of a point look like: normalised intensity patches, compared by their correlation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_kaf.coordinates import from_mm, to_grid_sample

ROWS = 1 << 14
"""Rows that are smoothed at a time: on a CPU torch takes 16 times their memory."""


def patch_descriptors(
    images: Tensor,
    coords: Tensor,
    spacing: Sequence[float],
    step_mm: float,
    radius_steps: int = 4,
    sigma_steps: float = 0.75,
) -> Tensor:
    """Describe the surroundings of points by smoothed, normalised intensity patches.

    The inner product of two such vectors is the normalised cross-correlation of the patches, so it ignores gain and
    offset. The patch is a grid of `2 * radius_steps + 1` points a side, `step_mm` apart, so that anisotropic voxels
    are described in physical size. Smoothing (Gaussian, `sigma_steps * step_mm`) avoids aliasing.

    Args:
        images: (B, C, *S) un-augmented images.
        coords: (B, K, D) voxel coordinates in these images, array order, voxel centres at integers.
        spacing: D voxel sizes in mm.
        step_mm: Distance of neighbouring samples in mm.
        radius_steps: Samples on each side of the centre.
        sigma_steps: Gaussian sigma in steps.

    Returns:
        (B, K, C * (2 * radius_steps + 1) ** D) float, zero mean over each channel's patch and unit norm; all zero where
        the patch is constant.
    """
    dims = coords.shape[2]
    smooth = _gaussian_smooth(images.float(), [sigma_steps * step_mm / float(mm) for mm in spacing])
    steps = torch.arange(-radius_steps, radius_steps + 1, device=images.device, dtype=torch.float32) * step_mm
    offsets = from_mm(torch.cartesian_prod(*[steps] * dims).reshape(-1, dims), spacing)
    points = coords.unsqueeze(2) + offsets
    patches = sample_at(smooth, points)  # (B, C, K, P)
    patches = patches - patches.mean(3, keepdim=True)
    vectors = patches.transpose(1, 2).flatten(2)
    norm = vectors.norm(dim=2, keepdim=True)
    # Rounding leaves about 1e-7 of a constant patch's level after its mean is removed: that is not structure.
    level = smooth.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1)
    return torch.where(norm > 1e-5 * level, vectors / norm.clamp_min(1e-20), 0.0)


def sample_at(images: Tensor, points: Tensor) -> Tensor:
    """Interpolate (B, C, *S) images linearly at (B, K, P, D) voxel coordinates -> (B, C, K, P); border repeated."""
    normalised = to_grid_sample(points, images.shape[2:], border=False)
    if points.shape[-1] == 3:
        normalised = normalised.unsqueeze(1)
    out = functional.grid_sample(images, normalised, mode="bilinear", padding_mode="border", align_corners=True)
    return out.squeeze(2) if points.shape[-1] == 3 else out


def _gaussian_smooth(images: Tensor, sigmas: list[float]) -> Tensor:
    """Smooth (B, C, *S) with a separable Gaussian, one sigma in voxels per axis, borders repeated."""
    for axis, sigma in enumerate(sigmas, start=2):
        radius = max(1, round(3 * sigma))
        x = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (x / max(sigma, 1e-3)) ** 2)
        moved = images.movedim(axis, -1)
        flat = functional.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
        weight = (kernel / kernel.sum()).view(1, 1, -1)
        smooth = torch.cat([functional.conv1d(rows, weight) for rows in torch.split(flat, ROWS)])
        images = smooth.view(moved.shape).movedim(-1, axis)
    return images
