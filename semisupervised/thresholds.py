"""How sure the teacher has to be of a voxel before the network learns its label: class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from semisupervised.losses import PseudoLabels, hard_labels


class Thresholds:
    """The smallest probability of a label that is learned, for every class; set anew after every epoch.

    The surest class, nearly always the background, keeps the highest threshold. That of another class is lower by as
    much as the teacher's mean probability of its labels is lower. With one threshold for all, the voxels of a class
    that is hard to tell are never learned, while the background around them is, which teaches the network that the
    class is not there. The form is that of FreeMatch (Wang et al., ICLR 2023) with a fixed highest threshold.

    For regions the two labels are its presence and its absence, region by region.

    Args:
        highest: Threshold of the surest class.
        outputs: Channels C of the network's output, or R regions.
        regions: Whether the outputs are regions, which may overlap, instead of classes.
        device: Of the outputs.
    """

    def __init__(self, highest: float, outputs: int, regions: bool, device: torch.device) -> None:
        self.highest, self.regions = highest, regions
        self._shape = (outputs, 2) if regions else (1, outputs)
        self._means = torch.ones(self._shape, device=device)
        self._sums = torch.zeros(2, *self._shape, device=device)

    @property
    def values(self) -> Tensor:
        """(R, 2), absent and present, for regions; (1, C) for classes."""
        return self.highest * self._means / self._means.max(1, keepdim=True).values

    @torch.no_grad()
    def label(self, logits: Tensor) -> PseudoLabels:
        """Label voxels by the teacher's output, and count how sure it is.

        Args:
            logits: (B, C, *S) classes, or (B, R, *S) regions.
        """
        target, probability = hard_labels(logits, self.regions)
        needed = torch.empty_like(probability)
        for i, of_output in enumerate(self.values):
            needed[:, i] = of_output[target[:, i].long()]
            for k in range(self._shape[1]):
                chosen = target[:, i] == k
                self._sums[0, i, k] += (probability[:, i] * chosen).sum()
                self._sums[1, i, k] += chosen.sum()
        return PseudoLabels(target, probability >= needed)

    def next_epoch(self, ddp: bool) -> None:
        """Set the thresholds by what was counted, over all processes; a label that was not given keeps its own."""
        if ddp:
            dist.all_reduce(self._sums)
        total, count = self._sums
        self._means = torch.where(count > 0, total / count.clamp_min(1), self._means)
        self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs, after an epoch; primitives."""
        return {"means": self._means.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self._means = torch.tensor(state["means"], device=self._means.device)
