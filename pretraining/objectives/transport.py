"""Local matching by optimal transport: which keypoint of one view is which of the other, or none of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_kaf.errors import KAFError
from pretraining.objectives.pairwise import by_pair, check_shapes, in_chunks, row_mean, usable_matches, within
from pretraining.pairs.batch import Places


def log_sinkhorn(scores: Tensor, dustbin: Tensor, valid_first: Tensor, valid_second: Tensor, iterations: int) -> Tensor:
    r"""Soft assignment between two sets of points, each of which may also be matched with nothing.

    The scores get one more row and column (the dustbins) that hold one value. The assignment P maximises
    :math:`\langle P, S \rangle + H(P)` over all P with the row sums mu and the column sums nu: 1 for a valid point, 0
    for padding, and the number of valid points of the other side for a dustbin. It is entropic optimal transport
    (Cuturi, 2013), here by Sinkhorn's alternation on the potentials in the log domain (Peyre and Cuturi, Computational
    Optimal Transport, 2019, section 4.4):

    .. math::
        u_i = \log \mu_i - \log \sum_j e^{S_{ij} + v_j}, \quad v_j = \log \nu_j - \log \sum_i e^{S_{ij} + u_i},
        \quad \log P_{ij} = S_{ij} + u_i + v_j

    The last update makes the column sums exact; the row sums converge. The backward pass differentiates the iterations
    (not the limit) and keeps potentials only, so that the memory is K x K + iterations x K.

    Args:
        scores: (B, Ka, Kb) float; entries of padding are ignored, whatever they hold.
        dustbin: Scalar, score of matching a point with nothing.
        valid_first: (B, Ka) bool.
        valid_second: (B, Kb) bool.
        iterations: Updates of both potentials, at least 1.

    Returns:
        (B, Ka + 1, Kb + 1) log P in at least float32; -inf, without gradient, wherever the mass is zero: in rows and
        columns of padding, and in the dustbin of a side whose other side has no valid point.

    Raises:
        KAFError: If the shapes disagree or there is no iteration.
    """
    if scores.shape != (*valid_first.shape, valid_second.shape[-1]) or valid_first.shape[0] != valid_second.shape[0]:
        raise KAFError(
            f"Expected scores (B, Ka, Kb), valid (B, Ka) and (B, Kb); found {tuple(scores.shape)}, "
            f"{tuple(valid_first.shape)} and {tuple(valid_second.shape)}."
        )
    if iterations < 1:
        raise KAFError(f"The number of Sinkhorn iterations is {iterations}; expected at least 1.")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    batch, count_first, count_second = scores.shape
    bins = dustbin.to(scores.dtype)
    scores = scores.masked_fill(~(valid_first.unsqueeze(2) & valid_second.unsqueeze(1)), 0)
    scores = torch.cat([scores, bins.expand(batch, count_first, 1)], 2)
    scores = torch.cat([scores, bins.expand(batch, 1, count_second + 1)], 1)
    rows = torch.cat([valid_first, valid_second.sum(1, keepdim=True)], 1).to(scores.dtype)
    columns = torch.cat([valid_second, valid_first.sum(1, keepdim=True)], 1).to(scores.dtype)
    out: Tensor = _Sinkhorn.apply(scores, rows, columns, iterations)
    return out


class _Sinkhorn(torch.autograd.Function):
    """Scores (B, M, N), row masses (B, M), column masses (B, N), iterations -> log assignment (B, M, N)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rows: Tensor, columns: Tensor, iterations: int) -> Tensor:
        log_rows, log_columns = rows.log(), columns.log()
        # Everything is allocated once: matrices that come and go between vectors that stay fragment the memory.
        work = torch.empty_like(scores)
        all_u, all_v = rows.new_empty(iterations, *rows.shape), columns.new_empty(iterations + 1, *columns.shape)
        # Potentials of rows and columns without mass are -inf, which takes them out of every sum.
        all_v[0] = torch.zeros_like(columns).masked_fill_(columns == 0, -torch.inf)
        for step in range(iterations):
            torch.add(scores, all_v[step].unsqueeze(1), out=work)
            all_u[step] = _potential(log_rows, work, 2)
            torch.add(scores, all_u[step].unsqueeze(2), out=work)
            all_v[step + 1] = _potential(log_columns, work, 1)
        ctx.save_for_backward(scores, rows, columns, all_u, all_v)
        return torch.add(scores, all_u[-1].unsqueeze(2), out=work).add_(all_v[-1].unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Chain rule through the updates, last first; the softmax in each is exp(S + u + v) / mass."""
        scores, rows, columns, all_u, all_v = ctx.saved_tensors
        grad = grad.masked_fill((rows == 0).unsqueeze(2) | (columns == 0).unsqueeze(1), 0)
        grad_u, grad_v = grad.sum(2), grad.sum(1)
        rows, columns = rows.masked_fill(rows == 0, 1), columns.masked_fill(columns == 0, 1)
        work = torch.empty_like(scores)
        for step in range(len(all_u) - 1, -1, -1):
            u = all_u[step].unsqueeze(2)
            torch.add(scores, u, out=work).add_(all_v[step + 1].unsqueeze(1)).exp_().mul_(
                (grad_v / columns).unsqueeze(1)
            )
            grad -= work
            grad_u = grad_u - work.sum(2)
            torch.add(scores, u, out=work).add_(all_v[step].unsqueeze(1)).exp_().mul_((grad_u / rows).unsqueeze(2))
            grad -= work
            # Earlier row potentials act through the column potentials only.
            grad_u, grad_v = torch.zeros_like(grad_u), -work.sum(1)
        return grad, None, None, None


def _potential(log_mass: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Log mass - logsumexp(logits) along an axis, -inf where the mass is zero; overwrites the logits."""
    # Finite also where all logits are -inf.
    largest = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    log_sum = logits.sub_(largest).exp_().sum(dim).log_().add_(largest.squeeze(dim))
    return (log_mass - log_sum).masked_fill_(log_mass == -torch.inf, -torch.inf)


def transport_loss(
    first: Tensor,
    second: Tensor,
    valid_first: Tensor,
    valid_second: Tensor,
    matches: Tensor,
    dustbin: Tensor,
    *,
    iterations: int,
    matched_weight: float,
    unmatched_weight: float,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Negative log-likelihood of the matches, and of the dustbin for points without a match.

    For one pair with the matches M and the valid but unmatched points U_1 and U_2 of its views, and the assignment P of
    `log_sinkhorn` on the scores :math:`\langle a_i, b_j \rangle / \sqrt{F}`:

    .. math::
        l = -\frac{w_m}{|M|} \sum_{(i, j) \in M} \log P_{ij}
            - \frac{w_u}{|U_1| + |U_2|} \Big( \sum_{i \in U_1} \log P_{i, bin} + \sum_{j \in U_2} \log P_{bin, j} \Big)

    Yang et al., NeurIPS 2023, local matching loss. The means are taken pair by pair, so that neither a pair with many
    keypoints nor the usually more numerous unmatched points outweigh the others.

    Args:
        first: (B, K, F) matching descriptors of the first views.
        second: (B, K2, F) matching descriptors of the second views.
        valid_first: (B, K) bool; other entries are padding and never take part.
        valid_second: (B, K2) bool.
        matches: (B, K) long, index into the second view or -1.
        dustbin: Scalar, learnable.
        iterations: Iterations of Sinkhorn's algorithm.
        matched_weight: w_m.
        unmatched_weight: w_u.
        places: Of the keypoints. With them, an unmatched point counts only if the other view has no keypoint within the
            distance in which partners were looked for; without them, every unmatched point counts.

    Returns:
        The loss of every pair (B,), and which pairs count (B,) bool: those with valid points on both sides. Without
        them there is nothing to match; their loss is zero.

    Raises:
        KAFError: If the shapes disagree.

    Examples:
        Two keypoints a view; the first ones correspond, the others have no partner:

        >>> import torch
        >>> first = 8 * torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
        >>> second = 8 * torch.tensor([[[1.0, 0, 0, 0], [0, 0, 1, 0]]])
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> options = {"dustbin": torch.tensor(8.0), "iterations": 50, "matched_weight": 1, "unmatched_weight": 1}
        >>> right, _ = transport_loss(first, second, valid, valid, torch.tensor([[0, -1]]), **options)
        >>> wrong, _ = transport_loss(first, second, valid, valid, torch.tensor([[1, -1]]), **options)
        >>> round(right.item(), 2), round(wrong.item(), 1)
        (0.01, 29.9)
    """
    check_shapes(first, second, valid_first, valid_second, matches)
    function = partial(
        _transport_pairs,
        dustbin=dustbin,
        iterations=iterations,
        matched_weight=matched_weight,
        unmatched_weight=unmatched_weight,
    )
    elements = (first.shape[1] + 1) * (second.shape[1] + 1)
    return in_chunks(function, elements, first, second, valid_first, valid_second, matches, *by_pair(places))


def _transport_pairs(
    first: Tensor,
    second: Tensor,
    valid_first: Tensor,
    valid_second: Tensor,
    matches: Tensor,
    *places: Tensor,
    dustbin: Tensor,
    iterations: int,
    matched_weight: float,
    unmatched_weight: float,
) -> tuple[Tensor, Tensor]:
    """`transport_loss` of some pairs."""
    # Padding may hold anything, also NaN or inf: replace it before it can reach a gradient.
    first = first.masked_fill(~valid_first.unsqueeze(2), 0)
    second = second.masked_fill(~valid_second.unsqueeze(2), 0)
    scores = torch.bmm(first, second.transpose(1, 2)) / math.sqrt(first.shape[2])
    cost = -log_sinkhorn(scores, dustbin, valid_first, valid_second, iterations)
    # The partner of an unmatched point is the number of points of the other side, which is the dustbin's column.
    matched, partners = usable_matches(matches, valid_first, valid_second)
    cost_first = cost[:, :-1].gather(2, partners.unsqueeze(2)).squeeze(2)
    taken = torch.zeros_like(cost[:, -1], dtype=torch.bool).scatter(1, partners, True)[:, :-1]
    alone_first, alone_second = valid_first & ~matched, valid_second & ~taken
    if places:
        mm_first, mm_second, same, reach = places
        near = within(mm_first, mm_second, torch.maximum(same, reach))
        near = near & valid_first.unsqueeze(2) & valid_second.unsqueeze(1)
        alone_first, alone_second = alone_first & ~near.any(2), alone_second & ~near.any(1)
    unmatched = torch.cat([alone_first, alone_second], 1)
    cost_unmatched = torch.cat([cost_first, cost[:, -1, :-1]], 1)
    per_pair = matched_weight * row_mean(cost_first, matched) + unmatched_weight * row_mean(cost_unmatched, unmatched)
    counted = valid_first.any(1) & valid_second.any(1)
    return per_pair.masked_fill(~counted, 0), counted
