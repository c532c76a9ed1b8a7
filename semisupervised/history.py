"""What is recorded of the epochs: lines of the log, `semi_training.json` and `semi_progress.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_kaf.files import replacing
from semisupervised.plot import plot_history

HISTORY_FILE = "semi_training.json"
PLOT_FILE = "semi_progress.png"


def foreground_names(labels: Any) -> list[str]:
    """Names of the foreground classes or regions as in dataset.json, in the order of the network's outputs.

    Args:
        labels: nnU-Net's label manager.
    """

    def key(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    names = {key(value): name for name, value in labels.label_dict.items()}
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    return [names[key(value)] for value in classes]


def log_lines(record: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """An epoch in words.

    Args:
        record: Of `EpochSums.finish`, with `weight`, what `Excess.next_epoch` returns, the limits that it got, the
            share of `islands`, and the guard's verdict in `guard` and `collapse`.
        classes: Names of the foreground classes.
    """
    beyond = [
        name for name, given, most in zip(classes, record["given"], record["limits"], strict=True) if given > most
    ]
    lacking = [name for name, share in zip(classes, record["shares"], strict=True) if share == 0]
    lines = [
        f"KAF: labelled loss {record['labelled_loss']:.4f}, unlabelled loss {record['unlabelled_loss']:.4f} with "
        f"weight {record['weight']:.3f}; teacher sure of {100 * record['sure']:.1f} % of the voxels, "
        f"{100 * record['islands']:.1f} % of its structures taken out as islands and "
        f"{100 * record['excess']:.1f} % of the rest as excess, its Dice on labelled training patches "
        f"{record['known']:.3f}, agreement with the network {record['agreement']:.3f}"
        + (f"; beyond their limits: {', '.join(beyond)}" if beyond else "")
        + (f"; not in its labels: {', '.join(lacking)}" if lacking else "")
    ]
    for reason in record["collapse"]:
        lines.append(f"KAF: WARNING: {reason}; the unlabelled loss goes on with {record['guard']:.3g} of its weight")
    return lines


def write_history(folder: Path, classes: Sequence[str], records: Sequence[Mapping[str, Any]], draw: bool) -> None:
    """Write the record of a training, in place of an earlier one.

    Args:
        folder: Folder of the fold.
        classes: Names of the foreground classes.
        records: Of all epochs so far.
        draw: Whether to draw the curves too, which takes about a second.
    """
    content = {"classes": list(classes), "epochs": [_finite(record) for record in records]}
    with replacing(folder / HISTORY_FILE) as file:
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if draw:
        plot_history(records, classes, folder / PLOT_FILE)


def _finite(value: Any) -> Any:
    """A record with null for what is no finite number, as JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
