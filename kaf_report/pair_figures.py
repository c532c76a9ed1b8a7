"""Pictures of a pretraining: pairs of views with their matches, nearest neighbours of global vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kaf_report.canvas import clean, new_figure, png, show

Array = npt.NDArray[Any]
COLORS = {"right": "#00c853", "wrong": "#ff1744", "missed": "#ffea00", "unmatched": "#90a4ae"}
GAP = 4
"""Voxels between two views."""
NEIGHBOURS = 5


@dataclass(frozen=True)
class Matching:
    """What the descriptors say about a pair, and what the transform says.

    Attributes:
        found: (K,) partner by mutual nearest neighbours of the descriptors, -1 for none.
        true: (K,) partner by the transform, -1 for none.
        valid: (K,) keypoints of the first view that exist.
    """

    found: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]

    def of(self, kind: str) -> npt.NDArray[np.bool_]:
        """(K,) keypoints of a kind of `COLORS`; every valid keypoint is of one kind."""
        right = (self.found >= 0) & (self.found == self.true)
        wrong = (self.found >= 0) & ~right
        missed = (self.found < 0) & (self.true >= 0)
        masks = {"right": right, "wrong": wrong, "missed": missed, "unmatched": (self.found < 0) & (self.true < 0)}
        chosen: npt.NDArray[np.bool_] = masks[kind] & self.valid
        return chosen


def match(first: Array, second: Array, valid_first: Array, valid_second: Array, true: Array) -> Matching:
    """Join keypoints that are each other's nearest neighbours by descriptor.

    Args:
        first: (K, F) descriptors of the first view.
        second: (K2, F) of the second view.
        valid_first: (K,) bool.
        valid_second: (K2,) bool.
        true: (K,) partner by the transform, or -1.
    """
    found = np.full(len(first), -1, dtype=np.int64)
    if valid_first.any() and valid_second.any():
        similarity = _unit(first) @ _unit(second).T
        similarity[~valid_first] = -np.inf
        similarity[:, ~valid_second] = -np.inf
        best, back = similarity.argmax(1), similarity.argmax(0)
        mutual = (back[best] == np.arange(len(first))) & valid_first
        found[mutual] = best[mutual]
    return Matching(found, np.asarray(true), np.asarray(valid_first))


def pair(views: Array, coords: Array, valid_second: Array, matching: Matching, spacing: Sequence[float]) -> bytes:
    """Draw two views side by side.

    Args:
        views: (2, *V), one channel; of a volume the slice through the strongest joined keypoint is shown, all points
            are projected on it.
        coords: (2, K, D) voxels.
        valid_second: (K,) bool.
        matching: Matching of the pair.
        spacing: D mm per voxel.
    """
    planes = [_plane(view, points, where) for view, points, where in zip(
        views, coords, _anchors(matching, coords), strict=True
    )]  # fmt: skip
    height, width = planes[0].shape
    both = np.full((height, 2 * width + GAP), min(float(p.min()) for p in planes), dtype=np.float32)
    both[:, :width], both[:, width + GAP :] = planes
    aspect = float(spacing[-2] / spacing[-1])
    figure = new_figure(11, max(2.0, 11 * height * aspect / both.shape[1]))
    axes = figure.subplots()
    show(axes, both, aspect)
    one, two = (points[:, -2:] + [0, shift] for points, shift in zip(coords, (0, width + GAP), strict=True))
    for kind in ("unmatched", "missed", "wrong", "right"):
        chosen = matching.of(kind)
        axes.scatter(one[chosen, 1], one[chosen, 0], s=16, color=COLORS[kind], linewidths=0)
        if kind in ("right", "wrong"):
            ends = two[matching.found[chosen]]
            for start, end in zip(one[chosen], ends, strict=True):
                axes.plot([start[1], end[1]], [start[0], end[0]], color=COLORS[kind], linewidth=0.7, alpha=0.8)
            axes.scatter(ends[:, 1], ends[:, 0], s=16, color=COLORS[kind], linewidths=0)
    alone = np.asarray(valid_second).copy()
    alone[matching.found[matching.found >= 0]] = False
    axes.scatter(two[alone, 1], two[alone, 0], s=16, color=COLORS["unmatched"], linewidths=0)
    return png(figure)


def neighbours(views: Array, vectors: Array, patients: Sequence[str], queries: int, spacing: Sequence[float]) -> bytes:
    """A row per query: the view, then the views whose global vectors are nearest, best first.

    Args:
        views: (N, *V), one channel.
        vectors: (N, E) global vectors.
        patients: N, to mark the same patient.
        queries: Rows; the first views are the queries.
        spacing: D mm per voxel.
    """
    similarity = _unit(vectors) @ _unit(vectors).T
    np.fill_diagonal(similarity, -np.inf)
    columns = 1 + min(NEIGHBOURS, len(views) - 1)
    aspect = float(spacing[-2] / spacing[-1])
    height, width = views.shape[-2:]
    figure = new_figure(1.7 * columns, (1.7 * height * aspect / width + 0.3) * queries)
    grid = figure.subplots(queries, columns, squeeze=False)
    for query, row in enumerate(grid):
        nearest = np.argsort(-similarity[query])[: columns - 1]
        show(row[0], _middle(views[query]), aspect, "view")
        for axes, other in zip(row[1:], nearest, strict=True):
            same = "same patient" if patients[other] == patients[query] else "another patient"
            show(axes, _middle(views[other]), aspect)
            clean(axes, f"{similarity[query, other]:.2f}, {same}")
    return png(figure)


def _anchors(matching: Matching, coords: Array) -> list[Array]:
    """The keypoints through which the slices of the two views go: the strongest joined ones, preferably rightly."""
    for kind in ("right", "wrong"):
        chosen = np.flatnonzero(matching.of(kind))
        if len(chosen):
            return [coords[0, chosen[0]], coords[1, matching.found[chosen[0]]]]
    return [coords[0, 0], coords[1, 0]]


def _plane(view: Array, points: Array, through: Array) -> Array:
    """The view itself in 2D; in 3D its slice through a point."""
    if view.ndim == 2:
        return view
    out: Array = view[int(np.clip(round(float(through[0])), 0, len(view) - 1))]
    return out


def _middle(view: Array) -> Array:
    out: Array = view if view.ndim == 2 else view[len(view) // 2]
    return out


def _unit(vectors: Array) -> Array:
    out: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return out
