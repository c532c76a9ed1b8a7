"""The end of the demo: a table of Dice per case and a picture of one case with the network's keypoints."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]


@dataclass(frozen=True)
class View:
    """One slice of a preprocessed case.

    Attributes:
        image: (y, x) of the first channel.
        keypoints: (N, 2) positions (y, x) in voxels of the points detected within a slice of this one.
        prediction: (y, x) labels.
        reference: (y, x) labels.
        aspect: Height over width of a voxel.
    """

    image: FloatArray
    keypoints: FloatArray
    prediction: IntArray
    reference: IntArray
    aspect: float


def class_names(labels: dict[str, Any]) -> dict[str, str]:
    """Map the keys of nnU-Net's `summary.json` to the names in `dataset.json`, regions included."""
    return {str(tuple(value) if isinstance(value, list) else value): name for name, value in labels.items()}


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def dice_table(summary: dict[str, Any], labels: dict[str, Any]) -> str:
    """Dice per case and class with means; `-` where a class is in neither mask.

    Args:
        summary: Content of `summary.json` of `nnUNetv2_evaluate_folder`.
        labels: The `labels` of `dataset.json`.
    """
    names = class_names(labels)
    keys = list(summary["metric_per_case"][0]["metrics"])
    rows = []
    for case in summary["metric_per_case"]:
        scores = [float(case["metrics"][key]["Dice"]) for key in keys]
        rows.append((Path(case["reference_file"]).name.split(".")[0], [*scores, _mean(scores)]))
    rows.append(("mean", [_mean(column) for column in zip(*(scores for _, scores in rows), strict=True)]))
    titles = [names.get(key, key) for key in keys] + ["mean"]
    first = max(len(name) for name, _ in rows)
    widths = [max(6, len(title)) for title in titles]
    lines = ["Dice".ljust(first) + "".join(f"  {title:>{width}}" for title, width in zip(titles, widths, strict=True))]
    for name, scores in rows:
        cells = ["-" if math.isnan(score) else f"{score:.3f}" for score in scores]
        lines.append(name.ljust(first) + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def patch_around(centre: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a patch of `size` (smaller where the image is) around `centre`, inside `shape`."""
    starts = [max(0, min(c - n // 2, full - n)) for c, full, n in zip(centre, shape, size, strict=True)]
    return tuple(slice(start, min(start + n, full)) for start, n, full in zip(starts, size, shape, strict=True))


def make_view(model: Path, images: Sequence[Path], prediction: Path, reference: Path) -> View:
    """Preprocess a case as nnU-Net does and detect keypoints on the patch around the reference's foreground."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):  # it announces what does not matter here
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    arguments = (predictor.plans_manager, configuration, predictor.dataset_json)
    files = [str(image) for image in images]
    data, predicted, _ = preprocessor.run_case(files, str(prediction), *arguments)
    _, expected, _ = preprocessor.run_case(files, str(reference), *arguments)
    data, predicted, expected = np.asarray(data), np.asarray(predicted)[0], np.asarray(expected)[0]
    foreground = np.argwhere(expected > 0)
    middle = np.median(foreground, axis=0) if len(foreground) else np.array(expected.shape) // 2
    centre = [int(value) for value in middle]
    size = [int(n) for n in configuration.patch_size]
    flat = len(size) == 2
    where = patch_around(centre, expected.shape, [1, *size] if flat else size)
    patch = data[(slice(None), *where)]
    missing = [n - have for n, have in zip([1, *size] if flat else size, patch.shape[1:], strict=True)]
    padded = np.pad(patch, [(0, 0), *((0, n) for n in missing)])
    tensor = torch.from_numpy(np.ascontiguousarray(padded, dtype=np.float32))[None]
    detected = predictor.network.encoder.detector(tensor[:, :, 0] if flat else tensor)
    points = detected.coords[0][detected.valid[0]].numpy()
    row = centre[0] - where[0].start
    points = points if flat else points[np.abs(points[:, 0] - row) <= 1, 1:]
    spacing = [float(value) for value in configuration.spacing[-2:]]
    return View(patch[0, row], points, predicted[where][row], expected[where][row], spacing[0] / spacing[1])


def draw(view: View, title: str, path: Path) -> None:
    """Save image, keypoints, prediction and reference side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4.6))
    window = np.percentile(view.image, (1, 99))
    top = max(int(view.prediction.max()), int(view.reference.max()), 1)
    panels = ((axes[0], "image"), (axes[1], f"{len(view.keypoints)} keypoints"), (axes[2], "prediction"))
    for axis, name in (*panels, (axes[3], "reference")):
        axis.imshow(view.image, cmap="gray", vmin=window[0], vmax=window[1], aspect=view.aspect)
        axis.set_title(name)
        axis.set_axis_off()
    axes[1].scatter(view.keypoints[:, 1], view.keypoints[:, 0], s=22, facecolors="none", edgecolors="cyan")
    for axis, labels in ((axes[2], view.prediction), (axes[3], view.reference)):
        shown = np.ma.masked_less(labels, 1)
        axis.imshow(
            shown, cmap="viridis", vmin=1, vmax=top + 0.5, alpha=0.55, aspect=view.aspect, interpolation="nearest"
        )
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: model folder, raw dataset, predictions, picture to write."""
    parser = argparse.ArgumentParser(description="Print Dice per case and draw one case.")
    for name in ("model", "raw", "predictions", "picture"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(argv)
    content = json.loads((options.raw / "dataset.json").read_text(encoding="utf-8"))
    summary = json.loads((options.predictions / "summary.json").read_text(encoding="utf-8"))
    sys.stdout.write("\n" + dice_table(summary, content["labels"]) + "\n")
    sys.stdout.flush()
    ending = content["file_ending"]
    prediction = Path(summary["metric_per_case"][0]["prediction_file"])
    identifier = prediction.name.removesuffix(ending)
    channels = range(len(content["channel_names"]))
    images = [options.raw / "imagesTs" / f"{identifier}_{channel:04d}{ending}" for channel in channels]
    reference = options.raw / "labelsTs" / prediction.name
    draw(make_view(options.model, images, prediction, reference), identifier, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
