"""Raw images of further sources, preprocessed with the first dataset's plans by nnU-Net itself, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from tqdm import tqdm

from nnunetv2_kaf.files import append_checksum, check_cache, replacing, shortened, sweep
from nnunetv2_kaf.plans import read_description
from pretraining.data.bad_images import BadImages
from pretraining.data.case import Case
from pretraining.data.raw import RawSource
from pretraining.data.raw_checks import describe, inspect_case
from pretraining.task import Task

logger = logging.getLogger(__name__)

FORMAT = 2
"""Counted up when cached images have to be made again."""
UNUSUAL_SPACING = 2.0
"""A spacing that differs from the plans' by more than this factor is mentioned in the log."""

_FROM_PLANS = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
_FROM_CONFIGURATION = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)


class Preprocessor:
    """Preprocesses raw images as nnU-Net preprocesses the first dataset.

    Args:
        task: The first dataset with its plans and configuration.
    """

    def __init__(self, task: Task) -> None:
        """Resolve nnU-Net's classes once."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self.task = task
        self._plans = PlansManager(dict(task.plans))
        self._configuration = self._plans.get_configuration(task.configuration)
        self._dataset_json = read_description(task.dataset_folder / "dataset.json")
        self._class = self._configuration.preprocessor_class
        self._reader = self._plans.image_reader_writer_class
        self._fingerprint = [
            FORMAT,
            task.channels,
            {key: self._plans.plans.get(key) for key in _FROM_PLANS},
            {key: task.resolved.get(key) for key in _FROM_CONFIGURATION},
        ]

    def target(self, source: RawSource, case: str) -> Path:
        """The file of a preprocessed case. Its name holds a hash of all that determines its content.

        So a file that exists is valid, one rename makes it so, and no second file can contradict it.
        """
        files = source.cases[case]
        spacing_file = source.folder / f"{case}.json"  # nnU-Net's reader of .tif takes the spacing from it
        stamps = []
        for path in (*files, spacing_file):
            with suppress(FileNotFoundError):  # few have a spacing file; an image that is missing fails when read
                stamps.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
        content = json.dumps([self._fingerprint, stamps], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        folder = cache_folder(self.task) / source.key
        return folder / f"{shortened(case)}-{digest}.b2nd"

    def inspect(self, files: tuple[Path, ...], bad: BadImages) -> tuple[float, ...] | None:
        """Read every channel of a case and collect what is wrong.

        Returns:
            The spacing in mm in the plans' order of axes, or `None` if something is wrong.
        """
        spacing = inspect_case(files, self._reader, self.task.channels, len(self.task.patch_size), bad)
        return None if spacing is None else tuple(spacing[axis] for axis in self._plans.transpose_forward)

    def run(self, files: tuple[Path, ...], target: Path, bad: BadImages) -> bool:
        """Preprocess a case and save it.

        Returns:
            Whether the case can be used; otherwise it was added to `bad`.

        Raises:
            KAFError: The result cannot be written.
        """
        try:
            data, _, _ = self._class(verbose=False).run_case(
                [str(path) for path in files], None, self._plans, self._configuration, self._dataset_json
            )
        except Exception as error:  # whatever the reader or the resampling raise belongs into the list
            bad.add(files[0], f"an image that nnU-Net cannot preprocess ({describe(error)})", "an image")
            return False
        data = np.ascontiguousarray(data, dtype=np.float32)
        if min(data.shape) < 1 or not np.isfinite(data).all():
            state = f"shape {data.shape}" if min(data.shape) < 1 else "NaN or infinite values"
            bad.add(files[0], f"{state} after preprocessing", "at least one voxel per axis, finite values")
            return False
        if float(data.min()) == float(data.max()):
            logger.warning("%s is constant: it has no keypoints and adds nothing to the local losses.", files[0])
        _save(target, data, self.task.patch_size)
        return True


def cache_folder(task: Task) -> Path:
    """Where preprocessed images of further sources are kept: next to nnU-Net's preprocessed images."""
    return task.image_folder.with_name(f"{task.image_folder.name}_kaf_images")


