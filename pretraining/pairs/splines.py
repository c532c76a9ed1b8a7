"""The geometry of a view: one spline that maps view voxels to source voxels, and its inverse for keypoints.

`control_points` turns the parameters of a view into one array, the control points of a cubic B-spline. A spline of this
kind reproduces affine maps exactly, so mirror, rotation, zoom, position and elastic deformation are all in that array.
The image is sampled along the spline (`render`), keypoints go through the inverse of the same spline (`to_view`): image
and coordinates cannot move apart. 2D and 3D share all code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from pretraining.pairs.views import ELASTIC_CELLS, ViewParameters

INVERSION_STEPS = 12
INVERSION_TOLERANCE = 0.05
"""Source voxels; a point that `to_view` has not placed better than this is outside the view."""


def control_points(parameters: ViewParameters, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """The B-spline control points of a view, (G, ..., G, D) float64 source voxels, G = ELASTIC_CELLS + 3.

    A view voxel at offset v mm from the view's centre shows the source at
    `centre + scale * R (mirror * v + u(v)) / spacing`, u being the elastic displacement in mm (free-form deformation,
    Rueckert et al., IEEE TMI 1999).
    """
    dims = len(shape)
    knots = (np.arange(ELASTIC_CELLS + 3) - 1) / ELASTIC_CELLS - 0.5  # relative to the centre, in extents
    axes = [
        knots * (n - 1) * s * (-1 if flip else 1) for n, s, flip in zip(shape, spacing, parameters.mirror, strict=True)
    ]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    if parameters.control is not None:
        offsets = offsets + np.moveaxis(parameters.control, 0, -1)
    matrix = parameters.scale * parameters.rotation / np.asarray(spacing)[:, None]
    control: np.ndarray = np.asarray(parameters.centre) + offsets @ matrix.T
    assert control.ndim == dims + 1
    return control


def spline_grid(control: Tensor, shape: Sequence[int]) -> Tensor:
    """Evaluate splines at every voxel: (N, G, ..., G, D) control points -> (N, *shape, D).

    The spline is a tensor product: one small matrix per axis does it.
    """
    count, dims = control.shape[0], len(shape)
    size = control.shape[1]
    out = control
    for axis in reversed(range(dims)):
        weights = _bspline_weights(shape[axis], size - 3).to(control)
        out = weights @ out.reshape(count * size**axis, size, -1)
    return out.view(count, *shape, control.shape[-1])


@lru_cache(maxsize=64)
def _bspline_weights(count: int, cells: int) -> Tensor:
    """The (count, cells + 3) cubic B-spline weights of voxels spread over `cells` intervals."""
    position = np.linspace(0, cells, count) if count > 1 else np.array([cells / 2])
    cell = np.clip(np.floor(position), 0, cells - 1).astype(int)
    weights = np.zeros((count, cells + 3))
    t = position - cell
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    np.put_along_axis(weights, cell[:, None] + np.arange(4), basis, axis=1)
    return torch.from_numpy(weights)


def to_source(
    control: np.ndarray, shape: Sequence[int], points: np.ndarray, slope: np.ndarray | None = None
) -> np.ndarray:
    """Evaluate one spline at view points.

    Args:
        control: (G, ..., G, D) from `control_points`.
        shape: Shape of the view.
        points: (K, D) view voxels; outside of the view the spline goes on affinely.
        slope: `mean_slope` of the spline, if it is known already.

    Returns:
        (K, D) source voxels.
    """
    cells = control.shape[0] - 3
    last = np.asarray(shape, dtype=np.float64) - 1
    clamped = np.clip(points, 0, last)
    position = np.where(last > 0, clamped / np.maximum(last, 1) * cells, cells / 2)
    # The spline of given coefficients; coefficient j lies one knot before the j-th cell.
    parts = [
        map_coordinates(part, position.T + 1, order=3, mode="nearest", prefilter=False)
        for part in np.moveaxis(control, -1, 0)
    ]
    out: np.ndarray = np.stack(parts, axis=1)
    beyond = points - clamped
    out += beyond @ (mean_slope(control, shape) if slope is None else slope).T
    return out


def to_view(control: np.ndarray, shape: Sequence[int], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where source points appear in a view: the inverse of `to_source`.

    Iterates `x <- x + A^-1 (s - f(x))` with A the affine part of the spline f. Below the folding limit of the elastic
    deformation (see `_draw_control`) the remainder is a contraction.

    Args:
        control: (G, ..., G, D) from `control_points`.
        shape: Shape of the view.
        points: (K, D) source voxels.

    Returns:
        (K, D) view voxels, and (K,) bool: inside the view (voxel edges included) and placed within
        `INVERSION_TOLERANCE`.
    """
    if not len(points):
        return np.zeros((0, len(shape))), np.zeros(0, dtype=bool)
    slope = mean_slope(control, shape)
    inverse = np.linalg.inv(slope).T
    extent = np.asarray(shape, dtype=np.float64)
    middle = np.broadcast_to((extent - 1) / 2, points.shape)
    x = middle + (points - to_source(control, shape, middle[:1], slope)) @ inverse
    # Far outside points need no more than the affine estimate: they stay outside.
    reach = 0.25 * extent + 1
    near = np.flatnonzero(((x > -0.5 - reach) & (x < extent - 0.5 + reach)).all(1))
    placed = np.zeros(len(points), dtype=bool)
    for _ in range(INVERSION_STEPS):
        difference = points[near] - to_source(control, shape, x[near], slope)
        done = np.abs(difference).max(1, initial=0.0) < INVERSION_TOLERANCE
        placed[near[done]] = True
        near = near[~done]
        if not len(near):
            break
        x[near] += difference[~done] @ inverse
    return x, placed & ((x >= -0.5) & (x <= extent - 0.5)).all(1)


def mean_slope(control: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The mean slope (D, D) of a spline: source voxels per view voxel."""
    cells, dims = control.shape[0] - 3, len(shape)
    columns = []
    for axis, n in enumerate(shape):
        step = np.diff(control, axis=axis).reshape(-1, control.shape[-1]).mean(0)
        columns.append(step * cells / (n - 1) if n > 1 else np.eye(dims)[axis])
    return np.stack(columns, axis=1)


def bounding_box(control: np.ndarray, extents: Sequence[int], margin: int = 1) -> tuple[slice, ...]:
    """The part of an image of shape `extents` that a view shows, at least one voxel per axis.

    The spline is evaluated on a lattice of a few points per cell; between them it deviates from the linear interpolant
    by at most h^2 / 8 times its second derivative, which its control points bound. `margin` voxels are added.
    """
    dims, per_cell = len(extents), 2
    lattice = [per_cell * (control.shape[0] - 3) + 1] * dims
    points = spline_grid(torch.from_numpy(control).unsqueeze(0), lattice).flatten(0, -2).numpy()
    bend = np.zeros(dims)
    for axis in range(dims):
        bend += np.abs(np.diff(control, n=2, axis=axis)).reshape(-1, dims).max(0)
    slack = bend / (8 * per_cell**2) + margin
    low, high = np.floor(points.min(0) - slack).astype(int), np.ceil(points.max(0) + slack).astype(int)
    box = []
    for first, last, size in zip(low, high, extents, strict=True):
        start = min(max(int(first), 0), size - 1)
        box.append(slice(start, max(min(int(last) + 1, size), start + 1)))
    return tuple(box)
