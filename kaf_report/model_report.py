"""The report of a model folder: what it is, the cases, the scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kaf_report import case_figures, facts, scores
from kaf_report.canvas import SCALE_COLORS, label_color, png
from kaf_report.page import Album, Picture, prepare_folder, write
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import CaseView, TrainedModel, open_model, spread_out, view_case
from pretraining.monitoring.progress import draw_progress

logger = logging.getLogger("kaf_report")

NO_LAYERS = (
    "This network has no keypoint layers: it is one of nnU-Net's own. Keypoints, attention and fusion exist in models "
    "of nnUNetTrainerKAF only; predictions, scores and curves are shown."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to report on.

    Attributes:
        folder: of the model.
        images: folder of images in nnU-Net's naming, or None.
        labels: folder of their references, or None.
        out: folder of the report.
        folds: names; None = all.
        checkpoint: file name in the folds.
        keypoints: whose attention is shown, per case.
        device: to predict on.
        mirror: use nnU-Net's test-time mirroring.
    """

    folder: Path
    images: Path | None
    labels: Path | None
    out: Path
    folds: Sequence[str] | None
    checkpoint: str
    keypoints: int
    device: str
    mirror: bool


@dataclass(frozen=True)
class Saved:
    """A picture that is written, and what it shows."""

    file: str
    text: str


@dataclass(frozen=True)
class Case:
    """What is kept of a case: numbers and files, not the image.

    Attributes:
        name: identifier.
        scores: by structure; None without a reference.
        result: picture.
        keypoints: picture, None in a plain network.
        attention: name and picture of every chosen keypoint.
        fusion: picture, None in a plain network.
        scales: mm, ascending.
        notes: what is not shown and why.
    """

    name: str
    scores: Mapping[Any, scores.Score] | None
    result: Saved
    keypoints: Saved | None
    attention: Sequence[tuple[str, Saved]]
    fusion: Saved | None
    scales: Sequence[float]
    notes: Sequence[str]

    @property
    def mean(self) -> float | None:
        """Mean Dice."""
        return None if self.scores is None else scores.mean_dice(self.scores)


def report_model(options: Options) -> Path:
    """Write the report of a model; returns the page.

    Raises:
        KAFError: the folder holds no readable model, or no case can be shown.
    """
    model = open_model(options.folder, options.folds, options.checkpoint)
    files = [] if options.images is None else case_files(model, options.images, options.labels)
    prepare_folder(options.out)
    album = Album(options.out)
    notes = [] if options.images is not None else ["No images were given (-i), so no cases are shown."]
    folds, more = _folds(model, album)
    cases, failed = _cases(model, files, options, album)
    cases.sort(key=lambda case: (case.mean is None, case.mean, case.name))
    content = {
        "title": f"{model.plans.get('dataset_name')}: {model.trainer}, {model.configuration}",
        "subtitle": str(options.folder),
        "notes": [*notes, *more, *failed],
        "model_facts": facts.of_model(model),
        "layer_facts": facts.of_layers(model),
        "no_layers": NO_LAYERS,
        "folds": folds,
        "labels": _legend(model),
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "versions": facts.version_line(),
        **_score_table(model, cases),
        "cases": [_embedded(case, album) for case in cases],
    }
    return write(options.out, "model.html", content)


def case_files(model: TrainedModel, images: Path, labels: Path | None) -> list[tuple[list[Path], Path | None]]:
    """Image files of every case of a folder, and its label file if there is one.

    Raises:
        KAFError: there are no cases, or a folder of labels fits none.
    """
    ending = model.dataset_json["file_ending"]
    first = sorted(images.glob(f"*_0000{ending}")) if images.is_dir() else []
    if not first:
        raise KAFError(
            f"-i {images}: found {'no *_0000' + ending + ' file in it' if images.is_dir() else 'no such folder'}; "
            f"expected images in nnU-Net's naming, CASE_0000{ending}."
        )
    found = []
    for file in first:
        case = file.name.removesuffix(f"_0000{ending}")
        # not by a pattern: the name of a case may hold * or [
        channels = [file]
        while (further := images / f"{case}_{len(channels):04d}{ending}").is_file():
            channels.append(further)
        label = None if labels is None else labels / f"{case}{ending}"
        found.append((channels, label if label is not None and label.is_file() else None))
    if labels is not None and not any(label for _, label in found):
        raise KAFError(
            f"-l {labels}: found no label file of a case in {images}; expected e.g. "
            f"{first[0].name.removesuffix(f'_0000{ending}')}{ending}."
        )
    return found


