"""From crops of source images to the views: a recipe that any device can carry out, batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_kaf.coordinates import to_grid_sample
from pretraining.pairs.splines import spline_grid
from pretraining.pairs.views import ViewParameters

NOISE_FIELD = 1 << 22
"""Values of the field that the noise of all views is taken from."""


@dataclass(frozen=True)
class Recipe:
    """N views that have yet to be rendered, on any device.

    Attributes:
        sources: (N, C, *R) float32 crops of the source images, padded with zeros at the ends.
        control: (N, G, ..., G, D) float32 control points in voxels of the crops.
        intensity: (N, 4, C) float32: gamma, contrast, brightness, noise of `ViewParameters`.
        seeds: N seeds of the noise.
    """

    sources: Tensor
    control: Tensor
    intensity: Tensor
    seeds: tuple[int, ...]

    def to(self, device: torch.device) -> Recipe:
        """The recipe with its tensors on `device`."""
        sources, control, intensity = (
            t.to(device, non_blocking=True) for t in (self.sources, self.control, self.intensity)
        )
        return Recipe(sources, control, intensity, self.seeds)


def make_recipe(
    crops: Sequence[Tensor],
    origins: Sequence[Sequence[int]],
    controls: Sequence[np.ndarray],
    parameters: Sequence[ViewParameters],
) -> Recipe:
    """Put views together.

    Args:
        crops: Parts of the source images, each (C, *R) float32.
        origins: Source voxel at index 0 of the crop, one per view.
        controls: Control points from `control_points`, one array per view.
        parameters: Parameters of each view.
    """
    control = [c - np.asarray(origin, dtype=np.float64) for c, origin in zip(controls, origins, strict=True)]
    intensity = [[p.gamma, p.contrast, p.brightness, p.noise] for p in parameters]
    return Recipe(
        stack_padded(crops),
        torch.from_numpy(np.stack(control).astype(np.float32)),
        torch.tensor(intensity, dtype=torch.float32),
        tuple(p.noise_seed for p in parameters),
    )


def join(recipes: Sequence[Recipe]) -> Recipe:
    """Concatenate recipes."""
    sources = stack_padded([source for recipe in recipes for source in recipe.sources])
    control = torch.cat([recipe.control for recipe in recipes])
    intensity = torch.cat([recipe.intensity for recipe in recipes])
    return Recipe(sources, control, intensity, tuple(seed for recipe in recipes for seed in recipe.seeds))


def stack_padded(crops: Sequence[Tensor]) -> Tensor:
    """Stack (C, *R) tensors of different sizes, padded with zeros at the ends (the value outside of an image)."""
    if all(crop.shape == crops[0].shape for crop in crops):
        return torch.stack(list(crops))
    target = [max(crop.shape[axis] for crop in crops) for axis in range(crops[0].ndim)]
    out = crops[0].new_zeros((len(crops), *target))
    for place, crop in zip(out, crops, strict=True):
        place[tuple(slice(n) for n in crop.shape)] = crop
    return out


def render(recipe: Recipe, shape: Sequence[int]) -> Tensor:
    """Compute the views: sample linearly, zero outside of the image, then change the intensities.

    Returns:
        (N, C, *shape) float32 on the recipe's device. The sources are not changed.
    """
    # Splines are affine in their control points, so the few control points are converted instead of every voxel.
    grid = spline_grid(to_grid_sample(recipe.control, recipe.sources.shape[2:], border=True), shape)
    views = functional.grid_sample(recipe.sources, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return adjust_intensity(views, recipe.intensity, recipe.seeds)


def adjust_intensity(views: Tensor, intensity: Tensor, seeds: Sequence[int]) -> Tensor:
    """Apply gamma, contrast, brightness and noise to views (N, C, *V); returns a new tensor.

    Args:
        views: (N, C, *V) float32.
        intensity: (N, 4, C), see `Recipe`.
        seeds: N seeds of the noise; a view's noise does not depend on its batch.
    """
    shape, flat = views.shape, views.flatten(2)
    gamma, contrast, brightness, strength = intensity.unsqueeze(3).unbind(1)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    extent = (high - low).clamp_min(1e-8)
    unit = flat.sub(low).div_(extent).pow_(gamma)
    mean = unit.mean(2, keepdim=True)
    square = torch.linalg.vector_norm(unit, dim=2, keepdim=True).square() / flat.shape[2]
    std = (square - mean.square()).clamp_min(0).sqrt()
    offset = (mean * (1 - contrast) + std * brightness) * extent + low
    out = torch.addcmul(offset, unit, contrast * extent)
    for view, deviation, seed in zip(out, std * strength * extent, seeds, strict=True):
        view.addcmul_(_noise(view.numel(), seed, views.device).view_as(view), deviation)
    return out.view(shape)


def _noise(count: int, seed: int, device: torch.device) -> Tensor:
    """`count` standard normal values that belong to a seed, the same on every device.

    They are a piece of one long field, at a place that the seed determines: drawing new values for every view would be
    one of the slowest parts of the input pipeline.
    """
    if count > NOISE_FIELD // 2:
        return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(device)
    # Multiplied by a large odd number, so that neighbouring seeds are not neighbouring places (Knuth's hash).
    start = seed * 2654435761 % (NOISE_FIELD - count + 1)
    return _noise_field(str(device))[start : start + count]


@lru_cache(maxsize=4)
def _noise_field(device: str) -> Tensor:
    """The field of `_noise` on a device."""
    return torch.randn(NOISE_FIELD, generator=torch.Generator().manual_seed(0)).to(device)
