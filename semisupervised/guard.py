"""The guard against confirmation bias: does the teacher lose a class, or does it part from the network?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

LOWEST = 1 / 16
"""The weight is never lowered further than to this share."""
VANISHED = 0.05
"""A class has vanished if it is this share of its largest share so far, or absent."""
FALL = 0.15
"""A fall of the agreement below its best by more than this is a collapse."""
FORGET = 0.98
"""What is largest or best so far shrinks by this factor per epoch, so that one lucky epoch is not held against it."""


@dataclass
class Guard:
    """Judges every epoch, and lowers the weight of the unlabelled loss while there is a collapse.

    Attributes:
        names: of the foreground classes or regions.
        factor: of the weight; halved by every epoch with a collapse, doubled by every other one up to 1.
        largest: largest share of each class in the sure voxels so far.
        best: best agreement so far.
    """

    names: Sequence[str]
    factor: float = 1.0
    largest: list[float] = field(default_factory=list)
    best: float = 0.0

    def judge(self, shares: Sequence[float], agreement: float, learned: bool) -> list[str]:
        """Judge an epoch.

        Args:
            shares: of each foreground class in the sure voxels.
            agreement: of teacher and network on labelled training patches, a Dice from 0 to 1.
            learned: whether the ramp-up is over; before, a class that is not there yet has not vanished.

        Returns:
            What is wrong, in words; nothing if all is well.
        """
        before = self.largest or [0.0] * len(self.names)
        reasons = [
            f"class {name} vanishes from the pseudo-labels ({share:.2g} of the sure voxels, {most:.2g} at most so far)"
            for name, share, most in zip(self.names, shares, before, strict=True)
            if learned and (share == 0 or share < VANISHED * most)
        ]
        if learned and agreement < self.best - FALL:
            reasons.append(
                f"teacher and network agree less on labelled training patches ({agreement:.2f}, {self.best:.2f} at "
                "best so far)"
            )
        self.largest = [max(share, FORGET * most) for share, most in zip(shares, before, strict=True)]
        self.best = max(agreement, FORGET * self.best)
        self.factor = max(LOWEST, self.factor / 2) if reasons else min(1.0, self.factor * 2)
        return reasons

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs; primitives."""
        return {"factor": self.factor, "largest": list(self.largest), "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`."""
        self.factor, self.largest, self.best = state["factor"], list(state["largest"]), state["best"]


class EpochSums:
    """Counts of an epoch, kept on the device: no step waits for them.

    Args:
        classes: foreground classes or regions.
        device: where the counts are.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._sums = torch.zeros(2 + 3 * classes + 3, dtype=torch.float32, device=device)
        self.classes = classes

    @torch.no_grad()
    def add_pseudo_labels(self, target: Tensor, sure: Tensor) -> None:
        """Count the voxels, the sure ones, and those of every class among them.

        Args:
            target: (B, 1, *S) classes or (B, R, *S) regions.
            sure: as `PseudoLabels.sure`.
        """
        self._sums[0] += sure.numel()
        self._sums[1] += sure.sum()
        self._sums[2 : 2 + self.classes] += self._per_class(target, sure)

    @torch.no_grad()
    def add_agreement(self, teacher: Tensor, student: Tensor) -> None:
        """Count the voxels in which teacher and network agree.

        Args:
            teacher: hard output on labelled patches, as `PseudoLabels.target`.
            student: the same of the network.
        """
        everywhere = torch.ones_like(teacher, dtype=torch.bool)
        both = (teacher == student) & everywhere
        first = 2 + self.classes
        self._sums[first : first + self.classes] += self._per_class(teacher, both)
        sizes = self._per_class(teacher, everywhere) + self._per_class(student, everywhere)
        self._sums[first + self.classes : first + 2 * self.classes] += sizes

    def add_losses(self, labelled: Tensor, unlabelled: Tensor) -> None:
        """Count a step and its losses."""
        self._sums[-3:] += torch.stack([torch.ones_like(labelled), labelled, unlabelled]).to(self._sums)

    def _per_class(self, target: Tensor, where: Tensor) -> Tensor:
        if target.shape[1] == 1 and not target.is_floating_point():
            return torch.stack([((target == c) & where).sum() for c in range(1, self.classes + 1)]).float()
        return ((target > 0) & where).flatten(2).sum((0, 2)).float()

    def finish(self, ddp: bool) -> dict[str, Any]:
        """Return the epoch's numbers over all processes, and start again from 0.

        Returns:
            sure: share of sure voxels; shares: of each class in them; agreement: mean Dice over the classes that
            occur; labelled_loss, unlabelled_loss: means.
        """
        if ddp:
            dist.all_reduce(self._sums)
        voxels, sure, *rest = self._sums.tolist()
        self._sums.zero_()
        n = self.classes
        steps, labelled, unlabelled = rest[3 * n :]
        dice = [2 * both / size for both, size in zip(rest[n : 2 * n], rest[2 * n : 3 * n], strict=True) if size > 0]
        return {
            "sure": sure / max(1.0, voxels),
            "shares": [count / max(1.0, sure) for count in rest[:n]],
            "agreement": sum(dice) / len(dice) if dice else 0.0,
            "labelled_loss": labelled / max(1.0, steps),
            "unlabelled_loss": unlabelled / max(1.0, steps),
        }
