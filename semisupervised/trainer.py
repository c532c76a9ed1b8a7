"""`nnUNetTrainerKAFSemi` and `nnUNetTrainerSemi`: training on labelled and unlabelled images together.

Hooks only: every method calls nnU-Net's own. In nnU-Net's training step the network passes over the unlabelled patches
first, forwards and backwards, and then over the labelled ones: the gradients add up, and no step needs the memory of
both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing
from nnunetv2_kaf.plans import is_kaf
from nnunetv2_kaf.precision import autocast
from nnunetv2_kaf.schedule import schedule_variant
from nnunetv2_kaf.trainer import nnUNetTrainerKAF, split_or_say_why, unwrapped
from pretraining.data.images import MEMORY
from semisupervised.guard import EpochSums, Guard
from semisupervised.losses import PseudoLabels, UnlabelledLoss, pseudo_labels
from semisupervised.plot import plot_history
from semisupervised.quick_norm import quicken_norms
from semisupervised.sampling import (
    TRAINING,
    VALIDATION,
    Geometry,
    LabelledBatches,
    Stream,
    UnlabelledPatches,
    share_of,
)
from semisupervised.seeding import seed_everything
from semisupervised.strong import StrongAugmentation, box_mask, cut_mix, strong_view
from semisupervised.teacher import Teacher
from semisupervised.unlabelled import Training, Unlabelled, find_unlabelled, write_record

HISTORY_FILE = "semi_training.json"
PLOT_FILE = "semi_progress.png"
STATE = "semisupervised"
"""Key of the teacher and the like in the optimiser's state of a checkpoint."""
_SPATIAL = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


