from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.batch import Batch
from pretraining.config import PretrainConfig
from pretraining.dataset import PreprocessedImages
from pretraining.loader import PairLoader


def loader(folder: Path, patch: tuple[int, ...], workers: int = 0, **changes: Any) -> PairLoader:
    images = PreprocessedImages(folder, "command")
    spacing = (4.0, 1.0, 1.0)[-len(patch) :]
    return PairLoader(images, tuple(images.identifiers), patch, spacing, 3, PretrainConfig(**changes), workers)


def same(one: Batch, two: Batch) -> bool:
    names = ("views", "grids", "extents", "positions", "known_transform", "origins")
    return one.cases == two.cases and all(torch.equal(getattr(one, n), getattr(two, n)) for n in names)


@pytest.mark.parametrize("patch", [(24, 16), (8, 24, 16)])
def test_threads_and_start_do_not_change_the_batches(tiny: Any, patch: tuple[int, ...]) -> None:
    tiny.add_cases(5)
    plain = list(loader(tiny.images["2d"], patch).batches(0, 6))
    threaded = list(loader(tiny.images["2d"], patch, workers=3).batches(2, 6))
    assert len(threaded) == 4
    assert all(same(a, b) for a, b in zip(plain[2:], threaded, strict=True))
    assert not same(plain[0], plain[1])
    assert not torch.equal(plain[0].views, next(iter(loader(tiny.images["2d"], patch, seed=1).batches(0, 1))).views)
    assert plain[0].views.shape == (6, 1, *patch)


def test_every_case_is_seen_once_per_pass(tiny: Any) -> None:
    tiny.add_cases(6)
    seen = [case for batch in loader(tiny.images["2d"], (24, 16)).batches(0, 4) for case in batch.cases]
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"case_{i:03d}" for i in range(6)]
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("shape", [(1, 1, 28, 20), (1, 1, 1, 1), (1, 3, 200, 5)])
@pytest.mark.parametrize("patch", [(24, 16), (8, 24, 16)])
def test_degenerate_volumes(tiny: Any, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    tiny.add("odd", np.random.default_rng(0).random(shape, np.float32))
    for batch in loader(tiny.images["2d"], patch).batches(0, 3):
        assert torch.isfinite(batch.views).all()
        assert batch.known_transform.all() == (len(patch) == 3 or shape[1] == 1)


def test_an_error_in_a_thread_reaches_the_caller(tiny: Any) -> None:
    tiny.add("nan", np.full((1, 4, 30, 30), np.nan, np.float32))
    with pytest.raises(KAFError, match=r"nan\.b2nd"):
        list(loader(tiny.images["2d"], (24, 16), workers=2).batches(0, 3))


def test_wrong_number_of_axes(tiny: Any) -> None:
    tiny.add("flat", np.zeros((4, 30, 30), np.float32))
    with pytest.raises(KAFError, match="expected \\(channels, z, y, x\\)"):
        loader(tiny.images["2d"], (24, 16)).batch(0)
