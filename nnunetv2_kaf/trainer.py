"""`nnUNetTrainerKAF`: nnU-Net's trainer with the KAF network, its pretrained encoder and a warm-up schedule.

Hooks only: every method either calls nnU-Net's own or is one that nnU-Net documents as replaceable.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.expected_end import expected_end
from nnunetv2_kaf.files import replacing, sweep
from nnunetv2_kaf.plans import check_configuration, check_plans, is_kaf, kaf_plans, pretraining_folder, read_plans
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.schedule import WarmupPolyLRScheduler, schedule_variant
from nnunetv2_kaf.schema_check import check
from nnunetv2_kaf.schema_checkpoints import ContinuedTraining
from nnunetv2_kaf.splits import SPLITS_FILE, cases_of_no_fold, check_fold, split_few_cases
from nnunetv2_kaf.tensors import LARGEST_WEIGHT, check_weights, diverged
from nnunetv2_kaf.weights import LoadReport, load_encoder

_CONTINUE_FIX = "Restore the file, name another, or train again."
PRETRAINED_VARIABLE = "KAF_PRETRAINED"
INITIALIZATION_FILE = "kaf_initialization.json"


class nnUNetTrainerKAF(nnUNetTrainer):  # type: ignore[misc]  # noqa: N801
    """Trains a `KAFUNet`, on KAF plans or on plain ones, from a pretraining checkpoint or from scratch.

    - Plain and residual-encoder plans: the UNet is replaced by a `KAFUNet` with the same stages; the plans saved with
      the model name the network completely. A model folder that already holds KAF plans keeps its own layers.
    - A new training starts from the pretraining checkpoint of its dataset, plans and configuration, if there is one:
      first of its own fold, then of fold "all". `KAF_PRETRAINED=<path>` names another, `KAF_PRETRAINED=none` none.
      One of its own fold or of fold "all" that has not finished is an error.
      `kaf_initialization.json` in the fold's folder records the file, its SHA-256 and the tensors.
    - The learning rate warms up over the first twentieth of the epochs (50 of 1000, as in nnU-Net's own warm-up
      trainer): the decoder and the fusion start at random, and their first large gradients, kept alive by a
      momentum of 0.99, would undo a pretrained encoder.
    """

    use_pretraining: ClassVar[bool] = True
    schedule_epochs: ClassVar[int | None] = None

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
            KAFError: The plans cannot carry KAF layers, or their kaf block is wrong.
        """
        check_plans(plans, f"the plans of {configuration}, fold {fold}")
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.schedule_epochs is not None:
            self.num_epochs = self.schedule_epochs
        self._epoch_seconds: list[float] = []
        self._use_plans(self._substitute(plans))
        self.kaf_config = check_configuration(self.plans_manager.plans, configuration)

    def _substitute(self, plans: dict[str, Any]) -> dict[str, Any]:
        """The plans with `KAFUNet`s: as given, as saved with this model, or with the default layers."""
        if is_kaf(plans, self.configuration_name):
            return kaf_plans(plans)  # completes the kaf block, so that no later default can change this model
        saved_file = Path(str(self.output_folder_base)) / "plans.json"
        if saved_file.is_file():
            saved = read_plans(saved_file)
            if self.configuration_name in saved["configurations"] and is_kaf(saved, self.configuration_name):
                self.print_to_log_file(f"KAF: keypoint fusion as saved with this model in {saved_file}")
                return kaf_plans(plans, KAFConfig.from_dict(_kaf_block(saved, self.configuration_name)))
        out = kaf_plans(plans)
        config = check_configuration(out, self.configuration_name)
        replaced = self.configuration_manager.network_arch_class_name.rsplit(".", 1)[-1]
        self.print_to_log_file(
            f"KAF: replaced the {replaced} of {self.plans_manager.plans_name} by KAFUNet, keypoint fusion "
            f"{config.to_dict()}"
        )
        return out

    def _use_plans(self, plans: dict[str, Any]) -> None:
        """Replace the plans everywhere: in the managers, and in what checkpoints store."""
        self.my_init_kwargs["plans"] = plans
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)

    def initialize(self) -> None:
        """See nnU-Net.

        Raises:
            KAFError: The configuration's data are not preprocessed.
        """
        check_preprocessed(self)
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """See nnU-Net; classes that plans name are looked up in a list and never imported by their name.

        Raises:
            KAFError: The plans name another network or operator, or the network cannot be built.
        """
        return build_network(
            configuration_manager.configuration["architecture"],
            num_input_channels,
            num_output_channels,
            where=f"plans {plans_manager.plans_name}",
            deep_supervision=enable_deep_supervision,
        )

    def do_split(self) -> tuple[list[str], list[str]]:
        """See nnU-Net; a dataset with fewer than five cases is split so that each fold leaves one patient out.

        Raises:
            KAFError: All cases are of one patient, or the fold does not exist.
        """
        split_or_say_why(self)
        split: tuple[list[str], list[str]] = super().do_split()
        return split

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's optimiser; its schedule with a warm-up."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, WarmupPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.num_epochs // 20)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See nnU-Net.

        Raises:
            KAFError: An image of the batch holds NaN or infinite values; training on would only spread them.
        """
        out: dict[str, Any] = super().train_step(batch)
        if not np.isfinite(out["loss"]):
            bad = [
                key for key, image in zip(batch["keys"], batch["data"], strict=True) if not torch.isfinite(image).all()
            ]
            if bad:
                raise KAFError(
                    f"epoch {self.current_epoch}: the preprocessed images of {bad} in "
                    f"{self.preprocessed_dataset_folder} hold NaN or infinite values. Repair or remove these cases "
                    "and preprocess again; the checkpoints written so far are untouched."
                )
        return out

    def on_train_start(self) -> None:
        """Initialise a new training from its pretraining checkpoint, then see nnU-Net.

        A trainer that is initialised already continues a training (`--c`) or was given `-pretrained_weights`.
        """
        if self.local_rank == 0:
            sweep(Path(self.output_folder), older_than=0)
        if not self.was_initialized:
            self.initialize()
            self._record(self._load_pretraining())
        elif self.current_epoch == 0:
            self._record(LoadReport(None, None, {}, "weights given to nnU-Net with -pretrained_weights"))
        super().on_train_start()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """See nnU-Net.

        Raises:
            KAFError: The weights have diverged: every further epoch, and every checkpoint of it, would be worthless.
        """
        super().on_train_epoch_end(train_outputs)
        bad = diverged(unwrapped(self.network).state_dict())
        if bad:
            raise KAFError(
                f"epoch {self.current_epoch}: the weights have diverged: found NaN, infinite or absurd values in "
                f"{len(bad)} tensor(s), the first is {bad[0]}; expected finite weights below {LARGEST_WEIGHT:g}. The "
                f"checkpoints in {self.output_folder} are from before. Look at the images for extreme values, lower "
                "initial_lr in a trainer of your own, or train in full precision (nnUNet_compile=f, -device cpu)."
            )

    def on_epoch_start(self) -> None:
        """See nnU-Net."""
        super().on_epoch_start()
        self._epoch_start = time.monotonic()

    def on_epoch_end(self) -> None:
        """See nnU-Net; logs when the training is expected to end."""
        super().on_epoch_end()
        self._epoch_seconds.append(time.monotonic() - self._epoch_start)
        left = self.num_epochs - self.current_epoch
        if left > 0:
            end = expected_end(self._epoch_seconds, left, datetime.now())
            self.print_to_log_file(f"KAF: expected end of the training: {end}")

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """See nnU-Net, which would run what a file holds; so the file is looked at before.

        Raises:
            KAFError: The file is missing, damaged, unsafe, or of another training.
        """
        if isinstance(filename_or_checkpoint, str):
            content = load_safely(filename_or_checkpoint, what="checkpoint of a training", fix=_CONTINUE_FIX)
            if not self.was_initialized:
                self.initialize()
            self._check_checkpoint(content, filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)

    def _check_checkpoint(self, content: dict[str, Any], where: str) -> None:
        """Raise a KAFError for a checkpoint that nnU-Net could not take."""
        check(ContinuedTraining, content, where, _CONTINUE_FIX)
        weights = check_weights(content["network_weights"], f"{where}: network_weights", _CONTINUE_FIX)
        ours = {k: tuple(v.shape) for k, v in unwrapped(self.network).state_dict().items()}
        theirs = {k.removeprefix("module."): tuple(v.shape) for k, v in weights.items()}
        differ = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differ:
            raise KAFError(
                f"{where}: network_weights: found another network than that of the plans: {len(differ)} tensor(s) "
                f"differ, the first is {differ[0]} ({theirs.get(differ[0])}, expected {ours.get(differ[0])}). "
                f"{_CONTINUE_FIX}"
            )

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, written beside the old one and then renamed: a full disk never costs the last one.

        Raises:
            KAFError: The file could not be written.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)  # writes nothing
            return
        with replacing(filename, "Free some disk space, then continue with --c.") as temporary:
            super().save_checkpoint(str(temporary))

    def _load_pretraining(self) -> LoadReport:
        path, why = self._find_pretraining()
        if path is None:
            return LoadReport(None, None, {}, why)
        report = load_encoder(unwrapped(self.network), path, self.plans_manager.plans, self.configuration_name)
        return replace(report, note=f"{why}; {report.note}")

    def _find_pretraining(self) -> tuple[Path | None, str]:
        """The checkpoint to start from, and why.

        Raises:
            KAFError: The pretraining of this fold is unfinished.
        """
        if not self.use_pretraining:
            return None, f"{type(self).__name__} never loads a pretraining checkpoint"
        chosen = os.environ.get(PRETRAINED_VARIABLE, "").strip()
        if chosen.lower() == "none":
            return None, f"{PRETRAINED_VARIABLE}=none"
        if chosen:
            return Path(chosen).expanduser(), f"{PRETRAINED_VARIABLE} names it"
        name, plans = self.plans_manager.dataset_name, self.plans_manager.plans_name
        for fold in (self.fold, "all"):
            path = pretraining_folder(name, plans, self.configuration_name, fold) / "checkpoint_final.pth"
            if path.is_file():
                seen = "its pretraining saw the images of this fold's validation cases, without labels"
                return path, "found at its standard place" + (f"; {seen}" if fold == "all" != self.fold else "")
            self._check_finished(path, fold)
        base = pretraining_folder(name, plans, self.configuration_name, self.fold)
        others = sorted(str(p) for p in base.parent.parent.glob("KAFPretraining__*/fold_*/checkpoint_final.pth"))
        hint = f"; checkpoints of other plans, configurations or folds: {others}" if others else ""
        kept = sorted(str(p) for fold in (self.fold, "all") for p in base.parent.glob(f"fold_{fold}/*.pth.bak-*"))
        hint += f"; set aside by a later run that did not finish: {kept}" if kept else ""
        return None, f"no pretraining checkpoint in {base} or fold_all{hint}"

    def _check_finished(self, final: Path, fold: int | str) -> None:
        latest = final.with_name("checkpoint_latest.pth")
        if latest.is_file():
            manager = self.plans_manager
            what = ["--dataset", manager.dataset_name, "-c", self.configuration_name, "-p", manager.plans_name]
            command = shlex.join(["kaf-pretrain", *what, "--fold", str(fold), "--continue"])
            whose = "this fold" if fold == self.fold else "all folds"
            raise KAFError(
                f"the pretraining of {whose} is unfinished: found {latest} and no {final.name}. Finish it "
                f"({command}, with the options it was started with), or set {PRETRAINED_VARIABLE}=none to start from "
                "scratch."
            )

    def _record(self, report: LoadReport) -> None:
        if self.local_rank != 0:
            return
        if report.source is None:
            self.print_to_log_file(f"KAF: no pretraining checkpoint is loaded: {report.note}")
        else:
            self.print_to_log_file(
                f"KAF: {sum(report.tensors.values())} tensors {report.tensors} initialised from {report.source} "
                f"(SHA-256 {report.sha256}): {report.note}" + (f"; adapted: {report.adapted}" if report.adapted else "")
            )
        record = Path(self.output_folder) / INITIALIZATION_FILE
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


class nnUNetTrainerKAFScratch(nnUNetTrainerKAF):  # noqa: N801
    """The same network and schedule, never from a pretraining checkpoint."""

    use_pretraining: ClassVar[bool] = False


def check_preprocessed(trainer: nnUNetTrainer) -> None:
    """Check that the data of a training are there; for any trainer of nnU-Net's.

    Raises:
        KAFError: They are not.
    """
    folder, plans = trainer.preprocessed_dataset_folder, trainer.plans_manager
    if folder is not None and not os.path.isdir(folder):
        raise KAFError(
            f"the preprocessed data {folder} do not exist. Run: nnUNetv2_preprocess -d "
            f"{int(plans.dataset_name[7:10])} -plans_name {plans.plans_name} -c {trainer.configuration_name}"
        )


def split_or_say_why(trainer: nnUNetTrainer) -> None:
    """Write the split of a dataset with fewer than five cases, unless there is one; for any trainer of nnU-Net's.

    Raises:
        KAFError: The data are not preprocessed, all cases are of one patient, or the fold does not exist.
    """
    check_preprocessed(trainer)
    if trainer.fold == "all":
        return
    if trainer.dataset_class is None:
        trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    folder = Path(trainer.preprocessed_dataset_folder_base)
    cases = trainer.dataset_class.get_identifiers(trainer.preprocessed_dataset_folder)
    message = split_few_cases(folder, cases)
    if message is not None:
        trainer.print_to_log_file(f"KAF: {message}")
    check_fold(folder, cases, trainer.fold)
    left_out = cases_of_no_fold(folder, cases) if (folder / SPLITS_FILE).is_file() else None
    if left_out is not None:
        trainer.print_to_log_file(f"KAF: WARNING: {left_out}.")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile."""
    inner: nn.Module = getattr(network, "module", network)
    unwrapped: nn.Module = getattr(inner, "_orig_mod", inner)
    return unwrapped


def _kaf_block(plans: dict[str, Any], configuration: str) -> Any:
    return PlansManager(plans).get_configuration(configuration).network_arch_init_kwargs["kaf"]


def __getattr__(name: str) -> type:
    """The variants `_1epoch` and `_<N>epochs` of the trainers here."""
    return schedule_variant(globals(), name)
