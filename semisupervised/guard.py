"""The guard against confirmation bias: what the teacher knows, whether it loses a class or parts from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nnunetv2_kaf.errors import KAFError

LOWEST = 1 / 16
"""The weight is never lowered further than to this share."""
VANISHED = 0.05
"""A class has vanished if it falls below this share of its largest share so far."""
ESTABLISHED = 5
"""Epochs in a row after which a class is there to stay, so that its absence is a collapse."""
FALL = 0.15
"""A fall of the agreement below its best by more than this, as a mean over the classes, is a collapse."""
FORGET = 0.98
"""What is largest or best so far shrinks by this factor per epoch, so that one lucky epoch is not held against it."""


@dataclass
class Guard:
    """Judges every epoch: the unlabelled loss counts as much as the teacher knows, and less while there is a collapse.

    A teacher that has not learned a class yet is sure of the background where that class is. Labels of such a teacher
    would hold the network back; its Dice on the labelled training patches says how much it knows.

    Attributes:
        names: Of the foreground classes or regions.
        known: Dice of the teacher on the labelled training patches of the last epoch; 0 in the first one.
        factor: Of the weight; halved by every epoch with a collapse, doubled by every other one up to 1.
        largest: Largest share of each class in the sure voxels so far.
        present: Epochs in a row in which each class has been there.
        best: Best agreement in each class since the ramp-up.
    """

    names: Sequence[str]
    known: float = 0.0
    factor: float = 1.0
    largest: list[float] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with no class seen."""
        self.largest = self.largest or [0.0] * len(self.names)
        self.best = self.best or [0.0] * len(self.names)
        self.present = self.present or [0] * len(self.names)

    @property
    def weight(self) -> float:
        """What the unlabelled loss is multiplied with in the next epoch, 0 to 1."""
        return self.known * self.factor

    def judge(
        self, shares: Sequence[float], known: float, agreements: Sequence[float | None], learned: bool
    ) -> list[str]:
        """Judge an epoch.

        Args:
            shares: Of each foreground class in the sure voxels.
            known: Dice of the teacher on labelled training patches, from 0 to 1.
            agreements: Of teacher and network on labelled training patches, a Dice from 0 to 1 for each class; None
                where neither of them found the class.
            learned: Whether the ramp-up is over; before, nothing is a collapse.

        Returns:
            What is wrong, in words; nothing if all is well.
        """
        self.known = known
        collapse = []
        for i, (name, share) in enumerate(zip(self.names, shares, strict=True)):
            most = self.largest[i]
            gone = share == 0 or share < VANISHED * most
            if gone and self.present[i] >= ESTABLISHED and learned:
                collapse.append(
                    f"class {name} vanishes from the pseudo-labels ({share:.2g} of the sure voxels, {most:.2g} at most "
                    "so far)"
                )
            if not gone:
                self.present[i] += 1
            elif self.present[i] < ESTABLISHED:
                self.present[i] = 0
            self.largest[i] = max(share, FORGET * most)
        if learned:
            collapse += self._parted(agreements)
        self.factor = max(LOWEST, self.factor / 2) if collapse else min(1.0, self.factor * 2)
        return collapse

    def _parted(self, agreements: Sequence[float | None]) -> list[str]:
        """Compare the agreement with its best, class by class.

        A mean over the classes would fall when the network finds a new one, which its teacher does not know yet.
        """
        pairs = list(zip(agreements, self.best, strict=True))
        falls = [best - found for found, best in pairs if found is not None]
        fall = sum(falls) / max(1, len(falls))
        self.best = [max(found or 0.0, FORGET * best) for found, best in pairs]
        if fall <= FALL:
            return []
        return [f"teacher and network agree less on labelled training patches (by {fall:.2f} than at best so far)"]

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs; primitives."""
        return {
            "known": self.known,
            "factor": self.factor,
            "largest": list(self.largest),
            "present": list(self.present),
            "best": list(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state saved by `state_dict`.

        Raises:
            KAFError: It has no number for each class.
        """
        for name in ("largest", "present", "best"):
            if not isinstance(state[name], list) or len(state[name]) != len(self.names):
                raise KAFError(
                    f"the checkpoint's guard.{name}: found {state[name]!r}, expected a number for each of "
                    f"{', '.join(self.names)}. It is damaged or of another version of nnunetv2-kaf: continue with that "
                    "version, or train again."
                )
        self.known, self.factor = state["known"], state["factor"]
        self.largest, self.present, self.best = (list(state[name]) for name in ("largest", "present", "best"))


