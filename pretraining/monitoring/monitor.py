"""Does it learn? Measured on fixed pairs of held-out cases before training and after every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nnunetv2_kaf.precision import autocast
from pretraining.data.case import Case
from pretraining.monitoring.metrics import alignment, effective_rank, recall_hits, uniformity
from pretraining.objectives.model import PretrainingModel
from pretraining.pairs.batch import Batch
from pretraining.pairs.loader import PairLoader

MONITORED = ("recall_at_1", "recall_at_5", "alignment", "uniformity", "effective_rank")
GLOBAL_LOSSES = ("bottleneck", "keypoints")
COLLAPSE_MARGIN = 0.05
"""A global loss less than this under log(2B - 1) has not left collapse."""
PAIRS = 16
PAIRS_AT_ONCE = 4
STREAM = 1
"""The sequence of pairs of the loader that makes the held-out pairs; training draws from sequence 0."""
HELD_OUT_SHARE = 0.05
HELD_OUT_MOST = 8
HELD_OUT_FROM = 5
"""With fewer patients than this none is held out: each one is worth more as training data."""


def hold_out(
    patients: dict[str, tuple[str, ...]], seed: int
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Split patients into those to train on and those to measure on.

    Returns:
        Both groups; one twentieth (at least 1, at most `HELD_OUT_MOST`) is held out, of further sources if they have
        enough patients; none of fewer than `HELD_OUT_FROM`.
    """
    if len(patients) < HELD_OUT_FROM:
        return dict(patients), {}
    count = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(patients))))
    # Images of further sources have no labels to lose: the first dataset's few labelled patients are all trained on.
    names = sorted(name for name in patients if not Case.of(name).is_own)
    names = names if len(names) >= count else sorted(patients)
    chosen = {names[i] for i in np.random.default_rng([seed, STREAM]).permutation(len(names))[:count]}
    training = {name: cases for name, cases in patients.items() if name not in chosen}
    return training, {name: cases for name, cases in patients.items() if name in chosen}


def collapsed(history: Sequence[Mapping[str, float]], pairs: int) -> dict[str, float]:
    """Global losses that have stayed at their value for collapsed embeddings, log(2B - 1), for two epochs.

    Args:
        history: One record per epoch, after one of the untrained network.
        pairs: B, pairs that are contrasted with each other.

    Returns:
        The last value of each such loss by its name; empty while there are less than two epochs.
    """
    if pairs < 2 or len(history) < 3:
        return {}
    limit = math.log(2 * pairs - 1) - COLLAPSE_MARGIN
    names = [name for name in GLOBAL_LOSSES if name in history[-1]]
    return {n: history[-1][n] for n in names if min(record.get(n, 0.0) for record in history[-2:]) > limit}


def collapse_warning(losses: Mapping[str, float], pairs: int) -> str:
    """What collapsed losses mean, and what to do.

    Args:
        losses: From `collapsed`.
        pairs: B.
    """
    values = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    return (
        f"Global loss at collapse: {values}; expected clearly less than log(2B - 1) = {math.log(2 * pairs - 1):.3f} "
        f"for B = {pairs} pairs a batch, the value of embeddings that are all alike. The encoder learns nothing "
        "from it. Use views that are easier to tell apart (--mirror 0, a smaller --rotation, --scale-min and "
        "--scale-max nearer to 1, --elastic 0, --across 0), more pairs (--batch-size), or --positives simclr."
    )


class Monitor:
    """Evaluates a model on the same pairs every time.

    Args:
        loader: Makes pairs of the held-out cases, `PAIRS_AT_ONCE` at a time.
        device: Device of the model.
    """

    def __init__(self, loader: PairLoader, device: torch.device) -> None:
        self.patch_size = loader.patch_size
        self.batches: Sequence[Batch] = [loader.batch(step) for step in range(PAIRS // PAIRS_AT_ONCE)]
        self.device = device

    @torch.no_grad()
    def evaluate(self, model: PretrainingModel, dtype: torch.dtype | None) -> dict[str, float]:
        """The `MONITORED` values; NaN where there is nothing to measure (no match in any pair)."""
        training = model.training
        model.eval()
        hits, count = torch.zeros(2), 0.0
        first: list[Tensor] = []
        second: list[Tensor] = []
        for batch in self.batches:
            batch = batch.to(self.device)
            views = batch.rendered(self.patch_size)
            with autocast(self.device.type, dtype):
                descriptors, vectors = model.describe(views, batch.keypoints)
            one, two = descriptors.float().chunk(2)
            found, matched = recall_hits(one, two, batch.keypoints.valid.chunk(2)[1], batch.matches)
            hits, count = hits + found.cpu(), count + float(matched)
            # on the CPU, since not every device has all that is measured
            for part, vector in zip((first, second), vectors.float().cpu().chunk(2), strict=True):
                part.append(vector)
        model.train(training)
        embeddings = torch.cat([*first, *second])
        recall = (hits / count if count else hits * torch.nan).tolist()
        values = (alignment(embeddings), uniformity(embeddings), effective_rank(embeddings))
        return dict(zip(MONITORED, (*recall, *(float(v) for v in values)), strict=True))
