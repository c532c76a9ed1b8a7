from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.data.images import PreprocessedImages

Texture = Callable[[tuple[int, ...], int], np.ndarray]
WHOLE = (slice(None), slice(None), slice(None))


def further_file(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blosc2.asarray(np.ascontiguousarray(image), urlpath=str(path))
    return path


def test_lists_images_only(tiny: Any) -> None:
    tiny.add_cases(3)
    images = PreprocessedImages(tiny.images["2d"], "command")
    assert images.identifiers == ["case_000", "case_001", "case_002"]
    assert images.shape("case_001") == (1, 10, 28, 20)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("numpy_format", [False, True])
def test_reads_boxes_of_both_formats(tiny: Any, make_texture: Texture, numpy_format: bool, memory: int) -> None:
    image = make_texture((2, 6, 7, 8), 0)
    tiny.add("a", image, numpy_format)
    images = PreprocessedImages(tiny.images["2d"], "command", memory=memory)
    box = (slice(1, 3), slice(0, 7), slice(2, 3))
    part = images.read("a", box)
    assert part.dtype == np.float32
    assert np.array_equal(part, image[(slice(None), *box)])
    part[:] = 0
    assert np.array_equal(images.read("a", box), image[(slice(None), *box)])
    if numpy_format:
        np.save(tiny.images["2d"] / "a.npy", image + 1)
        unpacked = PreprocessedImages(tiny.images["2d"], "command", memory=memory)
        assert np.array_equal(unpacked.read("a", box), image[(slice(None), *box)] + 1)


def test_further_sources_are_read_like_the_first(tiny: Any, make_texture: Texture, tmp_path: Path) -> None:
    tiny.add_cases(2)
    image = make_texture((1, 3, 4, 5), 7)
    path = further_file(tmp_path / "cache" / "case_000-0123.b2nd", image)
    images = PreprocessedImages(tiny.images["2d"], "command", {"more-1/case_000": path})
    assert images.identifiers == ["case_000", "case_001", "more-1/case_000"]
    assert images.path("more-1/case_000") == path
    assert images.shape("more-1/case_000") == (1, 3, 4, 5)
    assert np.array_equal(images.read("more-1/case_000", WHOLE), image)
    assert images.shape("case_000") == (1, 10, 28, 20)


def test_memory_is_a_limit_and_kept_images_need_no_file(tiny: Any) -> None:
    tiny.add_cases(3)
    one = 10 * 28 * 20 * 4
    images = PreprocessedImages(tiny.images["2d"], "command", memory=2 * one + 1)
    before = [images.read(case, WHOLE) for case in images.identifiers]
    kept = list(images._arrays)
    assert kept == ["case_000", "case_001"]
    for case in kept:
        images.path(case).unlink()
    images._thread.__dict__.clear()  # no open file either
    assert all(
        np.array_equal(images.read(case, WHOLE), old) for case, old in zip(images.identifiers, before, strict=True)
    )


@pytest.mark.parametrize("memory", [0, 3 * 10 * 28 * 20 * 4, 1 << 30])
def test_many_threads_read_what_one_reads(tiny: Any, memory: int) -> None:
    tiny.add_cases(5)
    reference = {f"case_{i:03d}": None for i in range(5)}
    lone = PreprocessedImages(tiny.images["2d"], "command", memory=0)
    truth = {case: lone.read(case, WHOLE) for case in reference}
    images = PreprocessedImages(tiny.images["2d"], "command", memory=memory)

    def right(seed: int) -> bool:
        generator = np.random.default_rng(seed)
        case, z = f"case_{generator.integers(5):03d}", int(generator.integers(10))
        read = images.read(case, (slice(z, z + 1), slice(3, 20), slice(None)))
        return np.array_equal(read, truth[case][:, z : z + 1, 3:20])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(400)))
    assert sum(a.nbytes for a in images._arrays.values()) <= memory


def test_open_files_are_limited(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretraining.data.images.OPEN_FILES", 2)
    tiny.add_cases(4)
    images = PreprocessedImages(tiny.images["2d"], "command", memory=0)
    for case in images.identifiers:
        images.read(case, WHOLE)
    assert images._thread.opened.cache_info().currsize == 2


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match="nnUNetv2_preprocess -d 1"):
        PreprocessedImages(tmp_path / "nothing", "nnUNetv2_preprocess -d 1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KAFError, match=r"no \.b2nd"):
        PreprocessedImages(tmp_path / "empty", "nnUNetv2_preprocess -d 1")


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_name_the_file(tiny: Any, value: float, memory: int) -> None:
    image = np.zeros((1, 4, 5, 6), np.float32)
    image[0, 1, 2, 3] = value
    tiny.add("broken", image)
    with pytest.raises(KAFError, match=r"2d/broken\.b2nd contains NaN.*preprocess again: command"):
        PreprocessedImages(tiny.images["2d"], "command", memory=memory).read("broken", WHOLE)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("ending", ["b2nd", "npz"])
def test_truncated_file(tiny: Any, ending: str, memory: int) -> None:
    tiny.add("cut", np.random.default_rng(0).random((1, 8, 9, 10), np.float32), numpy_format=ending == "npz")
    path = tiny.images["2d"] / f"cut.{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    images = PreprocessedImages(tiny.images["2d"], "command", memory=memory)
    for _ in range(2):
        with pytest.raises(KAFError, match=rf"cut\.{ending} cannot be read"):
            images.read("cut", WHOLE)


def test_further_files_name_their_own_remedy(tiny: Any, tmp_path: Path) -> None:
    tiny.add_cases(1)
    path = tmp_path / "cut-0.b2nd"
    path.write_bytes(b"no image")
    images = PreprocessedImages(tiny.images["2d"], "command", {"more-1/cut": path})
    with pytest.raises(KAFError, match=r"cut-0\.b2nd cannot be read .* Delete it and start again"):
        images.read("more-1/cut", WHOLE)


def test_only_images_are_opened(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label files and .pkl files are folders here, so opening one fails; and what is opened is recorded."""
    tiny.add_cases(2)
    opened: list[str] = []
    original = blosc2.open
    recording = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open" and str(tiny.root) in str(arguments[0]):
            opened.append(str(arguments[0]))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        opened.append(str(kwargs.get("urlpath", args[0] if args else "")))
        return original(*args, **kwargs)

    monkeypatch.setattr(blosc2, "open", wrapped)
    sys.addaudithook(audit)
    images = PreprocessedImages(tiny.images["2d"], "command")
    for case in images.identifiers:
        images.read(case, WHOLE)
    recording = False
    assert set(opened) == {str(images.path(case)) for case in images.identifiers}