class EpochSums:
    """Counts of an epoch, kept on the device: no step waits for them.

    Args:
        classes: Foreground classes or regions.
        device: Device of the counts.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._sums = torch.zeros(2 + 5 * classes + 3, dtype=torch.float32, device=device)
        self.classes = classes

    @torch.no_grad()
    def add_pseudo_labels(self, target: Tensor, sure: Tensor) -> None:
        """Count the voxels, the sure ones, and those of every class among them.

        Args:
            target: (B, 1, *S) classes or (B, R, *S) regions.
            sure: See `PseudoLabels.sure`.
        """
        self._sums[0] += sure.numel()
        self._sums[1] += sure.sum()
        self._sums[2 : 2 + self.classes] += self._per_class(target, sure)

    @torch.no_grad()
    def add_labelled(self, teacher: Tensor, student: Tensor, reference: Tensor) -> None:
        """Count the voxels of labelled patches in which the teacher agrees with the network, and with the reference.

        Args:
            teacher: Hard output on labelled patches, as `PseudoLabels.target`.
            student: The same of the network.
            reference: nnU-Net's target of these patches, (B, 1, *S) classes, or (B, R, *S) regions with one channel
                more if there is an ignore label; what is ignored does not count.
        """
        everywhere = torch.ones_like(teacher, dtype=torch.bool)
        self._add_overlap(0, teacher, student, everywhere)
        regions = teacher.shape[1] if teacher.is_floating_point() else None
        if regions is None:
            counted = reference <= self.classes  # nnU-Net's ignore label is the highest one
        else:
            counted = (reference[:, regions:] == 0).all(1, keepdim=True).expand_as(teacher)
        self._add_overlap(1, teacher, reference[:, :regions].to(teacher.dtype), counted)

    def _add_overlap(self, which: int, one: Tensor, other: Tensor, counted: Tensor) -> None:
        """Add numerators and denominators of a Dice per class."""
        first, n = 2 + (1 + 2 * which) * self.classes, self.classes
        self._sums[first : first + n] += 2 * self._per_class(one, (one == other) & counted)
        self._sums[first + n : first + 2 * n] += self._per_class(one, counted) + self._per_class(other, counted)

    def add_losses(self, labelled: float, unlabelled: Tensor) -> None:
        """Count a step and its losses."""
        self._sums[-3] += 1
        self._sums[-2] += labelled
        self._sums[-1] += unlabelled

    def _per_class(self, target: Tensor, where: Tensor) -> Tensor:
        if target.shape[1] == 1 and not target.is_floating_point():
            return torch.stack([((target == c) & where).sum() for c in range(1, self.classes + 1)]).float()
        return ((target > 0) & where).flatten(2).sum((0, 2)).float()

    def finish(self, ddp: bool) -> dict[str, Any]:
        """The epoch's numbers over all processes, and start again from 0.

        Returns:
            sure: share of sure voxels; shares: of each class in them; agreements: Dice of teacher and network on
            labelled patches in each class, None where neither found it; agreement, known: Dice of the teacher with the
            network and with the reference, means over the classes that occur; labelled_loss, unlabelled_loss: means.
        """
        if ddp:
            dist.all_reduce(self._sums)
        sums = self._sums.tolist()
        self._sums.zero_()
        voxels, sure = sums[:2]
        shares, *dice = (sums[2 + i * self.classes : 2 + (i + 1) * self.classes] for i in range(5))
        steps, labelled, unlabelled = sums[-3:]
        agreements, known = _dice(*dice[:2]), _dice(*dice[2:])
        return {
            "sure": sure / max(1.0, voxels),
            "shares": [count / max(1.0, sure) for count in shares],
            "agreements": agreements,
            "agreement": _mean(agreements),
            "known": _mean(known),
            "labelled_loss": labelled / max(1.0, steps),
            "unlabelled_loss": unlabelled / max(1.0, steps),
        }


def _dice(twice_both: Sequence[float], sizes: Sequence[float]) -> list[float | None]:
    """Of each class; None if there is none of it."""
    return [both / size if size > 0 else None for both, size in zip(twice_both, sizes, strict=True)]


def _mean(dice: Sequence[float | None]) -> float:
    """Mean over the classes that occur; 0 if none does."""
    there = [value for value in dice if value is not None]
    return sum(there) / len(there) if there else 0.0
