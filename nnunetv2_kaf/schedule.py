"""The learning-rate schedule of fine-tuning: nnU-Net's, after a warm-up; trainers of any number of epochs."""

from __future__ import annotations

import re
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class WarmupPolyLRScheduler(PolyLRScheduler):  # type: ignore[misc]
    """nnU-Net's polynomial decay after a linear warm-up, stepped once an epoch.

    Args:
        optimizer: The optimiser.
        initial_lr: Learning rate at the end of the warm-up.
        max_steps: Epochs.
        warmup: Epochs of warm-up; 0 gives nnU-Net's own schedule.
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


def schedule_variant(namespace: dict[str, Any], name: str) -> type:
    """The trainer `<base>_<N>epochs` (`<base>_1epoch`): a class of `namespace` with N as its `schedule_epochs`.

    A module calls it from its own `__getattr__`. The class is made once and kept in the module, so that nnU-Net's
    search and pickle find it there by name.

    Args:
        namespace: Globals of the module that defines the bases.
        name: Of the trainer.

    Raises:
        AttributeError: There is no such base, or the name has another form.
    """
    named = re.fullmatch(r"(\w+)_(?:(1)epoch|(?!1e)([1-9]\d*)epochs)", name)
    base = namespace.get(named[1]) if named else None
    if named is None or not isinstance(base, type) or "schedule_epochs" not in dir(base):
        raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
    epochs = int(named[2] or named[3])
    members = {
        "__module__": namespace["__name__"],
        "__qualname__": name,
        "__doc__": f"`{base.__name__}` for {epochs} epoch{'s' * (epochs > 1)}.",
        "schedule_epochs": epochs,
    }
    made: type = namespace.setdefault(name, type(name, (base,), members))
    return made
