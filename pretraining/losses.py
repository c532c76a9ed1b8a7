"""Contrastive objectives: pure functions, thin modules, named components."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf.errors import KAFError
from pretraining.correspondences import UNMATCHED


class LossComponents(NamedTuple):
    """Scalar losses of one step; ``total`` is the weighted sum that is differentiated."""

    total: Tensor
    bottleneck: Tensor
    keypoints: Tensor
    local: Tensor


def supervised_contrastive(embeddings: Tensor, positives: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Supervised contrastive loss with an explicit positive mask.

    .. math::
        L = \frac{1}{|A|} \sum_{i \in A} \frac{-1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \ne i} \exp(z_i \cdot z_a / \tau)}

    Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2 (L_out), with z normalised to unit length.
    A holds the anchors with at least one positive; the others are skipped (the paper always has one). Identical
    embeddings give log(N - 1).

    Args:
        embeddings: (N, E) float, not necessarily normalised.
        positives: (N, N) bool; the diagonal is ignored.
        temperature: tau > 0.

    Returns:
        Scalar. Zero, with a graph, if no anchor has a positive.

    Raises:
        KAFError: if the shapes disagree or the temperature is not positive.
    """
    count = embeddings.shape[0]
    if embeddings.ndim != 2 or positives.shape != (count, count):
        raise KAFError(
            f"Expected embeddings (N, E) and positives (N, N); found {tuple(embeddings.shape)} and "
            f"{tuple(positives.shape)}."
        )
    _check_temperature(temperature)
    unit = functional.normalize(embeddings, dim=1)
    diagonal = torch.eye(count, dtype=torch.bool, device=embeddings.device)
    logits = (unit @ unit.T / temperature).masked_fill(diagonal, _lowest(unit))
    log_probability = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    mask = positives & ~diagonal
    per_anchor = -(log_probability.masked_fill(~mask, 0)).sum(1) / mask.sum(1).clamp_min(1)
    return _masked_mean(per_anchor, mask.any(1)) + 0 * embeddings.sum()


