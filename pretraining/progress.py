"""progress.png: the loss components and the learning rate per epoch."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

logger = logging.getLogger(__name__)


def plot_progress(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the history of a run, as in `TrainingState.history`.

    A plot that cannot be written (full disk) is a warning: it must not end a run that can go on.
    """
    epochs = range(1, len(history) + 1)
    # Not pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    losses, matched, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    for name in ("total", "bottleneck", "keypoints", "local"):
        losses.plot(epochs, [entry[name] for entry in history], marker=".", label=name)
    losses.set_ylabel("loss")
    losses.legend()
    matched.plot(epochs, [100 * entry["matched"] for entry in history], marker=".")
    matched.set_ylabel("matched keypoints (%)")
    matched.set_ylim(0, 100)
    rate.plot(epochs, [entry["learning_rate"] for entry in history], marker=".")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, matched, rate):
        axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=100)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        logger.warning("Could not write %s: %s", path, error)
