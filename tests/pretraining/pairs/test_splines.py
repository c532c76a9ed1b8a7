"""The map of a view: one spline for the image and, inverted, for the keypoints."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining.config import PretrainConfig
from pretraining.pairs.render import make_recipe, render
from pretraining.pairs.splines import (
    INVERSION_TOLERANCE,
    _bspline_weights,
    bounding_box,
    control_points,
    spline_grid,
    to_source,
    to_view,
)
from pretraining.pairs.views import ViewParameters, draw_view

GEOMETRIES = [
    pytest.param((60, 44), (48, 40), (1.0, 1.0), id="2d"),
    pytest.param((60, 44), (33, 40), (0.8, 1.7), id="2d-anisotropic"),
    pytest.param((40, 44, 36), (32, 40, 24), (1.0, 1.0, 1.0), id="3d"),
    pytest.param((18, 60, 50), (14, 48, 40), (10.0, 1.5, 1.5), id="3d-anisotropic"),
]
Shape = tuple[int, ...]
Spacing = tuple[float, ...]


def drawn(shape: Shape, view: Shape, spacing: Spacing, seed: int, **changes: float) -> ViewParameters:
    config = PretrainConfig(**{"spatial": 1.0, **changes})
    return draw_view([(n - 1) / 2 for n in shape], view, spacing, 1, config, np.random.default_rng(seed))


def dense(control: np.ndarray, view: Shape) -> np.ndarray:
    grid: np.ndarray = spline_grid(torch.from_numpy(control)[None], view)[0].numpy()
    return grid


def naive_source(parameters: ViewParameters, view: Shape, spacing: Spacing, voxel: Shape) -> np.ndarray:
    """The formula of `control_points`, one voxel at a time, with the B-spline summed naively."""
    dims = len(view)
    offset = np.array([(i - (n - 1) / 2) * s for i, n, s in zip(voxel, view, spacing, strict=True)])
    offset = offset * np.where(parameters.mirror, -1, 1)
    if parameters.control is not None:
        cells = parameters.control.shape[1] - 3
        for index in np.ndindex(*parameters.control.shape[1:]):
            weight = 1.0
            for axis in range(dims):
                t = voxel[axis] / (view[axis] - 1) * cells - (index[axis] - 1)
                a = abs(t)
                weight *= (4 - 6 * a**2 + 3 * a**3) / 6 if a < 1 else max(0.0, (2 - a)) ** 3 / 6
            offset = offset + weight * parameters.control[(slice(None), *index)]
    source: np.ndarray = np.array(parameters.centre) + parameters.scale * (parameters.rotation @ offset) / spacing
    return source


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_equals_the_formula(shape: Shape, view: Shape, spacing: Spacing) -> None:
    parameters = drawn(shape, view, spacing, 3)
    control = control_points(parameters, view, spacing)
    grid = dense(control, view)
    generator = np.random.default_rng(0)
    voxels = [tuple(int(generator.integers(n)) for n in view) for _ in range(20)]
    for voxel in [*voxels, (0,) * len(view), tuple(n - 1 for n in view)]:
        expected = naive_source(parameters, view, spacing, voxel)
        assert np.allclose(grid[voxel], expected, atol=1e-9)
        assert np.allclose(to_source(control, view, np.array([voxel], float))[0], expected, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), geometry=st.sampled_from(GEOMETRIES), elastic=st.floats(0, 0.3))
def test_to_view_inverts_to_source(seed: int, geometry: pytest.param, elastic: float) -> None:  # type: ignore[valid-type]
    shape, view, spacing = geometry.values
    control = control_points(drawn(shape, view, spacing, seed, elastic=elastic), view, spacing)
    points = np.random.default_rng(seed).uniform(0, 1, (50, len(view))) * (np.array(view) - 1)
    back, inside = to_view(control, view, to_source(control, view, points))
    border = ((points < 0.2) | (points > np.array(view) - 1.2)).any(1)
    assert inside[~border].all()
    residual = to_source(control, view, back) - to_source(control, view, points)
    assert np.abs(residual)[inside].max() < INVERSION_TOLERANCE
    assert np.abs(back - points)[inside].max() < 0.2


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_image_and_points_move_together(shape: Shape, view: Shape, spacing: Spacing) -> None:
    """A blob painted at a source point appears where `to_view` says, to sub-voxel accuracy."""
    errors, sigma = [], 1.6
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij")
    places = np.meshgrid(*[np.arange(n) for n in view], indexing="ij")
    neutral = {"gamma": (1.0,), "contrast": (1.0,), "brightness": (0.0,), "noise": (0.0,)}
    for seed in range(60):
        parameters = replace(drawn(shape, view, spacing, seed), **neutral)
        size = np.array(shape)
        blob = (size - 1) / 2 + np.random.default_rng(seed).uniform(-0.15, 0.15, len(shape)) * size
        image = np.exp(-sum((a - c) ** 2 for a, c in zip(axes, blob, strict=True)) / (2 * sigma**2))
        control = control_points(parameters, view, spacing)
        crop = torch.from_numpy(image.astype(np.float32))[None]
        seen = render(make_recipe([crop], [(0,) * len(shape)], [control], [parameters]), view)[0, 0].numpy()
        weights = np.where(seen > 0.3, seen, 0.0)
        found, inside = to_view(control, view, blob[None])
        if not weights.any() or float(np.minimum(found[0], np.array(view) - 1 - found[0]).min()) < 2.5 * sigma:
            continue  # cut by the border of the view
        assert inside[0]
        centroid = np.array([(p * weights).sum() / weights.sum() for p in places])
        errors.append(np.abs(centroid - found[0]).max())
    assert len(errors) >= 15
    assert np.median(errors) < 0.1
    assert max(errors) < 0.3  # the centroid of a deformed blob is not exactly the image of its centre


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_mirrors_are_exact(shape: Shape, view: Shape, spacing: Spacing) -> None:
    parameters = drawn(shape, view, spacing, 0, elastic=0.0, rotation=0.0, mirror=0.0)
    points = np.random.default_rng(0).uniform(0, 1, (20, len(view))) * (np.array(view) - 1)
    source = to_source(control_points(parameters, view, spacing), view, points)
    flipped = replace(parameters, mirror=(True,) + (False,) * (len(view) - 1))
    back, _ = to_view(control_points(flipped, view, spacing), view, source)
    assert np.allclose(back[:, 0], view[0] - 1 - points[:, 0], atol=1e-6)
    assert np.allclose(back[:, 1:], points[:, 1:], atol=1e-6)


def test_points_outside_are_outside() -> None:
    control = control_points(drawn((40, 40), (16, 16), (1, 1), 0), (16, 16), (1.0, 1.0))
    _, inside = to_view(control, (16, 16), np.array([[500.0, 3.0], [-80.0, -80.0], [19.5, 19.5]]))
    assert inside.tolist() == [False, False, True]
    coords, none = to_view(control, (16, 16), np.zeros((0, 2)))
    assert coords.shape == (0, 2)
    assert none.shape == (0,)


def test_single_voxel_axes() -> None:
    view, spacing = (1, 5, 5), (9.0, 1.0, 1.0)
    control = control_points(drawn((1, 9, 9), view, spacing, 0), view, spacing)
    assert np.allclose(dense(control, view)[..., 0], 0)
    found, inside = to_view(control, view, np.array([[0.0, 4.0, 4.0]]))
    assert inside[0]
    assert abs(found[0, 0]) < 0.5


def test_distances_are_physical() -> None:
    spacing, view = (10.0, 1.5, 1.5), (6, 32, 32)
    parameters = drawn((11, 61, 61), view, spacing, 1, elastic=0.0, scale_min=1.0, scale_max=1.0)
    mm = dense(control_points(parameters, view, spacing), view) * np.array(spacing)
    assert np.linalg.norm(mm[0, 0, 0] - mm[5, 31, 31]) == pytest.approx(math.hypot(50, 31 * 1.5, 31 * 1.5), rel=1e-6)


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_the_deformation_never_folds(shape: Shape, view: Shape, spacing: Spacing) -> None:
    for seed in range(10):
        parameters = drawn(shape, view, spacing, seed, elastic=0.4, rotation=0.0, mirror=0.0)
        grid = dense(control_points(parameters, view, spacing), view)
        inner = tuple(slice(0, n - 1) for n in view)
        jacobian = np.stack([np.diff(grid, axis=d)[inner] for d in range(len(view))], -1)
        assert float(np.linalg.det(jacobian).min()) > 0


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_the_bounding_box_covers_the_view_tightly(shape: Shape, view: Shape, spacing: Spacing) -> None:
    for seed in range(10):
        control = control_points(drawn(shape, view, spacing, seed), view, spacing)
        grid = dense(control, view).reshape(-1, len(view))
        box = bounding_box(control + 1000, [3000] * len(view))
        low, high = grid.min(0) + 1000, grid.max(0) + 1000
        assert all(axis.start <= a and b <= axis.stop - 1 for axis, a, b in zip(box, low, high, strict=True))
        assert all(axis.stop - axis.start <= b - a + 14 for axis, a, b in zip(box, low, high, strict=True))
        assert bounding_box(control + 10**6, shape) == tuple(slice(n - 1, n) for n in shape)


def test_bspline_weights_are_a_partition_of_unity_and_reproduce_lines() -> None:
    for count in (1, 2, 9, 40):
        weights = _bspline_weights(count, 4).numpy()
        assert weights.shape == (count, 7)
        assert np.allclose(weights.sum(1), 1)
        place = np.linspace(0, 4, count) if count > 1 else np.array([2.0])
        assert np.allclose(weights @ (np.arange(7) - 1), place)
