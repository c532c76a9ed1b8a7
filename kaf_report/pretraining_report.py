"""The report of a pretraining: what ran, the curves, pairs of views with matches, neighbours of global vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaf_report import facts, pair_figures
from kaf_report.canvas import png
from kaf_report.page import Album, prepare_folder, write
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import file_sha256
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.checkpoint import FINAL, FORMAT, LATEST, load_latest
from pretraining.config import PretrainConfig
from pretraining.data.patients import group_by_patient
from pretraining.monitoring.progress import draw_progress
from pretraining.objectives.model import PretrainingModel
from pretraining.pairs.loader import PairLoader
from pretraining.prepare import Data, DataOptions, prepare
from pretraining.run import build_state
from pretraining.task import Task, resolve_task

QUERIES = 4
NEIGHBOUR_PAIRS = 12
Array = Any


@dataclass(frozen=True)
class Run:
    """What a folder of a pretraining says about it.

    Attributes:
        folder: of the run.
        config: options of the objectives.
        identity: dataset, plans, configuration, fold, cases, ...
        history: per epoch.
        weights: of the full network; None while the run is not finished.
    """

    folder: Path
    config: PretrainConfig
    identity: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    weights: Mapping[str, Any] | None


@dataclass(frozen=True)
class Described:
    """Some pairs of views, and what the model makes of them. The first B views are the first sides.

    Attributes:
        views: (2B, *V), first channel.
        coords: (2B, K, D).
        valid: (2B, K).
        matches: (B, K).
        descriptors: (2B, K, F).
        vectors: (2B, E).
        cases: 2B identifiers.
    """

    views: Array
    coords: Array
    valid: Array
    matches: Array
    descriptors: Array
    vectors: Array
    cases: tuple[str, ...]


def report_pretraining(folder: Path, out: Path, pairs: int, device: str) -> Path:
    """Write the report of a pretraining; returns the page.

    Raises:
        KAFError: the folder holds no readable pretraining.
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
        task = _task(run)
        model, note = load_model(run, task, torch.device(device))
        data = _data(run, task, torch.device(device))
        seen = describe(data.held_out, model, pairs, torch.device(device))
        everybody = replace(data.held_out, patients={**data.loader.patients, **data.held_out.patients})
        around = describe(everybody, model, max(pairs, NEIGHBOUR_PAIRS), torch.device(device))
    except KAFError as error:
        content["notes"].append(f"Pairs and neighbours are not shown: {error}")
    else:
        content["notes"] += [note] if note else []
        content["pairs"] = _pairs(seen, task, pairs, album)
        content["neighbours"] = _neighbours(around, task, run.config, album)
    return write(out, "pretraining.html", content)


def open_run(folder: Path) -> Run:
    """Read what a folder of a pretraining holds.

    Raises:
        KAFError: its checkpoint cannot be read, or is of another kind.
    """
    final = folder / FINAL
    if final.is_file():
        checkpoint = read_checkpoint(final)
        record = dict(checkpoint["pretraining"])
        missing = [key for key in ("config", "dataset", "plans", "configuration", "fold") if key not in record]
        if missing:
            raise KAFError(f"{final}: its record of the pretraining lacks {missing}. Run kaf-pretrain again.")
        config = PretrainConfig.from_dict(record["config"])
        return Run(folder, config, record, record.get("history", []), checkpoint["network_weights"])
    latest = folder / LATEST
    checkpoint = load_safely(latest, what="checkpoint of kaf-pretrain")
    if checkpoint.get("format") != FORMAT:
        raise KAFError(f"{latest} is not a checkpoint of kaf-pretrain. Give the folder of a pretraining.")
    config = PretrainConfig.from_dict(checkpoint["config"])
    return Run(folder, config, checkpoint["identity"], checkpoint["history"], None)


def _task(run: Run) -> Task:
    """Dataset and plans of the run.

    Raises:
        KAFError: they are not where nnU-Net's variables say.
    """
    identity = run.identity
    return resolve_task(identity["dataset"], identity["configuration"], identity["plans"], run.config.network)


def load_model(run: Run, task: Task, device: torch.device) -> tuple[PretrainingModel, str]:
    """The encoder, with the heads if the last save is there; and a note for the page.

    Raises:
        KAFError: the weights do not fit the dataset's plans.
    """
    why = "is gone"
    with torch.random.fork_rng(devices=[]):  # a save also restores the state of the random generator
        state = build_state(task, run.config, device)
        if (run.folder / LATEST).is_file():
            try:
                load_latest(run.folder / LATEST, state, run.config, {})
            except KAFError as error:
                if run.weights is None:
                    raise
                why = f"cannot be used ({error})"
            else:
                return state.model.eval(), ""
    assert run.weights is not None
    try:
        state.network.load_state_dict(dict(run.weights))
    except RuntimeError as error:
        raise KAFError(
            f"{run.folder / FINAL} does not fit the plans {task.plans_name} of {task.dataset_name} "
            f"({str(error).splitlines()[-1].strip()}); were they changed?"
        ) from error
    model = state.model.eval()
    # without the trained heads a keypoint is described by the features of all levels
    model.descriptor_head = model.bottleneck_head = None
    return model, (
        f"{LATEST}, which holds the heads, {why}: keypoints are compared by the encoder's features, global vectors "
        "are pooled bottlenecks."
    )


def _data(run: Run, task: Task, device: torch.device) -> Data:
    """The images of the run's first dataset, as the run divides them into training and held-out patients.

    Raises:
        KAFError: they are missing or bad.
    """
    fold = run.identity["fold"]
    fold = int(fold) if str(fold).isdigit() else fold
    return prepare(task, run.config, DataOptions(fold=fold, skip_bad=True), device, 2)


@torch.no_grad()
def describe(loader: PairLoader, model: PretrainingModel, pairs: int, device: torch.device) -> Described:
    """Make pairs and pass them through a model.

    Args:
        loader: of the patients to show.
        model: in evaluation mode.
        pairs: at least so many.
        device: where the model is.
    """
    parts: list[tuple[Any, ...]] = []
    for step in range(-(-pairs // loader.batch_size)):
        batch = loader.batch(step).to(device)
        views = batch.rendered(loader.patch_size)
        descriptors, vectors = model.describe(views, batch.coords, batch.valid)
        arrays = (views[:, 0], batch.coords, batch.valid, descriptors.float(), vectors.float())
        size = len(batch.matches)
        first, second = ([a[:size].cpu().numpy() for a in arrays], [a[size:].cpu().numpy() for a in arrays])
        parts.append((first, second, batch.matches.cpu().numpy(), batch.cases[:size], batch.cases[size:]))
    joined = [np.concatenate([part[0][i] for part in parts] + [part[1][i] for part in parts]) for i in range(5)]
    cases = tuple(case for side in (3, 4) for part in parts for case in part[side])
    return Described(
        views=joined[0],
        coords=joined[1],
        valid=joined[2],
        matches=np.concatenate([part[2] for part in parts]),
        descriptors=joined[3],
        vectors=joined[4],
        cases=cases,
    )


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
