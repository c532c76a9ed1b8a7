"""From case to batch: pair, views, keypoints and matches, in threads, reproducible from (seed, step, index)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from nnunetv2_kaf.coordinates import from_centre, to_mm
from nnunetv2_kaf.keypoints import Keypoints
from pretraining.config import PretrainConfig
from pretraining.data.images import PreprocessedImages
from pretraining.pairs.batch import Batch, PairSample, Places, collate
from pretraining.pairs.correspondences import UNMATCHED, match_by_descriptor, match_by_transform
from pretraining.pairs.keypoint_cache import KeypointCache, SourceKeypoints
from pretraining.pairs.pairs import Pair, Side, sample_pair
from pretraining.pairs.render import make_recipe, render
from pretraining.pairs.splines import bounding_box, control_points, to_view
from pretraining.pairs.views import draw_view

PREFETCH = 2
"""Batches made ahead."""
DEFAULT_RADIUS_VOXELS = 2.0
DEFAULT_SEARCH_VOXELS = 8.0


@dataclass(frozen=True)
class PairLoader:
    """Makes the batches of any step, independently of all other steps, so that a run can resume anywhere.

    Attributes:
        images: The images of all sources.
        keypoints: Their cached keypoints.
        patients: Cases of every patient, all of which may be drawn.
        patch_size: View shape.
        spacing: Voxel size in mm.
        batch_size: Pairs per batch, over all processes.
        config: Ranges and seed.
        num_workers: Threads; 0 makes each batch when it is asked for.
        rank: This process.
        world_size: Processes; each makes an equal share of every batch.
        stream: Which of several independent sequences of pairs.
        render_later: Leave the rendering to the device that the batch goes to.
    """

    images: PreprocessedImages
    keypoints: KeypointCache
    patients: Mapping[str, tuple[str, ...]]
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    batch_size: int
    config: PretrainConfig
    num_workers: int = 1
    rank: int = 0
    world_size: int = 1
    stream: int = 0
    render_later: bool = False

    def sample(self, step: int, index: int) -> PairSample:
        """Make pair `index` of step `step`."""
        generator = np.random.default_rng([self.config.seed, self.stream, step, index])
        pair = self._pair(step, index, generator)
        sides = (pair.first, pair.second)
        channels = self.images.shape(pair.first.case)[0]
        parameters = [
            draw_view(side.centre, self.patch_size, self.spacing, channels, self.config, generator) for side in sides
        ]
        controls = [control_points(p, self.patch_size, self.spacing) for p in parameters]
        points = [self._points(side, control) for side, control in zip(sides, controls, strict=True)]
        matches, places = self._match(pair, points[0][0], points[1][0])
        crops, origins = zip(*[self._crop(s, c) for s, c in zip(sides, controls, strict=True)], strict=True)
        recipe = make_recipe(crops, origins, controls, parameters)
        return PairSample(
            cases=(pair.first.case, pair.second.case),
            views=recipe if self.render_later else render(recipe, self.patch_size),
            keypoints=Keypoints(*map(torch.stack, zip(*(placed for _, placed in points), strict=True))),
            matches=matches,
            positions=torch.tensor([pair.first.position, pair.second.position], dtype=torch.float32),
            places=places,
        )

    def _pair(self, step: int, index: int, generator: np.random.Generator) -> Pair:
        """Draw the pair: the case by its turn, with the option's probability another image of the patient as well."""
        case, others = self._case(step, index)
        other = case
        if others and generator.random() < self.config.across:
            other = others[int(generator.integers(len(others)))]
        return sample_pair(
            (case, other),
            (self.images.shape(case)[1:], self.images.shape(other)[1:]),
            self.patch_size,
            generator,
            slice_distance=self.config.slice_distance,
            shift=self.config.shift,
        )

    def _case(self, step: int, index: int) -> tuple[str, tuple[str, ...]]:
        """The case of a pair and the patient's other ones.

        A fresh permutation of all cases per pass, so a batch repeats none needlessly.
        """
        passes, offset = divmod(step * self.batch_size + index, len(self._cases))
        order = _permutation((self.config.seed, self.stream, 0x6B6166, passes), len(self._cases))
        case, patient = self._cases[int(order[offset])]
        return case, tuple(other for other in patient if other != case)

    @cached_property
    def _cases(self) -> list[tuple[str, tuple[str, ...]]]:
        """All cases in a fixed order, each with the cases of its patient."""
        return [(case, patient) for patient in self.patients.values() for case in patient]

    def _points(self, side: Side, control: np.ndarray) -> tuple[SourceKeypoints, Keypoints]:
        """The strongest K keypoints that a view shows: in the source (K or fewer), and in the view (padded to K)."""
        found = self.keypoints.read(side.case, self.images.path(side.case), side.slice_index)
        count = self.keypoints.config.num_keypoints
        placed, inside = to_view(control, self.patch_size, found.coords.astype(np.float64))
        chosen = np.flatnonzero(inside)[:count]
        coords, valid = torch.zeros(count, len(self.patch_size)), torch.zeros(count, dtype=torch.bool)
        coords[: len(chosen)] = torch.from_numpy(placed[chosen].astype(np.float32))
        valid[: len(chosen)] = True
        shown = SourceKeypoints(found.coords[chosen], found.descriptors[chosen])
        return shown, Keypoints(coords, valid)

    def _match(self, pair: Pair, first: SourceKeypoints, second: SourceKeypoints) -> tuple[Tensor, Places]:
        """Match the points that two views show: (K,) long, and where the points are."""
        finest, count = min(self.spacing), self.keypoints.config.num_keypoints
        # Relative to the centre: that is how two images of a patient are aligned.
        one, two = (
            from_centre(points.coords, side.shape)
            for points, side in zip((first, second), (pair.first, pair.second), strict=True)
        )
        same = DEFAULT_RADIUS_VOXELS * finest if self.config.radius_mm is None else self.config.radius_mm
        if pair.known_transform:
            reach = same
            found = match_by_transform(one, two, self.spacing, reach)
        else:
            search = self.config.search_radius_mm
            reach = DEFAULT_SEARCH_VOXELS * finest if search is None else search
            found = match_by_descriptor(one, two, first.descriptors, second.descriptors, self.spacing, reach)
        matches = torch.full((count,), UNMATCHED, dtype=torch.long)
        matches[: len(found)] = torch.from_numpy(found)
        places = torch.zeros(2, count, len(self.patch_size))
        for side, points in enumerate((one, two)):
            places[side, : len(points)] = torch.from_numpy(to_mm(points, self.spacing).astype(np.float32))
        return matches, Places(places, torch.tensor(float(same)), torch.tensor(float(reach)))

    def _crop(self, side: Side, control: np.ndarray) -> tuple[Tensor, tuple[int, ...]]:
        """Read the part of the image that a view shows: (C, *R) and the source voxel at its index 0."""
        box = bounding_box(control, side.shape)
        origin = tuple(axis.start for axis in box)
        if side.slice_index is None:
            return torch.from_numpy(self.images.read(side.case, box)), origin
        plane = slice(side.slice_index, side.slice_index + 1)
        return torch.from_numpy(self.images.read(side.case, (plane, *box))[:, 0]), origin

    def batch(self, step: int) -> Batch:
        """Make this process's share of the batch of a step in the calling thread."""
        return collate([self.sample(step, index) for index in self._share()])

    def _share(self) -> range:
        size = self.batch_size // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop - 1` in order; threads work ahead of the consumer."""
        if self.num_workers == 0:
            yield from (self.batch(step) for step in range(start, stop))
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="pairs") as pool:
            pending: deque[list[Future[PairSample]]] = deque()
            try:
                for step in range(start, stop):
                    while len(pending) <= PREFETCH and step + len(pending) < stop:
                        ahead = step + len(pending)
                        pending.append([pool.submit(self.sample, ahead, i) for i in self._share()])
                    yield collate([future.result() for future in pending.popleft()])
            finally:
                # An error or an interrupt must not wait for work nobody will use.
                pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=8)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    """A permutation of `count` cases that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(count)
