"""The I/O edge: nnU-Net's preprocessed images. Segmentations and the .pkl files (class locations) are never opened."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnunetv2_kaf.errors import KAFError

logger = logging.getLogger(__name__)


class PreprocessedImages:
    """Lazily read images of one preprocessed configuration.

    Args:
        folder: e.g. ``$nnUNet_preprocessed/Dataset004_X/nnUNetPlans_3d_fullres``.
        preprocess_command: named in errors as the fix.

    Raises:
        KAFError: if the folder is missing or holds no images.
    """

    def __init__(self, folder: Path, preprocess_command: str) -> None:
        """List the cases."""
        self.folder = folder
        self.command = preprocess_command
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        blosc = [n[:-5] for n in names if n.endswith(".b2nd") and not n.endswith("_seg.b2nd")]
        numpy_format = [n[:-4] for n in names if n.endswith(".npz")]
        if not blosc and not numpy_format:
            found = "no such folder" if not folder.is_dir() else "no .b2nd or .npz images in it"
            raise KAFError(f"The dataset is not preprocessed: {folder} ({found}). Run: {preprocess_command}")
        self.ending = ".b2nd" if blosc else ".npz"
        self.identifiers = blosc or numpy_format
        self._checked_constant: set[str] = set()

    def path(self, case: str) -> Path:
        """Return the image file of a case; an unpacked ``.npy`` is preferred over ``.npz``."""
        unpacked = self.folder / f"{case}.npy"
        return unpacked if self.ending == ".npz" and unpacked.is_file() else self.folder / f"{case}{self.ending}"

    def shape(self, case: str) -> tuple[int, ...]:
        """Return the array shape (C, Z, Y, X)."""
        return tuple(int(n) for n in self._open(case).shape)

    def read(self, case: str, box: Sequence[slice]) -> np.ndarray:
        """Read part of an image.

        Args:
            case: identifier.
            box: one slice per spatial axis.

        Returns:
            (C, *box) float32, a fresh array.

        Raises:
            KAFError: if the file is unreadable or holds NaN or infinite values.
        """
        source = self._open(case)
        try:
            array = np.array(source[(slice(None), *box)], dtype=np.float32)
        except (RuntimeError, OSError, ValueError) as error:
            raise self._unreadable(case, error) from error
        if not np.isfinite(array).all():
            raise KAFError(
                f"{self.path(case)} contains NaN or infinite values. Correct the raw image of case {case} (or remove "
                f"the case) and preprocess again: {self.command}"
            )
        if array.size and float(array.min()) == float(array.max()):
            self._warn_if_constant(case, source)
        return array

    def _open(self, case: str) -> Any:
        path = self.path(case)
        try:
            if path.suffix == ".b2nd":
                # Memory mapping a b2nd file fails on Windows (nnU-Net has the same exception).
                extra = {} if os.name == "nt" else {"mmap_mode": "r"}
                return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **extra)
            if path.suffix == ".npy":
                return np.load(path, mmap_mode="r")
            with np.load(path) as archive:
                return archive["data"]
        except Exception as error:  # blosc2 and zipfile raise many types for a truncated file
            raise self._unreadable(case, error) from error

    def _unreadable(self, case: str, error: Exception) -> KAFError:
        path = self.path(case)
        return KAFError(
            f"{path} cannot be read as a preprocessed image ({type(error).__name__}: {error}); it may be truncated. "
            f"Delete it and preprocess again: {self.command}"
        )

    def _warn_if_constant(self, case: str, source: Any) -> None:
        """Warn once per case whose whole image is constant; a constant crop of a normal image is no news."""
        if case in self._checked_constant:
            return
        self._checked_constant.add(case)
        whole = np.asarray(source[:])
        if float(whole.min()) == float(whole.max()):
            logger.warning(
                "Case %s is constant (%g everywhere): no keypoints, it adds nothing to the local loss.",
                case,
                float(whole.min()),
            )


def training_cases(images: PreprocessedImages, dataset_folder: Path, fold: int | str) -> list[str]:
    """Return the cases that pretraining may see: all but the validation cases of the fold.

    The split is nnU-Net's: ``splits_final.json`` if it exists, otherwise the one that nnU-Net would create, which is
    saved as nnU-Net would so that both agree. A fold beyond the file's folds gets nnU-Net's seeded 80:20 split.

    Args:
        images: the preprocessed images.
        dataset_folder: ``$nnUNet_preprocessed/DatasetXXX``.
        fold: fold number, or ``"all"`` for every case.

    Raises:
        KAFError: if the split file is not usable or leaves no case.
    """
    everything = sorted(images.identifiers)
    if fold == "all":
        logger.info(
            "Fold all: pretraining uses all %d cases, validation cases of every fold included.", len(everything)
        )
        return everything
    fold = int(fold)
    path = dataset_folder / "splits_final.json"
    splits = _read_splits(path) if path.is_file() else _create_splits(everything, path)
    if fold < len(splits):
        validation = set(splits[fold]["val"])
    else:
        generator = np.random.RandomState(seed=12345 + fold)  # nnU-Net's own draw
        chosen = generator.choice(len(everything), int(len(everything) * 0.8), replace=False)
        validation = set(everything) - {everything[i] for i in chosen}
    cases = [case for case in everything if case not in validation]
    if not cases:
        raise KAFError(f"Fold {fold} of {path} leaves no training case among the {len(everything)} preprocessed ones.")
    logger.info(
        "Fold %d: pretraining uses %d cases, %d validation cases are left out.",
        fold,
        len(cases),
        len(everything) - len(cases),
    )
    return cases


def _read_splits(path: Path) -> list[dict[str, list[str]]]:
    """Read an existing split file."""
    try:
        splits: list[dict[str, list[str]]] = json.loads(path.read_text())
        if all("val" in split for split in splits) and splits:
            return splits
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        pass
    raise KAFError(f"{path} is not a split file of nnU-Net (a list of train/val dicts). Correct or delete it.")


def _create_splits(identifiers: list[str], path: Path) -> list[dict[str, list[str]]]:
    """Create and save nnU-Net's default split, exactly as nnUNetTrainer.do_split does."""
    from batchgenerators.utilities.file_and_folder_operations import save_json
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if len(identifiers) < 5:
        raise KAFError(
            f"The dataset has {len(identifiers)} preprocessed case(s); nnU-Net's five-fold split needs at least 5. "
            f"Use --fold all, or write your own split to {path}."
        )
    splits: list[dict[str, list[str]]] = generate_crossval_split(list(np.sort(identifiers)), seed=12345, n_splits=5)
    save_json(splits, str(path))
    logger.info("Created nnU-Net's default five-fold split: %s", path)
    return splits
