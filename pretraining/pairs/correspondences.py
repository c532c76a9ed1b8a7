"""Which keypoints of two views show the same place: by the known transforms, or by local appearance.

Both criteria are mutual nearest neighbours within a radius (method: distance criterion); everything else is unmatched.
Only pairs within the radius are ever looked at, so that time and memory grow with the number of points, not its square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from nnunetv2_kaf.coordinates import to_mm

UNMATCHED = -1


def mutual_nearest(rows: np.ndarray, columns: np.ndarray, cost: np.ndarray, count: int) -> np.ndarray:
    """Match points that are each other's cheapest partner among candidate pairs.

    Args:
        rows: (M,) index of the first point of every candidate pair.
        columns: (M,) index of the second one.
        cost: (M,) lower is better; of equal ones the lower index of the partner wins.
        count: Number of first points.

    Returns:
        (count,) int64, the partner's index in the other set or `UNMATCHED`. One to one by construction.
    """
    matches = np.full(count, UNMATCHED, dtype=np.int64)
    mutual = np.intersect1d(_cheapest(rows, cost, columns), _cheapest(columns, cost, rows), assume_unique=True)
    matches[rows[mutual]] = columns[mutual]
    return matches


def _cheapest(points: np.ndarray, cost: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """The index of the cheapest candidate pair of every point that has one."""
    order = np.lexsort((partners, cost, points))
    ordered = points[order]
    return order[np.flatnonzero(np.diff(ordered, prepend=-1))]


def match_by_transform(first: np.ndarray, second: np.ndarray, spacing: Sequence[float], radius_mm: float) -> np.ndarray:
    """Match keypoints of two views of the same voxels by their source coordinates.

    Args:
        first: (Ka, D) source coordinates in voxels of the keypoints that the first view shows.
        second: (Kb, D) the same of the second view.
        spacing: D voxel sizes in mm.
        radius_mm: Matches are at most this far apart.

    Returns:
        (Ka,) int64, index into the second view's keypoints or `UNMATCHED`.
    """
    rows, columns, distance = _within(first, second, spacing, radius_mm)
    return mutual_nearest(rows, columns, distance, len(first))


def match_by_descriptor(
    first: np.ndarray,
    second: np.ndarray,
    descriptors_first: np.ndarray,
    descriptors_second: np.ndarray,
    spacing: Sequence[float],
    radius_mm: float,
) -> np.ndarray:
    """Match keypoints of two different images (neighbouring slices, phases) by appearance within a radius.

    Arguments as for `match_by_transform`, and unit-norm descriptors (Ka, E) and (Kb, E). The cost -<a, b> orders them
    as the descriptor distance 2 - 2 <a, b> does: the nearest neighbour is the most correlated one. A point with a zero
    descriptor (no structure around it) is never matched.
    """
    rows, columns, _ = _within(first, second, spacing, radius_mm)
    textured = np.any(descriptors_first, axis=1)[rows] & np.any(descriptors_second, axis=1)[columns]
    rows, columns = rows[textured], columns[textured]
    one, two = (d[i].astype(np.float32) for d, i in ((descriptors_first, rows), (descriptors_second, columns)))
    return mutual_nearest(rows, columns, -np.einsum("me,me->m", one, two), len(first))


def _within(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float], radius_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of points within the radius: indices (M,), (M,) and distances in mm (M,)."""
    if not len(first) or not len(second):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
    one, two = cKDTree(to_mm(first, spacing)), cKDTree(to_mm(second, spacing))
    found = one.sparse_distance_matrix(two, radius_mm, output_type="ndarray")
    return found["i"], found["j"], found["v"]
