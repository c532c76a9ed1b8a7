"""Which images cannot be used: all of them are collected and reported at once, before anything is trained."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from nnunetv2_kaf.errors import KAFError
from pretraining.data.images import PreprocessedImages

logger = logging.getLogger(__name__)


class BadImages:
    """Collects what is wrong with images, so that the user gets one complete list instead of one error per run."""

    def __init__(self) -> None:
        """Start with an empty list."""
        self._lines: list[tuple[str, str]] = []

    def add(self, path: Path, found: str, expected: str) -> None:
        """Note a bad image; safe to call from several threads."""
        self._lines.append((str(path), f"{path}: found {found}; expected {expected}"))

    def finish(self, skip_bad: bool) -> None:
        """Report everything that was added since the last report.

        Args:
            skip_bad: Warn instead of raising.

        Raises:
            KAFError: Something was added; the message is the full list. Not with `skip_bad`.
        """
        lines = [line for _, line in sorted(set(self._lines))]
        self._lines.clear()
        if skip_bad:
            for line in lines:
                logger.warning("Bad image skipped: %s", line)
        elif lines:
            listing = "\n  ".join(lines)
            raise KAFError(
                f"{len(lines)} bad image(s), nothing was trained:\n  {listing}\n"
                "Correct or remove them, or go on without them: --skip-bad"
            )


def read_whole(images: PreprocessedImages, case: str, channels: int, bad: BadImages) -> np.ndarray | None:
    """Read and check a whole preprocessed case.

    Args:
        images: The images of all sources.
        case: Identifier.
        channels: How many the image must have.
        bad: The collector.

    Returns:
        (C, Z, Y, X) float32, or `None` if the case cannot be used, which the collector then knows.
    """
    path = images.path(case)
    try:
        shape = images.shape(case)
        if len(shape) != 4 or min(shape) < 1 or shape[0] != channels:
            expected = f"({channels}, z, y, x): as many channels as dataset.json names, none empty"
            bad.add(path, f"shape {shape}", expected)
            return None
        array = images.read(case, (slice(None), slice(None), slice(None)))
    except KAFError as error:
        found = f"unreadable ({error.__cause__})" if error.__cause__ else "NaN or infinite values"
        bad.add(path, found, f"a finite preprocessed image; {images.remedy(case)}")
        return None
    if float(array.min()) == float(array.max()):
        logger.warning("Case %s is constant: it has no keypoints and adds nothing to the local losses.", case)
    return array
