"""`nnUNetTrainerKAFSemi` and `nnUNetTrainerSemi`: training on labelled and unlabelled images together.

Hooks only: every method calls nnU-Net's own. In nnU-Net's training step the network passes over the unlabelled patches
first, forwards and backwards, and then over the labelled ones: the gradients add up, and no step needs the memory of
both.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.precision import autocast
from nnunetv2_kaf.schedule import schedule_variant
from nnunetv2_kaf.trainer import nnUNetTrainerKAF, unwrapped
from semisupervised.amounts import Amounts
from semisupervised.excess import Excess
from semisupervised.guard import EpochSums, Guard
from semisupervised.history import foreground_names, log_lines, write_history
from semisupervised.islands import Islands
from semisupervised.losses import PseudoLabels, UnlabelledLoss, hard_labels
from semisupervised.options import check_options
from semisupervised.quick_norm import quicken_norms
from semisupervised.step import UnlabelledFirst, strong_batch
from semisupervised.strong import StrongAugmentation
from semisupervised.teacher import Teacher
from semisupervised.thresholds import Thresholds
from semisupervised.trainer_data import TrainerWithUnlabelledImages
from semisupervised.unlabelled import Unlabelled

STATE = "semisupervised"
"""Key of the teacher and the like in the optimiser's state of a checkpoint."""
# what `_add_state` writes there
_ENTRIES = ("teacher", "seed", "guard", "thresholds", "islands", "amounts", "excess", "history", "unlabelled")


