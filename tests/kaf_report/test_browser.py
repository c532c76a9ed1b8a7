"""The page as a person sees it: in a headless Chromium, from a file, without a network."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from kaf_report import cli
from kaf_report.canvas import SCALE_COLORS
from kaf_report.pair_figures import COLORS
from pretraining.cli import main as pretrain

NASTY = "a<b onload=alert(1)>&\"'$x_{"
NASTY_LABEL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{"


@dataclass
class Seen:
    """A page that is open, and what went wrong in it."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


def look(browser: Any, path: Path) -> Seen:
    """Open a page; scripts, errors and requests are recorded from the start."""
    seen = Seen(browser.new_page(viewport={"width": 1200, "height": 900}))
    seen.page.on("console", lambda message: seen.messages.append(message.text))
    seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    seen.page.goto(path.as_uri())
    return seen


def pixels(locator: Any) -> np.ndarray:
    """A screenshot of a part of the page, (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def near(image: np.ndarray, color: str) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(image - ImageColor.getrgb(color)).max(2) < 40).sum())


@pytest.fixture(scope="module")
def report(write_model: Callable[..., Path], phantom_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a 3D model, with names that try to be more than text."""
    folder = tmp_path_factory.mktemp("report")
    model = write_model(folder / "m", folds=("0", "1"))
    dataset = json.loads((model / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, NASTY_LABEL: 1, "MYO": 2, "LV": 3}
    (model / "dataset.json").write_text(json.dumps(dataset))
    for part in ("images", "labels"):
        (folder / part).mkdir()
    shutil.copy(phantom_data / "imagesTs" / "phantom_t000_0000.nii.gz", folder / "images" / f"{NASTY}_0000.nii.gz")
    shutil.copy(phantom_data / "labelsTs" / "phantom_t000.nii.gz", folder / "labels" / f"{NASTY}.nii.gz")
    arguments = ["-i", folder / "images", "-l", folder / "labels", "-o", folder / "out", "--keypoints", "4"]
    assert cli.main([str(model), *map(str, arguments), "--disable-mirroring"]) == 0
    # as copied to a stick: the page alone
    moved = folder / "elsewhere" / "report.html"
    moved.parent.mkdir()
    shutil.copy(folder / "out" / "report.html", moved)
    shutil.rmtree(folder / "out")
    return moved


def test_the_page_stands_alone_and_says_nothing_on_the_console(browser: Any, report: Path) -> None:
    seen = look(browser, report)
    loaded = seen.page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) == 2 + 3 + 4
    assert all(loaded)
    assert seen.messages == []
    assert seen.dialogs == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [report.as_uri()]
    assert seen.page.locator("h2", has_text=NASTY).count() == 1
    assert seen.page.get_by_text(NASTY_LABEL).count() >= 2  # table and legend
    assert seen.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    seen.page.close()


def test_keypoints_are_visible_in_the_colours_of_their_scales(browser: Any, report: Path) -> None:
    seen = look(browser, report)
    shown = pixels(seen.page.locator("h3:text-is('Keypoints') ~ figure img").first)
    found = [near(shown, color) for color in SCALE_COLORS[:3]]
    assert found[0] > 20
    assert sum(found) > 100
    assert near(pixels(seen.page.locator("h3:text-is('Result') ~ figure img").first), SCALE_COLORS[0]) == 0
    seen.page.close()


def test_the_slider_moves_to_another_keypoint(browser: Any, report: Path) -> None:
    seen = look(browser, report)
    slider = seen.page.locator(".slider").first
    control = slider.locator("input")
    states = []
    for _ in range(4):
        visible = slider.locator("figure.frame:visible")
        assert visible.count() == 1
        states.append((control.input_value(), visible.get_attribute("data-name"), pixels(visible.locator("img"))))
        assert slider.locator("output").inner_text() == states[-1][1]
        control.press("ArrowRight")
    assert [value for value, _, _ in states] == ["0", "1", "2", "3"]
    assert len({name for _, name, _ in states}) == 4
    for one, other in pairwise(states):
        assert one[2].shape != other[2].shape or (one[2] != other[2]).mean() > 0.01
    assert all(near(image, "#00e5ff") > 30 for _, _, image in states)  # the cross at the query
    assert seen.messages == []
    seen.page.close()


def test_the_page_of_a_pretraining(browser: Any, tiny: Any, fast: list[str], tmp_path: Path) -> None:
    tiny.add_cases(5)
    assert pretrain(["-d", "123", "-c", "3d_fullres", *fast, "--output", str(tmp_path / "run")]) == 0
    assert cli.main([str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--pairs", "2"]) == 0
    seen = look(browser, tmp_path / "out" / "report.html")
    slider = seen.page.locator(".slider").first
    first = slider.locator("figure.frame:visible")
    before, text = pixels(first.locator("img")), first.inner_text()
    assert near(before, COLORS["right"]) + near(before, COLORS["wrong"]) > 5
    slider.locator("input").press("ArrowRight")
    assert slider.locator("output").inner_text() == "2 of 2"
    assert slider.locator("figure.frame:visible").inner_text() != text
    assert seen.messages == []
    assert all(url.startswith(("data:", "file:")) for url in seen.requests)
    seen.page.close()
