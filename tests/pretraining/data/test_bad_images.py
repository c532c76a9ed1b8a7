from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunetv2_kaf.errors import KAFError
from pretraining.data.bad_images import BadImages, read_whole
from pretraining.data.images import PreprocessedImages

Texture = Callable[[tuple[int, ...], int], np.ndarray]


def test_bad_images_are_reported_together_and_sorted() -> None:
    bad = BadImages()
    bad.finish(skip_bad=False)
    bad.add(Path("/b.nii"), "nothing", "something")
    bad.add(Path("/a.nii"), "NaN", "numbers")
    with pytest.raises(KAFError) as caught:
        bad.finish(skip_bad=False)
    message = str(caught.value)
    assert message.startswith("2 bad image(s), nothing was trained:")
    assert message.index("/a.nii: found NaN; expected numbers") < message.index("/b.nii: found nothing")
    assert "--skip-bad" in message
    bad.finish(skip_bad=False)  # reported once


def test_skip_bad_warns_of_each(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadImages()
    for name in ("x", "y"):
        bad.add(Path(name), "this", "that")
    with caplog.at_level(logging.WARNING):
        bad.finish(skip_bad=True)
    assert [r.getMessage() for r in caplog.records] == [
        f"Bad image skipped: {n}: found this; expected that" for n in "xy"
    ]


def fill(tiny: Any, texture: Texture) -> None:
    """Two good cases and one of each kind of bad ones."""
    shape = (1, 4, 6, 5)
    nan, inf = texture(shape, 1), texture(shape, 2)
    nan[0, 3, 5, 4], inf[0, 0, 0, 0] = np.nan, -np.inf
    for name, image in {
        "good_a": texture(shape, 3),
        "nan": nan,
        "inf": inf,
        "channels": texture((2, 4, 6, 5), 4),
        "axes": texture((1, 6, 5, 4), 5)[0],
        "cut": texture(shape, 6),
        "good_b": texture(shape, 7),
    }.items():
        tiny.add(name, image)
    path = tiny.images["2d"] / "cut.b2nd"
    path.write_bytes(path.read_bytes()[:-200])


def test_every_bad_case_is_found(tiny: Any, make_texture: Texture) -> None:
    fill(tiny, make_texture)
    images = PreprocessedImages(tiny.images["2d"], "the command")
    bad = BadImages()
    good = [case for case in images.identifiers if read_whole(images, case, 1, bad) is not None]
    assert good == ["good_a", "good_b"]
    with pytest.raises(KAFError) as caught:
        bad.finish(skip_bad=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for name, found in {
        "nan": "NaN or infinite",
        "inf": "NaN or infinite",
        "channels": "shape (2, 4, 6, 5)",
        "axes": "shape (6, 5, 4)",
        "cut": "unreadable",
    }.items():
        (line,) = (line for line in lines if f"/{name}.b2nd" in line)
        assert found in line
    assert "preprocess again: the command" in next(line for line in lines if "/cut.b2nd" in line)


def test_a_constant_case_is_used_with_a_warning(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny.add("flat", np.full((1, 4, 5, 6), 2.0, np.float32))
    partly = np.zeros((1, 4, 5, 6), np.float32)
    partly[0, 3, 4, 5] = 1
    tiny.add("normal", partly)
    images = PreprocessedImages(tiny.images["2d"], "command")
    with caplog.at_level(logging.WARNING):
        arrays = [read_whole(images, case, 1, BadImages()) for case in images.identifiers]
    assert arrays[0] is not None
    assert np.array_equal(arrays[1], partly)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["flat"]
