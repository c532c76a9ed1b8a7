"""Objectives: pure functions, and the module that weights them and reduces them over the processes of a run."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.precision import autocast
from pretraining.config import PretrainConfig
from pretraining.distributed import gather, sum_over_ranks
from pretraining.objectives.model import Embeddings
from pretraining.objectives.pairwise import ambiguous, by_pair, check_shapes, in_chunks, row_mean, usable_matches
from pretraining.objectives.positives import partition_positives, position_positives, simclr_positives
from pretraining.objectives.transport import transport_loss
from pretraining.pairs.batch import Places

T = TypeVar("T")


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
        KAFError: If the shapes disagree or the temperature is not positive.

    Examples:
        The two views of two images, that of each image equal to its other one and orthogonal to the rest:

        >>> import torch
        >>> from pretraining.objectives.positives import simclr_positives
        >>> views = torch.eye(2).repeat(2, 1)
        >>> round(supervised_contrastive(views, simclr_positives(4), temperature=0.5).item(), 4)
        0.2395

        Collapsed embeddings give log(N - 1):

        >>> round(supervised_contrastive(torch.ones(4, 8), simclr_positives(4)).exp().item(), 4)
        3.0
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
    # Zero for anchors without a positive.
    return per_anchor.sum() / mask.any(1).sum().clamp_min(1)


def local_contrastive(
    first: Tensor,
    second: Tensor,
    valid_first: Tensor,
    valid_second: Tensor,
    matches: Tensor,
    temperature: float = 0.1,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    r"""InfoNCE over keypoint descriptors with the matches as positives, in both directions.

    For a matched pair (i, j), with u the unit descriptors of the first and v of the second view:

    .. math::
        l_{i \to j} = -\log \frac{\exp(u_i \cdot v_j / \tau)}
            {\sum_{k \in V_2} \exp(u_i \cdot v_k / \tau) + \sum_{k \in V_1, k \ne i} \exp(u_i \cdot u_k / \tau)}

    and symmetrically for j -> i: van den Oord et al., 2018 (InfoNCE), with the NT-Xent choice (Chen et al., 2020) of
    also using the anchor's own view for negatives. The mean is over the anchors of a pair of views, so that a view with
    many keypoints does not outweigh the others. Identical descriptors give log(|V_1| + |V_2| - 1).

    Args:
        first: (B, K, F) descriptors of the first views.
        second: (B, K2, F) descriptors of the second views.
        valid_first: (B, K) bool; other entries are padding and never take part.
        valid_second: (B, K2) bool.
        matches: (B, K) long, index into the second view or -1.
        temperature: tau > 0.
        places: Of the keypoints. With them, pairs of keypoints that may show the same thing are left out of the sums
            (see `ambiguous`); without them, all that are not matched are negatives.

    Returns:
        The loss of every pair (B,), zero without a match, and which pairs have a match (B,) bool.

    Raises:
        KAFError: If the shapes disagree or the temperature is not positive.

    Examples:
        One pair of views with three keypoints each, of which the first two correspond crosswise:

        >>> import torch
        >>> first = torch.eye(4)[None, :3]
        >>> valid = torch.ones(1, 3, dtype=torch.bool)
        >>> loss, counted = local_contrastive(first, first[:, [1, 0, 2]], valid, valid, torch.tensor([[1, 0, -1]]))
        >>> loss.item() < 0.001, counted.tolist()
        (True, [True])
        >>> loss, _ = local_contrastive(first, first, valid, valid, torch.tensor([[1, 0, -1]]))
        >>> round(loss.item())
        10
    """
    check_shapes(first, second, valid_first, valid_second, matches)
    _check_temperature(temperature)
    elements = first.shape[1] ** 2 + second.shape[1] ** 2 + first.shape[1] * second.shape[1]
    function = partial(_local_pairs, temperature=temperature)
    return in_chunks(function, elements, first, second, valid_first, valid_second, matches, *by_pair(places))


def _local_pairs(
    first: Tensor,
    second: Tensor,
    valid_first: Tensor,
    valid_second: Tensor,
    matches: Tensor,
    *places: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`local_contrastive` of some pairs."""
    # Padding may hold anything, also NaN or inf: replace it before it can reach a gradient.
    unit_first = functional.normalize(first.masked_fill(~valid_first.unsqueeze(2), 0), dim=2)
    unit_second = functional.normalize(second.masked_fill(~valid_second.unsqueeze(2), 0), dim=2)
    matched, partners = usable_matches(matches, valid_first, valid_second)
    if first.shape[1] == 0 or second.shape[1] == 0:
        return unit_first.sum((1, 2)) * 0 + unit_second.sum((1, 2)) * 0, matched.any(1)
    unsure = ambiguous(matched, partners, *places) if places else None
    partners = partners.clamp_max(second.shape[1] - 1)
    across = torch.bmm(unit_first, unit_second.transpose(1, 2)) / temperature
    positive = across.gather(2, partners.unsqueeze(2)).squeeze(2)
    if unsure is not None:
        across = across.masked_fill(unsure.across, _lowest(across))
    own_first, own_second = (unsure.first, unsure.second) if unsure is not None else (None, None)
    norm_first = _log_partition(across, unit_first, valid_first, valid_second, own_first, temperature)
    norm_second = _log_partition(
        across.transpose(1, 2), unit_second, valid_second, valid_first, own_second, temperature
    )
    loss = (norm_first + norm_second.gather(1, partners)) / 2 - positive
    return row_mean(loss, matched), matched.any(1)


