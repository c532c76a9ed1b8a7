from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretraining.pairs.correspondences import match_by_descriptor, match_by_transform
from pretraining.pairs.descriptors import patch_descriptors


def naive_match(cost: np.ndarray, allowed: np.ndarray) -> list[int]:
    def best(values: np.ndarray, possible: np.ndarray) -> int:
        return min(((v, i) for i, (v, ok) in enumerate(zip(values, possible, strict=True)) if ok), default=(0, -1))[1]

    best_of_row = [best(cost[i], allowed[i]) for i in range(cost.shape[0])]
    best_of_column = [best(cost[:, j], allowed[:, j]) for j in range(cost.shape[1])]
    return [j if j >= 0 and best_of_column[j] == i else -1 for i, j in enumerate(best_of_row)]


def distances(first: np.ndarray, second: np.ndarray, spacing: list[float]) -> np.ndarray:
    mm = np.array(spacing)
    return np.array([[math.dist(a * mm, b * mm) for b in second] for a in first])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("radius", [0.5, 3.0, 50.0])
def test_transform_matches_equal_a_naive_loop(dims: int, radius: float) -> None:
    generator = np.random.default_rng(dims)
    spacing = [10.0, 1.5, 0.7][:dims]
    for _ in range(5):
        first, second = (generator.random((n, dims)) * 6 for n in (20, 17))
        distance = distances(first, second, spacing)
        found = match_by_transform(first, second, spacing, radius)
        assert found.tolist() == naive_match(distance, distance <= radius)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("radius", [3.0, 50.0])
def test_descriptor_matches_equal_a_naive_loop(dims: int, radius: float) -> None:
    generator = np.random.default_rng(dims)
    spacing = [10.0, 1.5, 0.7][:dims]
    first, second = (generator.random((n, dims)) * 6 for n in (20, 17))
    one, two = (generator.standard_normal((n, 9)).astype(np.float16) for n in (20, 17))
    one[3], two[5] = 0, 0
    allowed = distances(first, second, spacing) <= radius
    allowed[3], allowed[:, 5] = False, False
    cost = -(one.astype(np.float32) @ two.astype(np.float32).T)
    found = match_by_descriptor(first, second, one, two, spacing, radius)
    assert found.tolist() == naive_match(cost, allowed)
    assert found[3] == -1
    assert 5 not in found


def test_equal_points_match_at_radius_zero() -> None:
    points = np.random.default_rng(0).random((6, 2))
    order = np.array([3, 1, 5, 0, 2, 4])
    assert order[match_by_transform(points, points[order], [1, 1], 0.0)].tolist() == list(range(6))


def test_matches_are_one_to_one_even_among_duplicates() -> None:
    points = np.zeros((5, 3))
    found = match_by_transform(points, points, [1, 1, 1], 1.0)
    assert (found >= 0).sum() == 1


def test_permuting_the_points_permutes_the_matches() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random((12, 2)) * 9, generator.random((12, 2)) * 9
    order = generator.permutation(12)
    plain = match_by_transform(first, second, [1, 1], 4.0)
    assert (plain >= 0).sum() > 3
    assert np.array_equal(match_by_transform(first[order], second, [1, 1], 4.0), plain[order])


def test_no_points() -> None:
    none, three = np.zeros((0, 2)), np.zeros((3, 2))
    assert match_by_transform(none, three, [1, 1], 1.0).shape == (0,)
    assert match_by_transform(three, none, [1, 1], 1.0).tolist() == [-1] * 3
    assert match_by_descriptor(three, none, np.zeros((3, 4)), np.zeros((0, 4)), [1, 1], 1.0).tolist() == [-1] * 3


def test_descriptors_find_a_shifted_structure_within_the_radius() -> None:
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 60, 50))).float()
    shifted = torch.roll(image, (3, -2), (2, 3))
    points = np.stack(np.meshgrid(np.arange(12, 48, 6), np.arange(12, 40, 6), indexing="ij"), -1).reshape(-1, 2)
    order = np.random.default_rng(1).permutation(len(points))
    moved = (points + np.array([3, -2]))[order]
    one, two = (
        patch_descriptors(i, torch.from_numpy(p).float()[None], torch.ones(2), 1.0)[0].numpy()
        for i, p in ((image, points), (shifted, moved))
    )
    found = match_by_descriptor(points, moved, one, two, [1, 1], 8.0)
    assert order[found].tolist() == list(range(len(points)))
    too_far = match_by_descriptor(points, moved, one, two, [1, 1], 2.0)
    matched = np.flatnonzero(too_far >= 0)
    assert (order[too_far[matched]] != matched).all()
