"""The labelled and the unlabelled batches of a training, from any step on, made in the background or not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset

from semisupervised.sampling import Geometry
from semisupervised.seeding import seed_everything

_SPATIAL = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


class Stream:
    """Batches of a data set from a step on, in their order.

    Args:
        batches: Data set; item i is the batch of step i.
        first: Step to start with.
        workers: Processes that make batches ahead; 0 makes them when they are asked for.
        pin_memory: Whether to pin memory, for a GPU.
    """

    def __init__(self, batches: Dataset[Any], first: int, workers: int, pin_memory: bool) -> None:
        self.batches, self.workers = batches, workers
        self._numbers = itertools.count(first)
        self._iterator: Iterator[Any] | None = None
        if workers > 0:
            ahead = max(2, -(-6 // workers))
            loader: DataLoader[Any] = DataLoader(
                batches,
                batch_size=None,
                sampler=_From(first),
                num_workers=workers,
                pin_memory=pin_memory,
                prefetch_factor=ahead,
            )
            self._iterator = iter(loader)

    def __iter__(self) -> Stream:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch; there is always one."""
        if self._iterator is not None:
            return next(self._iterator)
        return self.batches[next(self._numbers)]

    def close(self) -> None:
        """End the processes."""
        self._iterator = None


class _From:
    """Whole numbers from a first one on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


class LabelledBatches(Dataset[Any]):
    """nnU-Net's batches, each of them drawn from the seed and its step alone.

    Args:
        loader: nnU-Net's `nnUNetDataLoader`, with its transforms.
        words: Seed, stream and process.
    """

    def __init__(self, loader: Any, words: Sequence[int]) -> None:
        self.loader, self.words = loader, tuple(words)
        fix_algorithms(loader.transforms)

    def __getitem__(self, step: int) -> Any:
        """The batch of a step; in a process of its own, whose generators nothing else uses."""
        seed_everything((*self.words, step))
        batch = self.loader.generate_train_batch()
        batch["keys"] = [str(key) for key in batch["keys"]]
        return batch


def training_workers() -> int:
    """Of nnU-Net's processes those that make labelled training batches."""
    processes: int = get_allowed_n_proc_DA()
    return processes - processes // 3


def validation_workers() -> int:
    """Of nnU-Net's processes those that make validation batches, which wait for the end of the epoch."""
    return max(1, int(get_allowed_n_proc_DA()) // 4)


def unlabelled_workers() -> int:
    """Of nnU-Net's processes those that make unlabelled batches, which take the least work; 0 if there are none."""
    processes: int = get_allowed_n_proc_DA()
    return max(1, processes // 3) if processes else 0


@contextmanager
def without_workers() -> Iterator[None]:
    """Let nnU-Net make its loaders without processes in this block."""
    name = "nnUNet_n_proc_DA"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def fix_algorithms(transform: Any) -> None:
    """Let blurs always use the same algorithm: nnU-Net's choose by a race, whose winner rounds in its own way."""
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for part in getattr(transform, "transforms", [getattr(transform, "transform", None)]):
        if part is not None:
            fix_algorithms(part)


def weak_geometry(loader: Any, dims: int) -> tuple[Geometry, bool]:
    """How nnU-Net cuts out and moves its labelled patches.

    Args:
        loader: nnU-Net's loader of training patches.
        dims: Spatial dimensions of the configuration.

    Returns:
        The geometry, and whether the slices of a volume are moved one by one.
    """
    weak = [t for t in loader.transforms.transforms if isinstance(t, _SPATIAL)]
    geometry = Geometry(
        tuple(int(n) for n in loader.patch_size)[-dims:],
        tuple(int(n) for n in loader.final_patch_size)[-dims:],
        ComposeTransforms(weak),
    )
    return geometry, any(isinstance(t, Convert3DTo2DTransform) for t in weak)
