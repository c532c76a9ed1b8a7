"""Dice and 95 % Hausdorff distance per case and class.

Dice is nnU-Net's. The distance is MONAI's: the larger of the two directed 95th percentiles of the distances between
the surfaces, in mm. Where a class is absent:

- in prediction and reference: both are left out (null);
- in one of the two: Dice is 0, and the distance is the diagonal of the image in mm, larger than any that can occur.
"""

from __future__ import annotations

import datetime
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import load_average, machine, write_json

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import versions

from .layout import read_json

BoolArray = npt.NDArray[np.bool_]


def hausdorff95(prediction: BoolArray, reference: BoolArray, spacing: tuple[float, ...]) -> float | None:
    """95 % Hausdorff distance.

    Args:
        prediction: Mask (*S).
        reference: Mask (*S).
        spacing: mm per voxel, array order.

    Returns:
        mm; None if both masks are empty, the diagonal of the image if one is.

    Raises:
        KAFError: MONAI is not installed.
    """
    if not prediction.any() and not reference.any():
        return None
    if not prediction.any() or not reference.any():
        return math.dist([0.0] * len(spacing), [n * s for n, s in zip(reference.shape, spacing, strict=True)])
    try:
        from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    except ImportError as error:
        raise KAFError(f"95 % Hausdorff distances need MONAI ({error}). Run: pip install monai") from error
    ours, theirs = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that MONAI itself has deprecated
        distance = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=spacing)
    return float(distance)


def measure(summary_file: str, checkpoint_file: str, device: str, out: str) -> None:
    """Write Dice and distances of all cases of an evaluated folder, and what they were measured with.

    Args:
        summary_file: nnU-Net's summary.json.
        checkpoint_file: Checkpoint of the training, which knows its seconds.
        device: Device that the training ran on.
        out: File to write.
    """
    cases = {}
    for case in read_json(Path(summary_file))["metric_per_case"]:
        name = Path(case["prediction_file"]).name.split(".")[0]
        cases[name] = _case(Path(case["prediction_file"]), Path(case["reference_file"]), case["metrics"])
    document = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(torch.device(device)),
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "versions": {**versions(), **_version("monai")},
        "training_seconds": training_seconds(checkpoint_file),
        "cases": cases,
    }
    write_json(document, Path(out))


def training_seconds(checkpoint_file: str) -> float:
    """Seconds of all epochs of a training: steps and the few validation batches, no start-up."""
    logging = torch.load(checkpoint_file, map_location="cpu", weights_only=False)["logging"]
    logging = logging.get("local_logger", logging)
    starts, ends = logging["epoch_start_timestamps"], logging["epoch_end_timestamps"]
    return round(float(sum(end - start for start, end in zip(starts, ends, strict=True))), 1)


def _case(prediction: Path, reference: Path, metrics: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    import SimpleITK as sitk  # noqa: N813
    from nnunetv2.evaluation.evaluate_predictions import key_to_label_or_region, region_or_label_to_mask

    images = [sitk.ReadImage(str(file)) for file in (prediction, reference)]
    arrays = [sitk.GetArrayFromImage(image) for image in images]
    spacing = tuple(reversed(images[1].GetSpacing()))  # SimpleITK's order is x, y, z
    out = {}
    for key, values in metrics.items():
        label = key_to_label_or_region(key)
        ours, theirs = (np.asarray(region_or_label_to_mask(array, label), dtype=bool) for array in arrays)
        dice = float(values["Dice"])
        out[key] = {"dice": None if math.isnan(dice) else dice, "hd95": hausdorff95(ours, theirs, spacing)}
    return out


def _version(package: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}