def cached_file(cache: Path, case: Case) -> Path | None:
    """The newest preprocessed file of a case of a further source in a `cache_folder`; None if there is none."""
    folder = cache / case.source
    pattern = re.compile(rf"{re.escape(shortened(case.name))}-[0-9a-f]{{16}}\.b2nd")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def preprocess_source(task: Task, source: RawSource, bad: BadImages, num_workers: int) -> dict[str, Path]:
    """Preprocess the images of a source that are not cached yet.

    Killed at any moment, the next call goes on with the cases that are missing. Several processes may run it at once.

    Args:
        task: The first dataset, whose plans and configuration are used.
        source: The images.
        bad: Collects what cannot be used.
        num_workers: Cases at a time.

    Returns:
        File by identifier (`<key>/<case>`), in the order of the source's cases.

    Raises:
        KAFError: A result cannot be written, or a cached one is damaged.
    """
    preprocessor = Preprocessor(task)
    folder = cache_folder(task) / source.key
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    targets = {case: preprocessor.target(source, case) for case in source.cases}
    todo = {case: target for case, target in targets.items() if not target.is_file()}
    check_cache((target for case, target in targets.items() if case not in todo), num_workers)
    spacings: dict[str, tuple[float, ...]] = {}

    def work(case: str) -> None:
        spacing = preprocessor.inspect(source.cases[case], bad)
        if spacing is not None and preprocessor.run(source.cases[case], targets[case], bad):
            spacings[case] = spacing

    if todo:
        logger.info(
            "%s: preprocessing %d of %d images of %s as %s.",
            source.key,
            len(todo),
            len(targets),
            source.folder,
            task.dataset_name,
        )
    _in_threads(work, list(todo), num_workers, source.key)
    _remove_outdated(folder, {shortened(case): targets[case] for case in spacings})
    _mention_spacings(task, source, spacings)
    return {
        Case(source.key, case).identifier: target
        for case, target in targets.items()
        if case not in todo or case in spacings
    }


def _in_threads(work: Any, cases: list[str], num_workers: int, name: str) -> None:
    """Call `work` for every case; the first exception (a full disk, Ctrl-C) cancels what has not begun."""
    with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="preprocess") as pool:
        futures: list[Future[None]] = [pool.submit(work, case) for case in cases]
        try:
            done = tqdm(
                as_completed(futures),
                desc=name,
                total=len(futures),
                unit="image",
                disable=None if futures else True,  # None: on a terminal only
            )
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _save(target: Path, data: np.ndarray, patch_size: tuple[int, ...]) -> None:
    """Write a .b2nd file in nnU-Net's layout under another name, read it back, and only then give it its name.

    Raises:
        KAFError: It cannot be written completely.
    """
    from nnunetv2.training.dataloading import nnunet_dataset

    # nnU-Net 2.7 has the function as a method of the class.
    layout = (
        getattr(nnunet_dataset, "comp_blosc2_params", None) or nnunet_dataset.nnUNetDatasetBlosc2.comp_blosc2_params
    )
    blocks, chunks = layout(data.shape, tuple(patch_size), data.itemsize)
    compression = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    with replacing(target) as temporary:
        blosc2.asarray(data, urlpath=str(temporary), mode="w", chunks=chunks, blocks=blocks, cparams=compression)
        if not np.array_equal(blosc2.open(urlpath=str(temporary), mode="r", dparams={"nthreads": 1})[:], data):
            raise OSError("the file differs from what was written")
        append_checksum(temporary)


def _remove_outdated(folder: Path, current: Mapping[str, Path]) -> None:
    """Remove earlier results of cases, made from another version of their files or with other plans.

    Args:
        folder: Of the source.
        current: Valid file by case, of the cases that were preprocessed now.
    """
    if not current:
        return
    for path in folder.iterdir():
        named = re.fullmatch(r"(.*)-[0-9a-f]{16}\.b2nd", path.name)
        if named and named[1] in current and path != current[named[1]]:
            with suppress(OSError):  # read-only: it is not used either
                path.unlink(missing_ok=True)


def _mention_spacings(task: Task, source: RawSource, spacings: dict[str, tuple[float, ...]]) -> None:
    """Log spacings that are far from the plans'; in 2D those within the slice count."""
    dims = len(task.spacing)
    unusual = sorted(
        spacing[-dims:]
        for spacing in spacings.values()
        if any(max(a / b, b / a) > UNUSUAL_SPACING for a, b in zip(spacing[-dims:], task.spacing, strict=True))
    )
    if unusual:
        logger.info(
            "%s: %d image(s) have a spacing that differs from the plans' %s mm by more than a factor of %g (from %s to "
            "%s); they are resampled to the plans'.",
            source.key,
            len(unusual),
            task.spacing,
            UNUSUAL_SPACING,
            unusual[0],
            unusual[-1],
        )
