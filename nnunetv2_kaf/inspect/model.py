"""The folder of an nnU-Net training, read without running code from its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import is_kaf, read_description, read_plans, resolve_configuration
from nnunetv2_kaf.safe_load import load_safely, read_json
from nnunetv2_kaf.schema_check import Record, brief, check

FINAL = "checkpoint_final.pth"
INITIALIZATION_FILE = "kaf_initialization.json"
CURVES = ("train_losses", "val_losses", "ema_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps")


@dataclass(frozen=True)
class Fold:
    """One training of a model.

    Attributes:
        name: A number or "all".
        folder: Its place.
        weights: State dict of the network.
        logging: What nnU-Net recorded per epoch, by the names in `CURVES`; empty if it recorded nothing.
        initialization: What the training started from, as nnUNetTrainerKAF recorded it; empty for other trainers.
    """

    name: str
    folder: Path
    weights: Mapping[str, Tensor]
    logging: Mapping[str, Sequence[float]]
    initialization: Mapping[str, Any]

    @property
    def seconds(self) -> float | None:
        """Seconds of all epochs, without pauses; None if they were not recorded."""
        starts, ends = (self.logging.get(f"epoch_{word}_timestamps", []) for word in ("start", "end"))
        return float(sum(b - a for a, b in zip(starts, ends, strict=False))) if ends else None


@dataclass(frozen=True)
class TrainedModel:
    """A model folder of nnU-Net.

    Attributes:
        folder: Holds plans.json, dataset.json and the folds.
        plans: Those saved with the model.
        dataset_json: The one saved with the model.
        configuration: The one that was trained.
        trainer: Its class name.
        mirror_axes: Axes of test-time mirroring, `None` for none.
        folds: One fold or more.
    """

    folder: Path
    plans: Mapping[str, Any]
    dataset_json: Mapping[str, Any]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...] | None
    folds: tuple[Fold, ...]

    @property
    def is_kaf(self) -> bool:
        """Whether the network has keypoint layers."""
        return is_kaf(self.plans, self.configuration)

    @property
    def is_cascade(self) -> bool:
        """Whether the network also needs the prediction of an earlier stage."""
        return resolve_configuration(self.plans, self.configuration).get("previous_stage") is not None

    def manager(self) -> PlansManager:
        """The plans in nnU-Net's form."""
        return PlansManager(dict(self.plans))

    def build(self, fold: Fold | None) -> nn.Module:
        """The network with the weights of a fold, in evaluation mode.

        Args:
            fold: One of `folds`; None = fresh weights, as at the start of a training from scratch.

        Raises:
            KAFError: The weights do not belong to the network that the plans describe.
        """
        manager = self.manager()
        configuration = manager.get_configuration(self.configuration)
        channels = determine_num_input_channels(manager, configuration, dict(self.dataset_json))
        network = build_network(
            resolve_configuration(self.plans, self.configuration)["architecture"],
            channels,
            manager.get_label_manager(dict(self.dataset_json)).num_segmentation_heads,
            where=f"{self.folder / 'plans.json'}, configuration {self.configuration}",
            deep_supervision=False,
            initialize=fold is None,
        )
        if fold is None:
            return network.eval()
        try:
            network.load_state_dict(dict(fold.weights))
        except RuntimeError as error:
            raise KAFError(
                f"{fold.folder}: its weights do not fit the {type(network).__name__} of {self.folder / 'plans.json'} "
                f"({str(error).splitlines()[-1].strip()}). The trainer {self.trainer} builds another network than its "
                "plans describe, which is not read here; use a model whose plans name its network."
            ) from error
        return network.eval()


