"""The report of a model folder: what it is, the cases, the scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kaf_report import facts, scores
from kaf_report.canvas import label_color, png
from kaf_report.case_report import Case, draw, embedded
from kaf_report.page import Album, Picture, prepare_folder, write
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import TrainedModel, open_model, view_case
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
        folder: Folder of the model.
        images: Folder of images in nnU-Net's naming, or None.
        labels: Folder of their references, or None.
        out: Folder of the report.
        folds: Names; None = all.
        checkpoint: File name in the folds.
        keypoints: Keypoints whose attention is shown, per case.
        device: Device to predict on.
        mirror: Use nnU-Net's test-time mirroring.
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


def report_model(options: Options) -> Path:
    """Write the report of a model; returns the page.

    Raises:
        KAFError: The folder holds no readable model, or no case can be shown.
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
        "cases": [embedded(case, album) for case in cases],
    }
    return write(options.out, "model.html", content)


def case_files(model: TrainedModel, images: Path, labels: Path | None) -> list[tuple[list[Path], Path | None]]:
    """Image files of every case of a folder, and its label file if there is one.

    Raises:
        KAFError: There are no cases, or a folder of labels fits none.
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
        KAFError: All failed.
    """
    cases, failed = [], []
    for number, (images, label) in enumerate(tqdm(files, desc="cases", unit="case", disable=None if files else True)):
        try:
            view = view_case(model, images, label, options.device, options.mirror)
        except KAFError as error:
            logger.warning("%s", error)
            failed.append(f"Not shown: {error}")
            continue
        cases.append(draw(model, view, number, options.keypoints, album))
    if files and not cases:
        raise KAFError(f"none of the {len(files)} case(s) of -i {options.images} can be shown. The first: {failed[0]}")
    return cases, failed


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
