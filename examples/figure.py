"""Draw what a trained model does with one case: image, keypoints, attention, fused map, result.

The figure of the README is that of the demo's phantoms: `make demo`, then `python examples/figure.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.inspect import CaseView, open_model, view_case

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo_output"
MODEL = "nnUNet_results/Dataset900_KAFPhantom/nnUNetTrainerKAF_1epoch__nnUNetKAFPlans__3d_fullres"
CASE = "nnUNet_raw/Dataset900_KAFPhantom/imagesTs/phantom_t003_0000.nii.gz"
LINES = 24
"""Attention weights that are drawn, the largest ones."""


def shown_slice(view: CaseView) -> int:
    """The slice of the inspected patch with most foreground in reference or prediction, in voxels of the volume."""
    labels = view.prediction if view.reference is None else view.reference
    foreground = (labels[view.box] > 0).sum((1, 2))
    return int(view.box[0].start) + int(foreground.argmax())


def query_keypoint(points: npt.NDArray[np.float32], centre: Sequence[float]) -> int:
    """The keypoint nearest to a voxel: whose attention is drawn."""
    return int(np.square(points - np.asarray(centre)).sum(1).argmin())


def draw(view: CaseView) -> Figure:
    """Draw five panels.

    Args:
        view: Of a network with keypoint layers.

    Raises:
        KAFError: The network has no keypoint layers, or no keypoint was found.
    """
    if view.keypoints is None or not len(view.keypoints):
        raise KAFError(
            f"{view.name}: found no keypoints; expected a model of nnUNetTrainerKAF and an image with content."
        )
    row = shown_slice(view)
    labels = view.prediction if view.reference is None else view.reference
    middle = (
        [row, *np.argwhere(labels[row] > 0).mean(0)] if labels[row].any() else [row, *np.array(labels.shape[1:]) / 2]
    )
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    panels = figure.subplots(1, 5)
    number = min(view.levels)
    names = ("image", "keypoints", "attention of one keypoint", f"fused map, level {number}", "result")
    window = np.percentile(view.image[0, row], (1, 99))
    for axes, name in zip(panels, names, strict=True):
        axes.imshow(
            view.image[0, row], cmap="gray", vmin=window[0], vmax=window[1], aspect=view.spacing[1] / view.spacing[2]
        )
        axes.set_title(name)
        axes.set_axis_off()
    _keypoints(panels[1], view, row)
    _attention(panels[2], view, query_keypoint(view.keypoints, middle), number)
    _fused(panels[3], view, row, number)
    _result(panels[4], view, row)
    return figure


def _keypoints(axes: Any, view: CaseView, row: int) -> None:
    """Circles of the size of the detected structures, of this slice and its neighbours."""
    points = view.keypoints
    assert points is not None
    near = np.abs(points[:, 0] - row) <= 1
    radii = 3 * view.scales[near] / view.spacing[2]
    axes.scatter(points[near, 2], points[near, 1], s=8 * radii**2, facecolors="none", edgecolors="cyan", linewidths=1.2)


def _attention(axes: Any, view: CaseView, query: int, level: int) -> None:
    """Lines from one keypoint to those that it attends to most, seen along the slice axis; mean of blocks and heads."""
    points = view.keypoints
    assert points is not None
    weights = view.levels[level].attention[0].mean((0, 1)).numpy()[view.index[query]][view.index]
    weights[query] = 0
    strongest = weights.argsort()[::-1][:LINES]
    least = weights[strongest].min()
    for other in strongest:
        strength = float((weights[other] - least) / max(weights.max() - least, 1e-12))
        ends = points[[query, other]]
        axes.plot(ends[:, 2], ends[:, 1], color="gold", linewidth=0.6 + 2.4 * strength, alpha=0.4 + 0.6 * strength)
    axes.scatter(points[query, 2], points[query, 1], s=60, color="red", zorder=3)


def _fused(axes: Any, view: CaseView, row: int, level: int) -> None:
    """Length of the vectors that the layer adds to the features, on the voxels of its level."""
    added, stride = view.levels[level].added[0].numpy(), view.levels[level].stride
    if not view.flat:
        added = added[(row - view.box[0].start + view.offset[0]) // stride[0]]
    top, left = (part.start - before for part, before in zip(view.box[1:], view.offset[-2:], strict=True))
    height, width = (n * s for n, s in zip(added.shape, stride[-2:], strict=True))
    extent = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
    axes.imshow(added, cmap="magma", alpha=0.75, extent=extent, aspect=view.spacing[1] / view.spacing[2])
    axes.set_xlim(-0.5, view.image.shape[3] - 0.5)
    axes.set_ylim(view.image.shape[2] - 0.5, -0.5)


def _result(axes: Any, view: CaseView, row: int) -> None:
    """Predicted labels, and the outlines of the reference."""
    top = max(int(view.prediction.max()), 1)
    shown = np.ma.masked_less(view.prediction[row], 1)
    axes.imshow(
        shown, cmap="viridis", vmin=1, vmax=top + 0.5, alpha=0.55, aspect=view.spacing[1] / view.spacing[2],
        interpolation="nearest",
    )  # fmt: skip
    if view.reference is not None:
        for label in np.unique(view.reference[row])[1:]:
            axes.contour(view.reference[row] == label, levels=[0.5], colors="white", linewidths=1)
        axes.set_title("result (white: reference)")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw what a trained model does with one case.")
    parser.add_argument("--model", type=Path, default=DEMO / MODEL, help="trained model folder (default: the demo's)")
    parser.add_argument("--image", type=Path, nargs="+", default=[DEMO / CASE], help="one file per channel")
    parser.add_argument("--label", type=Path, help="reference segmentation (default: that of the demo's case)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "assets" / "kaf.png", help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    demo = DEMO / CASE.replace("imagesTs", "labelsTs").replace("_0000", "")
    label = demo if options.label is None and options.image == [DEMO / CASE] else options.label
    try:
        figure = draw(view_case(open_model(options.model), options.image, label))
        with replacing(options.output) as temporary:
            figure.savefig(temporary, format="png", dpi=80)
    except KAFError as error:
        sys.stderr.write(f"figure: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