class nnUNetTrainerSemi(nnUNetTrainer):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's trainer and its own network, taught by unlabelled images too.

    Every step sees nnU-Net's labelled batch and as many unlabelled patches. The teacher, a moving average of the
    network, labels the unlabelled patches in their weak view (nnU-Net's spatial augmentation). The network sees them in
    the strong view (nnU-Net's intensity augmentation, stronger) with boxes exchanged between patches (CutMix), and
    learns the labels of the voxels where the teacher is sure, by cross-entropy and soft Dice.
    The form is FixMatch's (Sohn et al., NeurIPS 2020) with a mean teacher (Tarvainen and Valpola, NeurIPS 2017), as
    UniMatch (Yang et al., CVPR 2023) uses it for ACDC.

    Which images: see `semisupervised.unlabelled`. `semi_unlabelled.json` in the fold's folder lists them,
    `semi_training.json` and `semi_progress.png` say what the teacher does in every epoch.

    A subclass may set, as class attributes or in its `__init__`:

    Attributes:
        confidence_threshold: Smallest probability of the teacher's label of a voxel that the network learns.
        teacher_decay: Share of the teacher's old weights that stays in each step; the first steps average less.
        unlabelled_weight: Weight of the unlabelled loss after the ramp-up; the labelled loss has 1.
        unlabelled_ramp: Share of the training's steps over which the weight grows from 0.7 % to 100 % of that.
        unlabelled_share: Unlabelled patches per labelled patch.
        cutmix_probability: Probability of a CutMix box in a patch.
        strong_augmentation: A `StrongAugmentation`: all probabilities and ranges of the strong view.
        predict_with: "student" or "teacher", whose weights the final checkpoint and the validation use.
        guard_every: Steps between measurements of the agreement of teacher and network.
    """

    confidence_threshold: float = 0.95
    teacher_decay: float = 0.99
    unlabelled_weight: float = 1.0
    unlabelled_ramp: float = 0.2
    unlabelled_share: float = 1.0
    cutmix_probability: float = 0.5
    strong_augmentation: StrongAugmentation = StrongAugmentation()
    predict_with: str = "student"
    guard_every: int = 25
    schedule_epochs: ClassVar[int | None] = None
    network: Any

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
        if self.schedule_epochs is not None:
            self.num_epochs = self.schedule_epochs
        if self.is_cascaded:
            raise KAFError(
                f"{type(self).__name__} cannot train {configuration}, the second stage of a cascade: its network also "
                "sees the first stage's segmentation, which unlabelled images do not have. Train 3d_fullres with it, "
                "or the first stage (3d_lowres), and the second stage with nnUNetTrainerKAF or nnUNetTrainer."
            )
        self.semi_seed: int | None = None
        self.semi_history: list[dict[str, Any]] = []
        self._restored: dict[str, Any] | None = None
        self._teacher: Teacher | None = None
        self._unlabelled: Unlabelled | None = None
        self._stream: Stream | None = None
        self._labelled_loader: Any = None
        self._step = 0

    def _check_options(self) -> None:
        """Check what a subclass may set.

        Raises:
            KAFError: A value is out of range; the message names it.
        """
        for name, valid, expected in (
            ("confidence_threshold", 0 <= self.confidence_threshold <= 1, "a probability"),
            ("teacher_decay", 0 <= self.teacher_decay < 1, "a number from 0 to below 1"),
            ("unlabelled_weight", self.unlabelled_weight >= 0, "0 or more"),
            ("unlabelled_ramp", 0 <= self.unlabelled_ramp <= 1, "a share of the training from 0 to 1"),
            ("unlabelled_share", self.unlabelled_share > 0, "a number above 0"),
            ("cutmix_probability", 0 <= self.cutmix_probability <= 1, "a probability"),
            ("predict_with", self.predict_with in ("student", "teacher"), "'student' or 'teacher'"),
            ("guard_every", self.guard_every >= 1, "a whole number of at least 1"),
        ):
            if not valid:
                raise KAFError(
                    f"{type(self).__name__}.{name}: found {getattr(self, name)!r}, expected {expected}. Correct it in "
                    "the trainer."
                )

    def initialize(self) -> None:
        """See nnU-Net; draws the seed of the training, the same in all processes."""
        super().initialize()
        if self.device.type == "cpu":
            quicken_norms(unwrapped(self.network))
        seed = [int(np.random.randint(2**31))]  # noqa: NPY002  # follows the user's own seed, if there is one
        if self.is_ddp:
            dist.broadcast_object_list(seed)
        self.semi_seed = seed[0]
        classes = self.label_manager.foreground_regions if self._regions else self.label_manager.foreground_labels
        self._guard = Guard([str(name) for name in classes])
        self._sums = EpochSums(len(classes), self.device)
        weights = getattr(self.loss, "weight_factors", (1.0,))
        batch_dice = self.configuration_manager.batch_dice
        self._unlabelled_loss = UnlabelledLoss(self._regions, batch_dice, self.is_ddp, weights)

    def do_split(self) -> tuple[list[str], list[str]]:
        """As `nnUNetTrainerKAF`: with fewer than five cases each fold leaves one patient out."""
        split_or_say_why(self)
        split: tuple[list[str], list[str]] = super().do_split()
        return split

    @property
    def _regions(self) -> bool:
        return bool(self.label_manager.has_regions)

    def configure_optimizers(self) -> Any:
        """nnU-Net's; the optimiser's state in a checkpoint also holds what this class must remember."""
        optimizer, schedule = super().configure_optimizers()
        optimizer.register_state_dict_post_hook(self._add_state)
        optimizer.register_load_state_dict_pre_hook(self._take_state)
        return optimizer, schedule

    def _add_state(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if self._teacher is None or self._unlabelled is None:
            return state
        own = {
            "teacher": self._teacher.state_dict(),
            "seed": self.semi_seed,
            "guard": self._guard.state_dict(),
            "history": self.semi_history,
            "unlabelled": self._unlabelled.state_dict(),
        }
        return {**state, STATE: own}

    def _take_state(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self._restored = state.get(STATE)
        return {key: value for key, value in state.items() if key != STATE}

    def on_train_start(self) -> None:
        """Find the unlabelled images first, then see nnU-Net; make the teacher from the first weights.

        Raises:
            KAFError: There is no unlabelled image, or one cannot be used.
        """
        self._check_options()
        restored, self._restored = self._restored, None
        if restored is not None:
            self.semi_seed = restored["seed"]
            self._guard.load_state_dict(restored["guard"])
            self.semi_history = list(restored["history"])
            self._unlabelled = Unlabelled.from_state(restored["unlabelled"])
        else:
            self._unlabelled = self._find_unlabelled()
        super().on_train_start()
        self._announce(self._unlabelled)
        self._teacher = Teacher(unwrapped(self.network), self.teacher_decay, self._do_i_compile())
        if restored is not None:
            self._teacher.load_state_dict(restored["teacher"])
        self._stream = self._open_stream(self._unlabelled)

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
        processes = get_allowed_n_proc_DA()
        with _variable("nnUNet_n_proc_DA", "0"):
            train, validation = super().get_dataloaders()
        self._labelled_loader = train.data_loader
        for loader in (train.data_loader, validation.data_loader):
            _fix_algorithms(loader.transforms)
        if processes == 0:
            return train, validation
        streams = []
        sizes = (self.num_iterations_per_epoch, self.num_val_iterations_per_epoch)
        counts = (processes - processes // 3, max(1, processes // 4))
        for number, loader, size, count in zip((TRAINING, VALIDATION), (train, validation), sizes, counts, strict=True):
            batches = LabelledBatches(loader.data_loader, (self._known_seed(), number, self.local_rank))
            streams.append(Stream(batches, self.current_epoch * size, count, self.device.type == "cuda"))
        return streams[0], streams[1]

    def _known_seed(self) -> int:
        assert self.semi_seed is not None, "initialize() draws it"
        return self.semi_seed

    def _open_stream(self, unlabelled: Unlabelled) -> Stream:
        """The unlabelled batches from the current epoch on."""
        loader = self._labelled_loader
        dims = len(self.configuration_manager.patch_size)
        weak = [t for t in loader.transforms.transforms if isinstance(t, _SPATIAL)]
        geometry = Geometry(
            tuple(int(n) for n in loader.patch_size)[-dims:],
            tuple(int(n) for n in loader.final_patch_size)[-dims:],
            ComposeTransforms(weak),
        )
        self._flat_axis = any(isinstance(t, Convert3DTo2DTransform) for t in weak)
        world_size = dist.get_world_size() if self.is_ddp else 1
        total = max(world_size, round(self.configuration_manager.batch_size * self.unlabelled_share))
        processes = get_allowed_n_proc_DA()
        workers = max(1, processes // 3) if processes else 0
        patches = UnlabelledPatches(
            unlabelled.images,
            geometry,
            self.strong_augmentation,
            self.cutmix_probability,
            self._known_seed(),
            share_of(total, self.local_rank, world_size),
            total,
            MEMORY // max(1, workers),
        )
        first = self.current_epoch * self.num_iterations_per_epoch
        return Stream(patches, first, workers, self.device.type == "cuda")

    def on_train_epoch_start(self) -> None:
        """See nnU-Net; without processes that make batches, the batches of the epoch are drawn from its number."""
        super().on_train_epoch_start()
        self._step = self.current_epoch * self.num_iterations_per_epoch
        if get_allowed_n_proc_DA() == 0:
            seed_everything((self._known_seed(), TRAINING, self.local_rank, self.current_epoch))

    def current_weight(self) -> float:
        """The weight of the unlabelled loss in this step: ramp-up (Laine and Aila, ICLR 2017) times the guard's."""
        ramp = self.unlabelled_ramp * self.num_epochs * self.num_iterations_per_epoch
        rest = 1 - min(1.0, self._step / ramp) if ramp > 0 else 0.0
        return self.unlabelled_weight * self._guard.factor * math.exp(-5 * rest**2)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step on the labelled patches, whose gradients are added to those of the unlabelled ones."""
        assert self._teacher is not None, "on_train_start() makes it"
        assert self._stream is not None, "on_train_start() opens it"
        strong, labels = self._strong_batch(next(self._stream))
        image = batch["data"].to(self.device, non_blocking=True)
        check = self._label(image) if self._step % self.guard_every == 0 else None
        network = self.network
        self.network = twice = UnlabelledFirst(network, partial(self._learn, strong, labels))
        try:
            out: dict[str, Any] = super().train_step({**batch, "data": image})
        finally:
            self.network = network
        self._teacher.update(self._step)
        self._sums.add_pseudo_labels(*labels)
        self._sums.add_losses(float(out["loss"]), self._learned)
        if check is not None and twice.output is not None:
            self._sums.add_agreement(check.target, pseudo_labels(twice.output, 0.0, self._regions).target)
        self._step += 1
        return out

    def _learn(self, strong: Tensor, labels: PseudoLabels, network: nn.Module) -> None:
        """Add the gradients of the unlabelled loss to those of the network."""
        # Under DDP the processes exchange the sum once, after the labelled patches.
        with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
            output = network(strong)
            loss = self._unlabelled_loss(output if isinstance(output, (list, tuple)) else [output], labels)
            weighted = self.current_weight() * loss
            with autocast(self.device.type):
                (weighted if self.grad_scaler is None else self.grad_scaler.scale(weighted)).backward()
        self._learned = loss.detach()

    def _label(self, image: Tensor) -> PseudoLabels:
        """The teacher's labels of a batch (B, C, *S)."""
        assert self._teacher is not None
        with autocast(self.device.type, torch.float16 if self.device.type == "cuda" else None):  # as nnU-Net's own
            logits = self._teacher(image)
        return pseudo_labels(logits, self.confidence_threshold, self._regions)

    @torch.no_grad()
    def _strong_batch(self, unlabelled: dict[str, Any]) -> tuple[Tensor, PseudoLabels]:
        """The patches as the network sees them, (m, C, *S), and their labels by the teacher, who sees the weak view."""
        weak = unlabelled["data"].to(self.device, non_blocking=True)
        labels = self._label(weak)
        strong = strong_view(weak, unlabelled["intensity"], unlabelled["seeds"], self._flat_axis)
        masked = [i for i, use in enumerate(self.configuration_manager.use_mask_for_norm) if use]
        if masked:  # nnU-Net keeps 0 outside of the mask of these channels
            strong[:, masked] = strong[:, masked].masked_fill(weak[:, masked] == 0, 0)
        inside = box_mask(unlabelled["boxes"], tuple(weak.shape[2:]), self.device)
        partners = unlabelled["partners"].to(self.device, non_blocking=True)
        strong, target, sure = cut_mix(inside, partners, strong, labels.target, labels.sure)
        return strong, PseudoLabels(target, sure)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """See nnU-Net; judges the teacher, and records what it does."""
        super().on_train_epoch_end(train_outputs)
        record = {"epoch": self.current_epoch, "weight": self.current_weight(), **self._sums.finish(self.is_ddp)}
        learned = self.current_epoch + 1 > self.unlabelled_ramp * self.num_epochs
        reasons = self._guard.judge(record["shares"], record["agreement"], learned)
        record |= {"guard": self._guard.factor, "collapse": reasons}
        self.semi_history.append(record)
        if self.local_rank != 0:
            return
        self.print_to_log_file(
            f"KAF: labelled loss {record['labelled_loss']:.4f}, unlabelled loss {record['unlabelled_loss']:.4f} with "
            f"weight {record['weight']:.3f}; teacher sure of {100 * record['sure']:.1f} % of the voxels, agreement "
            f"with the network {record['agreement']:.3f}"
        )
        for reason in reasons:
            self.print_to_log_file(
                f"KAF: WARNING: {reason}; the unlabelled loss goes on with {self._guard.factor:.3g} of its weight"
            )
        self._write_history()

    def _write_history(self) -> None:
        folder = Path(self.output_folder)
        content = {"classes": list(self._guard.names), "epochs": self.semi_history}
        with replacing(folder / HISTORY_FILE) as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
        last = self.current_epoch + 1 >= self.num_epochs
        if last or (self.current_epoch + 1) % self.save_every == 0:
            plot_history(self.semi_history, self._guard.names, folder / PLOT_FILE)

    def on_train_end(self) -> None:
        """See nnU-Net; gives the network the teacher's weights if it is the one that predicts."""
        if self.predict_with == "teacher" and self._teacher is not None:
            unwrapped(self.network).load_state_dict(self._teacher.state_dict())
        super().on_train_end()
        for stream in (self._stream, self.dataloader_train, self.dataloader_val):
            if isinstance(stream, Stream):
                stream.close()


class nnUNetTrainerKAFSemi(nnUNetTrainerSemi, nnUNetTrainerKAF):  # noqa: N801
    """`nnUNetTrainerKAF`, network, pretrained start and warm-up included, taught by unlabelled images too.

    By default by those that the pretraining used, but for the fold's validation patients. See `nnUNetTrainerSemi` for
    the method and for what a subclass may set.
    """

    def _pretraining(self) -> Path | None:
        return self._find_pretraining()[0]


class UnlabelledFirst(nn.Module):
    """The network in one training step: learns from unlabelled patches, then sees the labelled ones.

    Args:
        network: Compiled or wrapped as it is trained.
        learn: Called with the network before each pass.
    """

    def __init__(self, network: nn.Module, learn: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.network, self.learn = network, learn
        self.output: Tensor | None = None

    def forward(self, image: Tensor) -> Any:
        """The network's output; the finest one stays in `output`."""
        self.learn(self.network)
        output = self.network(image)
        self.output = (output[0] if isinstance(output, (list, tuple)) else output).detach()
        return output


def _fix_algorithms(transform: Any) -> None:
    """Let blurs always use the same algorithm: nnU-Net's choose by a race, whose winner rounds in its own way."""
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for part in getattr(transform, "transforms", [getattr(transform, "transform", None)]):
        if part is not None:
            _fix_algorithms(part)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def __getattr__(name: str) -> type:
    """The variants `_1epoch` and `_<N>epochs` of the trainers here."""
    return schedule_variant(globals(), name)