def _folds(model: TrainedModel, album: Album) -> tuple[list[dict[str, Any]], list[str]]:
    """Facts and curves of every fold, and what is missing."""
    out, notes = [], []
    for number, fold in enumerate(model.folds):
        figure = facts.curves(fold)
        record, note = facts.pretraining_of(fold)
        before = None if record is None else draw_progress(record.get("history", []))
        notes += [note] if note and note not in notes else []
        out.append(
            {
                "name": fold.name,
                "facts": facts.of_fold(fold),
                "curves": _add(album, f"fold_{number}_training", figure, "Losses and pseudo Dice per epoch."),
                "pretraining": _add(album, f"fold_{number}_pretraining", before, "What the pretraining logged."),
            }
        )
    return out, notes


def _add(album: Album, name: str, figure: Any, text: str) -> Picture | None:
    return None if figure is None else album.embed(album.save(name, png(figure)), text)


def _cases(
    model: TrainedModel, files: Sequence[tuple[list[Path], Path | None]], options: Options, album: Album
) -> tuple[list[Case], list[str]]:
    """Predict and draw every case; those that fail are sentences.

    Raises:
        KAFError: all failed.
    """
    cases, failed = [], []
    for number, (images, label) in enumerate(tqdm(files, desc="cases", unit="case", disable=None if files else True)):
        try:
            view = view_case(model, images, label, options.device, options.mirror)
        except KAFError as error:
            logger.warning("%s", error)
            failed.append(f"Not shown: {error}")
            continue
        cases.append(_case(model, view, number, options, album))
    if files and not cases:
        raise KAFError(f"none of the {len(files)} case(s) of -i {options.images} can be shown. The first: {failed[0]}")
    return cases, failed


def _case(model: TrainedModel, view: CaseView, number: int, options: Options, album: Album) -> Case:
    """Draw the pictures of a case."""

    def save(name: str, data: bytes, text: str) -> Saved:
        return Saved(album.save(f"case_{number:04d}_{name}", data), text)

    notes, found = [], None
    if view.original_reference is None:
        notes.append("No label file: the prediction is shown without a reference, and there is no score.")
    else:
        labels = model.manager().get_label_manager(dict(model.dataset_json))
        found = scores.score(view.original_prediction, view.original_reference, view.original_spacing, labels)
    if view.disagreement is None:
        notes.append("One fold: there is no disagreement among folds to show.")
    text = "Three slices through the foreground, on the grid of the preprocessed image."
    if view.disagreement is not None:
        text += f" Folds disagree in {float((view.disagreement > 0).mean()):.2%} of the voxels; the brighter, the more."
    result = save("result", case_figures.result(view), text)
    if view.keypoints is None or not len(view.keypoints):
        notes += [] if view.keypoints is None else ["No keypoint was detected in the inspected patch."]
        return Case(view.name, found, result, None, [], None, [], notes)
    where = "the slice" if view.flat else "the patch"
    points = save(
        "keypoints",
        case_figures.keypoints_by_scale(view),
        f"{len(view.keypoints)} keypoints of {where} around the middle of the foreground (first channel)"
        + (", projected; those within two voxels of the plane are drawn fully." if not view.flat else "."),
    )
    attention: list[tuple[str, Saved]] = []
    for query in choose(view, options.keypoints):
        position = [int(v) for v in np.round(view.keypoints[query])]
        text = (
            f"Voxel {position}{_structure(model, view, query)}. Area and colour of a disc: share of the attention of "
            f"the last block that the keypoint at the cross pays there, relative to the largest. "
            f"{_largest(view, query)} First fold."
        )
        picture = save(f"attention_{query:04d}", case_figures.attention_of_keypoint(view, query), text)
        attention.append((f"{len(attention) + 1}, strength {view.score[query]:.2f}", picture))
    added = save(
        "fusion",
        case_figures.fusion(view),
        "Length of the feature vector before the fusion, and of what the fusion adds to it; in brackets the ratio of "
        "their sums.",
    )
    scales = sorted(set(np.round(view.scales, 3).tolist()))
    return Case(view.name, found, result, points, attention, added, scales, notes)


