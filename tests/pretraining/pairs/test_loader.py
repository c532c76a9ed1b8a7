from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.pairs.batch import Batch
from pretraining.pairs.loader import PairLoader

Make = Callable[..., PairLoader]
CONFIGURATIONS = ["2d", "3d_fullres"]


def by_side(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The tensors with a row for each side of a pair."""
    assert isinstance(batch.views, torch.Tensor)
    return batch.views, *batch.keypoints, batch.positions


def same(one: Batch, two: Batch) -> bool:
    tensors = [(*by_side(batch), batch.matches) for batch in (one, two)]
    return one.cases == two.cases and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_threads_and_start_do_not_change_the_batches(tiny: Any, make_loader: Make, configuration: str) -> None:
    tiny.add_cases(5)
    loader = make_loader(configuration)
    plain = list(loader.batches(0, 6))
    threaded = list(make_loader(configuration, workers=3).batches(2, 6))
    assert len(threaded) == 4
    assert all(same(a, b) for a, b in zip(plain[2:], threaded, strict=True))
    assert not same(plain[0], plain[1])
    assert not same(plain[0], make_loader(configuration, seed=1).batch(0))
    assert not same(plain[0], make_loader(configuration, stream=1).batch(0))
    assert plain[0].rendered(loader.patch_size).shape == (8, 1, *loader.patch_size)
    assert plain[0].keypoints.coords.shape == (8, 48, len(loader.patch_size))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_processes_share_a_batch(tiny: Any, make_loader: Make, configuration: str) -> None:
    tiny.add_cases(5)
    whole = make_loader(configuration).batch(3)
    halves = [make_loader(configuration, rank=rank, world_size=2).batch(3) for rank in (0, 1)]
    for expected, *parts in zip(*map(by_side, (whole, *halves)), strict=True):
        first, second = zip(*[part.chunk(2) for part in parts], strict=True)
        assert torch.equal(expected, torch.cat([*first, *second]))
    assert torch.equal(whole.matches, torch.cat([half.matches for half in halves]))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_rendering_on_the_device_gives_the_same_views(tiny: Any, make_loader: Make, configuration: str) -> None:
    tiny.add_cases(5, (1, 10, 40, 36))
    loader = make_loader(configuration)
    now, later = loader.batch(2), make_loader(configuration, render_later=True).batch(2)
    shape = loader.patch_size
    assert torch.allclose(now.rendered(shape), later.to(torch.device("cpu")).rendered(shape), atol=5e-3)
    assert torch.equal(now.matches, later.matches)


def test_every_case_is_seen_once_per_pass(tiny: Any, make_loader: Make) -> None:
    tiny.add_cases(6)
    seen = [case for batch in make_loader("2d").batches(0, 3) for case in batch.cases[:4]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"case_{i:03d}" for i in range(6)]
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_points_lie_on_their_places_in_the_views(tiny: Any, make_loader: Make, configuration: str) -> None:
    """At a keypoint, the view shows the intensity of the image at the keypoint's source voxel."""
    tiny.add_cases(3, (1, 10, 40, 36))
    neutral = {"gamma": 0.0, "contrast": 0.0, "brightness": 0.0, "noise": 0.0}
    # without enlargement of the voxels the linear interpolation at a point is close to the value of its voxel
    loader = make_loader(configuration, **neutral, elastic=0.05, rotation=5.0, scale_min=1.0, scale_max=1.0)
    batch = loader.batch(0)
    views = batch.rendered(loader.patch_size)
    for row in range(8):
        generator = np.random.default_rng([0, 0, 0, row % 4])
        pair = loader._pair(0, row % 4, generator)
        side = (pair.first, pair.second)[row // 4]
        found = loader.keypoints.read(side.case, loader.images.path(side.case), side.slice_index)
        image = loader.images.read(side.case, (slice(None),) * 3)[0]
        image = image if side.slice_index is None else image[side.slice_index]
        shown = views[row, 0].numpy()
        points = batch.keypoints.coords[row, batch.keypoints.valid[row]].round().long().numpy()
        inner = ((points >= 1) & (points < np.array(shown.shape) - 1)).all(1)
        at_points = shown[tuple(points[inner].T)]
        # the intensities at the detected voxels are the only candidates
        candidates = image[tuple(found.coords.astype(int).T)]
        nearest = np.abs(at_points[:, None] - candidates[None]).min(1)
        assert inner.sum() > 5
        assert np.median(nearest) < 0.25


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_matches_follow_the_known_transforms(tiny: Any, make_loader: Make, configuration: str) -> None:
    """Two views of the same voxels: a match is the same source point, and nearly all shared points are matched."""
    tiny.add_cases(4, (1, 1, 60, 50) if configuration == "2d" else (1, 12, 60, 50))
    loader = make_loader(configuration, spatial=1.0)
    for index in range(4):
        pair = loader._pair(0, index, np.random.default_rng([0, 0, 0, index]))
        assert pair.known_transform
        sample = loader.sample(0, index)
        matched = sample.matches >= 0
        assert matched.sum() > 5
        assert sample.keypoints.valid[0][matched].all()
        assert sample.keypoints.valid[1][sample.matches[matched]].all()
        assert len(set(sample.matches[matched].tolist())) == int(matched.sum())


def test_matches_are_identities_when_the_views_are_equal(tiny: Any, make_loader: Make) -> None:
    tiny.add_cases(4, (1, 1, 40, 36))
    loader = make_loader("2d", spatial=0.0, shift=0.0, mirror=0.0)
    batch = loader.batch(0)
    index = torch.arange(48).expand(4, -1)
    assert torch.equal(batch.matches[batch.keypoints.valid[:4]], index[batch.keypoints.valid[:4]])
    assert (batch.matches[~batch.keypoints.valid[:4]] == -1).all()


def test_neighbouring_slices_are_matched_by_appearance(tiny: Any, make_loader: Make) -> None:
    plane = np.random.default_rng(0).standard_normal((1, 1, 40, 32)).astype(np.float32)
    tiny.add("same_slices", np.repeat(plane, 6, axis=1))
    batch = make_loader("2d", spatial=0.0, shift=0.0, mirror=0.0).batch(0)
    matched = batch.matches >= 0
    assert matched[batch.keypoints.valid[:4]].float().mean() > 0.9
    first, second = batch.keypoints.coords.chunk(2)
    partner = second.gather(1, batch.matches.clamp_min(0).unsqueeze(2).expand(-1, -1, 2))
    assert torch.equal(partner[matched], first[matched])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_pairs_across_phases_of_a_patient(tiny: Any, make_loader: Make, configuration: str) -> None:
    volume = np.random.default_rng(0).standard_normal((1, 10, 40, 36)).astype(np.float32)
    for patient in range(3):
        for frame in (1, 9):
            # the second frame is cropped differently: aligned at the centre it is the same image
            image = np.roll(volume, patient * 7, axis=2)
            tiny.add(f"patient{patient:03d}_frame{frame:02d}", image if frame == 1 else image[:, 1:-1, 2:-2, 3:-3])
    loader = make_loader(configuration, across=1.0, spatial=0.0, shift=0.0, mirror=0.0)
    assert len(loader.patients) == 3
    for batch in loader.batches(0, 3):
        for first, second in zip(batch.cases[:4], batch.cases[4:], strict=True):
            assert first != second
            assert first.split("_")[0] == second.split("_")[0]
        matched = batch.matches >= 0
        assert matched.sum() > 4 * 5
    none = make_loader(configuration, across=0.0).batch(0)
    assert none.cases[:4] == none.cases[4:]
    alone = make_loader(configuration, across=1.0, patient_pattern="(.*)x").batch(0)
    assert alone.cases[:4] == alone.cases[4:]


@pytest.mark.parametrize("shape", [(1, 1, 28, 20), (1, 1, 1, 1), (1, 3, 200, 5)])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_degenerate_volumes(tiny: Any, make_loader: Make, shape: tuple[int, ...], configuration: str) -> None:
    tiny.add("odd", np.random.default_rng(0).random(shape, np.float32))
    loader = make_loader(configuration)
    for batch in loader.batches(0, 3):
        assert torch.isfinite(batch.rendered(loader.patch_size)).all()
        assert torch.isfinite(batch.keypoints.coords).all()


def test_an_error_in_a_thread_reaches_the_caller(tiny: Any, make_loader: Make) -> None:
    tiny.add_cases(2)
    loader = make_loader("2d", workers=2)
    for file in loader.keypoints.folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(KAFError, match="Delete it and run again"):
        list(loader.batches(0, 3))
