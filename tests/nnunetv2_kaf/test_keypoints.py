import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.keypoints import KeypointDetector, gaussian_kernel

CASES = [((20, 32), (1.0, 1.0)), ((8, 18, 26), (4.0, 1.0, 1.3))]


def blob(shape: tuple[int, ...], spacing: tuple[float, ...], centre: tuple[int, ...], width_mm: float) -> Tensor:
    grid = np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij")
    distance = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, centre, spacing, strict=True))
    return torch.from_numpy(np.exp(-distance / (2 * width_mm**2))).float()[None, None]


def detect(image: Tensor, spacing: tuple[float, ...], **options: object) -> tuple[set[tuple[int, ...]], Tensor]:
    detector = KeypointDetector(KAFConfig(**{"num_keypoints": 16, **options}), spacing)  # type: ignore[arg-type]
    found, score = detector.detect(image)
    return {tuple(p) for p in found.coords[0][found.valid[0]].long().tolist()}, score


def naive(image: Tensor, spacing: tuple[float, ...], config: KAFConfig) -> dict[tuple[int, ...], float]:
    """Scale-space extrema by scipy and loops: the reference."""
    x = image[0, 0].double().numpy()
    levels, previous, current = [], 0.0, x
    for scale in config.detection_scales:
        step = math.sqrt(scale**2 - previous**2) * min(spacing)
        previous = scale
        for axis, mm in enumerate(spacing):
            kernel = gaussian_kernel(step / mm).double().numpy()
            current = ndimage.convolve1d(current, kernel, axis=axis, mode="nearest")
        levels.append(current)
    response = np.abs(np.diff(np.stack(levels), axis=0))
    lowest = max(config.detection_threshold * x.std(), 1e-4 * np.abs(x).max())
    response = np.where(response > lowest, response, 0.0)
    found: dict[tuple[int, ...], float] = {}
    for point in itertools.product(*map(range, response.shape)):
        value = response[point]
        window = response[tuple(slice(max(i - 1, 0), i + 2) for i in point)]
        if value > 0 and value >= window.max():
            found[point[1:]] = max(found.get(point[1:], 0.0), value / x.std())
    return found


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_equals_the_naive_reference(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(3))
    config = KAFConfig(num_keypoints=math.prod(shape))
    expected = naive(image, spacing, config)
    found, score = KeypointDetector(config, spacing).detect(image)
    points = [tuple(p) for p in found.coords[0][found.valid[0]].long().tolist()]
    assert set(points) == set(expected)
    torch.testing.assert_close(
        score[0][found.valid[0]].double(), torch.tensor([expected[p] for p in points]), rtol=1e-3, atol=1e-4
    )
    assert torch.all(score[0][:-1] >= score[0][1:])


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_finds_a_blob_at_its_centre(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    centre = tuple(n // 2 for n in shape)
    image = blob(shape, spacing, centre, 1.8)
    points, _ = detect(image, spacing, num_keypoints=1)
    assert points == {centre}
    # a dark blob on a bright ground is a keypoint as well
    assert detect(1 - image, spacing, num_keypoints=1)[0] == {centre}


def test_scales_are_millimetres_on_every_axis() -> None:
    # along the coarse axis the same Gaussian spans fewer voxels
    detector = KeypointDetector(KAFConfig(), (10.0, 1.5, 1.5))
    first = [detector.get_buffer(f"kernel_0_{axis}") for axis in range(3)]
    assert first[0].numel() < first[1].numel() == first[2].numel()
    for kernel in detector.buffers():
        assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert not detector.state_dict(), "kernels are derived, a checkpoint must not carry them"


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_points_move_with_the_image(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    detector = KeypointDetector(KAFConfig(num_keypoints=16), spacing)
    straight, response = detector.detect(image)
    for axes in [(0,), tuple(range(len(shape)))]:
        mirrored = detector(image.flip([a + 2 for a in axes]))
        for axis in axes:
            mirrored.coords[..., axis] = shape[axis] - 1 - mirrored.coords[..., axis]
        torch.testing.assert_close(mirrored.coords, straight.coords)
    brighter, brighter_response = detector.detect(3 * image + 10)
    torch.testing.assert_close(brighter.coords, straight.coords)
    torch.testing.assert_close(brighter_response, response, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_batch_mates_do_not_matter_and_the_result_repeats(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    images = torch.randn(3, 1, *shape, generator=torch.Generator().manual_seed(0))
    images[1] *= 100
    detector = KeypointDetector(KAFConfig(num_keypoints=16), spacing)
    together, again = detector(images), detector(images)
    for i in range(3):
        alone = detector(images[i : i + 1])
        assert torch.equal(alone.coords[0], together.coords[i])
    assert torch.equal(together.coords, again.coords)
    assert torch.equal(together.valid, again.valid)
    assert not detector.detect(images.requires_grad_())[1].requires_grad


@pytest.mark.parametrize("value", [0.0, 5.0, -1000.0])
def test_constant_image_has_no_keypoints(value: float) -> None:
    found = KeypointDetector(KAFConfig(num_keypoints=8), (1.0, 1.0))(torch.full((2, 1, 16, 20), value))
    assert not found.valid.any()
    assert not found.coords.any()


def test_fewer_extrema_than_keypoints_are_padded() -> None:
    image = blob((20, 32), (1.0, 1.0), (9, 14), 1.8)
    found = KeypointDetector(KAFConfig(num_keypoints=32, detection_threshold=0.5), (1.0, 1.0))(image)
    assert found.coords.shape == (1, 32, 2)
    assert 1 <= int(found.valid.sum()) < 32
    assert not found.coords[0][~found.valid[0]].any()


def test_several_channels_count_equally_and_other_channels_are_ignored() -> None:
    shape, spacing = (20, 32), (1.0, 1.0)
    first, second = blob(shape, spacing, (5, 8), 1.8), blob(shape, spacing, (14, 24), 1.8)
    one_hot = torch.zeros(1, 1, *shape)
    one_hot[..., 10:14, 4:9] = 1
    image = torch.cat([first, 1000 * second, one_hot], dim=1)
    points, scores = detect(image, spacing, detection_channels=(0, 1), num_keypoints=2)
    assert points == {(5, 8), (14, 24)}
    torch.testing.assert_close(scores[0, 0], scores[0, 1], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    image = torch.randn(1, 1, 20, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    detector = KeypointDetector(KAFConfig(num_keypoints=16), (1.0, 1.0))
    assert torch.equal(detector(image).coords, detector(image.float()).coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(detector(image).coords, detector(image.float()).coords)


def test_errors_name_option_and_numbers() -> None:
    detector = KeypointDetector(KAFConfig(num_keypoints=100, detection_channels=(1,)), (1.0, 1.0))
    with pytest.raises(KAFError, match=r"num_keypoints: found 100, more than the 64 voxels"):
        detector(torch.zeros(1, 2, 8, 8))
    with pytest.raises(KAFError, match=r"detection_channels.*1 channel"):
        detector(torch.zeros(1, 1, 20, 20))
    with pytest.raises(KAFError, match="2 axes"):
        detector(torch.zeros(1, 2, 8, 8, 8))
