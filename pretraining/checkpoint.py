"""Save, resume and export of a pretraining run. Files hold tensors and primitives only (`weights_only=True`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nnunetv2_kaf.errors import KAFError, one_line
from nnunetv2_kaf.files import replacing, sweep, versions
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.schema_check import brief, check
from nnunetv2_kaf.schema_checkpoints import RunCheckpoint
from nnunetv2_kaf.tensors import check_optimizer, check_weights
from nnunetv2_kaf.weights import save_pretraining_checkpoint
from pretraining.config import PretrainConfig
from pretraining.loop import TrainingState
from pretraining.task import Task

logger = logging.getLogger(__name__)

LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
FORMAT = "nnunetv2_kaf.pretraining_run"
FORMAT_VERSION = 2
_FRESH = "Move the file away to start a new run, or leave out --continue."


def run_identity(
    task: Task, fold: int | str, cases: Sequence[str], batch_size: int, init: str | None = None
) -> dict[str, Any]:
    """What a run is about, besides its options; a run can only be continued as the same one.

    Args:
        task: dataset, plans and configuration.
        fold: The fold whose validation patients are left out.
        cases: Trained on.
        batch_size: Pairs per batch, over all processes.
        init: SHA-256 of the file that the first weights come from.
    """
    return {
        "dataset": task.dataset_name,
        "plans": task.plans_name,
        "configuration": task.configuration,
        "fold": str(fold),
        "patch_size": list(task.patch_size),
        "spacing": list(task.spacing),
        "batch_size": batch_size,
        "cases": list(cases),
        "init": init,
    }


def save_latest(
    path: Path,
    state: TrainingState,
    config: PretrainConfig,
    identity: Mapping[str, Any],
    when_written: Callable[[], None] = lambda: None,
) -> None:
    """Write everything that `load_latest` needs to go on exactly as if the run had never stopped.

    Args:
        path: Path of the file.
        state: State of the run.
        config: Its options.
        identity: What it is about.
        when_written: Called when the file is complete, before it gets its name.

    Raises:
        KAFError: If the file cannot be written; an earlier file at `path` is then untouched.
    """
    checkpoint = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "identity": dict(identity),
        "step": state.step,
        "sums": state.sums,
        "history": state.history,
        "network": state.network.state_dict(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "versions": versions(),
    }
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
        when_written()


def check_latest(path: Path, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
    """Check that `load_latest` will take a file, as far as that can be known without the images.

    Raises:
        KAFError: As `load_latest`.
    """
    _check(load_safely(path, what="checkpoint of an unfinished run", fix=_FRESH), path, config, identity)


def load_latest(
    path: Path, state: TrainingState, config: PretrainConfig, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore a run into a freshly built state.

    Args:
        path: Written by `save_latest`.
        state: Changed in place.
        config: Must equal the saved one, but for what does not change the result.
        identity: Must equal the saved one; what is not known any more may be left out.

    Returns:
        The saved identity.

    Raises:
        KAFError: If the file is unreadable, or belongs to a run with other options or data (the differences are named).
    """
    checkpoint = load_safely(path, what="checkpoint of an unfinished run", fix=_FRESH)
    _check(checkpoint, path, config, identity)
    try:
        state.network.load_state_dict(checkpoint["network"])
        state.model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise KAFError(
            f"{path} was made for another network (were the plans changed?): {one_line(error)} {_FRESH}"
        ) from error
    _restore_optimizer(state.optimizer, checkpoint["optimizer"], path)
    _restore_generators(checkpoint, path)
    try:
        if checkpoint["scaler"]:  # empty: saved on a device that needs no loss scaling
            state.scaler.load_state_dict(checkpoint["scaler"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise KAFError(
            f"{path}: scaler: found {checkpoint['scaler']}, which does not fit ({error}). {_FRESH}"
        ) from error
    state.step = checkpoint["step"]
    state.sums = checkpoint["sums"]
    state.history = checkpoint["history"]
    saved: dict[str, Any] = checkpoint["identity"]
    return saved


def _check(checkpoint: Mapping[str, Any], path: Path, config: PretrainConfig, identity: Mapping[str, Any]) -> None:
    """Check everything in a checkpoint that needs no network."""
    if checkpoint.get("format") != FORMAT:
        raise KAFError(f"{path} is not a checkpoint of an unfinished kaf-pretrain run. {_FRESH}")
    found = checkpoint.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise KAFError(f"{path} was written by another version of kaf-pretrain. {_FRESH}")
    check(RunCheckpoint, checkpoint, str(path), _FRESH)
    try:
        differences = PretrainConfig.from_dict(checkpoint["config"]).differences(config)
    except KAFError as error:
        raise KAFError(f"{path}: config: {error} {_FRESH}") from error
    differences += [
        f"{key}: {_brief(checkpoint['identity'].get(key))} != {_brief(value)}"
        for key, value in identity.items()
        if checkpoint["identity"].get(key) != value
    ]
    if differences:
        raise KAFError(
            f"{path} belongs to a run with other options (saved != now): {'; '.join(differences)}. Continue with the "
            "saved options, or leave out --continue to start a new run (the old files are kept)."
        )
    total = config.epochs * config.iterations
    if checkpoint["step"] > total or len(checkpoint["history"]) > config.epochs + 1:
        raise KAFError(
            f"{path}: found step {checkpoint['step']} and {len(checkpoint['history'])} records, expected at most "
            f"{total} steps and {config.epochs + 1} records. {_FRESH}"
        )
    for part in ("network", "model"):
        check_weights(checkpoint[part], f"{path}: {part}", _FRESH)


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path) -> None:
    """Take the moments; the options are those of this run, which are the saved ones."""
    check_optimizer(saved, optimizer, f"{path}: optimizer", _FRESH)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(saved))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise KAFError(f"{path}: optimizer: it does not fit ({error}). {_FRESH}") from error
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def _restore_generators(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Set the random generators."""
    try:
        torch.set_rng_state(checkpoint["rng_cpu"])
        if len(checkpoint["rng_cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all(checkpoint["rng_cuda"])
    except (RuntimeError, TypeError) as error:
        raise KAFError(
            f"{path}: rng_cpu, rng_cuda: found {brief(checkpoint['rng_cpu'])}, expected the state of a random "
            f"generator ({error}). {_FRESH}"
        ) from error


def export(path: Path, state: TrainingState, task: Task, fold: int | str, pretraining: Mapping[str, Any]) -> None:
    """Write the final checkpoint that the trainer loads (`nnunetv2_kaf.weights` defines what is in it).

    Raises:
        KAFError: If the file cannot be written.
    """
    save_pretraining_checkpoint(
        path,
        state.network,
        num_input_channels=task.channels,
        plans=task.plans,
        configuration=task.configuration,
        dataset_name=task.dataset_name,
        fold=fold,
        pretraining=pretraining,
    )


def tidy(folder: Path) -> None:
    """Remove what a killed run left in its folder.

    Raises:
        KAFError: If it cannot be removed.
    """
    try:
        sweep(folder, older_than=0)
    except OSError as error:
        raise KAFError(f"{folder}: the folder cannot be written to ({error}). Choose with --output.") from error


_FILES = (LATEST, FINAL, "progress.png", "pretraining.log", "nonfinite_batch.json", "tensorboard", "wandb")


def earlier_files(folder: Path) -> list[Path]:
    """What an earlier run has left in its folder."""
    return [path for path in (folder / name for name in _FILES) if path.exists()]


def set_aside(folder: Path) -> dict[Path, Path]:
    """Rename the files of an earlier run in `folder` to `<name>.bak-<time>`: new paths by the old ones.

    Raises:
        KAFError: If a file cannot be renamed; those that were are put back.
    """
    moved: dict[Path, Path] = {}
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for path in earlier_files(folder):
        target, count = path.with_name(f"{path.name}.bak-{stamp}"), 1
        while target.exists():
            target, count = path.with_name(f"{path.name}.bak-{stamp}-{count}"), count + 1
        try:
            os.replace(path, target)
        except OSError as error:
            put_back(moved)
            raise KAFError(f"Could not rename {path} of an earlier run: {error}. Move it away yourself.") from error
        moved[path] = target
    if moved:
        logger.info("An earlier run was found; its files are kept as: %s", ", ".join(map(str, moved.values())))
    return moved


def put_back(moved: Mapping[Path, Path]) -> None:
    """Undo `set_aside`, as far as nothing new is there."""
    for path, target in moved.items():
        with suppress(OSError):
            if not path.exists():
                os.replace(target, path)


def _brief(value: Any) -> str:
    """Shorten a long list for a message."""
    return f"{len(value)} cases {value[:2]}..." if isinstance(value, list) and len(value) > 4 else str(value)
