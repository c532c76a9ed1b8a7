"""Rows of text for the tables of the page: what a model is and what it started from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kaf_report.canvas import new_figure
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256, versions
from nnunetv2_kaf.inspect import Fold, TrainedModel
from nnunetv2_kaf.plans import resolve_configuration
from nnunetv2_kaf.schema_check import check
from nnunetv2_kaf.schema_checkpoints import FinishedRun
from nnunetv2_kaf.weights import read_checkpoint

Rows = list[tuple[str, str]]


def of_model(model: TrainedModel) -> Rows:
    """What a model is."""
    resolved = resolve_configuration(model.plans, model.configuration)
    architecture = resolved["architecture"]
    options = architecture["arch_kwargs"]
    return [
        ("folder", str(model.folder)),
        ("dataset", str(model.plans.get("dataset_name"))),
        ("trainer", model.trainer),
        ("plans", str(model.plans.get("plans_name"))),
        ("configuration", model.configuration),
        ("patch", f"{_list(resolved['patch_size'])} voxels"),
        ("spacing", f"{_list(resolved['spacing'])} mm"),
        ("batch", str(resolved["batch_size"])),
        ("network", architecture["network_class_name"].rpartition(".")[2]),
        ("stages", f"{options['n_stages']}, filters {_list(_repeated(options['features_per_stage']))}"),
        ("folds", ", ".join(fold.name for fold in model.folds)),
    ]


def of_layers(model: TrainedModel) -> Rows:
    """The options of the keypoint layers; nothing for a plain network."""
    if not model.is_kaf:
        return []
    options = resolve_configuration(model.plans, model.configuration)["architecture"]["arch_kwargs"]
    return [(name, json.dumps(value)) for name, value in options["kaf"].items()]


def of_fold(fold: Fold) -> Rows:
    """How a fold was trained, and what it started from."""
    losses = fold.logging.get("train_losses", [])
    seconds = "not recorded" if fold.seconds is None else duration(fold.seconds)
    rows = [("epochs", str(len(losses))), ("seconds of all epochs", seconds)]
    start = fold.initialization
    if not start:
        return [*rows, ("started from", "not recorded: only nnUNetTrainerKAF writes it down")]
    if not start.get("source"):
        return [*rows, ("started from", f"random weights: {start.get('note', '')}")]
    rows += [
        ("started from", str(start["source"])),
        ("SHA-256", str(start.get("sha256"))),
        ("tensors", f"{start.get('tensors_loaded')} {json.dumps(start.get('tensors'))}"),
        ("why", str(start.get("note"))),
    ]
    log = Path(str(start["source"])).with_name("pretraining.log")
    return [*rows, ("pretraining took", from_log(log))]


def pretraining_of(fold: Fold) -> tuple[Mapping[str, Any] | None, str]:
    """The record of the pretraining that a fold started from, or why it is not shown.

    Returns:
        The checkpoint's `pretraining` entry or None, and a sentence for the page ("" if all is well).
    """
    source = fold.initialization.get("source")
    if not source:
        return None, ""
    path = Path(str(source))
    if not path.is_file():
        return None, f"The curves of the pretraining are not shown: {path} is not there any more."
    if file_sha256(path) != fold.initialization.get("sha256"):
        return None, f"The curves of the pretraining are not shown: {path} has another SHA-256 than the file loaded."
    try:
        record = dict(read_checkpoint(path)["pretraining"])
        check(FinishedRun, record, f"{path}: pretraining", "Run kaf-pretrain again.")
        return record, ""
    except KAFError as error:
        return None, f"The curves of the pretraining are not shown: {error}"


def from_log(log: Path) -> str:
    """Time from the first to the last line of a pretraining.log."""
    stamps = []
    if log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                stamps.append(datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
            except ValueError:  # a continued message
                continue
    if len(stamps) < 2:
        return f"unknown: {log} is not there or empty"
    return f"{duration((stamps[-1] - stamps[0]).total_seconds())} from the first to the last line of its log"


def duration(seconds: float) -> str:
    """For example "5025 s (1:23:45)"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.0f} s ({minutes // 60}:{minutes % 60:02d}:{rest:02d})"


def curves(fold: Fold) -> Figure | None:
    """Losses and pseudo Dice per epoch; None if nothing is recorded."""
    drawn = {name: fold.logging.get(name, []) for name in ("train_losses", "val_losses", "ema_fg_dice")}
    if not any(drawn.values()):
        return None
    figure = new_figure(9, 2.6)
    left, right = figure.subplots(1, 2)
    for name, text in (("train_losses", "training"), ("val_losses", "validation")):
        values = [float(v) for v in drawn[name]]
        left.plot(np.arange(1, len(values) + 1), values, label=text, marker="." if len(values) < 30 else "")
    dice = [float(v) for v in drawn["ema_fg_dice"]]
    right.plot(np.arange(1, len(dice) + 1), dice, marker="." if len(dice) < 30 else "")
    left.set_ylabel("loss")
    left.legend()
    right.set_ylabel("pseudo Dice, moving average")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    return figure


def version_line() -> str:
    """Versions that a report depends on, as text."""
    return ", ".join(f"{name} {value}" for name, value in versions().items())


def _list(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _repeated(value: Any) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