def position_positives(positions: Tensor, threshold: float) -> Tensor:
    """Build the positive mask from positions along the volume.

    Zeng et al., Positional Contrastive Learning, MICCAI 2021: slices are positives if their normalised positions
    differ by less than a threshold, within and across volumes. In 3D every axis of the patch centre must be closer than
    the threshold. Views i and i + N/2 (the two sides of a pair) are always positives.

    Args:
        positions: (N, A) float in [0, 1]; first sides, then second sides.
        threshold: largest difference, exclusive.

    Returns:
        (N, N) bool, symmetric, False on the diagonal.

    Raises:
        KAFError: if N is odd.
    """
    count = positions.shape[0]
    if positions.ndim != 2 or count % 2:
        raise KAFError(f"Expected positions (2B, A), first sides before second sides; found {tuple(positions.shape)}.")
    near = (positions.unsqueeze(1) - positions.unsqueeze(0)).abs().amax(2) < threshold
    index = torch.arange(count, device=positions.device)
    return (near | (index.unsqueeze(1) == (index + count // 2) % count)) & (index.unsqueeze(1) != index)


def local_contrastive(
    first: Tensor,
    second: Tensor,
    valid_first: Tensor,
    valid_second: Tensor,
    matches: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    r"""InfoNCE over keypoint descriptors with the matches as positives, in both directions.

    For a matched pair (i, j), with u the unit descriptors of the first and v of the second view:

    .. math::
        l_{i \to j} = -\log \frac{\exp(u_i \cdot v_j / \tau)}
            {\sum_{k \in V_2} \exp(u_i \cdot v_k / \tau) + \sum_{k \in V_1, k \ne i} \exp(u_i \cdot u_k / \tau)}

    and symmetrically for j -> i: van den Oord et al., 2018 (InfoNCE), with the NT-Xent choice (Chen et al., 2020) of
    also using the anchor's own view for negatives. The mean is over the anchors of a pair of views, then over the pairs
    with matches, so that a view with many keypoints does not outweigh the others. Identical descriptors give
    log(|V_1| + |V_2| - 1).

    Args:
        first: (B, K, E) descriptors of the first views.
        second: (B, K2, E) descriptors of the second views.
        valid_first: (B, K) bool; other entries are padding and never take part.
        valid_second: (B, K2) bool.
        matches: (B, K) long, index into the second view or -1.
        temperature: tau > 0.

    Returns:
        Scalar. Zero, with a graph, if there is no match at all.

    Raises:
        KAFError: if the shapes disagree or the temperature is not positive.
    """
    if (
        first.shape[:2] != matches.shape
        or first.shape[:2] != valid_first.shape
        or second.shape[:2] != valid_second.shape
    ):
        raise KAFError(
            f"Expected descriptors (B, K, E), valid (B, K) and matches (B, K); found {tuple(first.shape)}, "
            f"{tuple(second.shape)}, {tuple(valid_first.shape)}, {tuple(valid_second.shape)}, {tuple(matches.shape)}."
        )
    _check_temperature(temperature)
    if first.shape[1] == 0 or second.shape[1] == 0:
        return 0 * (first.sum() + second.sum())
    # Padding may hold anything, also NaN or inf: replace it before it can reach a gradient.
    unit_first = functional.normalize(first.masked_fill(~valid_first.unsqueeze(2), 0), dim=2)
    unit_second = functional.normalize(second.masked_fill(~valid_second.unsqueeze(2), 0), dim=2)
    matched = (matches != UNMATCHED) & valid_first
    partner = matches.clamp_min(0)
    matched = matched & valid_second.gather(1, partner)
    across = torch.bmm(unit_first, unit_second.transpose(1, 2)) / temperature
    positive = across.gather(2, partner.unsqueeze(2)).squeeze(2)
    norm_first = _log_partition(across, unit_first, valid_first, valid_second, temperature)
    norm_second = _log_partition(across.transpose(1, 2), unit_second, valid_second, valid_first, temperature)
    loss = norm_first + norm_second.gather(1, partner) - 2 * positive
    count = matched.sum(1)
    per_pair = loss.masked_fill(~matched, 0).sum(1) / (2 * count.clamp_min(1))
    return _masked_mean(per_pair, count > 0) + 0 * (unit_first.sum() + unit_second.sum())


def _log_partition(across: Tensor, unit: Tensor, valid: Tensor, valid_other: Tensor, temperature: float) -> Tensor:
    """Return log of the InfoNCE denominator of every point of one view, (B, K)."""
    lowest = _lowest(unit)
    within = torch.bmm(unit, unit.transpose(1, 2)) / temperature
    itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    within = within.masked_fill(~valid.unsqueeze(1) | itself, lowest)
    across = across.masked_fill(~valid_other.unsqueeze(1), lowest)
    return torch.logaddexp(torch.logsumexp(across, 2), torch.logsumexp(within, 2))


class PretrainingLoss(nn.Module):
    """Weighted sum of the global loss on bottleneck and keypoint aggregate and of the local loss."""

    def __init__(
        self,
        *,
        temperature: float,
        position_threshold: float,
        weight_bottleneck: float,
        weight_keypoints: float,
        weight_local: float,
    ) -> None:
        """Store the weights; the module has no parameters."""
        super().__init__()
        self.temperature = temperature
        self.position_threshold = position_threshold
        self.weights = (weight_bottleneck, weight_keypoints, weight_local)

    def forward(
        self,
        bottleneck: Tensor,
        keypoints: Tensor,
        descriptors: Tensor,
        valid: Tensor,
        matches: Tensor,
        positions: Tensor,
    ) -> LossComponents:
        """Compute all components in float32.

        Args:
            bottleneck: (2B, E) global embeddings of the pooled bottleneck.
            keypoints: (2B, E) global embeddings of the keypoint aggregate.
            descriptors: (2B, K, F) keypoint descriptors.
            valid: (2B, K) bool.
            matches: (B, K) long, first view -> second view.
            positions: (2B, A) normalised positions.
        """
        positives = position_positives(positions, self.position_threshold)
        one, two = descriptors.float().chunk(2)
        valid_one, valid_two = valid.chunk(2)
        parts = (
            supervised_contrastive(bottleneck.float(), positives, self.temperature),
            supervised_contrastive(keypoints.float(), positives, self.temperature),
            local_contrastive(one, two, valid_one, valid_two, matches, self.temperature),
        )
        total = torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()
        return LossComponents(total, *parts)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the selected values; zero with a graph if none is selected."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


def _lowest(tensor: Tensor) -> float:
    """Return a logit that exp turns into zero; finite, so that rows without any candidate give no NaN."""
    return torch.finfo(tensor.dtype).min / 4


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise KAFError(f"The temperature of a contrastive loss is {temperature}; expected a value above 0.")
