"""What the losses that compare every keypoint of one view with every keypoint of the other have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nnunetv2_kaf.errors import KAFError
from pretraining.pairs.batch import Places

MAX_ELEMENTS = 2**24
"""Elements of the K x K matrices held at a time: 64 MiB in float32, times the few copies that autograd keeps."""


def in_chunks(function: Callable[..., tuple[Tensor, Tensor]], elements: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a function of pairs to as many pairs at a time as `MAX_ELEMENTS` allows.

    With more than one chunk the backward pass computes every chunk again instead of keeping it (Chen et al., Training
    Deep Nets with Sublinear Memory Cost, 2016), so the memory is linear in the number of keypoints until a single pair
    exceeds the limit.

    Args:
        function: Maps the tensors of some pairs to (per pair (b,), counted (b,)); the pairs must not interact.
        elements: Size of the matrices of one pair.
        tensors: (B, ...) each, of all pairs.

    Returns:
        The results of all pairs, (B,) each.
    """
    size = max(1, MAX_ELEMENTS // max(1, elements))
    if size >= tensors[0].shape[0]:
        return function(*tensors)
    chunks = zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
    # Nothing here is random; saving the random state would wait for the GPU.
    parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    per_pair, counted = zip(*parts, strict=True)
    return torch.cat(per_pair), torch.cat(counted)


def usable_matches(matches: Tensor, valid_first: Tensor, valid_second: Tensor) -> tuple[Tensor, Tensor]:
    """Drop matches of points that are not valid.

    Args:
        matches: (B, K) long, index into the second view or negative.
        valid_first: (B, K) bool.
        valid_second: (B, K2) bool.

    Returns:
        Matched (B, K) bool, and the partners (B, K) long, which are K2 for points without a match.
    """
    nobody = valid_second.shape[1]
    partners = torch.where(matches < 0, nobody, matches)
    matched = valid_first & functional.pad(valid_second, (0, 1)).gather(1, partners)
    return matched, torch.where(matched, partners, nobody)


class Ambiguous(NamedTuple):
    """Keypoints of which nobody knows whether they show the same thing: neither partners nor strangers.

    Attributes:
        across: (B, K, K2) bool, between the two views; never a match.
        first: (B, K, K) bool, within the first view; the diagonal is True.
        second: (B, K2, K2) bool, within the second view.
    """

    across: Tensor
    first: Tensor
    second: Tensor


def by_pair(places: Places | None) -> tuple[Tensor, ...]:
    """The tensors of places with one entry per pair, as `ambiguous` takes them: (B, ...) each; none without places."""
    return () if places is None else (*places.mm.chunk(2), places.same, places.reach)


def ambiguous(
    matched: Tensor, partners: Tensor, first: Tensor, second: Tensor, same: Tensor, reach: Tensor
) -> Ambiguous:
    """Find the pairs of keypoints that must not count as negatives.

    Between the views these are keypoints at the same place, those at the place of the other one's partner, and, within
    the distance in which partners were looked for, those of which at least one merely lacks a mutual partner. Within a
    view these are keypoints at the same place: one structure, detected twice.

    Args:
        matched: (B, K) bool, from `usable_matches`.
        partners: (B, K) long, from `usable_matches`.
        first: (B, K, D) mm, places of the keypoints of the first views.
        second: (B, K2, D) mm.
        same: (B,) mm, see `Places`.
        reach: (B,) mm.
    """
    count = second.shape[1]
    in_first, in_second = within(first, first, same), within(second, second, same)
    match = functional.one_hot(partners, count + 1)[..., :count].bool() & matched.unsqueeze(2)
    taken = match.any(1)
    lacking = within(first, second, reach) & ~(matched.unsqueeze(2) & taken.unsqueeze(1))
    # What lies at the place of a match, in either view.
    beside_partner = in_second.gather(1, partners.clamp_max(max(0, count - 1)).unsqueeze(2).expand(-1, -1, count))
    anchors = match.int().argmax(1)
    beside_anchor = in_first.gather(2, anchors.unsqueeze(1).expand(-1, first.shape[1], -1))
    at_match = (beside_partner & matched.unsqueeze(2)) | (beside_anchor & taken.unsqueeze(1))
    return Ambiguous((within(first, second, same) | lacking | at_match) & ~match, in_first, in_second)


def within(first: Tensor, second: Tensor, limit: Tensor) -> Tensor:
    """Which places are at most so far apart: (B, K, D) mm, (B, K2, D) mm, (B,) mm -> (B, K, K2) bool."""
    return torch.cdist(first, second) <= limit[:, None, None]


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the selected values of every row: (B, N), (B, N) bool -> (B,); zero with a graph if none is selected."""
    return values.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)


def check_shapes(first: Tensor, second: Tensor, valid_first: Tensor, valid_second: Tensor, matches: Tensor) -> None:
    """Raise a KAFError unless descriptors (B, K, F), validity (B, K) and matches (B, K) belong together."""
    agree = (
        first.ndim == second.ndim == 3
        and first.shape[::2] == second.shape[::2]
        and first.shape[:2] == valid_first.shape == matches.shape
        and second.shape[:2] == valid_second.shape
    )
    if not agree:
        raise KAFError(
            "Expected descriptors (B, K, F) and (B, K2, F), valid (B, K) and (B, K2) and matches (B, K); found "
            f"{tuple(first.shape)}, {tuple(second.shape)}, {tuple(valid_first.shape)}, {tuple(valid_second.shape)}, "
            f"{tuple(matches.shape)}."
        )
