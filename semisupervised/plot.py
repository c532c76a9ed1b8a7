"""Curves of the semi-supervised part of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_history(history: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    """Plot losses and weight, what is known of the teacher, and the classes of the pseudo-labels over the epochs.

    Args:
        history: Records of the epochs.
        names: Names of the foreground classes.
        path: Image to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(8, 11), layout="constrained")
    FigureCanvasAgg(figure)
    losses, trust, classes = figure.subplots(3, 1, sharex=True)
    for key, label in (("labelled_loss", "labelled"), ("unlabelled_loss", "unlabelled"), ("weight", "weight")):
        losses.plot(epochs, [record[key] for record in history], label=label)
    losses.set_ylabel("loss, weight of the unlabelled one")
    trust.plot(epochs, [record["sure"] for record in history], label="share of sure voxels")
    trust.plot(epochs, [record["agreement"] for record in history], label="agreement on labelled training patches")
    trust.plot(epochs, [record["known"] for record in history], label="teacher's Dice on labelled training patches")
    trust.plot(epochs, [record["islands"] for record in history], label="islands taken out of its structures")
    trust.plot(epochs, [record["excess"] for record in history], label="excess taken out of its structures")
    for record in history:
        if record["collapse"]:
            trust.axvline(record["epoch"], color="red", alpha=0.3)
    trust.set_ylim(0, 1.02)
    trust.set_ylabel("teacher (red: collapse)")
    for i, name in enumerate(names):
        classes.plot(epochs, [record["shares"][i] for record in history], label=f"class {name}")
    classes.set_ylabel("share of the sure voxels")
    classes.set_xlabel("epoch")
    for axes in (losses, trust, classes):
        axes.legend()
    figure.savefig(path)
