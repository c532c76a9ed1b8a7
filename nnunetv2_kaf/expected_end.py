"""When a training will be done: from the seconds of its last epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime, timedelta

RECENT = 10
"""Epochs that the estimate is made from: a machine that others use changes its speed."""


def expected_end(epoch_seconds: Sequence[float], left: int, now: datetime) -> str:
    """Say when a training ends.

    Args:
        epoch_seconds: Durations of the epochs so far in this process, at least one; the median of the last ten counts,
            so that neither the slow first epoch nor a pause decides.
        left: Epochs still to do.
        now: Local time.

    Returns:
        For example "2026-11-26 18:40 (5:12 h left, 61 s an epoch)".
    """
    seconds = statistics.median(epoch_seconds[-RECENT:])
    end = now + timedelta(seconds=seconds * left)
    hours, minutes = divmod(round(seconds * left / 60), 60)
    return f"{end:%Y-%m-%d %H:%M} ({hours}:{minutes:02d} h left, {seconds:.3g} s an epoch)"
