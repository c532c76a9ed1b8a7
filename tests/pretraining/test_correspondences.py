from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretraining.correspondences import (
    match_by_descriptor,
    match_by_transform,
    mutual_nearest,
    patch_descriptors,
    sample_at,
)


def naive_match(cost: Tensor, allowed: Tensor) -> list[list[int]]:
    result = []
    for c, ok in zip(cost.tolist(), allowed.tolist(), strict=True):
        rows, columns = len(c), len(c[0])
        best_of_row = [
            min((c[i][j], j) for j in range(columns) if ok[i][j])[1] if any(ok[i]) else -1 for i in range(rows)
        ]
        best_of_column = [
            min(((c[i][j], i) for i in range(rows) if ok[i][j]), default=(0, -1))[1] for j in range(columns)
        ]
        result.append([j if j >= 0 and best_of_column[j] == i else -1 for i, j in enumerate(best_of_row)])
    return result


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("radius", [0.5, 3.0, 50.0])
def test_transform_matches_equal_a_naive_loop(dims: int, radius: float) -> None:
    g = torch.Generator().manual_seed(dims)
    spacing = torch.tensor([10.0, 1.5, 0.7][:dims])
    first, second = (torch.rand(3, n, dims, generator=g) * 6 for n in (20, 17))
    valid_first, valid_second = (torch.rand(3, n, generator=g) > 0.3 for n in (20, 17))
    valid_second[1] = False
    distance = torch.tensor(
        [
            [[math.dist((a * spacing).tolist(), (b * spacing).tolist()) for b in s] for a in f]
            for f, s in zip(first, second, strict=True)
        ]
    )
    allowed = (distance <= radius) & valid_first.unsqueeze(2) & valid_second.unsqueeze(1)
    found = match_by_transform(first, second, valid_first, valid_second, spacing, radius)
    assert found.tolist() == naive_match(distance, allowed)
    assert (found[1] == -1).all()


def test_matches_are_one_to_one_even_among_duplicates() -> None:
    points = torch.zeros(1, 5, 3)
    valid = torch.ones(1, 5, dtype=torch.bool)
    found = match_by_transform(points, points, valid, valid, torch.ones(3), 1.0)[0]
    matched = found[found >= 0]
    assert len(matched) == len(set(matched.tolist())) == 1


def test_permuting_the_points_permutes_the_matches() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(1, 12, 2, generator=g) * 9, torch.rand(1, 12, 2, generator=g) * 9
    valid = torch.ones(1, 12, dtype=torch.bool)
    order = torch.randperm(12, generator=g)
    plain = match_by_transform(first, second, valid, valid, torch.ones(2), 4.0)
    permuted = match_by_transform(first[:, order], second, valid, valid, torch.ones(2), 4.0)
    assert torch.equal(permuted, plain[:, order])


def test_padding_changes_nothing() -> None:
    g = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 6, 3, generator=g) * 5, torch.rand(2, 6, 3, generator=g) * 5
    valid = torch.ones(2, 6, dtype=torch.bool)
    padded = [torch.cat([t, torch.zeros(2, 3, 3)], 1) for t in (first, second)]
    mask = torch.cat([valid, torch.zeros(2, 3, dtype=torch.bool)], 1)
    plain = match_by_transform(first, second, valid, valid, torch.ones(3), 3.0)
    found = match_by_transform(*padded, mask, mask, torch.ones(3), 3.0)
    assert torch.equal(found[:, :6], plain)
    assert (found[:, 6:] == -1).all()


def test_no_points() -> None:
    assert mutual_nearest(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3, dtype=torch.bool)).shape == (2, 0)
    assert mutual_nearest(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0, dtype=torch.bool)).tolist() == [[-1] * 3] * 2


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


def test_constant_image_has_no_descriptor_and_no_match() -> None:
    points = torch.rand(1, 4, 2) * 9
    valid = torch.ones(1, 4, dtype=torch.bool)
    zero = patch_descriptors(torch.full((1, 1, 10, 10), 7.3), points, torch.ones(2), 1.0)
    assert (zero == 0).all()
    assert (match_by_descriptor(points, points, valid, valid, zero, zero, torch.ones(2), 99.0) == -1).all()


def test_descriptors_find_a_shifted_structure_within_the_radius() -> None:
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 60, 50))).float()
    shifted = torch.roll(image, (3, -2), (2, 3))
    points = torch.stack(torch.meshgrid(torch.arange(12, 48, 6), torch.arange(12, 40, 6), indexing="ij"), -1)
    points = points.reshape(1, -1, 2).float()
    moved = points + torch.tensor([3.0, -2.0])
    order = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(1))
    spacing, valid = torch.ones(2), torch.ones(points.shape[:2], dtype=torch.bool)
    one = patch_descriptors(image, points, spacing, 1.0)
    two = patch_descriptors(shifted, moved[:, order], spacing, 1.0)
    found = match_by_descriptor(points, moved[:, order], valid, valid, one, two, spacing, 8.0)
    assert torch.equal(order[found[0]], torch.arange(points.shape[1]))
    too_far = match_by_descriptor(points, moved[:, order], valid, valid, one, two, spacing, 2.0)
    assert (order[too_far[0][too_far[0] >= 0]] != torch.arange(points.shape[1])[too_far[0] >= 0]).all()
