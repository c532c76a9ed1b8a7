"""Reading of preprocessed images of any source. Segmentations and .pkl files (class locations) are never opened."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnunetv2_kaf.errors import KAFError

MEMORY = 2 << 30
"""Bytes of decompressed images kept by default."""
OPEN_FILES = 32
"""Open files kept per thread."""


class PreprocessedImages:
    """Images of one preprocessed configuration, and of further sources preprocessed alike, read in parts.

    Decompressed images are kept in memory until `memory` is used up, and never exchanged for others: pretraining goes
    through all cases again and again, and a least-recently-used cache smaller than the data would hardly ever hit. The
    other images are read from their files, which stay open. Safe for use from several threads.

    Args:
        folder: e.g. `$nnUNet_preprocessed/Dataset004_X/nnUNetPlans_3d_fullres`.
        command: Command that preprocesses this folder; errors name it as the fix.
        further: Files of further images by identifier (`<source>/<case>`).
        memory: Bytes of decompressed images to keep.

    Raises:
        KAFError: If the folder is missing or holds no images.
    """

    def __init__(
        self, folder: Path, command: str, further: Mapping[str, Path] | None = None, memory: int = MEMORY
    ) -> None:
        """List the cases."""
        self.folder = folder
        self.command = command
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        blosc = [n[:-5] for n in names if n.endswith(".b2nd") and not n.endswith("_seg.b2nd")]
        numpy_format = [n[:-4] for n in names if n.endswith(".npz")]
        if not blosc and not numpy_format:
            found = "no such folder" if not folder.is_dir() else "no .b2nd or .npz images in it"
            raise KAFError(f"The dataset is not preprocessed: {folder} ({found}). Run: {command}")
        self._ending = ".b2nd" if blosc else ".npz"
        self._further = dict(further or {})
        self.identifiers = [*(blosc or numpy_format), *sorted(self._further)]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._asked: set[str] = set()
        self._free = memory
        self._lock = threading.Lock()
        self._thread = threading.local()

    def path(self, case: str) -> Path:
        """The image file of a case; an unpacked `.npy` is preferred over `.npz`."""
        if case in self._further:
            return self._further[case]
        unpacked = self.folder / f"{case}.npy"
        return unpacked if self._ending == ".npz" and unpacked.is_file() else self.folder / f"{case}{self._ending}"

    def shape(self, case: str) -> tuple[int, ...]:
        """The array shape (C, Z, Y, X).

        Raises:
            KAFError: If the file is unreadable.
        """
        if case not in self._shapes:
            self._shapes[case] = tuple(int(n) for n in self._open(case).shape)
        return self._shapes[case]

    def read(self, case: str, box: Sequence[slice]) -> np.ndarray:
        """Read part of an image.

        Args:
            case: Identifier.
            box: One slice per spatial axis.

        Returns:
            (C, *box) float32, a fresh array.

        Raises:
            KAFError: If the file is unreadable or holds NaN or infinite values.
        """
        source = self._kept(case)
        if source is None:
            source = self._open(case)
        try:
            array = np.array(source[(slice(None), *box)], dtype=np.float32)
        except (RuntimeError, OSError, ValueError) as error:
            raise self._unreadable(case, error) from error
        if not np.isfinite(array).all():
            raise KAFError(
                f"{self.path(case)} contains NaN or infinite values. Correct the raw image of case {case} (or remove "
                f"the case) and {self.remedy(case)}"
            )
        return array

    def _kept(self, case: str) -> np.ndarray | None:
        """The decompressed image if there is room for it in memory."""
        if case in self._asked:  # None while another thread decompresses it: read from the file meanwhile
            return self._arrays.get(case)
        shape = self.shape(case)
        with self._lock:
            size = math.prod(shape) * 4
            if case in self._asked or size > self._free:
                self._asked.add(case)
                return self._arrays.get(case)
            self._asked.add(case)
            self._free -= size
        try:
            self._arrays[case] = np.ascontiguousarray(self._open(case)[:], dtype=np.float32)
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, KAFError):
                raise
            raise self._unreadable(case, error) from error
        return self._arrays[case]

    def _open(self, case: str) -> Any:
        """Open a file for reading parts of it; one handle per thread, because blosc2 promises no thread safety."""
        if self._ending == ".npz" and self.path(case).suffix == ".npz":
            return self._load(case)  # a whole array: keeping it would not respect the memory limit
        if not hasattr(self._thread, "opened"):
            self._thread.opened = lru_cache(OPEN_FILES)(self._load)
        return self._thread.opened(case)

    def _load(self, case: str) -> Any:
        """Open a file; of an archive the array."""
        path = self.path(case)
        try:
            if path.suffix == ".npz":
                with np.load(path) as archive:
                    return archive["data"]
            if path.suffix == ".npy":
                return np.load(path, mmap_mode="r")
            # Memory mapping a b2nd file fails on Windows (nnU-Net has the same exception).
            extra = {} if os.name == "nt" else {"mmap_mode": "r"}
            return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **extra)
        except Exception as error:  # blosc2 and zipfile raise many types for a truncated file
            raise self._unreadable(case, error) from error

    def _unreadable(self, case: str, error: Exception) -> KAFError:
        return KAFError(
            f"{self.path(case)} cannot be read as a preprocessed image ({type(error).__name__}: {error}); it may be "
            f"truncated. Delete it and {self.remedy(case)}"
        )

    def remedy(self, case: str) -> str:
        """How the preprocessed image of a case is made again."""
        return "start again" if case in self._further else f"preprocess again: {self.command}"
