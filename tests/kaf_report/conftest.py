"""Model folders, a dataset of pretraining, and a browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# the tiny preprocessed dataset of the pretraining's tests
_spec = importlib.util.spec_from_file_location(
    "pretraining_conftest", Path(__file__).parents[1] / "pretraining" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tiny, fast = _module.tiny, _module.fast

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def find_browser() -> str | None:
    """Path of a Chromium of this machine; None for playwright's own."""
    names = (os.environ.get("KAF_BROWSER", ""), *BROWSERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = find_browser()
        if path is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip(
                "this test looks at the page in Chromium, and found none. Install it (apt-get install chromium, or "
                "python -m playwright install chromium), or name it: KAF_BROWSER=/path/to/chrome"
            )
        # without its sandbox: it refuses to run as root, as in a container
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
