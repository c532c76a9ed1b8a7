"""The numbers of every epoch for TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nnunetv2_kaf.errors import KAFError
from pretraining.monitoring.metrics import GROUPS

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ENABLED = "nnUNet_wandb_enabled"
WANDB_PROJECT = "nnUNet_wandb_project"
WANDB_MODE = "nnUNet_wandb_mode"


class Tracker(Protocol):
    """Takes the record of every epoch."""

    def log(self, record: Mapping[str, float], epoch: int) -> None:
        """Take the numbers of an epoch; 0 is the state before training."""

    def close(self) -> None:
        """Write what is not written yet; nothing is logged afterwards."""


def open_trackers(folder: Path, options: Mapping[str, Any], resume: bool) -> Tracker:
    """Open everything that follows a run: TensorBoard always, Weights & Biases where nnU-Net's variables ask for it.

    The variables are those of nnU-Net's own training: `nnUNet_wandb_enabled` (0, False, false, 1, True or true;
    default 0), `nnUNet_wandb_project` (default nnunet), `nnUNet_wandb_mode` (default online).

    In a distributed run only one process may do this.

    Args:
        folder: Folder of the run; TensorBoard's event files go to its subfolder `tensorboard`.
        options: Shown by Weights & Biases as the configuration of the run.
        resume: This run goes on where an earlier one in `folder` was interrupted; epochs that are done again do not
            appear twice. Otherwise the events of an earlier run in `folder` are hidden.

    Returns:
        A tracker whose `Tracker.log` and `Tracker.close` never fail: the first failure of a tool is a warning, and the
        tool gets nothing more.

    Raises:
        KAFError: A variable has a bad value, or Weights & Biases is wanted but cannot be started.
    """
    trackers: dict[str, Tracker] = {"TensorBoard": TensorBoardTracker(folder / TENSORBOARD_FOLDER, resume)}
    if wandb_enabled():
        trackers["Weights & Biases"] = WandbTracker(folder, options, resume)
    return TolerantTrackers(trackers)


def check_trackers() -> None:
    """Check what `open_trackers` needs, without opening anything.

    Raises:
        KAFError: A variable has a bad value, or Weights & Biases is wanted and not installed.
    """
    if wandb_enabled():
        _import_wandb()


class TolerantTrackers:
    """Several trackers as one that never raises: a full disk or a network must not end a run that can go on.

    Args:
        trackers: Each under the name that warnings use.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        """Start with all of them."""
        self._trackers = dict(trackers)

    def log(self, record: Mapping[str, float], epoch: int) -> None:
        """Pass the record on to those that have not failed."""
        for name, tracker in tuple(self._trackers.items()):
            try:
                tracker.log(record, epoch)
            except Exception as error:  # whatever a third party's tool or its network raises
                self._drop(name, error, f"No epoch from {epoch} on is logged there until the run is continued.")

    def close(self) -> None:
        """Close all, those that failed included."""
        for name in tuple(self._trackers):
            tracker = self._trackers.pop(name)
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", name, _describe(error))

    def _drop(self, name: str, error: Exception, consequence: str) -> None:
        """Warn, and let the tool release its files and threads if it still can."""
        logger.warning("%s failed: %s. %s", name, _describe(error), consequence)
        tracker = self._trackers.pop(name)
        try:
            tracker.close()
        except Exception as second:
            logger.debug("%s could not be closed either: %s", name, _describe(second))


