"""What an augmented view looks like: every random parameter of its geometry and intensities, and how it is drawn.

`splines` turns the parameters into a map from view to source, `render` into an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretraining.config import PretrainConfig

ELASTIC_CELLS = 4
"""Control intervals of the elastic deformation along each axis of the view."""
ANISOTROPY_LIMIT = 3.0
"""Beyond this ratio of voxel sizes the deformation stays within the planes (nnU-Net's rule for its "dummy 2D")."""


@dataclass(frozen=True)
class ViewParameters:
    """Everything that determines one view; replaying it gives the same view bit for bit on one machine.

    Attributes:
        centre: Source voxel coordinates of the view's centre (D values, array order).
        rotation: (D, D) rotation matrix in mm space.
        scale: Source mm per view mm.
        mirror: Whether the view is mirrored, one value per axis.
        control: Elastic displacement in mm of the control points, (D, ELASTIC_CELLS + 3, ...), or `None`.
        gamma: Exponent per channel, applied to the view scaled to [0, 1].
        contrast: Factor per channel around the view's mean.
        brightness: Offset per channel in standard deviations of the view.
        noise: Standard deviation of the noise per channel, in standard deviations of the view.
        noise_seed: Seed of the noise.
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

    With probability `config.spatial`: rotation uniform in +-`rotation` degrees (about every axis; in the plane only
    if the voxel sizes differ by more than `ANISOTROPY_LIMIT`), scale log-uniform in [`scale_min`, `scale_max`],
    elastic control displacements uniform in +-`elastic` of the control spacing. Otherwise a plain crop. Mirrors and
    intensity changes are drawn independently of that.

    Args:
        centre: Source voxel coordinates of the crop centre.
        shape: Shape of the view in voxels.
        spacing: Voxel size in mm, of source and view alike.
        channels: Number of image channels.
        config: The ranges to draw from.
        generator: Source of all draws.
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


def _isotropic_axes(spacing: Sequence[float]) -> tuple[int, ...]:
    """The axes that may be mixed: all, or the two fine ones of a strongly anisotropic volume."""
    if len(spacing) == 2 or max(spacing) <= ANISOTROPY_LIMIT * min(spacing):
        return tuple(range(len(spacing)))
    thick = int(np.argmax(spacing))
    return tuple(axis for axis in range(3) if axis != thick)


def _draw_rotation(dims: int, axes: tuple[int, ...], limit: float, generator: np.random.Generator) -> np.ndarray:
    """Draw a rotation matrix: one angle per plane spanned by two of `axes`, each uniform in +-limit radians."""
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
