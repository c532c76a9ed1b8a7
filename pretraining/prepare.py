"""Everything that happens before the first step: which images, their check, their keypoints, who is held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from tqdm import tqdm

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import sweep
from pretraining import distributed
from pretraining.config import PretrainConfig
from pretraining.data.bad_images import BadImages, read_whole
from pretraining.data.cases import collect_images
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import group_by_patient
from pretraining.monitoring.monitor import PAIRS_AT_ONCE, STREAM, hold_out
from pretraining.pairs.keypoint_cache import KeypointCache
from pretraining.pairs.loader import PairLoader
from pretraining.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images to use, and how to prepare them.

    Attributes:
        fold: Validation patients of this fold are left out; `"all"` uses every case.
        datasets: Further datasets, whose raw training images are used.
        folders: Folders of unlabelled images in nnU-Net's naming.
        skip_bad: Go on without the files that cannot be used.
        num_workers: Threads that prepare images and pairs.
    """

    fold: int | str = 0
    datasets: Sequence[str] = ()
    folders: Sequence[Path] = ()
    skip_bad: bool = False
    num_workers: int = 1


@dataclass(frozen=True)
class Data:
    """What the run draws from.

    Attributes:
        loader: Makes the training pairs.
        held_out: Makes pairs of cases that are not trained on; of training cases if there are too few.
        cases: The training cases.
        held_out_cases: Cases that are measured on and not trained on; none if there are too few patients.
    """

    loader: PairLoader
    held_out: PairLoader
    cases: tuple[str, ...]
    held_out_cases: tuple[str, ...]


def prepare(task: Task, config: PretrainConfig, options: DataOptions, device: torch.device, batch_size: int) -> Data:
    """Collect and check the images, detect keypoints where that has not been done, and build the loaders.

    Process 0 does the work, the others wait and find the files.

    Args:
        task: Dataset, plans and configuration.
        config: Options of the objectives.
        options: Which images.
        device: Where keypoints are detected, and views are rendered if it is an accelerator.
        batch_size: Pairs per batch, over all processes.

    Raises:
        KAFError: Images are missing or bad.
    """
    if distributed.rank() > 0:
        distributed.barrier()
    try:
        bad = BadImages()
        images, cases = collect_images(
            task,
            options.datasets,
            options.folders,
            fold=options.fold,
            patient_pattern=config.patient_pattern,
            bad=bad,
            num_workers=options.num_workers,
        )
        keypoints = keypoint_cache(task)
        cases = cache_keypoints(images, cases, keypoints, task.channels, bad, options.num_workers, device)
        bad.finish(options.skip_bad)
        if not cases:
            raise KAFError("All images were skipped as bad (see the warnings above); nothing is left to train on.")
    finally:
        # Also after an error: the others must not wait for ever, and will find the same error themselves.
        if distributed.rank() == 0:
            distributed.barrier()
    patients = group_by_patient(cases, config.patient_pattern)
    training, held_out = hold_out(patients, config.seed)
    _announce(patients, training, held_out)

    def loader(group: dict[str, tuple[str, ...]], size: int, stream: int, rank: int, world_size: int) -> PairLoader:
        return PairLoader(
            images, keypoints, group, task.patch_size, task.spacing, size, config,
            options.num_workers, rank, world_size, stream, render_later=device.type == "cuda",
        )  # fmt: skip

    return Data(
        loader(training, batch_size, 0, distributed.rank(), distributed.world_size()),
        loader(held_out or training, PAIRS_AT_ONCE, STREAM, 0, 1),
        tuple(case for group in training.values() for case in group),
        tuple(case for group in held_out.values() for case in group),
    )


def keypoint_cache(task: Task) -> KeypointCache:
    """The keypoints of a task's images, next to nnU-Net's preprocessed images."""
    folder = task.image_folder.with_name(f"{task.image_folder.name}_kaf_keypoints")
    return KeypointCache(folder, task.layers, task.patch_size, task.spacing)


def cache_keypoints(
    images: PreprocessedImages,
    cases: Sequence[str],
    cache: KeypointCache,
    channels: int,
    bad: BadImages,
    num_workers: int,
    device: torch.device,
) -> list[str]:
    """Read and check every case that has no cached keypoints yet, and detect them.

    Returns:
        The usable cases; `bad` knows the others.

    Raises:
        KAFError: A cached file is damaged, or cannot be written.
    """
    sweep(cache.folder)
    files = {case: cache.path(case, images.path(case)) for case in cases}
    missing = [case for case, file in files.items() if not file.is_file()]
    new = set(missing)
    cache.verify((files[case] for case in cases if case not in new), num_workers)
    if missing:
        logger.info(
            "Detecting the keypoints of %d of %d cases; they are kept in %s.", len(missing), len(cases), cache.folder
        )

    # Older torch lacks an interpolation on Apple's GPUs; others have room for one volume at a time.
    detector = torch.device("cpu") if device.type == "mps" else device
    one_at_a_time = nullcontext() if detector.type == "cpu" else Lock()

    def detect(case: str) -> str | None:
        image = read_whole(images, case, channels, bad)
        if image is None:
            return case
        with one_at_a_time:
            cache.create(case, images.path(case), image, detector)
        return None

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(detect, missing)
        unusable = set(
            tqdm(
                results,
                total=len(missing),
                desc="keypoints",
                leave=False,
                unit="image",
                disable=None if missing else True,  # None: on a terminal only
            )
        )
    cache.remove_outdated(cache.path(case, images.path(case)) for case in missing if case not in unusable)
    return [case for case in cases if case not in unusable]


def _announce(
    patients: dict[str, tuple[str, ...]], training: dict[str, tuple[str, ...]], held_out: dict[str, tuple[str, ...]]
) -> None:
    """Log how many patients there are and which are held out."""
    logger.info(
        "%d image(s) of %d patient(s); %d patient(s) with several images.",
        sum(map(len, patients.values())),
        len(patients),
        sum(len(cases) > 1 for cases in patients.values()),
    )
    if held_out:
        logger.info("Held out to measure on, not trained on: %s.", ", ".join(sorted(held_out)))
    else:
        logger.info(
            "With %d patient(s) none is held out: recall and the like are measured on training cases.", len(training)
        )
