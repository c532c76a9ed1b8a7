from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pretraining.config import PretrainConfig
from pretraining.views import (
    ViewParameters,
    _bspline_weights,
    adjust_intensity,
    bounding_box,
    draw_view,
    inside,
    resample,
    sampling_grid,
    source_coordinates,
)

GEOMETRIES = [
    pytest.param((60, 44), (48, 40), (1.0, 1.0), id="2d"),
    pytest.param((60, 44), (33, 40), (0.8, 1.7), id="2d-anisotropic"),
    pytest.param((40, 44, 36), (32, 40, 24), (1.0, 1.0, 1.0), id="3d"),
    pytest.param((18, 60, 50), (14, 48, 40), (10.0, 1.5, 1.5), id="3d-anisotropic"),
]


def identity(shape: tuple[int, ...], view: tuple[int, ...]) -> ViewParameters:
    """Parameters that show the middle of an image unchanged."""
    centre = tuple(math.floor((n - v) / 2) + (v - 1) / 2 for n, v in zip(shape, view, strict=True))
    ones = (1.0,)
    return ViewParameters(
        centre, np.eye(len(shape)), 1.0, (False,) * len(shape), None, ones, ones, (0.0,), (0.0,), noise_seed=0
    )


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_plain_crop_is_exact(shape: tuple[int, ...], view: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    parameters = identity(shape, view)
    grid = sampling_grid(parameters, view, spacing)
    box = tuple(slice(math.floor((n - v) / 2), math.floor((n - v) / 2) + v) for n, v in zip(shape, view, strict=True))
    assert torch.allclose(resample(image, grid, (0,) * len(shape)), image[(slice(None), *box)], atol=1e-4)
    flipped = replace(parameters, mirror=(False,) * (len(shape) - 1) + (True,))
    mirrored = resample(image, sampling_grid(flipped, view, spacing), (0,) * len(shape))
    assert torch.allclose(mirrored, image[(slice(None), *box)].flip(-1), atol=1e-4)


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_reading_a_bounding_box_changes_nothing(
    shape: tuple[int, ...], view: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) + 1
    for seed in range(5):
        centre = [n * f for n, f in zip(shape, np.random.default_rng(seed).random(len(shape)), strict=True)]
        drawn = draw_view(centre, view, spacing, 1, PretrainConfig(spatial=1.0), np.random.default_rng(seed))
        grid = sampling_grid(drawn, view, spacing)
        box = bounding_box(grid, shape, [1] * len(shape))
        before = image.clone()
        part = resample(image[(slice(None), *box)], grid, [axis.start for axis in box])
        assert torch.allclose(part, resample(image, grid, (0,) * len(shape)), atol=1e-4)
        assert torch.equal(image, before)


def test_a_grid_outside_the_image_gives_zeros() -> None:
    parameters = replace(identity((20, 20), (8, 8)), centre=(500.5, -300.5))
    grid = sampling_grid(parameters, (8, 8), (1.0, 1.0))
    box = bounding_box(grid, (20, 20), (1, 1))
    image = torch.ones(1, 20, 20)
    assert (resample(image[(slice(None), *box)], grid, [axis.start for axis in box]) == 0).all()
    assert not inside(grid.view(1, -1, 2), torch.tensor([[20.0, 20.0]])).any()


def blob_image(shape: tuple[int, ...], centre: Tensor, sigma: float) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in shape], indexing="ij")
    squared = torch.stack([(a - c) ** 2 for a, c in zip(axes, centre, strict=True)]).sum(0)
    return torch.exp(-squared / (2 * sigma**2)).unsqueeze(0)


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_image_and_coordinates_move_together(
    shape: tuple[int, ...], view: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """A blob's centre in the view, looked up in the grid, is the blob's centre in the source, to sub-voxel accuracy."""
    size, sigma = torch.tensor(shape, dtype=torch.float32), 1.6
    errors = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        blob = (size - 1) / 2 + torch.from_numpy(generator.uniform(-0.15, 0.15, len(shape))).float() * size
        drawn = draw_view(((size - 1) / 2).tolist(), view, spacing, 1, PretrainConfig(spatial=1.0), generator)
        grid = sampling_grid(drawn, view, spacing)
        seen = resample(blob_image(shape, blob, sigma), grid, (0,) * len(shape))[0]
        weights = torch.where(seen > 0.3, seen, 0.0)
        if not weights.any():
            continue
        axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in view], indexing="ij")
        found = torch.stack([(a * weights).sum() / weights.sum() for a in axes])
        if float(torch.minimum(found, torch.tensor(view) - 1 - found).min()) < 2.5 * sigma:
            continue  # cut by the border of the view
        back = source_coordinates(grid.unsqueeze(0), found.view(1, 1, -1))[0, 0]
        errors.append(float((back - blob).abs().max()))
    assert len(errors) >= 15
    assert np.median(errors) < 0.1
    assert max(errors) < 0.3  # the centroid of a deformed blob is not exactly the image of its centre


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_grid_lookup_is_exact_at_voxels(
    shape: tuple[int, ...], view: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    drawn = draw_view([n / 2 for n in shape], view, spacing, 1, PretrainConfig(spatial=1.0), np.random.default_rng(0))
    grid = sampling_grid(drawn, view, spacing)
    points = torch.stack([torch.randint(0, n, (2, 30)) for n in view], -1)
    points[0, 0] = torch.tensor(view) - 1
    found = source_coordinates(torch.stack([grid, grid]), points.float())
    assert torch.equal(found, grid[tuple(points.unbind(-1))])


def test_grid_lookup_is_linear_between_voxels() -> None:
    plain = sampling_grid(identity((9, 8), (5, 4)), (5, 4), (1.0, 1.0))
    found = source_coordinates(plain.unsqueeze(0), torch.tensor([[[1.25, 2.5], [3.9, 0.1]]]))
    assert torch.allclose(found, torch.tensor([[[3.25, 4.5], [5.9, 2.1]]]))


def test_single_voxel_axes() -> None:
    drawn = draw_view((0.0, 4.0, 4.0), (1, 5, 5), (9.0, 1, 1), 1, PretrainConfig(spatial=1.0), np.random.default_rng(0))
    grid = sampling_grid(drawn, (1, 5, 5), (9.0, 1.0, 1.0))
    assert (grid[..., 0] == 0).all()
    assert torch.equal(source_coordinates(grid.unsqueeze(0), torch.zeros(1, 1, 3))[0, 0], grid[0, 0, 0])


def test_distances_are_physical_and_thick_slices_are_not_mixed() -> None:
    spacing, view = (10.0, 1.5, 1.5), (6, 32, 32)
    config = PretrainConfig(spatial=1.0, elastic=0.0, scale_min=1.0, scale_max=1.0)
    drawn = draw_view((5, 30, 30), view, spacing, 1, config, np.random.default_rng(1))
    mm = sampling_grid(drawn, view, spacing) * torch.tensor(spacing)
    assert float((mm[0, 0, 0] - mm[5, 31, 31]).norm()) == pytest.approx(math.hypot(50, 31 * 1.5, 31 * 1.5), rel=1e-4)
    assert torch.allclose(mm[:, :1, :1, 0].expand(6, 32, 32), mm[..., 0], atol=1e-3)
    assert not np.allclose(drawn.rotation, np.eye(3))


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_the_deformation_never_folds(shape: tuple[int, ...], view: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    config = PretrainConfig(spatial=1.0, elastic=0.4, rotation=0.0, mirror=0.0)
    for seed in range(10):
        drawn = draw_view([n / 2 for n in shape], view, spacing, 1, config, np.random.default_rng(seed))
        grid = sampling_grid(drawn, view, spacing)
        inner = tuple(slice(0, n - 1) for n in view)
        jacobian = torch.stack([grid.diff(dim=d)[inner] for d in range(len(view))], -1)
        assert float(torch.linalg.det(jacobian).min()) > 0


def test_bspline_weights_are_a_partition_of_unity() -> None:
    for count in (1, 2, 9, 40):
        weights = _bspline_weights(count, 4)
        assert weights.shape == (count, 7)
        assert torch.allclose(weights.sum(1), torch.ones(count))


def test_replay_and_draws() -> None:
    config = PretrainConfig(spatial=1.0)
    one, two = (draw_view((9.5, 9.5), (16, 12), (1, 1), 2, config, np.random.default_rng(5)) for _ in range(2))
    image = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    views = [adjust_intensity(resample(image, sampling_grid(p, (16, 12), (1, 1)), (0, 0)), p) for p in (one, two)]
    assert torch.equal(views[0], views[1])
    other = draw_view((9.5, 9.5), (16, 12), (1, 1), 2, config, np.random.default_rng(6))
    assert other.scale != one.scale
    assert 0.7 <= one.scale <= 1.3
    plain = draw_view((9.5, 9.5), (16, 12), (1, 1), 2, PretrainConfig(spatial=0.0), np.random.default_rng(6))
    assert plain.control is None
    assert plain.scale == 1


def test_intensity_changes_leave_the_input_alone_and_stay_finite() -> None:
    drawn = draw_view((5.0, 5.0), (8, 8), (1, 1), 2, PretrainConfig(), np.random.default_rng(0))
    view = torch.rand(2, 8, 8)
    view[1] = 3.0
    before = view.clone()
    out = adjust_intensity(view, drawn)
    assert torch.equal(view, before)
    assert torch.isfinite(out).all()
    assert torch.allclose(out[1], torch.full((8, 8), 3.0), atol=1e-4)
    neutral = replace(drawn, gamma=(1.0, 1.0), contrast=(1.0, 1.0), brightness=(0.0, 0.0), noise=(0.0, 0.0))
    assert torch.allclose(adjust_intensity(view, neutral), view, atol=1e-6)