def _log_partition(
    across: Tensor, unit: Tensor, valid: Tensor, valid_other: Tensor, unsure: Tensor | None, temperature: float
) -> Tensor:
    """Log of the InfoNCE denominator of every point of one view, (B, K)."""
    lowest = _lowest(unit)
    within = torch.bmm(unit, unit.transpose(1, 2)) / temperature
    left_out = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    left_out = left_out if unsure is None else left_out | unsure
    within = within.masked_fill(~valid.unsqueeze(1) | left_out, lowest)
    across = across.masked_fill(~valid_other.unsqueeze(1), lowest)
    return torch.logaddexp(torch.logsumexp(across, 2), torch.logsumexp(within, 2))


class PretrainingLoss(nn.Module):
    """Weighted sum of the losses with a weight above 0, of the global batch: the same value on every rank."""

    def __init__(self, config: PretrainConfig) -> None:
        """Build for the options of a run; the module has no parameters."""
        super().__init__()
        self.config = config

    def forward(
        self, embeddings: Embeddings, matches: Tensor, positions: Tensor, places: Places | None = None
    ) -> dict[str, Tensor]:
        """Compute all active losses, in float32 at least, also under autocast.

        Args:
            embeddings: Embeddings of this rank's views, first sides before second sides.
            matches: (B, K) long, first view -> second view.
            positions: (2B, A) normalised positions.
            places: Of the keypoints; without them, keypoints that are not matched are negatives, wherever they are.

        Returns:
            The scalar of every active component, and "total", their weighted sum.

        Raises:
            KAFError: If the embedding of an active component is missing.
        """
        weights = self.config.components
        with autocast(positions.device.type):
            losses: dict[str, Tensor] = {}
            if "bottleneck" in weights or "keypoints" in weights:
                positives = self._positives(_gather_views(positions))
            if "bottleneck" in weights:
                losses["bottleneck"] = self._global(_given(embeddings.bottleneck, "bottleneck"), positives)
            if "keypoints" in weights:
                losses["keypoints"] = self._global(_given(embeddings.keypoints, "keypoints"), positives)
            if "local" in weights:
                losses["local"] = self._local(embeddings, matches, self._places(places))
            if "transport" in weights:
                losses["transport"] = self._transport(embeddings, matches, self._places(places))
            losses["total"] = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return losses

    def _places(self, places: Places | None) -> Places | None:
        """The places, if keypoints that may show the same thing are to be left out."""
        return places if self.config.ambiguous == "ignored" else None

    def _positives(self, positions: Tensor) -> Tensor:
        """Positive mask of all ranks' views."""
        if self.config.position_axes == "first":
            positions = positions[:, :1]
        if self.config.positives == "simclr":
            return simclr_positives(positions.shape[0], positions.device)
        if self.config.positives == "gcl":
            return partition_positives(positions, self.config.partitions)
        return position_positives(positions, self.config.position_threshold)

    def _global(self, embeddings: Tensor, positives: Tensor) -> Tensor:
        return supervised_contrastive(_gather_views(_full(embeddings)), positives, self.config.temperature)

    def _local(self, embeddings: Embeddings, matches: Tensor, places: Places | None) -> Tensor:
        first, second = _full(_given(embeddings.descriptors, "descriptors")).chunk(2)
        valid_first, valid_second = embeddings.valid.chunk(2)
        return _mean_over_pairs(
            *local_contrastive(first, second, valid_first, valid_second, matches, self.config.temperature, places)
        )

    def _transport(self, embeddings: Embeddings, matches: Tensor, places: Places | None) -> Tensor:
        first, second = _full(_given(embeddings.matching, "matching")).chunk(2)
        valid_first, valid_second = embeddings.valid.chunk(2)
        per_pair, counted = transport_loss(
            first,
            second,
            valid_first,
            valid_second,
            matches,
            _given(embeddings.dustbin, "dustbin"),
            iterations=self.config.sinkhorn_iterations,
            matched_weight=self.config.transport_matched,
            unmatched_weight=self.config.transport_unmatched,
            places=places,
        )
        return _mean_over_pairs(per_pair, counted)


def _gather_views(tensor: Tensor) -> Tensor:
    """Gather (2b, ...) of every rank to (2B, ...): all first sides, then all second sides."""
    return torch.cat([gather(side) for side in tensor.chunk(2)])


def _mean_over_pairs(per_pair: Tensor, counted: Tensor) -> Tensor:
    """Mean over the pairs of all ranks that count; zero with a graph if there is none."""
    local = torch.stack([per_pair.masked_fill(~counted, 0).sum(), counted.sum().to(per_pair.dtype)])
    everywhere = sum_over_ranks(local)
    return everywhere[0] / everywhere[1].clamp_min(1)


def _full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _given(value: T | None, name: str) -> T:
    """The embedding that an active loss needs."""
    if value is None:
        raise KAFError(
            f"The model gives no {name}, which a loss with a weight above 0 needs; build both for one config."
        )
    return value


def _lowest(tensor: Tensor) -> float:
    """A logit that exp turns into zero; finite, so that rows without any candidate give no NaN."""
    return torch.finfo(tensor.dtype).min / 4


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise KAFError(f"The temperature of a contrastive loss is {temperature}; expected a value above 0.")
