"""The learning-rate schedule of fine-tuning: nnU-Net's, after a warm-up."""

from __future__ import annotations

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class WarmupPolyLRScheduler(PolyLRScheduler):  # type: ignore[misc]
    """nnU-Net's polynomial decay after a linear warm-up, stepped once an epoch.

    Args:
        optimizer: the optimiser.
        initial_lr: learning rate at the end of the warm-up.
        max_steps: epochs.
        warmup: epochs of warm-up; 0 gives nnU-Net's own schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, max_steps: int, warmup: int) -> None:
        self.warmup, self.peak_lr = warmup, initial_lr
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of epoch `current_step`."""
        ramp = 1.0
        if current_step is not None and current_step < self.warmup:
            ramp = (current_step + 1) / (self.warmup + 1)
        self.initial_lr = self.peak_lr * ramp
        super().step(current_step)