def open_model(folder: str | Path, folds: Sequence[str] | None = None, checkpoint: str = FINAL) -> TrainedModel:
    """Read a model folder of nnU-Net, of `nnUNetTrainerKAF` or any trainer whose plans name its network.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION in nnUNet_results.
        folds: Names of the folds; None = all that have the checkpoint.
        checkpoint: File name in the folds' folders.

    Raises:
        KAFError: No such folder, no plans, no finished fold, or a file that cannot be read safely.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise KAFError(f"{folder} does not exist or is no folder. Give a model folder: TRAINER__PLANS__CONFIGURATION.")
    if not (folder / "plans.json").is_file():
        raise KAFError(
            f"{folder} holds no plans.json, so it is no model folder. Give the folder TRAINER__PLANS__CONFIGURATION in "
            "nnUNet_results, with plans.json, dataset.json and fold_*."
        )
    plans, dataset_json = read_plans(folder / "plans.json"), read_description(folder / "dataset.json")
    # One after the other: a checkpoint also holds the state of the optimiser, which is not kept.
    read = [_read_fold(file) for file in _fold_files(folder, folds, checkpoint)]
    _, about = read[0]
    resolve_configuration(plans, about.init_args.configuration, str(folder / "plans.json"))
    axes = about.inference_allowed_mirroring_axes
    return TrainedModel(
        folder=folder,
        plans=plans,
        dataset_json=dataset_json,
        configuration=about.init_args.configuration,
        trainer=about.trainer_name,
        mirror_axes=None if axes is None else tuple(axes),
        folds=tuple(fold for fold, _ in read),
    )


class _InitArgs(Record):
    """What is used of the arguments of a trainer."""

    configuration: str


class _Checkpoint(Record):
    """What is used of a checkpoint of nnU-Net, besides the curves."""

    network_weights: dict[str, Tensor]
    trainer_name: str
    init_args: _InitArgs
    inference_allowed_mirroring_axes: tuple[int, ...] | list[int] | None = None


def _read_fold(file: Path) -> tuple[Fold, _Checkpoint]:
    """Read a checkpoint of a training.

    Raises:
        KAFError: It cannot be read safely, or an entry is missing or of another type.
    """
    content = load_safely(file, what="checkpoint of an nnU-Net training")
    fix = "Give a model that nnU-Net has trained, or copy the file again."
    about = check(_Checkpoint, content, str(file), fix)
    record = file.parent / INITIALIZATION_FILE
    start = read_json(record, "Restore the file.") if record.is_file() else {}
    if not isinstance(start, dict):
        raise KAFError(f"{record}: found a {type(start).__name__}, expected a JSON object. Restore the file.")
    logging = content.get("logging")
    fold = Fold(
        name=file.parent.name.removeprefix("fold_"),
        folder=file.parent,
        weights=about.network_weights,
        logging={name: _curve(logging, name, file) for name in CURVES} if isinstance(logging, dict) else {},
        initialization=start,
    )
    return fold, about


def _curve(logging: Mapping[str, Any], name: str, file: Path) -> list[float]:
    """One number per epoch; empty if the trainer records none.

    Raises:
        KAFError: It holds something else than numbers.
    """
    try:
        return [float(value) for value in logging.get(name, [])]
    except (TypeError, ValueError) as error:
        raise KAFError(
            f"{file}: logging.{name}: found {brief(logging[name])}, expected numbers. Copy the file again."
        ) from error


def _fold_files(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[Path]:
    """The checkpoints to read.

    Raises:
        KAFError: There are none.
    """
    names = sorted((p.name.removeprefix("fold_") for p in folder.glob("fold_*") if p.is_dir()), key=_natural)
    files = [folder / f"fold_{name}" / checkpoint for name in (names if folds is None else folds)]
    # "all" was trained on the others' validation cases: in an ensemble only if it is asked for
    if folds is None and len(files) > 1:
        files = [file for file in files if file.parent.name != "fold_all"]
    missing = [file for file in files if not file.is_file()]
    if folds is not None and missing:
        raise KAFError(f"{missing[0]} does not exist; folds found in {folder}: {names}. Choose with --folds.")
    found = [file for file in files if file.is_file()]
    if not found:
        others = sorted({p.name for p in folder.glob("fold_*/checkpoint_*.pth")})
        hint = f"Found {', '.join(others)}: choose with --checkpoint." if others else "Finish its training first."
        raise KAFError(f"{folder} has no fold with {checkpoint} (folds: {names or 'none'}). {hint}")
    return found


def _natural(name: str) -> tuple[int, str]:
    """Sorts "2" before "10" and "all" last."""
    return (int(name), "") if re.fullmatch(r"\d+", name) else (10**9, name)
