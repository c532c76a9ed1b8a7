from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.dataset import PreprocessedImages, training_cases

WHOLE = (slice(None), slice(None), slice(None))


def test_lists_images_only(tiny: Any) -> None:
    tiny.add_cases(3)
    images = PreprocessedImages(tiny.images["2d"], "command")
    assert images.identifiers == ["case_000", "case_001", "case_002"]
    assert images.shape("case_001") == (1, 10, 28, 20)


@pytest.mark.parametrize("numpy_format", [False, True])
def test_reads_boxes_of_both_formats(
    tiny: Any, make_texture: Callable[[tuple[int, ...], int], np.ndarray], numpy_format: bool
) -> None:
    image = make_texture((2, 6, 7, 8), 0)
    tiny.add("a", image, numpy_format)
    images = PreprocessedImages(tiny.images["2d"], "command")
    box = (slice(1, 3), slice(0, 7), slice(2, 3))
    assert np.array_equal(images.read("a", box), image[(slice(None), *box)])
    if numpy_format:
        np.save(tiny.images["2d"] / "a.npy", image + 1)
        assert np.array_equal(images.read("a", box), image[(slice(None), *box)] + 1)
    part = images.read("a", box)
    part[:] = 0
    assert images.read("a", box).any()


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match="nnUNetv2_preprocess -d 1"):
        PreprocessedImages(tmp_path / "nothing", "nnUNetv2_preprocess -d 1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KAFError, match=r"no \.b2nd"):
        PreprocessedImages(tmp_path / "empty", "nnUNetv2_preprocess -d 1")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_name_the_file(tiny: Any, value: float) -> None:
    image = np.zeros((1, 4, 5, 6), np.float32)
    image[0, 1, 2, 3] = value
    tiny.add("broken", image)
    with pytest.raises(KAFError, match=r"2d/broken\.b2nd contains NaN"):
        PreprocessedImages(tiny.images["2d"], "command").read("broken", WHOLE)


@pytest.mark.parametrize("ending", ["b2nd", "npz"])
def test_truncated_file(tiny: Any, ending: str) -> None:
    tiny.add("cut", np.random.default_rng(0).random((1, 8, 9, 10), np.float32), numpy_format=ending == "npz")
    path = tiny.images["2d"] / f"cut.{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(KAFError, match=rf"cut\.{ending} cannot be read"):
        PreprocessedImages(tiny.images["2d"], "command").read("cut", WHOLE)


def test_constant_image_warns_once(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny.add("flat", np.full((1, 4, 5, 6), 2.0, np.float32))
    partly = np.zeros((1, 4, 5, 6), np.float32)
    partly[0, 3, 4, 5] = 1
    tiny.add("normal", partly)
    images = PreprocessedImages(tiny.images["2d"], "command")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            images.read("flat", WHOLE)
            images.read("normal", (slice(0, 1), slice(None), slice(None)))
    assert [record.getMessage().split()[1] for record in caplog.records] == ["flat"]


def test_split_is_the_one_nnunet_makes(tiny: Any) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    tiny.add_cases(7)
    images = PreprocessedImages(tiny.images["2d"], "command")
    expected = generate_crossval_split([f"case_{i:03d}" for i in range(7)], seed=12345, n_splits=5)
    for fold in range(5):
        assert training_cases(images, tiny.folder, fold) == sorted(expected[fold]["train"])
    saved = json.loads((tiny.folder / "splits_final.json").read_text())
    assert saved == [{k: list(map(str, v)) for k, v in split.items()} for split in expected]


def test_existing_split_and_folds_beyond_it(tiny: Any) -> None:
    tiny.add_cases(6)
    images = PreprocessedImages(tiny.images["2d"], "command")
    split = [{"train": ["case_000"], "val": ["case_003", "case_004"]}]
    (tiny.folder / "splits_final.json").write_text(json.dumps(split))
    # cases that the fold does not name at all are unlabelled extra cases: they may be used
    assert training_cases(images, tiny.folder, 0) == ["case_000", "case_001", "case_002", "case_005"]
    keys = [f"case_{i:03d}" for i in range(6)]
    chosen = np.random.RandomState(seed=12345 + 3).choice(6, 4, replace=False)
    assert training_cases(images, tiny.folder, 3) == sorted(keys[i] for i in chosen)


def test_fold_all_says_that_it_uses_everything(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny.add_cases(3)
    with caplog.at_level(logging.INFO):
        assert len(training_cases(PreprocessedImages(tiny.images["2d"], "c"), tiny.folder, "all")) == 3
    assert "validation cases of every fold included" in caplog.text
    assert not (tiny.folder / "splits_final.json").exists()


def test_bad_splits(tiny: Any) -> None:
    tiny.add_cases(3)
    images = PreprocessedImages(tiny.images["2d"], "command")
    with pytest.raises(KAFError, match="--fold all"):
        training_cases(images, tiny.folder, 0)
    (tiny.folder / "splits_final.json").write_text("[{")
    with pytest.raises(KAFError, match=r"splits_final\.json is not a split file"):
        training_cases(images, tiny.folder, 0)
    everything = [{"train": [], "val": images.identifiers}]
    (tiny.folder / "splits_final.json").write_text(json.dumps(everything))
    with pytest.raises(KAFError, match="no training case"):
        training_cases(images, tiny.folder, 0)


def test_only_images_are_opened(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label files and .pkl files are folders here, so opening one fails; and what is opened is recorded."""
    tiny.add_cases(2)
    opened: list[str] = []
    original = blosc2.open

    def recording(*args: Any, **kwargs: Any) -> Any:
        opened.append(str(kwargs.get("urlpath", args[0] if args else "")))
        return original(*args, **kwargs)

    monkeypatch.setattr(blosc2, "open", recording)
    images = PreprocessedImages(tiny.images["2d"], "command")
    for case in images.identifiers:
        images.read(case, WHOLE)
    assert sorted(opened) == [str(images.path(case)) for case in images.identifiers]
