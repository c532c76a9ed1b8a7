from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretraining.config import PretrainConfig
from pretraining.pairs.render import (
    NOISE_FIELD,
    Recipe,
    _noise,
    adjust_intensity,
    join,
    make_recipe,
    render,
    stack_padded,
)
from pretraining.pairs.splines import bounding_box, control_points, spline_grid
from pretraining.pairs.views import ViewParameters, draw_view

GEOMETRIES = [
    pytest.param((60, 44), (48, 40), (1.0, 1.0), id="2d"),
    pytest.param((18, 60, 50), (14, 48, 40), (10.0, 1.5, 1.5), id="3d-anisotropic"),
]
Shape = tuple[int, ...]


def identity(shape: Shape, view: Shape, channels: int = 1) -> ViewParameters:
    """Parameters that show the middle of an image unchanged."""
    centre = tuple(math.floor((n - v) / 2) + (v - 1) / 2 for n, v in zip(shape, view, strict=True))
    ones, zeros = (1.0,) * channels, (0.0,) * channels
    return ViewParameters(
        centre, np.eye(len(shape)), 1.0, (False,) * len(shape), None, ones, ones, zeros, zeros, noise_seed=0
    )


def one(image: Tensor, parameters: ViewParameters, view: Shape, spacing: tuple[float, ...]) -> Recipe:
    control = control_points(parameters, view, spacing)
    return make_recipe([image], [(0,) * len(view)], [control], [parameters])


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_a_plain_crop_is_exact_and_so_is_its_mirror(shape: Shape, view: Shape, spacing: tuple[float, ...]) -> None:
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    parameters = identity(shape, view, 2)
    start = [math.floor((n - v) / 2) for n, v in zip(shape, view, strict=True)]
    crop = image[(slice(None), *(slice(s, s + v) for s, v in zip(start, view, strict=True)))]
    assert torch.allclose(render(one(image, parameters, view, spacing), view)[0], crop, atol=1e-3)
    flipped = replace(parameters, mirror=(False,) * (len(shape) - 1) + (True,))
    assert torch.allclose(render(one(image, flipped, view, spacing), view)[0], crop.flip(-1), atol=1e-3)


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_samples_along_the_spline(shape: Shape, view: Shape, spacing: tuple[float, ...]) -> None:
    """Equal to a direct sampling at the coordinates of the dense grid."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    config = PretrainConfig(spatial=1.0, gamma=0, contrast=0, brightness=0, noise=0)
    parameters = draw_view([n / 2 for n in shape], view, spacing, 1, config, np.random.default_rng(0))
    grid = spline_grid(torch.from_numpy(control_points(parameters, view, spacing))[None], view).float()
    normalised = ((2 * grid + 1) / torch.tensor(shape) - 1).flip(-1)
    expected = functional.grid_sample(image[None], normalised, align_corners=False)
    assert torch.allclose(render(one(image, parameters, view, spacing), view), expected, atol=1e-3)


@pytest.mark.parametrize(("shape", "view", "spacing"), GEOMETRIES)
def test_crops_batches_and_padding_change_nothing(shape: Shape, view: Shape, spacing: tuple[float, ...]) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) + 1
    before = image.clone()
    config = PretrainConfig(spatial=1.0)
    whole, cropped = [], []
    for seed in range(5):
        centre = [n * f for n, f in zip(shape, np.random.default_rng(seed).random(len(shape)), strict=True)]
        parameters = draw_view(centre, view, spacing, 1, config, np.random.default_rng(seed))
        control = control_points(parameters, view, spacing)
        box = bounding_box(control, shape)
        crop = image[(slice(None), *box)]
        whole.append(one(image, parameters, view, spacing))
        cropped.append(make_recipe([crop], [[axis.start for axis in box]], [control], [parameters]))
    separate = torch.cat([render(recipe, view) for recipe in whole])
    together = render(join(cropped), view)
    assert torch.allclose(separate, together, atol=2e-3)
    assert torch.equal(image, before)
    assert torch.equal(render(join(cropped).to(torch.device("cpu")), view), together)


def test_outside_of_the_image_is_zero() -> None:
    parameters = replace(identity((20, 20), (8, 8)), centre=(500.5, -300.5))
    assert (render(one(torch.ones(1, 20, 20), parameters, (8, 8), (1.0, 1.0)), (8, 8)) == 0).all()


def test_stack_padded_pads_with_zeros_at_the_end() -> None:
    stacked = stack_padded([torch.ones(1, 2, 3), torch.ones(1, 4, 1)])
    assert stacked.shape == (2, 1, 4, 3)
    assert stacked[0].sum() == 6
    assert stacked[1, 0, :, 0].tolist() == [1, 1, 1, 1]
    assert stacked[1].sum() == 4


def naive_intensity(view: np.ndarray, gamma: float, contrast: float, brightness: float) -> np.ndarray:
    low, high = view.min(), view.max()
    out = ((view - low) / (high - low)) ** gamma * (high - low) + low
    mean, std = out.mean(), out.std()
    changed: np.ndarray = (out - mean) * contrast + mean + std * brightness
    return changed


def test_intensities_equal_the_formula() -> None:
    views = torch.randn(2, 2, 12, 9, generator=torch.Generator().manual_seed(0)) * 5 + 3
    before = views.clone()
    generator = np.random.default_rng(0)
    values = generator.uniform(0.5, 1.5, (2, 4, 2)).astype(np.float32)
    values[:, 3] = 0
    out = adjust_intensity(views, torch.from_numpy(values), (1, 2))
    assert torch.equal(views, before)
    for n in range(2):
        for c in range(2):
            expected = naive_intensity(views[n, c].double().numpy(), *values[n, :3, c].tolist())
            assert np.allclose(out[n, c].numpy(), expected, atol=1e-3)


def test_noise_has_its_strength_and_belongs_to_the_view() -> None:
    views = torch.randn(3, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    plain = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1).repeat(3, 1, 1)
    noisy = plain.clone()
    noisy[:, 3] = 0.5
    noise = adjust_intensity(views, noisy, (1, 2, 3)) - adjust_intensity(views, plain, (1, 2, 3))
    assert torch.allclose(noise.std(dim=(1, 2, 3)), 0.5 * views.std(dim=(1, 2, 3)), rtol=0.05)
    alone = adjust_intensity(views[2:], noisy[2:], (3,)) - adjust_intensity(views[2:], plain[2:], (3,))
    assert torch.allclose(noise[2:], alone, atol=1e-5)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)


def test_constant_views_stay_finite() -> None:
    intensity = torch.tensor([1.3, 1.2, 0.2, 0.5]).view(1, 4, 1)
    out = adjust_intensity(torch.full((1, 1, 8, 8), 3.0), intensity, (0,))
    assert torch.allclose(out, torch.full((1, 1, 8, 8), 3.0), atol=1e-4)


def test_noise_is_normal_and_large_views_have_their_own() -> None:
    pieces = [_noise(40_000, seed, torch.device("cpu")) for seed in (1, 2, 2**61 + 5)]
    for piece in pieces:
        assert abs(float(piece.mean())) < 0.03
        assert float(piece.std()) == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(torch.stack(pieces)) - torch.eye(3)
    assert float(correlation.abs().max()) < 0.03
    assert torch.equal(pieces[0], _noise(40_000, 1, torch.device("cpu")))
    large = _noise(NOISE_FIELD // 2 + 1, 3, torch.device("cpu"))
    assert large.shape == (NOISE_FIELD // 2 + 1,)
    assert not torch.equal(large[:100], _noise(NOISE_FIELD // 2 + 1, 4, torch.device("cpu"))[:100])
