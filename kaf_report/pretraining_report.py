"""The report of a pretraining: what ran, the curves, pairs of views with matches, neighbours of global vectors."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from kaf_report import facts, pair_figures
from kaf_report.canvas import png
from kaf_report.page import Album, prepare_folder, write
from kaf_report.pretraining_run import Described, Run, describe, load_model, open_run, pairs_of, task_of
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from pretraining.checkpoint import FINAL
from pretraining.config import PretrainConfig
from pretraining.data.patients import group_by_patient
from pretraining.monitoring.progress import draw_progress
from pretraining.task import Task

QUERIES = 4
NEIGHBOUR_PAIRS = 12
NONE_HELD_OUT = "No patient is recorded as held out: the pairs are of images that were trained on."


def report_pretraining(folder: Path, out: Path, pairs: int, device: str) -> Path:
    """Write the report of a pretraining; returns the page.

    Raises:
        KAFError: The folder holds no readable pretraining.
    """
    run = open_run(folder)
    prepare_folder(out)
    album = Album(out)
    figure = draw_progress(run.history)
    curves = None if figure is None else album.embed(album.save("curves", png(figure)), "What was logged per epoch.")
    content: dict[str, Any] = {
        "title": f"Pretraining on {run.identity['dataset']}, {run.identity['configuration']}",
        "subtitle": str(folder),
        "notes": [] if run.weights is not None else ["This pretraining is not finished: its last save is shown."],
        "run_facts": _facts(run),
        "curves": curves,
        "pairs": [],
        "neighbours": None,
        "colors": pair_figures.COLORS,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "versions": facts.version_line(),
    }
    try:
        task = task_of(run)
        model, note = load_model(run, task, torch.device(device))
        held_out, everybody = pairs_of(run, task, torch.device(device))
        seen = describe(held_out, model, pairs, torch.device(device))
        around = describe(everybody, model, max(pairs, NEIGHBOUR_PAIRS), torch.device(device))
    except KAFError as error:
        content["notes"].append(f"Pairs and neighbours are not shown: {error}")
    else:
        content["notes"] += [note] if note else []
        content["notes"] += [] if run.held_out else [NONE_HELD_OUT]
        content["pairs"] = _pairs(seen, task, pairs, album)
        content["neighbours"] = _neighbours(around, task, run.config, album)
    return write(out, "pretraining.html", content)


def _pairs(seen: Described, task: Task, count: int, album: Album) -> list[dict[str, Any]]:
    """Frames of the slider."""
    total = len(seen.matches)
    out = []
    for index in range(min(count, total)):
        sides = [index, total + index]
        valid = seen.valid[sides]
        one, two = seen.descriptors[sides]
        matching = pair_figures.match(one, two, valid[0], valid[1], seen.matches[index])
        data = pair_figures.pair(seen.views[sides], seen.coords[sides], valid[1], matching, task.spacing)
        counts = {kind: int(matching.of(kind).sum()) for kind in pair_figures.COLORS}
        cases = list(dict.fromkeys(seen.cases[side] for side in sides))
        text = (
            f"{' and '.join(cases)}: {counts['right']} right, {counts['wrong']} wrong, {counts['missed']} not found, "
            f"{counts['unmatched']} without a partner."
            + (" The slices through a joined keypoint; all keypoints are projected on them." * (len(task.spacing) == 3))
        )
        picture = album.embed(album.save(f"pair_{index:03d}", data), text)
        out.append({"name": f"{index + 1} of {min(count, total)}", "picture": picture})
    return out


def _neighbours(seen: Described, task: Task, config: PretrainConfig, album: Album) -> Any:
    groups = group_by_patient(tuple(dict.fromkeys(seen.cases)), config.patient_pattern)
    patient = {case: name for name, cases in groups.items() for case in cases}
    data = pair_figures.neighbours(
        seen.views, seen.vectors, [patient[case] for case in seen.cases], min(QUERIES, len(seen.matches)), task.spacing
    )
    text = (
        "Of all patients. A row: a view, then the views with the most similar global vectors (cosine), "
        "most similar first. The other view of the same pair should come early."
    )
    return album.embed(album.save("neighbours", data), text)


def _facts(run: Run) -> facts.Rows:
    """What ran."""
    final = run.folder / FINAL
    identity, config = run.identity, run.config
    rows = [
        (name, str(identity[key]))
        for name, key in (
            ("dataset", "dataset"), ("plans", "plans"), ("configuration", "configuration"), ("fold left out", "fold"),
            ("patch", "patch_size"), ("spacing in mm", "spacing"), ("pairs per batch", "batch_size"),
        )
        if key in identity
    ]  # fmt: skip
    done = max((round(entry.get("epoch", 0)) for entry in run.history), default=0)
    return [
        *rows,
        ("training images", str(len(identity.get("cases", [])))),
        ("epochs", f"{done} of {config.epochs}, {config.iterations} steps each"),
        ("losses", ", ".join(f"{name} x {weight:g}" for name, weight in config.components.items())),
        ("took", facts.from_log(run.folder / "pretraining.log")),
        ("SHA-256", file_sha256(final) if final.is_file() else "not finished"),
        ("started from", str(identity.get("init") or "random weights")),
        ("options", json.dumps(config.to_dict())),
    ]
