"""How alike two attention patterns are, and where their mass lies. Pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from scipy.spatial.distance import cdist

FloatArray = npt.NDArray[np.float64]
UNITS = 1_000_000
"""A flow counts whole units; attention is rounded to this fraction."""


def normalized(attention: FloatArray) -> FloatArray:
    """Rows (..., N) scaled to sum to 1; rows without mass stay 0."""
    total = attention.sum(-1, keepdims=True)
    out: FloatArray = np.divide(attention, total, out=np.zeros_like(attention), where=total > 0)
    return out


def jensen_shannon(first: FloatArray, second: FloatArray) -> FloatArray:
    r"""Jensen-Shannon distance of distributions over the same keypoints.

    .. math:: \sqrt{\tfrac12 D(p \| m) + \tfrac12 D(q \| m)}, \qquad m = \tfrac12 (p + q)

    with the Kullback-Leibler divergence D in bits (Lin, Divergence measures based on the Shannon entropy, 1991; a
    metric by Endres and Schindelin, 2003).

    Args:
        first: (..., N), rows sum to 1.
        second: The same.

    Returns:
        (...) in [0, 1]; 0 = equal, 1 = no keypoint in common.
    """
    middle = (first + second) / 2

    def divergence(part: FloatArray) -> Any:
        ratio = np.divide(part, middle, out=np.ones_like(part), where=part > 0)
        return (part * np.log2(ratio)).sum(-1)

    out: FloatArray = np.sqrt(np.clip((divergence(first) + divergence(second)) / 2, 0, 1))
    return out


def share_that_stays(
    first: FloatArray, second: FloatArray, first_mm: FloatArray, second_mm: FloatArray, radius_mm: float
) -> float:
    """Largest share of the mass of one pattern that becomes the other one if no mass may move farther than a radius.

    It is a maximum flow: from every keypoint of the first pattern to those of the second within the radius.

    Args:
        first: (N,) attention, sums to 1.
        second: (M,) the same.
        first_mm: (N, D) positions of its keypoints in mm.
        second_mm: (M, D) positions in the same frame.
        radius_mm: Mass moves at most this far.

    Returns:
        From 0 (all mass is elsewhere) to 1.
    """
    supply, demand = (np.round(p * UNITS).astype(np.int32) for p in (first, second))
    rows, columns = np.nonzero(cdist(first_mm, second_mm) <= radius_mm)
    n, m = len(first), len(second)
    source, sink = n + m, n + m + 1
    starts = np.concatenate([np.full(n, source), rows, n + np.arange(m)])
    ends = np.concatenate([np.arange(n), n + columns, np.full(m, sink)])
    capacities = np.concatenate([supply, np.full(len(rows), UNITS, dtype=np.int32), demand])
    graph = coo_array((capacities, (starts, ends)), shape=(n + m + 2, n + m + 2)).tocsr()
    graph.indices, graph.indptr = graph.indices.astype(np.int32), graph.indptr.astype(np.int32)
    return float(maximum_flow(graph, source, sink).flow_value) / UNITS


def without_self(attention: FloatArray) -> FloatArray:
    """(..., K, K) without what keypoints take from themselves, rows scaled to sum to 1."""
    return normalized(attention * (1 - np.eye(attention.shape[-1])))


def share_on_own_structure(attention: FloatArray, labels: npt.NDArray[np.integer]) -> tuple[float, float] | None:
    """Share of attention that keypoints on a labelled structure pay to others on the same structure.

    Args:
        attention: (K, K), rows sum to 1.
        labels: (K,), 0 = background; only keypoints on a structure with another keypoint are queries.

    Returns:
        The mean over the queries, and what attention that is equal everywhere would give; None without queries.
    """
    same = (labels[:, None] == labels[None]) & ~np.eye(len(labels), dtype=bool)
    queries = (labels > 0) & same.any(1)
    if not queries.any():
        return None
    others = without_self(attention)
    uniform = same[queries].sum(1) / (len(labels) - 1)
    return float((others * same)[queries].sum(1).mean()), float(uniform.mean())


def share_near(attention: FloatArray, positions_mm: FloatArray, radius_mm: float) -> float:
    """Mean share of attention that keypoints pay to others within a radius; (K, K) and (K, D)."""
    near = cdist(positions_mm, positions_mm) <= radius_mm
    return float((without_self(attention) * near).sum(1).mean())


def effective_share(attention: FloatArray) -> float:
    """Mean of exp(entropy) / N over rows (..., N): 1 = attention is equal everywhere, 1 / N = on one keypoint."""
    logs = np.log(attention, out=np.zeros_like(attention), where=attention > 0)
    return float((np.exp(-(attention * logs).sum(-1)) / attention.shape[-1]).mean())