def _largest(view: CaseView, query: int) -> str:
    """How far the attention is from equal: colours are relative, and hide it."""
    shares = ", ".join(
        f"{case_figures.attention_row(view, level, query).mean(0).max():.1%} at level {number}"
        for number, level in view.levels.items()
    )
    return f"Largest share (mean of the heads): {shares}; equal attention would pay {1 / len(view.index):.1%} to each."


def choose(view: CaseView, count: int) -> list[int]:
    """Keypoints to show: the strongest one of every structure, then some that lie far from each other."""
    assert view.keypoints is not None
    labels = _labels_at(view)
    strongest = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels[labels > 0])]
    coords = torch.from_numpy(view.keypoints)
    spread = spread_out(coords, torch.ones(len(coords), dtype=torch.bool), view.spacing, count)
    return list(dict.fromkeys([*strongest, *spread]))[:count]


def _labels_at(view: CaseView) -> Any:
    """(N,) label under every keypoint, of the reference if there is one."""
    assert view.keypoints is not None
    labels = view.prediction if view.reference is None else view.reference
    voxel = np.clip(np.round(view.keypoints).astype(int), 0, np.array(labels.shape) - 1)
    return labels[tuple(voxel.T)]


def _structure(model: TrainedModel, view: CaseView, query: int) -> str:
    """Where a keypoint lies, as part of a sentence: nothing outside of all structures."""
    label = int(_labels_at(view)[query])
    found = [str(name) for name, value in model.dataset_json["labels"].items() if value == label]
    return f", on {found[0] if found else f'label {label}'}" if label > 0 else ""


def _legend(model: TrainedModel) -> list[dict[str, str]]:
    """Names and colours of the labels in the pictures; of regions, the labels that they are made of."""
    labels = model.manager().get_label_manager(dict(model.dataset_json))
    names = scores.names(model.dataset_json["labels"], labels.foreground_labels)
    return [{"name": names[label], "color": label_color(int(label))} for label in labels.foreground_labels]


def _score_table(model: TrainedModel, cases: Sequence[Case]) -> dict[str, Any]:
    """Names of the structures, and the rows of the table, in the order of the cases."""
    scored = [(number, case) for number, case in enumerate(cases, start=1) if case.scores is not None]
    if not scored:
        return {"structures": [], "rows": []}
    parts = list(scored[0][1].scores or {})
    names = scores.names(model.dataset_json["labels"], parts)
    rows = [
        {"number": number, "name": case.name, "scores": list((case.scores or {}).values()), "mean": case.mean}
        for number, case in scored
    ]
    return {"structures": [names[part] for part in parts], "rows": rows}


def _embedded(case: Case, album: Album) -> dict[str, Any]:
    """A case for the template, its pictures embedded as far as there is room."""

    def embed(saved: Saved | None) -> Picture | None:
        return None if saved is None else album.embed(saved.file, saved.text)

    return {
        "name": case.name,
        "notes": case.notes,
        "result": embed(case.result),
        "keypoints": embed(case.keypoints),
        "attention": [{"name": name, "picture": embed(saved)} for name, saved in case.attention],
        "fusion": embed(case.fusion),
        "scales": [
            {"name": f"{scale:g} mm", "color": SCALE_COLORS[number % len(SCALE_COLORS)]}
            for number, scale in enumerate(case.scales)
        ],
    }
