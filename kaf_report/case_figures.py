"""Pictures of one case: keypoints by scale, attention of one keypoint, what the fusion adds, the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kaf_report.canvas import SCALE_COLORS, label_map, new_figure, png, show
from nnunetv2_kaf.inspect import CaseView, Level

Array = npt.NDArray[Any]
CELL = 1.9
"""Inches of a panel's longer side."""
SLICES = (0.2, 0.5, 0.8)
"""Where in the extent of the foreground the slices of the result are."""


@dataclass(frozen=True)
class Plane:
    """One plane of the inspected patch.

    Attributes:
        axis: Axis that is cut; 0 in 2D.
        position: Voxel of the patch on that axis.
        start: Voxel of the volume where the patch starts.
    """

    axis: int
    position: int
    start: int = 0

    def cut(self, volume: Array) -> Array:
        """(Z, Y, X) -> (rows, columns)."""
        out: Array = np.take(volume, self.position, axis=self.axis)
        return out

    def project(self, points: Array) -> Array:
        """(N, 3) -> (N, 2) rows and columns."""
        out: Array = np.delete(points, self.axis, axis=1)
        return out

    def aspect(self, spacing: Sequence[float]) -> float:
        """Height over width of a voxel."""
        rows, columns = np.delete(np.asarray(spacing), self.axis)
        return float(rows / columns)

    @property
    def name(self) -> str:
        """For titles: which axis is cut, and where in the volume."""
        return f"{'zyx'[self.axis]} = {self.start + self.position}"


def patch_of(view: CaseView) -> Array:
    """The first channel of the inspected patch, (Z, Y, X)."""
    out: Array = view.image[0][view.box]
    return out


def points_of(view: CaseView) -> Array:
    """(N, 3) keypoints in voxels of the inspected patch; those in its padding are moved to its border."""
    assert view.keypoints is not None
    shape = np.array([b.stop - b.start for b in view.box])
    out: Array = np.clip(view.keypoints - [b.start for b in view.box], 0, shape - 1)
    return out


def planes_through(view: CaseView, point: Array) -> list[Plane]:
    """The three planes through a point of the patch; one in 2D."""
    axes = (0,) if view.flat else (0, 1, 2)
    return [Plane(axis, round(float(point[axis])), view.box[axis].start) for axis in axes]


def keypoints_by_scale(view: CaseView) -> bytes:
    """All keypoints over the planes through the strongest one; in 3D those within two voxels are filled."""
    points, image = points_of(view), patch_of(view)
    planes = planes_through(view, points[0])
    steps = sorted(set(np.round(view.scales, 3).tolist()))
    figure = new_figure(*_size(view, planes, 1, cell=3.2))
    row = figure.subplots(1, len(planes), squeeze=False)[0]
    for axes, plane in zip(row, planes, strict=True):
        show(axes, plane.cut(image), plane.aspect(view.spacing), plane.name)
        near = np.abs(points[:, plane.axis] - plane.position) <= (0 if view.flat else 2)
        for number, step in enumerate(steps):
            of_step = np.round(view.scales, 3) == step
            color = SCALE_COLORS[number % len(SCALE_COLORS)]
            # the radius grows with the scale
            size = 14 * (1 + number) ** 1.5
            for chosen, alpha in ((of_step & near, 1.0), (of_step & ~near, 0.3)):
                where = plane.project(points[chosen])
                axes.scatter(
                    where[:, 1], where[:, 0], s=size, facecolors="none", edgecolors=color, alpha=alpha, linewidths=1
                )
    return png(figure)


def attention_of_keypoint(view: CaseView, query: int) -> bytes:
    """What one keypoint attends to: a row per level with the head mean on every plane, then the single heads.

    Args:
        view: The case.
        query: Number among `view.keypoints`.
    """
    points, image = points_of(view), patch_of(view)
    planes = planes_through(view, points[query])
    heads = next(iter(view.levels.values())).attention.shape[2]
    columns = [*planes, *[planes[0]] * heads]
    figure = new_figure(*_size(view, columns, len(view.levels)))
    grid = figure.subplots(len(view.levels), len(columns), squeeze=False)
    for row, level in zip(grid, view.levels.values(), strict=True):
        per_head = attention_row(view, level, query)
        for number, (axes, plane) in enumerate(zip(row, columns, strict=True)):
            head = number - len(planes)
            shares = per_head.mean(0) if head < 0 else per_head[head]
            what = f"mean, {plane.name}" if head < 0 else f"head {head + 1}"
            show(axes, plane.cut(image), plane.aspect(view.spacing), f"level {level.level} {what}")
            _attended(axes, plane, points, shares, query)
    return png(figure)


def attention_row(view: CaseView, level: Level, query: int) -> Array:
    """(heads, N) attention that a keypoint pays to all keypoints of the view in the last block of a level."""
    block = level.attention[0, -1].cpu().numpy()
    row: Array = block[:, view.index[query]][:, view.index]
    return row


