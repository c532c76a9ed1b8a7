"""Does it learn, does it collapse: retrieval of the true correspondences and the geometry of the global vectors.

Pure functions without parameters or random draws, for monitoring on held-out cases; none of them is trained. `PANELS`
registers every number of a run, these and the losses: how it is called, drawn and grouped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.precision import autocast
from pretraining.config import COMPONENTS


@dataclass(frozen=True)
class Panel:
    """Numbers that are drawn together.

    Attributes:
        label: Text at the vertical axis.
        group: Prefix of the names in TensorBoard and Weights & Biases.
        names: Key in the history -> name in the legend.
        height: Relative to the other panels.
        factor: The values are multiplied by it.
        limits: Ends of the vertical axis; `None` fits them to the data.
        log: Logarithmic axis; values that are not positive are left out.
    """

    label: str
    group: str
    names: Mapping[str, str]
    height: int = 1
    factor: float = 1.0
    limits: tuple[float, float] | None = None
    log: bool = False


PANELS = (
    Panel("loss", "loss", {name: name for name in ("total", *COMPONENTS)}, height=2),
    Panel(
        "keypoints (%)",
        "keypoints",
        {"matched": "matched", "recall_at_1": "recall at 1", "recall_at_5": "recall at 5"},
        factor=100,
        limits=(-2, 102),
    ),
    Panel("global vectors", "global", {"alignment": "alignment", "uniformity": "uniformity"}),
    Panel("effective rank", "global", {"effective_rank": "effective rank"}),
    Panel("learning rate", "optimiser", {"learning_rate": "learning rate"}, log=True),
)
"""Every number of a run: what a new metric has to be added to, so that it is drawn and tracked."""
GROUPS = {name: panel.group for panel in PANELS for name in panel.names}
"""Group of every number, by its key in the history."""


def recall_hits(
    first: Tensor, second: Tensor, valid_second: Tensor, matches: Tensor, ranks: Sequence[int] = (1, 5)
) -> tuple[Tensor, Tensor]:
    r"""Count the matched keypoints whose partner is among the most similar keypoints of the second view.

    With the unit descriptors u of the first and v of the second view, m(i) the partner of i and V the valid keypoints
    of the second view:

    .. math::
        r_i = |\{k \in V, k \ne m(i) : u_i \cdot v_k \ge u_i \cdot v_{m(i)}\}|, \qquad
        hits_R = |\{i : m(i) \ne -1, r_i < R\}|

    This is Recall@R of metric learning (Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011),
    with the cosine as similarity. An equal similarity, up to rounding, counts against the partner, so that
    collapsed descriptors score 0 (unless fewer than R others are valid) and not what the sorting order of ties gives.
    A similarity that is not a number counts against the partner as well.

    Counts, not shares: the recall of several batches or processes is the sum of the hits over the sum of the counts.

    Args:
        first: (B, K, F) descriptors of the first views, of any length.
        second: (B, K2, F) descriptors of the second views.
        valid_second: (B, K2) bool.
        matches: (B, K) long; index of the partner in the second view, which is valid, or -1 (no other negative).
        ranks: The R, at least 1.

    Returns:
        Hits (len(ranks),) long, and the number of matched keypoints () long.

    Raises:
        KAFError: If the shapes disagree or a rank is not positive.
    """
    _check_recall(first, second, valid_second, matches, ranks)
    # A monitoring number must not depend on the precision of the training step that it is called from.
    with autocast(first.device.type):
        one, two = _unit(first), _unit(second)
        similarity = one @ two.transpose(1, 2)
    partner = matches.clamp_min(0).unsqueeze(2)
    reached = similarity.gather(2, partner)
    # Equal columns of a product may differ by the order of summation. Not ">=": NaN must not win.
    ahead = ~(similarity < reached - 8 * torch.finfo(similarity.dtype).eps) & valid_second.unsqueeze(1)
    rank = ahead.scatter(2, partner, False).sum(2)
    matched = matches >= 0
    hits = [((rank < limit) & matched).sum() for limit in ranks]
    return torch.stack(hits), matched.sum()


def alignment(embeddings: Tensor) -> Tensor:
    r"""Mean squared distance between the unit vectors of the two views of a pair.

    .. math:: \frac{1}{B} \sum_{i=1}^{B} \lVert x_i - x_{i+B} \rVert^2

    Wang & Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
    ICML 2020, sec. 4.1 with alpha = 2. From 0 (the views of a pair agree) to 4; 2 for unrelated vectors. Collapsed
    vectors give 0 too: read it together with `uniformity`.

    Args:
        embeddings: (2B, E) of any length; first sides, then second sides.

    Returns:
        Scalar.

    Raises:
        KAFError: If there is not an even, positive number of rows.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] == 0 or embeddings.shape[0] % 2:
        raise KAFError(f"Expected embeddings (2B, E), first sides before second; found {tuple(embeddings.shape)}.")
    first, second = _unit(embeddings).chunk(2)
    return (first - second).square().sum(1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    r"""Logarithm of the mean Gaussian potential between distinct unit vectors.

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} \exp(-2 \lVert x_i - x_j \rVert^2)

    Wang & Isola, ICML 2020, sec. 4.1 with t = 2. From -8 (two opposite vectors; about -4 + 8 / E for many vectors
    spread evenly over a sphere in E dimensions) to 0 (collapsed). All pairs of rows count; the two views of a pair
    are a vanishing share of them in a batch of useful size.

    Args:
        embeddings: (N, E) of any length, N at least 2.

    Returns:
        Scalar.

    Raises:
        KAFError: If there are fewer than 2 rows.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise KAFError(f"Expected embeddings (N, E) with N of at least 2; found {tuple(embeddings.shape)}.")
    squared = torch.pdist(_unit(embeddings)).square()
    return torch.logsumexp(-2 * squared, 0) - math.log(squared.numel())


def effective_rank(embeddings: Tensor) -> Tensor:
    r"""Number of dimensions that the unit vectors use: from 1 (collapsed) to min(N - 1, E).

    With the singular values s of the centred unit vectors:

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \qquad p_k = s_k / \sum_l s_l

    Roy & Vetterli, The Effective Rank: A Measure of Effective Dimensionality, EUSIPCO 2007. The centring is
    ours: a common offset of all vectors is no information. Singular values within the rounding error of unit vectors
    count as 0, otherwise the rounding of equal vectors would pass for a high rank. Equal vectors, for which the paper
    has no value (0 / 0), have 1.

    Args:
        embeddings: (N, E) of any length, N at least 1.

    Returns:
        Scalar; NaN only if the embeddings are not finite.

    Raises:
        KAFError: If the embeddings are not a matrix with at least one row.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise KAFError(f"Expected embeddings (N, E) with N of at least 1; found {tuple(embeddings.shape)}.")
    unit = _unit(embeddings)
    if not bool(unit.isfinite().all()):
        return unit.new_full((), math.nan)  # the decomposition would raise an error
    values = torch.linalg.svdvals(unit - unit.mean(0))
    # numpy's rule for matrix_rank, with the norm that the vectors had before the centring
    threshold = max(unit.shape) * torch.finfo(unit.dtype).eps * math.sqrt(unit.shape[0])
    values = torch.where(values > threshold, values, 0)
    shares = values / values.sum().clamp_min(threshold)
    return torch.exp(-torch.xlogy(shares, shares).sum())


def _unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to unit length, in float32 at least; zero vectors stay zero."""
    return functional.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)


def _check_recall(first: Tensor, second: Tensor, valid: Tensor, matches: Tensor, ranks: Sequence[int]) -> None:
    """Raise a KAFError unless the arguments of `recall_hits` fit each other."""
    fits = first.ndim == second.ndim == 3 and first.shape[::2] == second.shape[::2]
    if not fits or valid.shape != second.shape[:2] or matches.shape != first.shape[:2]:
        raise KAFError(
            "Expected descriptors (B, K, F) and (B, K2, F), valid (B, K2) and matches (B, K); found "
            f"{tuple(first.shape)}, {tuple(second.shape)}, {tuple(valid.shape)} and {tuple(matches.shape)}."
        )
    if not ranks or min(ranks) < 1:
        raise KAFError(f"Expected ranks of at least 1; found {tuple(ranks)}.")
