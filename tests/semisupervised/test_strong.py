import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from semisupervised.strong import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GAMMA,
    INVERT,
    NEUTRAL,
    NOISE,
    ZOOM,
    StrongAugmentation,
    strong_view,
)  # fmt: skip

SHAPES = {2: (12, 17), 3: (6, 11, 14)}
ALL = StrongAugmentation(p_brightness=1, p_contrast=1, p_gamma=1, p_invert=0.5, p_blur=1, p_low_resolution=1, p_noise=1)


def batch(dims: int, size: int = 3, channels: int = 2) -> torch.Tensor:
    return torch.randn(size, channels, *SHAPES[dims], generator=torch.Generator().manual_seed(dims))


def neutral(size: int = 3, channels: int = 2, **changes: float) -> torch.Tensor:
    parameters = torch.tensor(NEUTRAL).repeat(size, channels, 1)
    columns = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "gamma": GAMMA, "invert": INVERT, "blur": BLUR}
    columns |= {"zoom": ZOOM, "noise": NOISE}
    for name, value in changes.items():
        parameters[..., columns[name]] = value
    return parameters


@pytest.mark.parametrize("dims", [2, 3])
def test_neutral_parameters_change_nothing_and_the_input_stays_as_it_is(dims):
    image = batch(dims)
    before = image.clone()
    out = strong_view(image, neutral(), torch.arange(3))
    torch.testing.assert_close(out, image, atol=1e-6, rtol=1e-5)
    drawn = torch.stack([ALL.draw(np.random.default_rng(i), 2) for i in range(3)])
    changed = strong_view(image, drawn, torch.arange(3))
    assert torch.equal(image, before)
    assert changed.data_ptr() != image.data_ptr()
    assert not torch.allclose(changed, image, atol=1e-2)
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_does_not_depend_on_the_others_of_its_batch(dims):
    image, seeds = batch(dims), torch.tensor([5, 6, 7])
    drawn = torch.stack([ALL.draw(np.random.default_rng(i), 2) for i in range(3)])
    together = strong_view(image, drawn, seeds)
    for i in range(3):
        alone = strong_view(image[i : i + 1], drawn[i : i + 1], seeds[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_each_operation_does_what_its_name_says():
    image = batch(2)
    seeds = torch.arange(3)
    torch.testing.assert_close(strong_view(image, neutral(brightness=1.5), seeds), 1.5 * image)
    flatter = strong_view(image, neutral(contrast=0.5), seeds)
    torch.testing.assert_close(flatter.mean((2, 3)), image.mean((2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(flatter.std((2, 3)), 0.5 * image.std((2, 3)))
    curved = strong_view(image, neutral(gamma=2.0), seeds)
    torch.testing.assert_close(curved.std((2, 3)), image.std((2, 3)))
    assert torch.equal(curved.flatten(2).argsort(), image.flatten(2).argsort()), "a gamma keeps the order of the greys"
    assert not torch.allclose(curved, strong_view(image, neutral(gamma=2.0, invert=1.0), seeds))
    noisy = strong_view(torch.zeros(3, 2, 64, 64), neutral(noise=0.5), seeds)
    assert noisy.std() == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1]), "other seeds, other noise"
    constant = strong_view(torch.ones(3, 2, 8, 8), neutral(gamma=2.0, blur=1.0, zoom=0.5), seeds)
    torch.testing.assert_close(constant, torch.ones(3, 2, 8, 8))


@pytest.mark.parametrize("dims", [2, 3])
def test_blur_of_a_point_is_a_gaussian_about_it(dims):
    shape = (21,) * dims
    image = torch.zeros(1, 1, *shape)
    image[(0, 0, *(10,) * dims)] = 1
    out = strong_view(image, neutral(1, 1, blur=1.0), torch.zeros(1, dtype=torch.int64))[0, 0]
    assert out.sum().item() == pytest.approx(1, abs=1e-5)
    place = torch.arange(21.0) - 10
    along = out.sum(tuple(range(1, dims)))
    assert (along * place**2).sum().item() == pytest.approx(1, rel=0.01)


def test_low_resolution_can_leave_the_slices_apart():
    image = torch.zeros(1, 1, 4, 8, 8)
    image[:, :, 1] = 1
    kept = strong_view(image, neutral(1, 1, zoom=0.5), torch.zeros(1, dtype=torch.int64), flat_axis=True)
    torch.testing.assert_close(kept, image)
    mixed = strong_view(image, neutral(1, 1, zoom=0.5), torch.zeros(1, dtype=torch.int64))
    assert not torch.allclose(mixed, image)


def test_the_parameters_are_in_their_ranges_and_as_often_as_asked_for():
    setting = StrongAugmentation(p_noise=0.3)
    drawn = torch.stack([setting.draw(np.random.default_rng(i), 1)[0] for i in range(2000)])
    brightness = drawn[:, BRIGHTNESS][drawn[:, BRIGHTNESS] != 1]
    assert 0.6 <= brightness.min() < 0.65 and 1.35 < brightness.max() <= 1.4  # noqa: PT018
    assert (drawn[:, GAMMA] < 1).sum() / (drawn[:, GAMMA] != 1).sum() == pytest.approx(0.5, abs=0.05)
    assert (drawn[:, NOISE] > 0).float().mean() == pytest.approx(0.3, abs=0.04)
    assert drawn[:, NOISE].max() <= 0.15**0.5 + 1e-6
    assert (drawn[:, ZOOM] <= 1).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [("p_blur", 1.5), ("p_noise", "often"), ("gamma", (2.0, 0.5)), ("blur", (0.0, 1.0)), ("blur", (0.5, 3.0)),
     ("low_resolution", (0.5, 1.5)), ("noise", 0.1), ("contrast", (float("nan"), 1.0))],
)  # fmt: skip
def test_values_that_cannot_be_computed_are_refused_by_their_names(option, value):
    with pytest.raises(KAFError, match=rf"StrongAugmentation\.{option}: found .*, expected "):
        StrongAugmentation(**{option: value})
