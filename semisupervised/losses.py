"""What the network learns from the teacher: labels of the voxels where it is sure, cross-entropy and soft Dice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

SMOOTH = 0.04
"""Smoothing of the Dice, as a share of the voxels that it is computed from."""


class PseudoLabels(NamedTuple):
    """Labels by the teacher.

    Attributes:
        target: (B, 1, *S) int64 classes, or (B, R, *S) float32 of 0 and 1 for regions.
        sure: (B, 1, *S) or (B, R, *S) bool, where the label is learned: the teacher is sure of it, or its own was
            replaced by one that is known.
    """

    target: Tensor
    sure: Tensor


def hard_labels(logits: Tensor, regions: bool) -> tuple[Tensor, Tensor]:
    """The labels that an output stands for.

    Args:
        logits: (B, C, *S) classes, or (B, R, *S) regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.

    Returns:
        Labels as `PseudoLabels.target`, and their probabilities, of the same shape; for a region the probability of it
        or of its absence.
    """
    if regions:
        probability = torch.sigmoid(logits.float())
        return (probability > 0.5).float(), torch.maximum(probability, 1 - probability)
    confidence, target = torch.softmax(logits.float(), 1).max(1, keepdim=True)
    return target, confidence


class UnlabelledLoss(nn.Module):
    """Cross-entropy and nnU-Net's soft Dice on the sure voxels, over the outputs of deep supervision.

    The cross-entropy is the mean over all voxels, with zeros where the teacher is not sure (as in FixMatch, Sohn et
    al., NeurIPS 2020): it grows with the share of sure voxels.

    The Dice is (2 overlap + s) / (sizes + s), with s = `SMOOTH` times the voxels. nnU-Net has nearly none of that
    smoothing, which suits labels that are right. With it a handful of voxels that the teacher mistook for a rare
    structure would weigh as much as a whole organ, while a structure that no voxel of the batch is labelled as would
    not be unlearned; mistakes of the teacher would grow from step to step.

    Args:
        regions: Whether the outputs are regions.
        batch_dice: nnU-Net's option of the configuration.
        ddp: Whether the Dice is that of all processes.
        weights: Weights of the outputs of deep supervision, finest first; those of 0 are left out.
    """

    def __init__(self, regions: bool, batch_dice: bool, ddp: bool, weights: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.regions = regions
        self.weights = tuple(float(weight) for weight in weights)
        self.dice = MemoryEfficientSoftDiceLoss(
            apply_nonlin=torch.sigmoid if regions else softmax_helper_dim1,
            batch_dice=batch_dice,
            do_bg=regions,
            ddp=ddp,
        )

    def forward(self, outputs: Sequence[Tensor], labels: PseudoLabels) -> Tensor:
        """The loss, a scalar.

        Args:
            outputs: Logits (B, C, *S_i) of the network, finest first.
            labels: Labels of the same patches at the finest resolution; coarser outputs take the nearest voxels.
        """
        total = outputs[0].new_zeros((), dtype=torch.float32)
        for weight, output in zip(self.weights, outputs, strict=False):
            if weight != 0:
                total = total + weight * self._single(output, at_resolution(labels, output.shape[2:]))
        return total

    def _single(self, logits: Tensor, labels: PseudoLabels) -> Tensor:
        target, sure = labels
        if self.regions:
            entropy = functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        else:
            entropy = functional.cross_entropy(logits.float(), target[:, 0], reduction="none")[:, None]
        entropy = (entropy * sure).mean()
        self.dice.smooth = SMOOTH * self._voxels_of_a_dice(logits)
        dice: Tensor = self.dice(logits, target, loss_mask=sure)
        return entropy + dice

    def _voxels_of_a_dice(self, logits: Tensor) -> int:
        voxels = math.prod(logits.shape[2:])
        if not self.dice.batch_dice:
            return voxels
        return voxels * logits.shape[0] * (dist.get_world_size() if self.dice.ddp else 1)


def at_resolution(labels: PseudoLabels, shape: Sequence[int]) -> PseudoLabels:
    """The labels at another resolution, by the nearest voxel, as nnU-Net resamples labels."""
    if tuple(labels.target.shape[2:]) == tuple(shape):
        return labels
    return PseudoLabels(_nearest(labels.target, shape), _nearest(labels.sure, shape))


def _nearest(image: Tensor, shape: Sequence[int]) -> Tensor:
    """`interpolate(mode="nearest-exact")` for any type of numbers on any device."""
    for axis, size in enumerate(shape, start=2):
        place = ((torch.arange(size, device=image.device) + 0.5) * (image.shape[axis] / size)).long()
        image = image.index_select(axis, place)
    return image
