"""A folder of a pretraining, opened for a report: its record, its model, and pairs as the model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.safe_load import load_safely
from nnunetv2_kaf.schema_check import check
from nnunetv2_kaf.schema_checkpoints import FinishedRun, RunCheckpoint
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.checkpoint import FINAL, FORMAT, LATEST, load_latest
from pretraining.config import PretrainConfig
from pretraining.data.bad_images import BadImages
from pretraining.data.case import Case
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import group_by_patient
from pretraining.data.preprocess import cache_folder, cached_file
from pretraining.monitoring.monitor import PAIRS_AT_ONCE, STREAM
from pretraining.objectives.model import PretrainingModel
from pretraining.pairs.loader import PairLoader
from pretraining.prepare import cache_keypoints, keypoint_cache
from pretraining.run import build_state
from pretraining.task import Task, resolve_task

Array = Any
WORKERS = 2


@dataclass(frozen=True)
class Run:
    """What a folder of a pretraining says about it.

    Attributes:
        folder: Folder of the run.
        config: Options of the objectives.
        identity: dataset, plans, configuration, fold, cases, ...
        history: One record per epoch.
        weights: Weights of the full network; None while the run is not finished.
    """

    folder: Path
    config: PretrainConfig
    identity: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    weights: Mapping[str, Any] | None

    @property
    def held_out(self) -> Sequence[str]:
        """Cases that were measured on and not trained on; none if there were too few patients."""
        held_out: Sequence[str] = self.identity.get("held_out", ())
        return held_out


@dataclass(frozen=True)
class Described:
    """Some pairs of views, and what the model makes of them. The first B views are the first sides.

    Attributes:
        views: (2B, *V), first channel.
        coords: (2B, K, D).
        valid: (2B, K).
        matches: (B, K).
        descriptors: (2B, K, F).
        vectors: (2B, E).
        cases: 2B identifiers.
    """

    views: Array
    coords: Array
    valid: Array
    matches: Array
    descriptors: Array
    vectors: Array
    cases: tuple[str, ...]


def open_run(folder: Path) -> Run:
    """Read what a folder of a pretraining holds.

    Raises:
        KAFError: Its checkpoint cannot be read, or is of another kind.
    """
    final = folder / FINAL
    if final.is_file():
        checkpoint = read_checkpoint(final)
        record = dict(checkpoint["pretraining"])
        check(FinishedRun, record, f"{final}: pretraining", "Run kaf-pretrain again.")
        config = PretrainConfig.from_dict(record["config"])
        return Run(folder, config, record, record.get("history", []), checkpoint["network_weights"])
    latest = folder / LATEST
    checkpoint = load_safely(latest, what="checkpoint of kaf-pretrain")
    if checkpoint.get("format") != FORMAT:
        raise KAFError(f"{latest} is not a checkpoint of kaf-pretrain. Give the folder of a pretraining.")
    check(RunCheckpoint, checkpoint, str(latest), "Copy the file again, or run kaf-pretrain again.")
    config = PretrainConfig.from_dict(checkpoint["config"])
    return Run(folder, config, checkpoint["identity"], checkpoint["history"], None)


def task_of(run: Run) -> Task:
    """Dataset and plans of the run.

    Raises:
        KAFError: They are not where nnU-Net's variables say.
    """
    identity = run.identity
    return resolve_task(identity["dataset"], identity["configuration"], identity["plans"], run.config.network)


def load_model(run: Run, task: Task, device: torch.device) -> tuple[PretrainingModel, str]:
    """The encoder, with the heads if the last save is there; and a note for the page.

    Raises:
        KAFError: The weights do not fit the dataset's plans.
    """
    why = "is gone"
    with torch.random.fork_rng(devices=[]):  # a save also restores the state of the random generator
        state = build_state(task, run.config, device)
        if (run.folder / LATEST).is_file():
            try:
                load_latest(run.folder / LATEST, state, run.config, {})
            except KAFError as error:
                if run.weights is None:
                    raise
                why = f"cannot be used ({error})"
            else:
                return state.model.eval(), ""
    assert run.weights is not None
    try:
        state.network.load_state_dict(dict(run.weights))
    except RuntimeError as error:
        raise KAFError(
            f"{run.folder / FINAL} does not fit the plans {task.plans_name} of {task.dataset_name} "
            f"({str(error).splitlines()[-1].strip()}); were they changed?"
        ) from error
    model = state.model.eval()
    # without the trained heads a keypoint is described by the features of all levels
    model.descriptor_head = model.bottleneck_head = None
    return model, (
        f"{LATEST}, which holds the heads, {why}: keypoints are compared by the encoder's features, global vectors "
        "are pooled bottlenecks."
    )


def pairs_of(run: Run, task: Task, device: torch.device) -> tuple[PairLoader, PairLoader]:
    """Pairs of the patients that the run held out, of training patients if of none; and pairs of all its patients.

    Raises:
        KAFError: Images are missing or bad.
    """
    everything = [*run.identity["cases"], *run.held_out]
    files = {name: cached_file(cache_folder(task), Case.of(name)) for name in everything if not Case.of(name).is_own}
    further = {name: file for name, file in files.items() if file is not None}
    images = PreprocessedImages(task.image_folder, task.preprocess_command, further)
    gone = [name for name in everything if name not in further and (name in files or not images.path(name).is_file())]
    if gone:
        raise KAFError(
            f"{len(gone)} preprocessed images of the pretraining are gone from {task.image_folder.parent}: "
            f"{', '.join(gone[:5])}. Preprocess them again: {task.preprocess_command} (of other sources: the same "
            "kaf-pretrain command with --continue)."
        )
    keypoints, bad = keypoint_cache(task), BadImages()
    usable = cache_keypoints(images, everything, keypoints, task.channels, bad, WORKERS, device)
    bad.finish(skip_bad=True)

    def loader(cases: Iterable[str]) -> PairLoader:
        patients = group_by_patient(cases, run.config.patient_pattern)
        return PairLoader(
            images, keypoints, patients, task.patch_size, task.spacing, PAIRS_AT_ONCE, run.config, WORKERS,
            stream=STREAM, render_later=device.type == "cuda",
        )  # fmt: skip

    return loader([case for case in usable if case in set(run.held_out or everything)]), loader(usable)


@torch.no_grad()
def describe(loader: PairLoader, model: PretrainingModel, pairs: int, device: torch.device) -> Described:
    """Make pairs and pass them through a model.

    Args:
        loader: Loader of the patients to show.
        model: Model in evaluation mode.
        pairs: How many at least.
        device: Device of the model.
    """
    parts: list[tuple[Any, ...]] = []
    for step in range(-(-pairs // loader.batch_size)):
        batch = loader.batch(step).to(device)
        views = batch.rendered(loader.patch_size)
        descriptors, vectors = model.describe(views, batch.keypoints)
        arrays = (views[:, 0], *batch.keypoints, descriptors.float(), vectors.float())
        size = len(batch.matches)
        first, second = ([a[:size].cpu().numpy() for a in arrays], [a[size:].cpu().numpy() for a in arrays])
        parts.append((first, second, batch.matches.cpu().numpy(), batch.cases[:size], batch.cases[size:]))
    joined = [np.concatenate([part[0][i] for part in parts] + [part[1][i] for part in parts]) for i in range(5)]
    cases = tuple(case for side in (3, 4) for part in parts for case in part[side])
    return Described(
        views=joined[0],
        coords=joined[1],
        valid=joined[2],
        matches=np.concatenate([part[2] for part in parts]),
        descriptors=joined[3],
        vectors=joined[4],
        cases=cases,
    )
