"""Keypoints and descriptors of the un-augmented images, detected once per case and kept on disk.

The detector is the network's own (`nnunetv2_kaf.keypoints`), run on windows of about the size of a patch, so that a
case has the points that the network finds in fine-tuning. In 2D every slice is an image of its own. One file per case
lies next to nnU-Net's preprocessed data; its name holds what it was made from: a changed image or option is a new file.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import append_checksum, check_cache, replacing, shortened
from nnunetv2_kaf.keypoints import KeypointDetector
from pretraining.data.case import Case
from pretraining.pairs.descriptors import patch_descriptors

VERSION = 2
OVERSAMPLING = 1.5
"""Points kept per patch volume in multiples of K: a view that is zoomed out shows more of the image than a patch."""
DESCRIPTOR_SHAPE = {2: (4, 1.0), 3: (2, 2.0)}
"""Per number of axes: samples on each side of the centre and their distance in finest voxels (81 and 125 samples)."""
OPEN_FILES = 64


@dataclass(frozen=True)
class SourceKeypoints:
    """Keypoints of one image (a slice or a volume), strongest first.

    Attributes:
        coords: (n, D) float32 source voxels.
        descriptors: (n, E) float16, unit norm or zero.
    """

    coords: np.ndarray
    descriptors: np.ndarray


class KeypointCache:
    """Detects, stores and reads the keypoints of cases.

    Args:
        folder: Place of the files; one sub-folder per set of options.
        config: The network's layers.
        patch_size: Patch size of the configuration; its length says whether slices or volumes are the images.
        spacing: Voxel size in mm, as many axes as the patch.
    """

    def __init__(self, folder: Path, config: KAFConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> None:
        self.config = config
        self.patch_size = tuple(patch_size)
        self.spacing = tuple(float(s) for s in spacing)
        self.folder = folder / self._options_hash()
        self._rows = lru_cache(OPEN_FILES)(self._read_rows)
        self._verified: set[Path] = set()

    def _options_hash(self) -> str:
        """Hash of everything besides the image that determines the points."""
        detection = {k: v for k, v in asdict(self.config).items() if k.startswith(("detection", "num_keypoints"))}
        options = [
            VERSION,
            OVERSAMPLING,
            DESCRIPTOR_SHAPE[len(self.patch_size)],
            self.patch_size,
            self.spacing,
            detection,
        ]
        return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:12]

    def path(self, case: str, image: Path) -> Path:
        """The file of a case; the name changes when the image file does.

        Raises:
            KAFError: If the image file is not there any more.
        """
        try:
            status = image.stat()
        except OSError as error:
            raise KAFError(
                f"{image} cannot be read any more ({error.strerror}). Restore it, or preprocess again."
            ) from error
        stamp = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
        source, name = Case.of(case)
        return self.folder / source / f"{shortened(name)}.{stamp}.npy"

    def create(self, case: str, image_path: Path, image: np.ndarray, device: torch.device) -> None:
        """Detect and store the points of a case.

        Args:
            case: Identifier; may contain `/`.
            image_path: File of the image.
            image: (C, Z, Y, X) float32.
            device: Device that detects.

        Raises:
            KAFError: If the file cannot be written.
        """
        dims = len(self.patch_size)
        pixels = torch.from_numpy(image).to(device)
        # 2D: the slices are a batch of images; 3D: the volume is a batch of one.
        batch = pixels.transpose(0, 1) if dims == 2 else pixels.unsqueeze(0)
        records = []
        for index, single in enumerate(batch):
            coords = self._detect(single.unsqueeze(0))
            record = np.zeros(len(coords), dtype=self._record_type(image.shape[0]))
            record["slice"], record["coords"] = index, coords.cpu().numpy()
            record["descriptor"] = self._describe(single.unsqueeze(0), coords).cpu().numpy()
            records.append(record)
        with replacing(self.path(case, image_path)) as temporary:
            with temporary.open("wb") as file:
                np.save(file, np.concatenate(records))
            append_checksum(temporary)

    def read(self, case: str, image_path: Path, slice_index: int | None) -> SourceKeypoints:
        """Read the points of a slice (2D) or of the volume (`None`, 3D).

        Raises:
            KAFError: If the file is missing or unreadable.
        """
        rows, slices = self._rows(self.path(case, image_path))
        first, last = np.searchsorted(slices, [slice_index or 0, (slice_index or 0) + 1])
        part = np.asarray(rows[int(first) : int(last)])
        return SourceKeypoints(part["coords"], part["descriptor"])

    def _read_rows(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The mapped file and the slice of every row.

        Raises:
            KAFError: If the file is missing, damaged, or of another kind.
        """
        self.verify([path])
        fix = f"Delete it and run again, it is made anew: rm {shlex.quote(str(path))}"
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise KAFError(f"{path} cannot be read as cached keypoints ({error}). {fix}") from error
        expected, names = self._record_type(1), ("slice", "coords", "descriptor")
        kinds = getattr(rows, "dtype", None)
        fields = kinds.fields if isinstance(kinds, np.dtype) and rows.ndim == 1 else None
        if not fields or set(fields) != set(names) or any(fields[n][0].base != expected[n].base for n in names):
            raise KAFError(f"{path}: found {kinds}, expected one record per keypoint, {expected}. {fix}")
        return rows, np.array(rows["slice"])

    def verify(self, paths: Iterable[Path], threads: int = 1) -> None:
        """Compare files with the checksums at their ends, once.

        Raises:
            KAFError: Some are damaged, or cannot be read.
        """
        new = [path for path in paths if path not in self._verified]
        check_cache(new, threads)
        self._verified.update(new)

    def remove_outdated(self, current: Iterable[Path]) -> None:
        """Remove the points of earlier versions of images.

        Args:
            current: Files of the images as they are now, from `path`.
        """
        valid = {(path.parent, _stem(path)): path for path in current}
        for folder in {folder for folder, _ in valid}:
            for path in folder.glob("*.npy"):
                if valid.get((folder, _stem(path)), path) != path:
                    with suppress(OSError):  # read-only: it is not used either
                        path.unlink(missing_ok=True)

    def _record_type(self, channels: int) -> np.dtype[np.void]:
        dims = len(self.patch_size)
        samples = channels * (2 * DESCRIPTOR_SHAPE[dims][0] + 1) ** dims
        return np.dtype([("slice", "<i4"), ("coords", "<f4", (dims,)), ("descriptor", "<f2", (samples,))])

    def _describe(self, image: Tensor, coords: Tensor) -> Tensor:
        """Describe the points (n, D) of an image (1, C, *S): (n, E)."""
        radius, step = DESCRIPTOR_SHAPE[len(self.patch_size)]
        return patch_descriptors(image, coords.unsqueeze(0), self.spacing, step * min(self.spacing), radius).squeeze(0)

    def _detect(self, image: Tensor) -> Tensor:
        """Detect in an image (1, C, *S), window by window: coordinates (n, D), strongest first."""
        shape = image.shape[2:]
        coords, scores = [], []
        for core in _windows(shape, self.patch_size):
            halo = [math.ceil(self._reach_mm() / s) + 2 for s in self.spacing]
            box = [slice(max(0, c.start - h), min(n, c.stop + h)) for c, h, n in zip(core, halo, shape, strict=True)]
            window = image[(slice(None), slice(None), *box)]
            found, score = self._detector(window.shape[2:]).to(image.device).detect(window)
            points = found.coords[0] + torch.tensor([float(b.start) for b in box], device=image.device)
            keep = found.valid[0].clone()
            for axis, part in enumerate(core):
                keep &= (points[:, axis] >= part.start) & (points[:, axis] < part.stop)
            coords.append(points[keep])
            scores.append(score[0][keep])
        order = torch.cat(scores).argsort(descending=True, stable=True)
        return torch.cat(coords)[order]

    def _detector(self, shape: Sequence[int]) -> KeypointDetector:
        """Build the network's detector for a window: as many points per volume as in a patch, times `OVERSAMPLING`."""
        patches = max(1.0, math.prod(shape) / math.prod(self.patch_size))
        count = min(math.prod(shape), math.ceil(OVERSAMPLING * self.config.num_keypoints * patches))
        return KeypointDetector(replace(self.config, num_keypoints=count), self.spacing)

    def _reach_mm(self) -> float:
        """Distance in mm from which intensities influence a response: three standard deviations of every blur."""
        scales = [0.0, *self.config.detection_scales]
        steps = [math.sqrt(b**2 - a**2) for a, b in pairwise(scales)]
        return 3 * sum(steps) * min(self.spacing)


def _stem(path: Path) -> str:
    """The case in the name of a file of the cache, which ends with a stamp and .npy."""
    return path.name.rsplit(".", 2)[0]


def _windows(shape: Sequence[int], patch_size: Sequence[int]) -> list[tuple[slice, ...]]:
    """Split an image into windows of about the size of a patch that cover every voxel once."""
    axes = []
    for size, patch in zip(shape, patch_size, strict=True):
        edges = np.linspace(0, size, max(1, round(size / patch)) + 1).round().astype(int).tolist()
        axes.append([slice(a, b) for a, b in pairwise(edges)])
    grids = np.meshgrid(*[np.arange(len(a)) for a in axes], indexing="ij")
    return [
        tuple(axis[int(i)] for axis, i in zip(axes, index, strict=True))
        for index in np.stack(grids, -1).reshape(-1, len(axes))
    ]
