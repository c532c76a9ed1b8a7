"""Short trainers: nnU-Net's and ours, of another length, with seeds; found through nnUNet_extTrainer.

`write` copies this file into the folder of external trainers and adds one class per arm. What is paired between arms:

- the first weights, where the networks are equal (one seed per draw, whatever the arm);
- the batches of every epoch, with `augmentation_processes` 0 and a network that draws no random numbers itself: the
  generators are seeded anew at the start of every epoch, so that a continued training sees the same batches as well.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from nnunetv2_kaf.schedule import WarmupPolyLRScheduler


class Study:
    """What the study changes in a trainer; mixed in before it."""

    epochs: ClassVar[int]
    iterations: ClassVar[int]
    validation_iterations: ClassVar[int]
    attributes: ClassVar[Mapping[str, float | str]] = {}
    warmup_epochs: ClassVar[int | None] = None
    mirror_predictions: ClassVar[bool] = True
    seeds: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  # nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)  # type: ignore[call-arg]
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = self.validation_iterations
        self.save_every = max(1, self.epochs // 10)
        for name, value in self.attributes.items():
            setattr(self, name, value)
        if hasattr(self, "warmup_duration_whole_net"):  # nnU-Net's trainers with a warm-up of their own
            self.warmup_duration_whole_net = self.epochs // 20 if self.warmup_epochs is None else self.warmup_epochs
            self.warmup_duration_whole_net = max(1, self.warmup_duration_whole_net)

    def initialize(self) -> None:
        """Build the network from the seed of the draw."""
        self._seed(0)
        super().initialize()  # type: ignore[misc]

    def configure_optimizers(self, *stage: str) -> Any:
        """The trainer's optimiser; its schedule with the study's warm-up."""
        optimizer, schedule = super().configure_optimizers(*stage)  # type: ignore[misc]
        if self.warmup_epochs is not None and not hasattr(self, "warmup_duration_whole_net"):
            peak: float = self.initial_lr  # type: ignore[attr-defined]
            schedule = WarmupPolyLRScheduler(optimizer, peak, self.num_epochs, self.warmup_epochs)
        return optimizer, schedule

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802  # nnU-Net's
        """nnU-Net's augmentation; the checkpoint says whether predictions are averaged over mirrored images."""
        out: tuple[Any, ...] = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # type: ignore[misc]
        if not self.mirror_predictions:
            self.inference_allowed_mirroring_axes = None
        return out

    def on_train_epoch_start(self) -> None:
        """Seed the batches of the epoch."""
        super().on_train_epoch_start()  # type: ignore[misc]
        self._seed(1 + self.current_epoch)  # type: ignore[attr-defined]

    def on_epoch_end(self) -> None:
        """See nnU-Net; the curves are drawn at the end only, since drawing takes as long as many short steps."""
        logger, epoch = self.logger, self.current_epoch  # type: ignore[attr-defined]
        draw = logger.plot_progress_png
        if epoch + 1 < self.num_epochs:
            logger.plot_progress_png = lambda folder: None
        try:
            super().on_epoch_end()  # type: ignore[misc]
        finally:
            logger.plot_progress_png = draw

    def save_checkpoint(self, filename: str) -> None:
        """Save, but for the best checkpoint: the study uses the last one."""
        if not str(filename).endswith("checkpoint_best.pth"):
            super().save_checkpoint(filename)  # type: ignore[misc]

    def _seed(self, stream: int) -> None:
        seed = self.seeds[self.fold]  # type: ignore[attr-defined]
        words = np.random.SeedSequence([seed, stream]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))  # noqa: NPY002  # what nnU-Net's loaders draw from
        torch.manual_seed(int(words[2]))


_BASES = {
    "plain": ("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnUNetTrainer"),
    "kaf": ("nnunetv2_kaf.trainer", "nnUNetTrainerKAF"),
    "semi": ("semisupervised.trainer", "nnUNetTrainerSemi"),
    "kaf_semi": ("semisupervised.trainer", "nnUNetTrainerKAFSemi"),
    "primus": ("nnunetv2.training.nnUNetTrainer.primus.primus_trainers", "nnUNet_Primus_S_Trainer"),
}


def write(path: Path, arms: Mapping[str, tuple[str, Mapping[str, float | str]]], common: Mapping[str, Any]) -> None:
    """Write this file and one class per arm to the folder of external trainers.

    Args:
        path: File.
        arms: Kind of trainer and its attributes, by name of the class.
        common: Class attributes of all arms.
    """
    # Under another name, so that no name of nnU-Net's or ours is found in this module first.
    kinds = sorted({kind for kind, _ in arms.values()})
    lines = [f"from {_BASES[kind][0]} import {_BASES[kind][1]} as _{kind}  # noqa: E402" for kind in kinds]
    for name, (kind, attributes) in arms.items():
        own = dict(attributes)
        values = {**common, "warmup_epochs": own.pop("warmup_epochs", None), "attributes": own}
        lines += ["", "", f"class {name}(Study, _{kind}):"]
        lines += [f"    {key} = {value!r}" for key, value in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Path(__file__).read_text() + "\n\n" + "\n".join(lines) + "\n")
