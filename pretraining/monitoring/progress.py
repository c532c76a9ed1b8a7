"""progress.png: what was logged per epoch, one panel per kind of number."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from pretraining.monitoring.metrics import PANELS, Panel

logger = logging.getLogger(__name__)


Points = list[tuple[float, float]]


def plot_progress(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the history of a run, as in `TrainingState.history`; nothing is written while there is nothing to draw.

    The file is replaced as a whole, so that a reader never sees half of it. A plot that cannot be written (full disk)
    is a warning: it must not end a run that can go on.

    Args:
        history: One record per epoch: "epoch" and any of the names in `PANELS`. The first one may be of the state
            before training.
        path: The PNG to write.
    """
    figure = draw_progress(history)
    if figure is None:
        return
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
    except KAFError as error:
        logger.warning("No curves were drawn: %s", error)


def draw_progress(history: Sequence[Mapping[str, float]]) -> Figure | None:
    """Draw the panels that have data, below each other over a common axis of epochs; None if none has."""
    drawn = [(panel, lines) for panel in PANELS if (lines := _lines(panel, history))]
    if not drawn:
        return None
    heights = [panel.height for panel, _ in drawn]
    # Not pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(9, 1 + 2 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (panel, lines) in zip(column, drawn, strict=True):
        _draw(axes, panel, lines)
    column[-1].set_xlabel("epoch")
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _lines(panel: Panel, history: Sequence[Mapping[str, float]]) -> dict[str, Points]:
    """The points (epoch, value) of every name of the panel that has any."""
    lines = {name: _points(history, name, panel) for name in panel.names}
    return {name: points for name, points in lines.items() if points}


def _points(history: Sequence[Mapping[str, float]], name: str, panel: Panel) -> Points:
    """Collect what can be drawn. A number that is measured now and then is one line: gaps are bridged."""
    points = [(entry.get("epoch", math.nan), panel.factor * entry.get(name, math.nan)) for entry in history]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not panel.log)]


def _draw(axes: Any, panel: Panel, lines: Mapping[str, Points]) -> None:
    """Draw the lines of one panel."""
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=panel.names[name])
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    if len(panel.names) > 1:
        axes.legend()
    if panel.log:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(panel.limits)