class nnUNetTrainerSemi(TrainerWithUnlabelledImages):  # noqa: N801
    """nnU-Net's trainer and its own network, taught by unlabelled images too.

    Every step sees nnU-Net's labelled batch and as many unlabelled patches. The teacher, a moving average of the
    network, labels the unlabelled patches in their weak view (nnU-Net's spatial augmentation). The network sees them in
    the strong view (nnU-Net's intensity augmentation, stronger) with boxes exchanged between patches (CutMix), and
    learns the labels of the voxels where the teacher is sure, by cross-entropy and a smoothed soft Dice.
    The form is FixMatch's (Sohn et al., NeurIPS 2020) with a mean teacher (Tarvainen and Valpola, NeurIPS 2017), as
    UniMatch (Yang et al., CVPR 2023) uses it for ACDC.

    Which images: see `semisupervised.unlabelled`; which patches of them: `semisupervised.positions`.
    `semi_unlabelled.json` in the fold's folder lists the images, `semi_training.json` and `semi_progress.png` say what
    the teacher does in every epoch.

    A subclass may set, as class attributes or in its `__init__`, beside nnU-Net's own (of which
    `oversample_foreground_percent` holds for the unlabelled patches too):

    Attributes:
        confidence_threshold: Smallest probability of the teacher's label of a voxel that the network learns; lower for
            a class of which it would leave out more than half, higher for the background, see
            `semisupervised.thresholds`.
        teacher_decay: Share of the teacher's old weights that stays in each step; the first steps average less.
        unlabelled_weight: Weight of the unlabelled loss after the ramp-up, times what the teacher knows: its Dice on
            the labelled training patches of the epoch before. The labelled loss has 1.
        unlabelled_ramp: Share of the training's steps over which the weight grows from 0.7 % to 100 % of that.
        unlabelled_share: Unlabelled patches per labelled patch.
        remove_islands: Whether the network learns of a structure that is one piece in the labelled patches the largest
            piece alone, see `semisupervised.islands`.
        excess_limit: How many times the share that a structure has in the patches of the labelled case with the most of
            it the teacher may give to it, see `semisupervised.amounts`; the least sure voxels beyond are taken away
            from it, see `semisupervised.excess`. `math.inf` for no limit.
        cutmix_probability: Probability of a CutMix box in a patch.
        strong_augmentation: A `StrongAugmentation`: all probabilities and ranges of the strong view.
        predict_with: "student" or "teacher", whose weights the final checkpoint and the validation use.
        guard_every: Steps between measurements of the teacher, on labelled patches and by what it gave to the
            structures; the first one of every epoch is one.
    """

    confidence_threshold: float = 0.95
    teacher_decay: float = 0.99
    unlabelled_weight: float = 1.0
    unlabelled_ramp: float = 0.2
    unlabelled_share: float = 1.0
    remove_islands: bool = True
    excess_limit: float = 1.5
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
        """See nnU-Net, and `TrainerWithUnlabelledImages`."""
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.schedule_epochs is not None:
            self.num_epochs = self.schedule_epochs
        self.semi_history: list[dict[str, Any]] = []
        self._restored: dict[str, Any] | None = None
        self._teacher: Teacher | None = None
        self._step = 0

    def initialize(self) -> None:
        """See nnU-Net; makes the guard and the unlabelled loss."""
        super().initialize()
        if self.device.type == "cpu":
            quicken_norms(unwrapped(self.network))
        classes = foreground_names(self.label_manager)
        self._guard = Guard(classes)
        self._sums = EpochSums(len(classes), self.device)
        outputs = self.label_manager.num_segmentation_heads
        self._thresholds = Thresholds(self.confidence_threshold, outputs, self._regions, self.device)
        self._islands = Islands(len(classes), self._regions, self.device)
        self._amounts = Amounts(len(classes), self._regions, self.do_split()[0], self.device)
        self._excess = Excess(len(classes), self._regions, self.device)
        weights = getattr(self.loss, "weight_factors", (1.0,))
        batch_dice = self.configuration_manager.batch_dice
        self._unlabelled_loss = UnlabelledLoss(self._regions, batch_dice, self.is_ddp, weights)

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
            "thresholds": self._thresholds.state_dict(),
            "islands": self._islands.state_dict(),
            "amounts": self._amounts.state_dict(),
            "excess": self._excess.state_dict(),
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
            KAFError: There is no unlabelled image, or one cannot be used; or the training cannot be continued.
        """
        check_options(self)
        restored, self._restored = self._restored, None
        if restored is not None:
            _refuse_if_lacking(restored)
            self._amounts.load_state_dict(restored["amounts"])
            self._excess.load_state_dict(restored["excess"])
            self.semi_seed = restored["seed"]
            self._guard.load_state_dict(restored["guard"])
            self._thresholds.load_state_dict(restored["thresholds"])
            self._islands.load_state_dict(restored["islands"])
            self.semi_history = list(restored["history"])
            self._unlabelled = Unlabelled.from_state(
                restored["unlabelled"], Path(self.preprocessed_dataset_folder_base)
            )
        else:
            self._unlabelled = self._find_unlabelled()
        super().on_train_start()
        self._announce(self._unlabelled)
        self._teacher = Teacher(unwrapped(self.network), self.teacher_decay, self._do_i_compile())
        if restored is not None:
            self._teacher.load_state_dict(restored["teacher"])
        self._stream = self._open_stream(self._unlabelled)

    def on_train_epoch_start(self) -> None:
        """See nnU-Net; counts the steps from the first epoch on."""
        super().on_train_epoch_start()
        self._step = self.current_epoch * self.num_iterations_per_epoch

    def current_weight(self) -> float:
        """The weight of the unlabelled loss in this step: ramp-up (Laine and Aila, ICLR 2017) times the guard's."""
        ramp = self.unlabelled_ramp * self.num_epochs * self.num_iterations_per_epoch
        rest = 1 - min(1.0, self._step / ramp) if ramp > 0 else 0.0
        return self.unlabelled_weight * self._guard.weight * math.exp(-5 * rest**2)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step on the labelled patches, whose gradients are added to those of the unlabelled ones."""
        assert self._teacher is not None, "on_train_start() makes it"
        assert self._stream is not None, "on_train_start() opens it"
        in_epoch = self._step % self.num_iterations_per_epoch
        measure = in_epoch % self.guard_every == 0  # at its first step at least
        if measure:
            self._excess.refresh(self.is_ddp)
        strong, labels = self._strong_batch(next(self._stream))
        image = batch["data"].to(self.device, non_blocking=True)
        check = self._hard_labels(self._teach(image)) if measure else None
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
            target = batch["target"]
            reference = (target[0] if isinstance(target, (list, tuple)) else target).to(self.device)
            self._sums.add_labelled(check, self._hard_labels(twice.output), reference)
            self._islands.learn(reference)
            self._amounts.learn(reference, batch["keys"])
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

    def _teach(self, image: Tensor) -> Tensor:
        """The teacher's logits of a batch (B, C, *S)."""
        assert self._teacher is not None
        with autocast(self.device.type, torch.float16 if self.device.type == "cuda" else None):  # as nnU-Net's own
            return self._teacher(image)

    def _hard_labels(self, logits: Tensor) -> Tensor:
        return hard_labels(logits, self._regions)[0]

    def _strong_batch(self, unlabelled: dict[str, Any]) -> tuple[Tensor, PseudoLabels]:
        """The patches as the network sees them, (m, C, *S), and their labels by the teacher, who sees the weak view."""
        weak = unlabelled["data"].to(self.device, non_blocking=True)
        logits = self._teach(weak)
        labels = self._thresholds.label(logits)
        if self.remove_islands:
            labels = self._islands.remove(labels)
        labels = self._excess.remove(logits, labels)
        masked = [i for i, use in enumerate(self.configuration_manager.use_mask_for_norm) if use]
        return strong_batch(weak, labels, unlabelled, masked, self._flat_axis)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """See nnU-Net; judges the teacher, and records what it does."""
        super().on_train_epoch_end(train_outputs)
        record = {"epoch": self.current_epoch, "weight": self.current_weight(), **self._sums.finish(self.is_ddp)}
        learned = self.current_epoch + 1 > self.unlabelled_ramp * self.num_epochs
        reasons = self._guard.judge(record["shares"], record["known"], record["agreements"], learned)
        self._thresholds.next_epoch(self.is_ddp)
        most = self._amounts.next_epoch(self.is_ddp, self.excess_limit)
        record |= {
            **self._excess.next_epoch(self.is_ddp, most),
            "limits": most.tolist(),
            "thresholds": self._thresholds.values.tolist(),
            "islands": self._islands.next_epoch(self.is_ddp),
            "one_piece": self._islands.one_piece.tolist(),
            "guard": self._guard.factor,
            "collapse": reasons,
        }
        self.semi_history.append(record)
        if self.local_rank != 0:
            return
        for line in log_lines(record, self._guard.names):
            self.print_to_log_file(line)
        # nnU-Net writes a checkpoint then, and drawing takes about a second
        draw = self.current_epoch + 1 == self.num_epochs or (self.current_epoch + 1) % self.save_every == 0
        write_history(Path(self.output_folder), self._guard.names, self.semi_history, draw)

    def on_train_end(self) -> None:
        """See nnU-Net; gives the network the teacher's weights if it is the one that predicts."""
        if self.predict_with == "teacher" and self._teacher is not None:
            unwrapped(self.network).load_state_dict(self._teacher.state_dict())
        super().on_train_end()


def _refuse_if_lacking(restored: dict[str, Any]) -> None:
    lacking = [name for name in _ENTRIES if name not in restored]
    if lacking:
        raise KAFError(
            f"the checkpoint's optimizer_state.{STATE}: found no {', '.join(lacking)}, expected all of "
            f"{', '.join(_ENTRIES)}. It is damaged or of another version of nnunetv2-kaf: continue with that "
            "version, or train again."
        )


class nnUNetTrainerKAFSemi(nnUNetTrainerSemi, nnUNetTrainerKAF):  # noqa: N801
    """`nnUNetTrainerKAF`, network, pretrained start and warm-up included, taught by unlabelled images too.

    By default by those that the pretraining used and those that kaf-unlabelled has listed, but for the fold's
    validation patients. See `nnUNetTrainerSemi` for the method and for what a subclass may set.
    """

    def _pretraining(self) -> Path | None:
        return self._find_pretraining()[0]


def __getattr__(name: str) -> type:
    """The variants `_1epoch` and `_<N>epochs` of the trainers here."""
    return schedule_variant(globals(), name)
