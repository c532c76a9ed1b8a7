from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.keypoints import KeypointDetector
from pretraining.pairs.keypoint_cache import OVERSAMPLING, KeypointCache, _windows

CPU = torch.device("cpu")
CONFIG = KAFConfig(num_keypoints=40)
Texture = Callable[[tuple[int, ...], int], np.ndarray]


def stored(tmp_path: Path, image: np.ndarray, cache: KeypointCache, case: str = "a") -> Path:
    path = tmp_path / "a.b2nd"
    path.write_bytes(b"image")
    cache.create(case, path, image, CPU)
    return path


@pytest.mark.parametrize("dims", [2, 3])
def test_points_are_those_of_the_network(tmp_path: Path, make_texture: Texture, dims: int) -> None:
    """On an image of one patch, the cache holds what the network's own detector finds in it, strongest first."""
    image, spacing = make_texture((1, 8, 24, 16), 0), (4.0, 1.0, 1.0)[-dims:]
    cache = KeypointCache(tmp_path / "cache", CONFIG, (8, 24, 16)[-dims:], spacing)
    path = stored(tmp_path, image, cache)
    detector = KeypointDetector(CONFIG, spacing)
    for index in range(8) if dims == 2 else [None]:
        view = torch.from_numpy(image[:, index] if index is not None else image).unsqueeze(0)
        expected = detector(view)
        found = cache.read("a", path, index)
        count = int(expected.valid.sum())
        assert count > 10
        assert len(found.coords) >= count
        assert np.array_equal(found.coords[:count], expected.coords[0, :count].numpy())
        assert len(found.coords) <= OVERSAMPLING * CONFIG.num_keypoints
        assert np.allclose(np.linalg.norm(found.descriptors.astype(float), axis=1), 1, atol=1e-2)


def test_a_large_volume_is_covered_window_by_window(tmp_path: Path, make_texture: Texture) -> None:
    image = make_texture((1, 20, 60, 40), 1)
    cache = KeypointCache(tmp_path / "cache", CONFIG, (8, 24, 16), (1.0, 1.0, 1.0))
    found = cache.read("a", stored(tmp_path, image, cache), None)
    assert len(found.coords) > 4 * CONFIG.num_keypoints
    assert len(np.unique(found.coords, axis=0)) == len(found.coords)
    # every window has its share: no part of the volume is without points
    cells = np.floor(found.coords / [10, 20, 20]).astype(int)
    assert len(np.unique(cells, axis=0)) == 2 * 3 * 2


def test_windows_tile_the_image() -> None:
    for shape in [(20, 60, 40), (1, 1, 1), (9, 100, 24)]:
        seen = np.zeros(shape, int)
        for window in _windows(shape, (8, 24, 16)):
            seen[window] += 1
        assert (seen == 1).all()


def test_empty_slices_and_constant_images_have_no_points(tmp_path: Path, make_texture: Texture) -> None:
    image = make_texture((1, 6, 24, 16), 0)
    image[:, [0, 3, 5]] = 1.0
    cache = KeypointCache(tmp_path / "cache", CONFIG, (24, 16), (1.0, 1.0))
    path = stored(tmp_path, image, cache)
    counts = [len(cache.read("a", path, index).coords) for index in range(6)]
    assert [count > 0 for count in counts] == [False, True, True, False, True, False]
    other = KeypointCache(tmp_path / "other", CONFIG, (4, 24, 16), (1.0, 1.0, 1.0))
    assert other.read("a", stored(tmp_path, np.zeros((1, 6, 24, 16), np.float32), other), None).coords.shape == (0, 3)
    tiny = KeypointCache(tmp_path / "tiny", CONFIG, (4, 24, 16), (1.0, 1.0, 1.0))
    stored(tmp_path, np.ones((1, 2, 3, 2), np.float32), tiny)


def test_another_option_or_image_is_another_file(tmp_path: Path, make_texture: Texture) -> None:
    image = make_texture((1, 8, 24, 16), 0)
    arguments = ((24, 16), (1.0, 1.0))
    cache = KeypointCache(tmp_path / "cache", CONFIG, *arguments)
    path = stored(tmp_path, image, cache)
    first = cache.path("a", path)
    assert KeypointCache(tmp_path / "cache", CONFIG, *arguments).path("a", path) == first
    changes = [{"num_keypoints": 41}, {"detection_threshold": 0.05}, {"detection_channels": (0, 1)}]
    for change in changes:
        assert KeypointCache(tmp_path / "cache", replace(CONFIG, **change), *arguments).path("a", path) != first  # type: ignore[arg-type]
    assert KeypointCache(tmp_path / "cache", CONFIG, (24, 16), (1.0, 2.0)).path("a", path) != first
    # options of the layers do not matter
    assert KeypointCache(tmp_path / "cache", replace(CONFIG, num_blocks=5), *arguments).path("a", path) == first
    os.utime(path, ns=(1, 1))
    assert cache.path("a", path) != first
    with pytest.raises(KAFError, match="cannot be read"):
        cache.read("a", path, 0)
    cache.create("a", path, image, CPU)
    cache.remove_outdated([cache.path("a", path)])
    assert not first.exists()
    assert [p.name for p in cache.folder.iterdir()] == [cache.path("a", path).name]


def test_names_with_folders_and_dots(tmp_path: Path, make_texture: Texture) -> None:
    cache = KeypointCache(tmp_path / "cache", CONFIG, (24, 16), (1.0, 1.0))
    image = make_texture((1, 2, 24, 16), 0)
    path = stored(tmp_path, image, cache, "folder/case.1")
    cache.create("folder/case.12", path, image, CPU)
    cache.create("folder/case", path, image, CPU)
    assert len(cache.read("folder/case.1", path, 1).coords) > 0
    before = {name: cache.path(name, path) for name in ("folder/case.1", "folder/case.12", "folder/case")}
    assert set((cache.folder / "folder").iterdir()) == set(before.values())
    os.utime(path, ns=(1, 1))
    cache.create("folder/case.1", path, image, CPU)
    cache.remove_outdated([cache.path("folder/case.1", path)])
    after = {**before, "folder/case.1": cache.path("folder/case.1", path)}
    assert set((cache.folder / "folder").iterdir()) == set(after.values())


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, make_texture: Texture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KeypointCache(tmp_path / "cache", CONFIG, (24, 16), (1.0, 1.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KAFError, match="No space left"):
        stored(tmp_path, make_texture((1, 2, 24, 16), 0), cache)
    assert list(cache.folder.iterdir()) == []


def test_truncated_file_names_the_fix(tmp_path: Path, make_texture: Texture) -> None:
    cache = KeypointCache(tmp_path / "cache", CONFIG, (24, 16), (1.0, 1.0))
    path = stored(tmp_path, make_texture((1, 2, 24, 16), 0), cache)
    file = cache.path("a", path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(KAFError, match="Delete it"):
        cache.read("a", path, 0)
