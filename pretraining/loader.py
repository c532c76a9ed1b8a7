"""From case to batch: pair, views and references, made in background threads, reproducible from (seed, step, index)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.batch import Batch, PairSample, collate
from pretraining.config import PretrainConfig
from pretraining.dataset import PreprocessedImages
from pretraining.pairs import Pair, Side, sample_pair
from pretraining.views import adjust_intensity, bounding_box, draw_view, resample, sampling_grid

REFERENCE_MARGIN = 8
"""Voxels kept around the sampled region of a reference slice, for the descriptors of points near its border."""
PREFETCH = 2
"""Batches made ahead."""


@dataclass(frozen=True)
class PairLoader:
    """Makes the batches of any step, independently of all other steps, so that a run can resume anywhere.

    Attributes:
        images: where the images come from.
        cases: cases to draw from.
        patch_size: view shape.
        spacing: voxel size in mm.
        batch_size: pairs per batch.
        config: ranges and seed.
        num_workers: threads; 0 makes each batch when it is asked for.
    """

    images: PreprocessedImages
    cases: tuple[str, ...]
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    batch_size: int
    config: PretrainConfig
    num_workers: int = 1

    def sample(self, step: int, index: int) -> PairSample:
        """Make pair ``index`` of step ``step``."""
        generator = np.random.default_rng([self.config.seed, step, index])
        case = self._case(step, index)
        shape = self.images.shape(case)
        if len(shape) != 4:
            raise KAFError(f"{self.images.path(case)} has shape {shape}; expected (channels, z, y, x).")
        pair = sample_pair(
            case,
            shape[1:],
            self.patch_size,
            generator,
            slice_distance=self.config.slice_distance,
            shift=self.config.shift,
        )
        sides = [self._view(pair, side, shape, generator) for side in (pair.first, pair.second)]
        is_2d = len(self.patch_size) == 2
        return PairSample(
            case=case,
            views=torch.stack([view for view, _, _, _ in sides]),
            grids=torch.stack([grid for _, grid, _, _ in sides]),
            extents=torch.tensor(shape[-len(self.patch_size) :], dtype=torch.float32),
            positions=torch.tensor([pair.first.position, pair.second.position], dtype=torch.float32),
            known_transform=pair.known_transform,
            references=(sides[0][2], sides[1][2]) if is_2d else None,
            origins=torch.tensor([origin for _, _, _, origin in sides], dtype=torch.float32),
        )

    def _case(self, step: int, index: int) -> str:
        """Return the case of a pair: a fresh permutation of all cases per pass, so a batch repeats none needlessly."""
        position = step * self.batch_size + index
        passes, offset = divmod(position, len(self.cases))
        order = np.random.default_rng([self.config.seed, 0x6B6166, passes]).permutation(len(self.cases))
        return self.cases[int(order[offset])]

    def _view(
        self, pair: Pair, side: Side, shape: tuple[int, ...], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Make one view: (view, grid, source crop, origin of the crop)."""
        dims = len(self.patch_size)
        parameters = draw_view(side.centre, self.patch_size, self.spacing, shape[0], self.config, generator)
        grid = sampling_grid(parameters, self.patch_size, self.spacing)
        margin = [REFERENCE_MARGIN if dims == 2 else 1] * dims
        box = bounding_box(grid, shape[-dims:], margin)
        origin = tuple(axis.start for axis in box)
        if side.slice_index is None:
            source = torch.from_numpy(self.images.read(pair.case, box))
        else:
            plane = slice(side.slice_index, side.slice_index + 1)
            source = torch.from_numpy(self.images.read(pair.case, (plane, *box))[:, 0])
        view = adjust_intensity(resample(source, grid, origin), parameters)
        return view, grid, source, origin

    def batch(self, step: int) -> Batch:
        """Make the batch of a step in the calling thread."""
        return collate([self.sample(step, index) for index in range(self.batch_size)])

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` to ``stop - 1`` in order; threads work ahead of the consumer."""
        if self.num_workers == 0:
            yield from (self.batch(step) for step in range(start, stop))
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="pairs") as pool:
            pending: deque[list[Future[PairSample]]] = deque()
            try:
                for step in range(start, stop):
                    while len(pending) <= PREFETCH and step + len(pending) < stop:
                        ahead = step + len(pending)
                        pending.append([pool.submit(self.sample, ahead, i) for i in range(self.batch_size)])
                    yield collate([future.result() for future in pending.popleft()])
            finally:
                # An error or an interrupt must not wait for work nobody will use.
                pool.shutdown(wait=False, cancel_futures=True)
