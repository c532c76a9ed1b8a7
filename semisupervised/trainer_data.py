"""Where the batches of a semi-supervised training come from: the labelled cases of the fold, and unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import is_kaf
from nnunetv2_kaf.trainer import split_or_say_why
from pretraining.data.images import MEMORY
from semisupervised.positions import labelled_positions
from semisupervised.sampling import UnlabelledPatches, share_of
from semisupervised.seeding import TRAINING, VALIDATION, seed_everything
from semisupervised.streams import (
    LabelledBatches,
    Stream,
    fix_algorithms,
    training_workers,
    unlabelled_workers,
    validation_workers,
    weak_geometry,
    without_workers,
)
from semisupervised.strong import StrongAugmentation
from semisupervised.unlabelled import Training, Unlabelled, find_unlabelled, write_record


class TrainerWithUnlabelledImages(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's trainer with a stream of unlabelled batches beside the labelled ones.

    Every batch depends on the seed of the training and its step alone, so that a continued training sees the same ones.
    `nnUNetTrainerSemi` documents the options.
    """

    unlabelled_share: float
    cutmix_probability: float
    strong_augmentation: StrongAugmentation

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  # nnU-Net's signature
    ) -> None:
        """See nnU-Net.

        Raises:
            KAFError: The configuration is the second stage of a cascade.
        """
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise KAFError(
                f"{type(self).__name__} cannot train {configuration}, the second stage of a cascade: its network also "
                "sees the first stage's segmentation, which unlabelled images do not have. Train 3d_fullres or "
                "3d_lowres with it, or both stages of the cascade with nnUNetTrainerKAF, or both with nnUNetTrainer."
            )
        self.semi_seed: int | None = None
        self._unlabelled: Unlabelled | None = None
        self._stream: Stream | None = None
        self._labelled_loader: Any = None

    def initialize(self) -> None:
        """See nnU-Net; draws the seed of the training, the same in all processes."""
        self._foreground_share = self.oversample_foreground_percent  # before nnU-Net divides it among processes
        super().initialize()
        seed = [int(np.random.randint(2**31))]  # noqa: NPY002  # follows the user's own seed, if there is one
        if self.is_ddp:
            dist.broadcast_object_list(seed)
        self.semi_seed = seed[0]

    def _known_seed(self) -> int:
        assert self.semi_seed is not None, "initialize() draws it"
        return self.semi_seed

    def do_split(self) -> tuple[list[str], list[str]]:
        """As `nnUNetTrainerKAF`: with fewer than five cases each fold leaves one patient out."""
        split_or_say_why(self)
        split: tuple[list[str], list[str]] = super().do_split()
        return split

    def _find_unlabelled(self) -> Unlabelled:
        """Find and prepare the images: process 0 first, so that the others find them prepared."""
        train, validation = self.do_split()
        plans, configuration = self.plans_manager, self.configuration_name
        training = Training(
            dataset_name=plans.dataset_name,
            configuration=configuration,
            plans_name=plans.plans_name,
            network="kaf" if is_kaf(plans.plans, configuration) else "plain",
            fold=self.fold,
            train=tuple(train),
            validation=() if self.fold == "all" else tuple(validation),
            pretraining=self._pretraining(),
        )
        if self.is_ddp and self.local_rank > 0:
            dist.barrier()
        try:
            return find_unlabelled(training, max(1, get_allowed_n_proc_DA()))
        finally:
            if self.is_ddp and self.local_rank == 0:
                dist.barrier()

    def _pretraining(self) -> Path | None:
        """The pretraining checkpoint that this training starts from, if it is known."""
        return None

    def _announce(self, unlabelled: Unlabelled) -> None:
        if self.local_rank != 0:
            return
        count = len(unlabelled.images.cases)
        labelled = f", {unlabelled.labelled} of them labelled in this fold" if unlabelled.labelled else ""
        self.print_to_log_file(f"KAF: {count} unlabelled images{labelled}: {unlabelled.origin}")
        if unlabelled.labelled == count:
            self.print_to_log_file(
                "KAF: WARNING: every one of these images is labelled in this fold; little is to be gained. Name images "
                "without labels with KAF_UNLABELLED."
            )
        write_record(Path(self.output_folder), unlabelled)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's batches, drawn from the seed and the step, so that a continued training sees the same ones."""
        with without_workers():
            train, validation = super().get_dataloaders()
        self._labelled_loader = train.data_loader
        if get_allowed_n_proc_DA() == 0:
            for loader in (train.data_loader, validation.data_loader):
                fix_algorithms(loader.transforms)
            return train, validation
        streams = []
        for number, loader, steps, workers in (
            (TRAINING, train, self.num_iterations_per_epoch, training_workers()),
            (VALIDATION, validation, self.num_val_iterations_per_epoch, validation_workers()),
        ):
            batches = LabelledBatches(loader.data_loader, (self._known_seed(), number, self.local_rank))
            streams.append(Stream(batches, self.current_epoch * steps, workers, self.device.type == "cuda"))
        return streams[0], streams[1]

    def _open_stream(self, unlabelled: Unlabelled) -> Stream:
        """The unlabelled batches from the current epoch on."""
        loader = self._labelled_loader
        geometry, self._flat_axis = weak_geometry(loader, len(self.configuration_manager.patch_size))
        world_size = dist.get_world_size() if self.is_ddp else 1
        total = max(world_size, round(self.configuration_manager.batch_size * self.unlabelled_share))
        workers = unlabelled_workers()
        patches = UnlabelledPatches(
            unlabelled.images,
            geometry,
            self.strong_augmentation,
            self.cutmix_probability,
            self._known_seed(),
            share_of(total, self.local_rank, world_size),
            total,
            MEMORY // max(1, workers),
            labelled_positions(loader._data, loader._data.identifiers, self._foreground_share),
        )
        first = self.current_epoch * self.num_iterations_per_epoch
        return Stream(patches, first, workers, self.device.type == "cuda")

    def on_train_epoch_start(self) -> None:
        """See nnU-Net; without processes that make batches, the batches of the epoch are drawn from its number."""
        super().on_train_epoch_start()
        if get_allowed_n_proc_DA() == 0:
            seed_everything((self._known_seed(), TRAINING, self.local_rank, self.current_epoch))

    def on_train_end(self) -> None:
        """See nnU-Net; ends the processes that make batches."""
        super().on_train_end()
        for stream in (self._stream, self.dataloader_train, self.dataloader_val):
            if isinstance(stream, Stream):
                stream.close()
