"""Dice and the 95 % Hausdorff distance of a case, per label or region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """One structure of one case.

    Attributes:
        dice: None if the structure is in neither mask.
        hd95: HD95 in mm; None if a mask is empty.
        missing: "prediction" or "reference" if that mask alone is empty, else "".
    """

    dice: float | None
    hd95: float | None
    missing: str = ""


def score(
    prediction: npt.NDArray[np.int16], reference: npt.NDArray[np.int16], spacing: Sequence[float], labels: LabelManager
) -> dict[int | tuple[int, ...], Score]:
    """Compare a prediction with its reference, on the grid of the image file.

    Args:
        prediction: Labels (Z, Y, X).
        reference: Labels (Z, Y, X).
        spacing: Voxel sizes in mm.
        labels: nnU-Net's description of the labels; voxels with the ignore label count for nothing.

    Returns:
        By label, or by region where the training had regions.
    """
    known = np.ones(reference.shape, dtype=bool)
    if labels.has_ignore_label:
        known = reference != labels.ignore_label
    out = {}
    for part in labels.foreground_regions if labels.has_regions else labels.foreground_labels:
        ours, theirs = (region_or_label_to_mask(array, part) & known for array in (prediction, reference))
        out[part] = compare(ours, theirs, spacing)
    return out


def compare(ours: Mask, theirs: Mask, spacing: Sequence[float]) -> Score:
    """Dice and distance of two masks."""
    sizes = int(ours.sum()), int(theirs.sum())
    if not any(sizes):
        return Score(None, None)
    dice = 2 * int((ours & theirs).sum()) / sum(sizes)
    if not all(sizes):
        return Score(dice, None, "reference" if sizes[0] else "prediction")
    return Score(dice, hausdorff95(ours, theirs, spacing))


def hausdorff95(ours: Mask, theirs: Mask, spacing: Sequence[float]) -> float:
    """The 95 % Hausdorff distance: the larger one of the two directed 95th percentiles of surface distances, in mm.

    An image of one slice is taken as flat: its structures end at their outline, not above and below.

    Args:
        ours: Not empty.
        theirs: Not empty.
        spacing: Voxel sizes in mm.
    """
    flat = tuple(axis for axis, size in enumerate(ours.shape[:-1]) if size == 1)
    ours, theirs = ours.squeeze(flat), theirs.squeeze(flat)
    spacing = [mm for axis, mm in enumerate(spacing) if axis not in flat]
    box = _bounding_box(ours | theirs)
    surfaces = [_surface(mask[box]) for mask in (ours, theirs)]
    directed = []
    for one, other in (surfaces, surfaces[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        directed.append(float(np.percentile(distance[one], 95)))
    return max(directed)


def _surface(mask: Mask) -> Mask:
    """Voxels of a mask with a face on its outside; the border of the image is outside."""
    padded = np.pad(mask, 1)
    inner = ndimage.binary_erosion(padded)[tuple(slice(1, -1) for _ in mask.shape)]
    surface: Mask = mask & ~inner
    return surface


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    return tuple(part for part in ndimage.find_objects(mask.astype(np.int8))[0])


def names(labels: Mapping[str, Any], parts: Sequence[int | tuple[int, ...]]) -> dict[int | tuple[int, ...], str]:
    """Names of labels or regions in dataset.json."""
    known = {tuple(value) if isinstance(value, list) else value: str(name) for name, value in labels.items()}
    return {part: known.get(part, str(part)) for part in parts}


def mean_dice(scores: Mapping[int | tuple[int, ...], Score]) -> float | None:
    """Mean over the structures that are in either mask; None if there is none."""
    found = [entry.dice for entry in scores.values() if entry.dice is not None]
    return float(np.mean(found)) if found else None
