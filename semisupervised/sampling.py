"""The unlabelled batch of every step: patches of unlabelled images in the weak view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pretraining.data.images import MEMORY, PreprocessedImages
from semisupervised.cut_mix import draw_box
from semisupervised.positions import Positions
from semisupervised.seeding import UNLABELLED, isolated
from semisupervised.strong import StrongAugmentation


@dataclass(frozen=True)
class Images:
    """Where the unlabelled images are; opened in the process that reads them.

    Attributes:
        folder: Folder of the first dataset's preprocessed images.
        command: Command that makes them.
        cases: Identifiers, those of further sources as `<source>/<case>`.
        further: Files of further sources by identifier.
    """

    folder: Path
    command: str
    cases: tuple[str, ...]
    further: Mapping[str, Path] = field(default_factory=dict)

    def open(self, memory: int = MEMORY) -> PreprocessedImages:
        """The reader; never of a label."""
        return PreprocessedImages(self.folder, self.command, self.further, memory)


def share_of(total: int, rank: int, world_size: int) -> list[int]:
    """The places in the global batch of one process; sizes differ by 1 at most."""
    return [int(i) for i in np.array_split(np.arange(total), world_size)[rank]]


def partner_of(place: int, total: int) -> int:
    """The patch that CutMix takes a box from: neighbours of the global batch exchange theirs."""
    return place ^ 1 if place ^ 1 < total else 0


@dataclass(frozen=True)
class Geometry:
    """How a patch is cut out, as nnU-Net cuts the labelled ones.

    Attributes:
        crop: Shape that is read, with the margin that rotation and scaling need.
        patch: Shape that the network sees.
        weak: nnU-Net's spatial transforms, called with an image.
    """

    crop: tuple[int, ...]
    patch: tuple[int, ...]
    weak: Any


class UnlabelledPatches(Dataset[dict[str, Any]]):
    """The unlabelled batch of every step: patches in the weak view, and what makes the strong one of them.

    A batch depends on the seed and the step alone. Of several processes each makes its share of the global batch; a
    patch whose partner for CutMix another process has is followed, at the end, by a copy of that partner.

    Args:
        images: Images to draw from, each case equally often.
        geometry: Geometry of the patches.
        strong: The strong augmentation.
        cutmix: Probability of a CutMix box.
        seed: Seed of the training.
        places: Places of this process's patches in the global batch.
        total: Patches in the global batch.
        memory: Bytes of images to keep in memory, per process that reads.
        structures: Where structures lie in the labelled images.
    """

    def __init__(
        self,
        images: Images,
        geometry: Geometry,
        strong: StrongAugmentation,
        cutmix: float,
        seed: int,
        places: Sequence[int],
        total: int,
        memory: int = MEMORY,
        structures: Positions = Positions(),  # noqa: B008  # immutable
    ) -> None:
        self.images, self.geometry, self.strong, self.structures = images, geometry, strong, structures
        self.cutmix, self.seed, self.memory = cutmix, seed, memory
        partners = [partner_of(place, total) for place in places]
        self.places = [*places, *sorted(set(partners) - set(places))]
        self.partners = [self.places.index(partner) for partner in partners]
        self._reader: PreprocessedImages | None = None

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step.

        Returns:
            data: (n, C, *S) float32, own patches first, then partners of other processes.
            intensity: (n, C, 7), seeds: (n,), for `strong_view`.
            boxes: (m, D, 2) of the m own patches, partners: (m,) index in the batch.
            keys: n identifiers of cases.
        """
        samples = [self._sample(step, place) for place in self.places]
        own = len(self.partners)
        return {
            "data": torch.stack([sample["image"] for sample in samples]),
            "intensity": torch.stack([sample["intensity"] for sample in samples]),
            "seeds": torch.tensor([sample["seed"] for sample in samples]),
            "boxes": torch.stack([sample["box"] for sample in samples[:own]]),
            "partners": torch.tensor(self.partners),
            "keys": [sample["case"] for sample in samples],
        }

    def _sample(self, step: int, place: int) -> dict[str, Any]:
        words = (self.seed, UNLABELLED, step, place)
        generator = np.random.default_rng(words)
        case = self.images.cases[int(generator.integers(len(self.images.cases)))]
        crop = self._crop(case, generator)
        with isolated(words):
            image = self.geometry.weak(image=crop)["image"].contiguous()
        return {
            "case": case,
            "image": image,
            "intensity": self.strong.draw(generator, len(image)),
            "seed": int(generator.integers(2**31)),
            "box": draw_box(generator, self.geometry.patch, self.cutmix),
        }

    def _crop(self, case: str, generator: np.random.Generator) -> torch.Tensor:
        """Cut a region anywhere in the image, or one that shows where a structure lies in a labelled one.

        It may reach over the border by as much as nnU-Net allows; outside is 0.
        """
        if self._reader is None:
            self._reader = self.images.open(self.memory)
        flat = len(self.geometry.patch) == 2
        crop, patch = (((1, *size) if flat else size) for size in (self.geometry.crop, self.geometry.patch))
        channels, *shape = self._reader.shape(case)
        out = np.zeros((channels, *crop), dtype=np.float32)
        source, target = [], []
        position = self.structures.draw(generator)
        for axis, (n, size, final) in enumerate(zip(shape, crop, patch, strict=True)):
            margin = max(size - final, size - n)  # over both borders together
            lowest, highest = -(margin // 2), n - size + margin - margin // 2
            if position is None:
                first = int(generator.integers(lowest, highest + 1))
            else:
                inside = int(generator.integers(final))  # where in the patch the position is to lie
                first = min(max(int(position[axis] * n) - inside - (size - final) // 2, lowest), highest)
            low, high = max(0, first), min(n, first + size)
            source.append(slice(low, high))
            target.append(slice(low - first, high - first))
        out[(slice(None), *target)] = self._reader.read(case, source)
        return torch.from_numpy(out[:, 0] if flat else out)
