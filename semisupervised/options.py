"""Check of what a subclass of the semi-supervised trainers may set."""

from __future__ import annotations

import math
from typing import Any

from nnunetv2_kaf.errors import KAFError
from semisupervised.strong import StrongAugmentation

_NUMBERS: dict[str, tuple[float, float, str]] = {
    "confidence_threshold": (0, 1, "a probability, from 0 to 1"),
    "teacher_decay": (0, math.nextafter(1, 0), "a number from 0 to below 1"),
    "unlabelled_weight": (0, 1e6, "a number from 0 to 1e6"),
    "unlabelled_ramp": (0, 1, "a share of the training, from 0 to 1"),
    "unlabelled_share": (1e-6, 1e6, "a number above 0, at most 1e6"),
    "cutmix_probability": (0, 1, "a probability, from 0 to 1"),
    "excess_limit": (1, math.inf, "a number of at least 1, or math.inf for no limit"),
}
"""Lowest and highest value, and both in words."""


def check_options(trainer: Any) -> None:
    """Check the options of a trainer.

    Args:
        trainer: A `nnUNetTrainerSemi`.

    Raises:
        KAFError: A value is of another kind or out of range; the message names it.
    """
    for name, (low, high, expected) in _NUMBERS.items():
        value = getattr(trainer, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _refuse_unless(number and low <= value <= high, trainer, name, expected)
    every = trainer.guard_every
    whole = isinstance(every, int) and not isinstance(every, bool)
    _refuse_unless(whole and every >= 1, trainer, "guard_every", "a whole number of at least 1")
    _refuse_unless(isinstance(trainer.remove_islands, bool), trainer, "remove_islands", "True or False")
    _refuse_unless(trainer.predict_with in ("student", "teacher"), trainer, "predict_with", "'student' or 'teacher'")
    strong = isinstance(trainer.strong_augmentation, StrongAugmentation)
    _refuse_unless(strong, trainer, "strong_augmentation", "a semisupervised.strong.StrongAugmentation")


def _refuse_unless(valid: bool, trainer: Any, name: str, expected: str) -> None:
    if not valid:
        raise KAFError(
            f"{type(trainer).__name__}.{name}: found {getattr(trainer, name)!r}, expected {expected}. Correct it in "
            "the trainer."
        )
