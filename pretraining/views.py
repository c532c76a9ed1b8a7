"""Augmented views whose geometric record is the sampling grid itself.

`draw_view` draws `ViewParameters` (random), `sampling_grid` turns them into the source coordinate of every voxel
(deterministic), `resample` and `adjust_intensity` compute the view (pure). A keypoint's source coordinate is the grid
at the keypoint, so image and coordinates cannot move apart. 2D and 3D share all code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pretraining.config import PretrainConfig

ELASTIC_CELLS = 4
"""Control intervals of the elastic deformation along each axis of the view."""
ANISOTROPY_LIMIT = 3.0
"""Beyond this ratio of voxel sizes the deformation stays within the planes (nnU-Net's rule for its "dummy 2D")."""


@dataclass(frozen=True)
class ViewParameters:
    """Everything that determines one view; replaying it gives the same view bit for bit on one machine.

    Attributes:
        centre: source voxel coordinates of the view's centre (D values, array order).
        rotation: (D, D) rotation matrix in mm space.
        scale: source mm per view mm.
        mirror: per axis, whether the view is mirrored.
        control: displacement in mm of the control points, (D, ELASTIC_CELLS + 3, ...), or ``None`` for none.
        gamma: exponent per channel, applied to the view scaled to [0, 1].
        contrast: factor per channel around the view's mean.
        brightness: offset per channel in standard deviations of the view.
        noise: standard deviation of the noise per channel, in standard deviations of the view.
        noise_seed: seed of the noise.
    """

    centre: tuple[float, ...]
    rotation: np.ndarray
    scale: float
    mirror: tuple[bool, ...]
    control: np.ndarray | None
    gamma: tuple[float, ...]
    contrast: tuple[float, ...]
    brightness: tuple[float, ...]
    noise: tuple[float, ...]
    noise_seed: int


def draw_view(
    centre: Sequence[float],
    shape: Sequence[int],
    spacing: Sequence[float],
    channels: int,
    config: PretrainConfig,
    generator: np.random.Generator,
) -> ViewParameters:
    """Draw the parameters of one view.

    With probability ``config.spatial``: rotation uniform in +-``rotation`` degrees (about every axis; in the plane only
    if the voxel sizes differ by more than `ANISOTROPY_LIMIT`), scale log-uniform in [``scale_min``, ``scale_max``],
    elastic control displacements uniform in +-``elastic`` of the control spacing. Otherwise a plain crop. Mirrors and
    intensity changes are drawn independently of that.

    Args:
        centre: source voxel coordinates of the crop centre.
        shape: shape of the view in voxels.
        spacing: voxel size in mm, of source and view alike.
        channels: number of image channels.
        config: ranges.
        generator: source of all draws.
    """
    dims = len(shape)
    rotation, scale, control = np.eye(dims), 1.0, None
    if generator.random() < config.spatial:
        axes = _isotropic_axes(spacing)
        rotation = _draw_rotation(dims, axes, math.radians(config.rotation), generator)
        scale = math.exp(generator.uniform(math.log(config.scale_min), math.log(config.scale_max)))
        control = _draw_control(shape, spacing, axes, config.elastic, generator)

    def per_channel(low: float, high: float) -> tuple[float, ...]:
        return tuple(float(v) for v in generator.uniform(low, high, channels))

    return ViewParameters(
        centre=tuple(float(c) for c in centre),
        rotation=rotation,
        scale=scale,
        mirror=tuple(bool(m) for m in generator.random(dims) < config.mirror),
        control=control,
        gamma=tuple(math.exp(v) for v in per_channel(-config.gamma, config.gamma)),
        contrast=per_channel(1 - config.contrast, 1 + config.contrast),
        brightness=per_channel(-config.brightness, config.brightness),
        noise=per_channel(0, config.noise),
        noise_seed=int(generator.integers(2**62)),
    )


def sampling_grid(parameters: ViewParameters, shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Return the source voxel coordinate of every view voxel, (*shape, D) float32, array order.

    A view voxel at offset v mm from the view's centre shows the source at
    ``centre + scale * R (mirror * v + u(v)) / spacing``, u being the elastic displacement in mm.
    """
    dims = len(shape)
    size = torch.tensor(spacing, dtype=torch.float64)
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * s * (-1 if flip else 1)
        for n, s, flip in zip(shape, size, parameters.mirror, strict=True)
    ]
    # The grid is affine apart from the displacement: adding one column per axis avoids a (D, D) product per voxel.
    linear = torch.from_numpy(parameters.rotation * parameters.scale) / size.unsqueeze(1)
    grid = torch.tensor(parameters.centre, dtype=torch.float64).expand(*[1] * dims, dims)
    for axis, values in enumerate(axes):
        column = values.unsqueeze(1) * linear[:, axis]
        grid = grid + column.view(*[-1 if a == axis else 1 for a in range(dims)], dims)
    grid = grid.float()
    if parameters.control is not None:
        grid = grid + _displacement(parameters.control, shape) @ linear.T.float()
    return grid


def _displacement(control: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Evaluate the control displacements (D, G, ...) as a uniform cubic B-spline at every voxel, (*shape, D).

    Free-form deformation (Rueckert et al., IEEE TMI 1999). It is a tensor product: one small matrix per axis does it.
    """
    field = torch.from_numpy(control).float()
    for axis, count in enumerate(shape, start=1):
        field = torch.tensordot(_bspline_weights(count, control.shape[axis] - 3), field, dims=([1], [axis])).movedim(
            0, axis
        )
    return field.movedim(0, -1)


def _bspline_weights(count: int, cells: int) -> Tensor:
    """Return the (count, cells + 3) cubic B-spline weights of voxels spread over ``cells`` intervals."""
    position = torch.linspace(0, cells, count) if count > 1 else torch.tensor([cells / 2])
    cell = position.floor().clamp(max=cells - 1)
    t = position - cell
    basis = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    weights = torch.zeros(count, cells + 3)
    return weights.scatter_(1, cell.long().unsqueeze(1) + torch.arange(4), basis)


def resample(source: Tensor, grid: Tensor, origin: Sequence[int]) -> Tensor:
    """Sample an image linearly, zero outside of it.

    Args:
        source: (C, *S) float32, possibly a crop of the whole image that covers the grid.
        grid: (*V, D) coordinates in the whole image.
        origin: voxel of the whole image at index 0 of ``source``.

    Returns:
        (C, *V) float32. ``source`` is not changed.
    """
    size = torch.tensor(source.shape[1:], dtype=torch.float32, device=grid.device)
    local = grid - torch.tensor(origin, dtype=torch.float32, device=grid.device)
    # align_corners=False: -1 and 1 are the outer edges of the first and last voxel; the last array axis comes first.
    normalised = ((2 * local + 1) / size - 1).flip(-1)
    view = functional.grid_sample(
        source.unsqueeze(0), normalised.unsqueeze(0), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return view.squeeze(0)


def bounding_box(grid: Tensor, shape: Sequence[int], margin: Sequence[int]) -> tuple[slice, ...]:
    """Return the part of an image of ``shape`` that a grid (*V, D) touches, at least one voxel per axis.

    ``margin`` voxels are added on each side (for descriptors around the sampled points).
    """
    flat = grid.flatten(0, -2)
    low, high = flat.amin(0).floor().long().tolist(), flat.amax(0).ceil().long().tolist()
    box = []
    for first, last, size, extra in zip(low, high, shape, margin, strict=True):
        start = min(max(first - extra, 0), size - 1)
        box.append(slice(start, max(min(last + extra + 1, size), start + 1)))
    return tuple(box)


def adjust_intensity(view: Tensor, parameters: ViewParameters) -> Tensor:
    """Apply gamma, contrast, brightness and noise to a view (C, *V); returns a new tensor."""

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=view.dtype, device=view.device).view(-1, *[1] * (view.ndim - 1))

    space = tuple(range(1, view.ndim))
    low, high = view.amin(space, keepdim=True), view.amax(space, keepdim=True)
    extent = (high - low).clamp_min(1e-8)
    out = ((view - low) / extent) ** column(parameters.gamma) * extent + low
    mean, std = out.mean(space, keepdim=True), out.std(space, keepdim=True, unbiased=False)
    out = (out - mean) * column(parameters.contrast) + mean + std * column(parameters.brightness)
    generator = torch.Generator(device=view.device).manual_seed(parameters.noise_seed)
    noise = torch.randn(view.shape, generator=generator, dtype=view.dtype, device=view.device)
    return out + noise * std * column(parameters.noise)


def source_coordinates(grids: Tensor, coords: Tensor) -> Tensor:
    """Look up the source coordinates of view points in the sampling grids.

    Exact for integer coordinates, multilinear between voxels (the grid is smooth).

    Args:
        grids: (B, *V, D) as from `sampling_grid`.
        coords: (B, K, D) view coordinates in voxels, clamped to the view.

    Returns:
        (B, K, D) float32 source coordinates in voxels.
    """
    shape = grids.shape[1:-1]
    size = torch.tensor(shape, device=coords.device, dtype=coords.dtype)
    points = torch.minimum(coords.clamp_min(0), size - 1)
    base = torch.minimum(points.floor(), (size - 2).clamp_min(0))
    fraction = points - base
    flat = grids.flatten(1, -2)
    strides = torch.tensor([math.prod(shape[d + 1 :]) for d in range(len(shape))], device=coords.device)
    result = torch.zeros_like(coords, dtype=flat.dtype)
    for corner in product((0, 1), repeat=len(shape)):
        step = torch.tensor(corner, device=coords.device)
        weight = torch.where(step == 1, fraction, 1 - fraction).prod(-1, keepdim=True)
        voxel = torch.minimum(base.long() + step, size.long() - 1)
        index = (voxel * strides).sum(-1, keepdim=True).expand(-1, -1, flat.shape[2])
        result = result + weight * flat.gather(1, index)
    return result


def inside(source: Tensor, extents: Tensor) -> Tensor:
    """Return which source coordinates (B, K, D) lie on a voxel of images with ``extents`` (B, D); (B, K) bool."""
    return ((source >= -0.5) & (source <= extents.unsqueeze(1) - 0.5)).all(2)


def _isotropic_axes(spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the axes that may be mixed: all, or the two fine ones of a strongly anisotropic volume."""
    if len(spacing) == 2 or max(spacing) <= ANISOTROPY_LIMIT * min(spacing):
        return tuple(range(len(spacing)))
    thick = int(np.argmax(spacing))
    return tuple(axis for axis in range(3) if axis != thick)


def _draw_rotation(dims: int, axes: tuple[int, ...], limit: float, generator: np.random.Generator) -> np.ndarray:
    """Draw a rotation matrix: one angle per plane spanned by two of ``axes``, each uniform in +-limit radians."""
    matrix = np.eye(dims)
    for i, first in enumerate(axes):
        for second in axes[i + 1 :]:
            angle = generator.uniform(-limit, limit)
            plane = np.eye(dims)
            plane[first, first] = plane[second, second] = math.cos(angle)
            plane[first, second], plane[second, first] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ plane
    return matrix


def _draw_control(
    shape: Sequence[int], spacing: Sequence[float], axes: tuple[int, ...], limit: float, generator: np.random.Generator
) -> np.ndarray | None:
    """Draw B-spline control displacements in mm; below 0.4 of the control spacing the deformation cannot fold.

    Bound: Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, 2000.
    """
    if limit == 0:
        return None
    dims = len(shape)
    cell_mm = min(shape[axis] * spacing[axis] for axis in axes) / ELASTIC_CELLS
    control = generator.uniform(-limit * cell_mm, limit * cell_mm, (dims, *[ELASTIC_CELLS + 3] * dims))
    for axis in range(dims):
        if axis not in axes:
            control[axis] = 0
    return control