def _attended(axes: Any, plane: Plane, points: Array, shares: Array, query: int) -> None:
    """Keypoints as discs whose area is their share of the attention; the query as a cross."""
    where = plane.project(points)
    order = np.argsort(shares)
    relative = shares / max(float(shares.max()), 1e-9)
    axes.scatter(
        where[order, 1], where[order, 0], s=2 + 60 * relative[order], c=relative[order], cmap="plasma", vmin=0, vmax=1,
        alpha=0.85, linewidths=0,
    )  # fmt: skip
    for color, size, width in (("black", 15, 5), ("#00e5ff", 13, 2.5)):
        axes.plot(where[query, 1], where[query, 0], "+", color=color, markersize=size, markeredgewidth=width)


def fusion(view: CaseView) -> bytes:
    """Per level, on the plane through the strongest keypoint: the features' length, and what the fusion adds to it."""
    points = points_of(view)
    plane = planes_through(view, points[0])[0]
    levels = list(view.levels.values())
    figure = new_figure(*_size(view, [plane] * (1 + 2 * len(levels)), 1, cell=2.4))
    row = figure.subplots(1, 1 + 2 * len(levels), squeeze=False)[0]
    image = patch_of(view)
    show(row[0], plane.cut(image), plane.aspect(view.spacing), f"image, {plane.name}")
    for number, level in enumerate(levels):
        before, added = (_on_patch(view, part[0].cpu().numpy(), level.stride) for part in (level.features, level.added))
        aspect = plane.aspect(view.spacing)
        show(row[1 + 2 * number], plane.cut(before), aspect, f"level {level.level}: features", cmap="viridis")
        share = float(added.sum() / max(float(before.sum()), 1e-9))
        title = f"level {level.level}: added ({share:.0%})"
        show(row[2 + 2 * number], plane.cut(added), aspect, title, cmap="magma", vmin=0, vmax=float(added.max()) + 1e-9)
    return png(figure)


def _on_patch(view: CaseView, level_map: Array, stride: Sequence[int]) -> Array:
    """A map of a level at the resolution of the patch, without the padding."""
    for axis, factor in enumerate(stride):
        level_map = np.repeat(level_map, factor, axis=axis)
    sizes = [b.stop - b.start for b in view.box][-level_map.ndim :]
    inside: Array = level_map[tuple(slice(o, o + n) for o, n in zip(view.offset, sizes, strict=True))]
    return inside[None] if view.flat else inside


def result(view: CaseView) -> bytes:
    """Three slices through the foreground: image, reference, prediction, where they differ, disagreement of folds."""
    foreground = view.prediction > 0 if view.reference is None else (view.reference > 0) | (view.prediction > 0)
    rows = np.flatnonzero(foreground.any((1, 2)))
    rows = rows if len(rows) else np.arange(view.image.shape[1])
    chosen = sorted({int(rows[round(share * (len(rows) - 1))]) for share in SLICES})
    titles = ["image", *(["reference"] if view.reference is not None else []), "prediction"]
    titles += ["differs"] if view.reference is not None else []
    titles += ["folds disagree"] if view.disagreement is not None else []
    planes = [Plane(0, z) for z in chosen]
    figure = new_figure(*_size(view, [planes[0]] * len(titles), len(planes), whole=True))
    grid = figure.subplots(len(planes), len(titles), squeeze=False)
    most = max(1, int(view.prediction.max()), 0 if view.reference is None else int(view.reference.max()))
    for row, plane in zip(grid, planes, strict=True):
        aspect = plane.aspect(view.spacing)
        for axes, title in zip(row, titles, strict=True):
            show(axes, plane.cut(view.image[0]), aspect, f"{title}, {plane.name}" if title == "image" else title)
            _overlay(axes, view, plane, title, most, aspect)
    return png(figure)


def _overlay(axes: Any, view: CaseView, plane: Plane, title: str, most: int, aspect: float) -> None:
    """What a panel of `result` shows over the image."""
    options: dict[str, Any] = {"aspect": aspect, "interpolation": "nearest"}
    shown = {"reference": view.reference, "prediction": view.prediction}.get(title)
    if shown is not None:
        labels = np.ma.masked_less(plane.cut(shown), 1)
        axes.imshow(labels, cmap=label_map(most), vmin=0.5, vmax=most + 0.5, alpha=0.55, **options)
    elif title == "differs" and view.reference is not None:
        wrong = plane.cut(view.prediction) != plane.cut(view.reference)
        axes.imshow(np.ma.masked_equal(wrong.astype(float), 0), cmap="autumn", vmin=0, vmax=1, alpha=0.8, **options)
    elif title == "folds disagree" and view.disagreement is not None:
        share = plane.cut(view.disagreement)
        axes.imshow(np.ma.masked_equal(share, 0), cmap="hot", vmin=0, vmax=1, alpha=0.8, **options)


def _size(
    view: CaseView, columns: Sequence[Plane], rows: int, cell: float = CELL, whole: bool = False
) -> tuple[float, float]:
    """Width and height in inches of panels that keep the proportions of their planes."""
    shape = np.asarray(view.image.shape[1:] if whole else [b.stop - b.start for b in view.box], dtype=float)
    extent = shape * np.asarray(view.spacing)
    sides = [np.delete(extent, plane.axis) for plane in columns]
    longest = max(float(side.max()) for side in sides)
    widths = [max(0.6, cell * float(side[1]) / longest) for side in sides]
    height = max(0.6, cell * max(float(side[0]) for side in sides) / longest) + 0.25
    return sum(widths) + 0.1 * len(widths), height * rows
