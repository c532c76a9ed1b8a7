from __future__ import annotations

import numpy as np
import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.pairs.pairs import Pair, sample_pair


def draw(shape: tuple[int, ...], patch: tuple[int, ...], seed: int = 0, **changes: float) -> Pair:
    options = {"slice_distance": 0.05, "shift": 0.25, **changes}
    return draw_two(shape, shape, ("case", "case"), patch, seed, **options)


def draw_two(
    shape: tuple[int, ...],
    other: tuple[int, ...],
    cases: tuple[str, str],
    patch: tuple[int, ...],
    seed: int,
    slice_distance: float = 0.05,
    shift: float = 0.25,
) -> Pair:
    generator = np.random.default_rng(seed)
    return sample_pair(cases, (shape, other), patch, generator, slice_distance=slice_distance, shift=shift)


@pytest.mark.parametrize(("depth", "reach"), [(2, 1), (10, 1), (40, 2), (100, 5)])
def test_neighbouring_slices(depth: int, reach: int) -> None:
    distances, slices = set(), set()
    for seed in range(400):
        pair = draw((depth, 20, 30), (16, 16), seed)
        assert pair.first.slice_index is not None
        assert pair.second.slice_index is not None
        distances.add(abs(pair.first.slice_index - pair.second.slice_index))
        slices |= {pair.first.slice_index, pair.second.slice_index}
        assert pair.first.position[0] == (pair.first.slice_index + 0.5) / depth
        in_plane = zip(pair.first.position[1:], pair.first.centre, (20, 30), strict=True)
        assert all(share == pytest.approx((centre + 0.5) / size) for share, centre, size in in_plane)
        assert not pair.known_transform
    assert distances == set(range(1, reach + 1))
    assert min(slices) >= 0
    assert max(slices) < depth


def test_single_slice_gives_two_views_of_it() -> None:
    pair = draw((1, 20, 30), (16, 16))
    assert pair.first.slice_index == pair.second.slice_index == 0
    assert pair.known_transform
    assert pair.first.position[0] == 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 30, 30), (5, 40, 9), (200, 100, 150)])
def test_patches_overlap_and_keep_their_centre_in_the_volume(shape: tuple[int, ...]) -> None:
    patch = (8, 24, 16)
    for seed in range(200):
        pair = draw(shape, patch, seed)
        for a, b, size, length in zip(pair.first.centre, pair.second.centre, shape, patch, strict=True):
            assert abs(a - b) <= 0.25 * min(size, length) + 1  # rounding to the raster of both
            assert -1 <= a <= size
            if size >= 2 * length:
                assert a - (length - 1) / 2 >= -0.5
                assert a + (length - 1) / 2 <= size - 0.5
            if size > 1:
                assert (a - (length - 1) / 2) % 1 == 0
        assert all(0 <= p <= 1 for p in pair.first.position + pair.second.position)
        assert pair.known_transform


def test_positions_vary_even_if_the_volume_is_smaller_than_the_patch() -> None:
    positions = {draw((30, 30, 30), (40, 40, 40), seed).first.position for seed in range(50)}
    assert len(positions) > 25


@pytest.mark.parametrize("depth", [7, 8])
def test_a_single_slice_of_a_volume_lies_on_the_raster_of_the_view(depth: int) -> None:
    pair = draw((1, 40, 40), (depth, 24, 16))
    for side in (pair.first, pair.second):
        assert (side.centre[0] - (depth - 1) / 2) % 1 == 0
        assert side.position[0] == 0.5


def test_generator_decides() -> None:
    assert draw((9, 40, 40), (4, 16, 16), 3) == draw((9, 40, 40), (4, 16, 16), 3)
    assert draw((9, 40, 40), (4, 16, 16), 3) != draw((9, 40, 40), (4, 16, 16), 4)


def test_empty_volume() -> None:
    with pytest.raises(KAFError, match="case"):
        draw((0, 4, 4), (4, 4))


@pytest.mark.parametrize("patch", [(16, 16), (8, 16, 16)])
def test_two_images_of_a_patient_are_aligned_at_their_centres(patch: tuple[int, ...]) -> None:
    shape, other = (20, 60, 40), (28, 64, 50)
    slices = set()
    for seed in range(300):
        pair = draw_two(shape, other, ("p_ed", "p_es"), patch, seed, shift=0.0)
        assert (pair.first.case, pair.second.case) == ("p_ed", "p_es")
        assert not pair.known_transform
        assert pair.first.shape == shape[-len(patch) :]
        assert pair.second.shape == other[-len(patch) :]
        for a, b, m, n in zip(pair.first.centre, pair.second.centre, pair.first.shape, pair.second.shape, strict=True):
            assert abs((a - (m - 1) / 2) - (b - (n - 1) / 2)) <= 1
        if pair.first.slice_index is not None and pair.second.slice_index is not None:
            expected = (pair.first.slice_index + 0.5) / 20 * 28
            assert abs(pair.second.slice_index + 0.5 - expected) <= 2
            slices.add((pair.first.slice_index, pair.second.slice_index))
    # the same slice of another phase is a partner as well
    assert len(patch) == 3 or any(a == 10 and b == 14 for a, b in slices)
