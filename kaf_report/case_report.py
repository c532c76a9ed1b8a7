"""One case of a report: its pictures and sentences, and how they come into the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kaf_report import case_figures, scores
from kaf_report.canvas import SCALE_COLORS
from kaf_report.page import Album, Picture
from nnunetv2_kaf.inspect import CaseView, TrainedModel, spread_out


@dataclass(frozen=True)
class Saved:
    """A picture that is written, and what it shows."""

    file: str
    text: str


@dataclass(frozen=True)
class Case:
    """What is kept of a case: numbers and files, not the image.

    Attributes:
        name: Identifier.
        scores: Scores by structure; None without a reference.
        result: Picture.
        keypoints: Picture, None in a plain network.
        attention: Name and picture of every chosen keypoint.
        fusion: Picture, None in a plain network.
        scales: mm, ascending.
        notes: What is not shown and why.
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


def draw(model: TrainedModel, view: CaseView, number: int, keypoints: int, album: Album) -> Case:
    """Draw and save the pictures of a case.

    Args:
        model: Model that the case went through.
        view: The case.
        number: Number of the case, for the names of the files.
        keypoints: Keypoints whose attention is drawn.
        album: Album where pictures are saved.
    """

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
    for query in choose(view, keypoints):
        position = [int(v) for v in np.round(view.keypoints[query])]
        text = (
            f"Voxel {position} (z, y, x){_structure(model, view, query)}. Area and colour of a disc: share of the "
            f"attention of the last block that the keypoint at the cross pays there, relative to the largest. "
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
    labels = labels_at(view)
    strongest = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels[labels > 0])]
    coords = torch.from_numpy(view.keypoints)
    spread = spread_out(coords, torch.ones(len(coords), dtype=torch.bool), view.spacing, count)
    return list(dict.fromkeys([*strongest, *spread]))[:count]


def labels_at(view: CaseView) -> Any:
    """(N,) label under every keypoint, of the reference if there is one."""
    assert view.keypoints is not None
    labels = view.prediction if view.reference is None else view.reference
    voxel = np.clip(np.round(view.keypoints).astype(int), 0, np.array(labels.shape) - 1)
    return labels[tuple(voxel.T)]


def _structure(model: TrainedModel, view: CaseView, query: int) -> str:
    """Where a keypoint lies, as part of a sentence: nothing outside of all structures."""
    label = int(labels_at(view)[query])
    found = [str(name) for name, value in model.dataset_json["labels"].items() if value == label]
    return f", on {found[0] if found else f'label {label}'}" if label > 0 else ""


def embedded(case: Case, album: Album) -> dict[str, Any]:
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