class TensorBoardTracker:
    """Event files for TensorBoard.

    Args:
        folder: Folder of the event files; made at the first `log`.
        resume: Whether the events of earlier epochs in `folder` are to be kept in sight.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        """Open nothing yet: only the first record says at which epoch a continued run goes on."""
        self._folder = folder
        self._resume = resume
        self._writer: Any = None

    def log(self, record: Mapping[str, float], epoch: int) -> None:
        """Write the numbers of an epoch to disk."""
        if self._writer is None:
            # Slow, and of no use to whoever imports this module for --help.
            from torch.utils.tensorboard import SummaryWriter

            # The session start that this writes hides all events of earlier sessions from that step on. TensorBoard
            # takes the first start of a folder for no restart, so that a new run needs one as well.
            self._writer = SummaryWriter(str(self._folder), purge_step=epoch if self._resume else 0)
        for tag, value in tagged(record).items():
            self._writer.add_scalar(tag, value, epoch)
        # An epoch is long: show it now, and let a full disk be noticed now.
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, with the environment variables and the continuing of nnU-Net's own logger.

    Args:
        folder: Folder of the run; the tool writes to its subfolder `wandb`.
        options: The configuration to show.
        resume: Go on with the latest run in `folder`, if there is one.

    Raises:
        KAFError: If wandb is not installed or does not start.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], resume: bool) -> None:
        """Start the run."""
        wandb = _import_wandb()
        mode = os.environ.get(WANDB_MODE, "online")
        try:
            self._run = wandb.init(
                project=os.environ.get(WANDB_PROJECT, "nnunet"),
                dir=str(folder),
                id=latest_wandb_id(folder) if resume else None,
                mode=mode,
                resume="allow" if resume else "never",
            )
            # A continued run may change the options that do not change the result.
            self._run.config.update(dict(options), allow_val_change=True)
        except Exception as error:
            raise KAFError(
                f"Weights & Biases ({WANDB_ENABLED} is set) did not start with {WANDB_MODE}={mode}: "
                f"{_describe(error)}. Set {WANDB_MODE}=offline to log without a network or an account, or "
                f"{WANDB_ENABLED}=0."
            ) from error
        self._first = int(self._run.step) if resume else 0

    def log(self, record: Mapping[str, float], epoch: int) -> None:
        """Send the numbers of an epoch, unless an earlier session did."""
        if epoch >= self._first:
            # Committed: an epoch must not wait for the next one, before which the run may be killed.
            self._run.log(tagged(record), step=epoch, commit=True)

    def close(self) -> None:
        """Mark the run as finished."""
        self._run.finish()


def tagged(record: Mapping[str, float]) -> dict[str, float]:
    """Name the finite numbers of a record by group, as in `loss/total`; the epoch is not among them."""
    return {
        f"{GROUPS.get(name, 'other')}/{name}": float(value)
        for name, value in record.items()
        if name != "epoch" and math.isfinite(value)
    }


def wandb_enabled() -> bool:
    """Read `nnUNet_wandb_enabled` as nnU-Net does.

    Raises:
        KAFError: The value is none that nnU-Net knows.
    """
    value = os.environ.get(WANDB_ENABLED, "0")
    if value in ("0", "False", "false"):
        return False
    if value in ("1", "True", "true"):
        return True
    raise KAFError(f"The environment variable {WANDB_ENABLED} is {value!r}; expected 0 (off) or 1 (on).")


def latest_wandb_id(folder: Path) -> str | None:
    """The id of the latest run below `folder`, from the name of its file `run-<id>.wandb`; None without."""
    file = min((folder / "wandb" / "latest-run").glob("run-*.wandb"), default=None)
    return None if file is None else file.stem.removeprefix("run-")


def _import_wandb() -> Any:
    """Import wandb.

    Raises:
        KAFError: If it is not installed.
    """
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise KAFError(_not_installed(f"could not be imported ({error})")) from error
    # Runs leave a folder of this name, which Python imports as an empty package from the working directory.
    if not hasattr(module, "init"):
        raise KAFError(_not_installed("is not installed (only a folder of that name was found)"))
    return module


def _not_installed(found: str) -> str:
    """The message for a missing package."""
    return (
        f"The environment variable {WANDB_ENABLED} asks for Weights & Biases, but the package wandb {found}. Run "
        f"`pip install wandb`, or set {WANDB_ENABLED}=0."
    )


def _describe(error: Exception) -> str:
    """An error as text; many have no message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
