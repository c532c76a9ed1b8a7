from __future__ import annotations

import math

import pytest
import torch

from pretraining.pairs import descriptors
from pretraining.pairs.descriptors import patch_descriptors, sample_at


@pytest.mark.parametrize("shape", [(7, 5), (4, 7, 5)])
def test_sampling_reproduces_voxels_in_array_order(shape: tuple[int, ...]) -> None:
    image = torch.arange(math.prod(shape), dtype=torch.float32).view(1, 1, *shape)
    points = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij"), -1).float()
    sampled = sample_at(image, points.view(1, -1, 1, len(shape)))
    assert torch.allclose(sampled.flatten(), image.flatten(), atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_descriptors_are_correlations(dims: int) -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, 2, *[20] * dims, generator=g)
    points = torch.rand(1, 9, dims, generator=g) * 19
    spacing = torch.tensor([3.0, 1.0, 1.0][:dims])
    plain = patch_descriptors(image, points, spacing, 1.0)
    assert plain.shape == (1, 9, 2 * 9**dims)
    assert torch.allclose(plain.norm(dim=2), torch.ones(1, 9))
    assert torch.allclose(plain.unflatten(2, (2, -1)).mean(3), torch.zeros(1, 9, 2), atol=1e-6)
    # gain and offset do not matter
    assert torch.allclose(patch_descriptors(3 * image + 5, points, spacing, 1.0), plain, atol=1e-4)


def test_a_constant_image_has_no_descriptor() -> None:
    points = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(0)) * 9
    assert (patch_descriptors(torch.full((1, 1, 10, 10), 7.3), points, torch.ones(2), 1.0) == 0).all()


def test_smoothing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(1, 2, 9, 11, 13, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[4.0, 5.0, 6.0], [2.0, 3.0, 9.5]]])
    whole = patch_descriptors(image, points, (2.0, 1.0, 1.0), 1.0, 2)
    monkeypatch.setattr(descriptors, "ROWS", 7)
    torch.testing.assert_close(patch_descriptors(image, points, (2.0, 1.0, 1.0), 1.0, 2), whole)
