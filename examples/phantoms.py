"""Anatomical phantoms as an nnU-Net raw dataset: short-axis hearts in a chest, small enough for a laptop.

Each case shows the right ventricle (RV), the left-ventricular myocardium (MYO) and the left-ventricular cavity (LV)
between lungs, chest wall, great vessels, liver and stomach. Blood has one intensity whether or not it belongs to a
labelled chamber, and muscle has one intensity whether it is myocardium, chest wall or liver, so a structure is told by
where it lies and what surrounds it and never by its grey value. Pose, size, shape, contrast, noise and coil shading are
drawn for each case from an explicit generator: the same seed writes the same files.

Coordinates are array order (z, y, x). The scene is drawn in a frame where the field of view spans -1..1 on each axis.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813  (the name everyone knows it by)
from scipy import ndimage

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[np.uint8]
LabelStyle = Literal["plain", "regions", "ignore"]

RV, MYO, LV, IGNORE = 1, 2, 3, 4
TISSUES = ("air", "lung", "muscle", "liver", "fat", "bone", "blood")
# Mean intensity of each tissue, one row per channel. Channel 1 is a dark-blood contrast.
CONTRASTS = (
    (0.02, 0.10, 0.42, 0.46, 0.78, 0.55, 0.76),
    (0.02, 0.08, 0.50, 0.44, 0.80, 0.34, 0.16),
)


@dataclass(frozen=True)
class PhantomConfig:
    """What to generate.

    Attributes:
        training: Number of labelled cases in `imagesTr`/`labelsTr`.
        test: Number of cases in `imagesTs`, whose reference is kept in `labelsTs`.
        channels: 1 or 2 image channels.
        shape: Voxels along (z, y, x).
        spacing: Millimetres along (z, y, x).
        noise: Standard deviation of the Rician noise, relative to an intensity scale of about 0 to 1.
        style: `plain` labels, `regions` (overlapping label definitions) or `ignore` (unannotated slices).
        seed: Seed of every draw.
    """

    training: int = 12
    test: int = 4
    channels: int = 1
    shape: tuple[int, int, int] = (20, 64, 64)
    spacing: tuple[float, float, float] = (3.0, 1.5, 1.5)
    noise: float = 0.05
    style: LabelStyle = "plain"
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject what cannot be generated."""
        if self.channels not in (1, 2):
            raise ValueError(f"channels is {self.channels}, expected 1 or 2")
        if self.training < 1 or self.test < 0:
            raise ValueError(f"training is {self.training} and test is {self.test}, expected at least 1 and 0")
        if min(self.shape) < 1 or min(self.spacing) <= 0:
            raise ValueError(f"shape {self.shape} and spacing {self.spacing} must be positive")


@dataclass(frozen=True)
class Phantom:
    """One case: `images` float32 (C, z, y, x) and `labels` uint8 (z, y, x)."""

    images: npt.NDArray[np.float32]
    labels: LabelArray


def smooth_field(shape: Sequence[int], knots: int, rng: np.random.Generator) -> FloatArray:
    """Draw a smooth random field: independent normal values on a coarse grid, interpolated by cubic splines.

    Args:
        shape: Voxels of the result.
        knots: Grid points per axis (fewer where an axis is shorter); more knots give a rougher field.
        rng: Source of the draw.

    Returns:
        Array of `shape` with values of roughly unit standard deviation.
    """
    coarse = [max(2, min(knots, size)) for size in shape]
    values = rng.normal(size=coarse)
    axes = [np.linspace(0, n - 1, size) for n, size in zip(coarse, shape, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.asarray(ndimage.map_coordinates(values, grid, order=3, mode="nearest"), dtype=np.float64)


def scene_coordinates(shape: Sequence[int], rng: np.random.Generator) -> FloatArray:
    """The scene position (3, z, y, x) of every voxel under a random pose and a smooth deformation.

    In-plane rotation is normal with 10 degrees, sizes vary by about 12 %; the position varies by about 6 to 8 % of the
    half field of view and the deformation has a standard deviation of 5 % of it.
    """
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    angle = np.deg2rad(np.clip(rng.normal(scale=10), -25, 25))
    cos, sin = np.cos(angle), np.sin(angle)
    rotated = np.stack([z, cos * y - sin * x, sin * y + cos * x])
    scale = rng.uniform(0.88, 1.12, size=3) * rng.uniform(0.92, 1.08)
    shift = np.clip(rng.normal(scale=(0.08, 0.06, 0.06)), -0.2, 0.2)
    posed = rotated / scale[:, None, None, None] - shift[:, None, None, None]
    warp = np.stack([smooth_field(shape, 5, rng) for _ in range(3)])
    return np.asarray(posed + 0.05 * warp, dtype=np.float64)


def _ellipse(grid: FloatArray, centre: Sequence[float], radii: Sequence[float]) -> BoolArray:
    """Where `grid` lies in an ellipsoid; with two radii, in an elliptic cylinder along z."""
    axes = range(3 - len(radii), 3)
    terms = [((grid[axis] - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)]
    return np.asarray(np.sum(terms, axis=0) < 1, dtype=bool)


def draw_chest(grid: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Paint the surroundings of the heart.

    Args:
        grid: Scene coordinates (3, z, y, x).
        rng: Source of the per-case sizes.

    Returns:
        Index into `TISSUES` (z, y, x). Vessels and stomach content are blood-like, the stomach wall and the liver
        muscle-like: distractors with the intensities of the targets.
    """
    tissue = np.zeros(grid.shape[1:], dtype=np.intp)

    def paint(name: str, where: BoolArray) -> None:
        tissue[where] = TISSUES.index(name)

    wall = rng.uniform(0.05, 0.12)
    paint("fat", _ellipse(grid, (0, 0), (0.92, 1.0)))
    paint("muscle", _ellipse(grid, (0, 0), (0.92 - wall, 1.0 - wall)))
    for side in (-1, 1):
        paint("lung", _ellipse(grid, (-0.08, side * 0.55), (0.55, 0.33 + rng.uniform(-0.04, 0.04))))
    paint("bone", _ellipse(grid, (0.66, 0.0), (0.15, 0.17)))
    paint("fat", _ellipse(grid, (0.62, 0.0), (0.05, 0.06)))
    paint("blood", _ellipse(grid, (0.5, 0.26), (0.10, 0.10)))  # descending aorta
    paint("blood", _ellipse(grid, (0.5, -0.28), (0.08, 0.09)))  # vena cava
    paint("liver", _ellipse(grid, (-1.0, 0.2, -0.5), (0.75, 0.5, 0.45)))
    stomach = (-0.9, 0.25 + rng.uniform(-0.08, 0.08), 0.6)
    paint("muscle", _ellipse(grid, stomach, (0.8, 0.28, 0.27)))
    paint("blood", _ellipse(grid, stomach, (0.7, 0.18, 0.17)))
    paint("blood", _ellipse(grid, (0.95, 0.1, 0.22), (0.40, 0.26, 0.28)))  # left atrium
    paint("blood", _ellipse(grid, (0.95, 0.05, -0.34), (0.40, 0.24, 0.24)))  # right atrium
    return tissue


def draw_heart(grid: FloatArray, rng: np.random.Generator) -> tuple[LabelArray, BoolArray]:
    """Paint the ventricles: a half-ellipsoid LV in its ring of muscle, the RV crescent on its left.

    Args:
        grid: Scene coordinates (3, z, y, x).
        rng: Source of the per-case sizes.

    Returns:
        Labels (z, y, x) with RV, MYO and LV, and where papillary muscles lie (inside LV, with muscle's intensity).
    """
    apex, base = -0.78 + rng.uniform(-0.08, 0.08), 0.60 + rng.uniform(-0.08, 0.08)
    radius, wall = rng.uniform(0.34, 0.42), rng.uniform(0.09, 0.15)
    z, (y, x) = grid[0], (grid[1] - 0.02, grid[2] - 0.14)
    height = np.clip((base - z) / (base - apex), 0, 1)
    outer = radius * np.sqrt(1 - height**2)
    inner = (radius - wall) * np.sqrt(np.clip(1 - (height * 1.12) ** 2, 0, 1))
    ventricle = (z < base) & (z > apex)
    distance = np.hypot(y, x)
    labels = np.zeros(grid.shape[1:], dtype=np.uint8)
    crescent = np.hypot(y / rng.uniform(0.95, 1.15), x + rng.uniform(0.24, 0.32)) < outer * rng.uniform(0.92, 1.05)
    labels[ventricle & crescent & (height < 0.85)] = RV
    labels[ventricle & (distance < outer)] = MYO
    labels[ventricle & (distance < inner)] = LV
    papillary = np.zeros(labels.shape, dtype=bool)
    for angle in rng.uniform(0, 2 * np.pi, size=2):
        papillary |= np.hypot(y - 0.6 * inner * np.sin(angle), x - 0.6 * inner * np.cos(angle)) < 0.05
    return labels, papillary & (labels == LV) & (height > 0.3)


def render(tissue: npt.NDArray[np.intp], channel: int, noise: float, rng: np.random.Generator) -> FloatArray:
    """Turn a tissue map (z, y, x) into an image of `channel`'s contrast.

    Per case the contrast varies by 0.03, the shading field by about 20 % and the receiver gain between 300 and 900;
    edges are blurred over about a voxel (partial volume) and the noise is Rician.
    """
    contrast = np.asarray(CONTRASTS[channel]) + rng.normal(scale=0.03, size=len(TISSUES))
    texture = 0.02 * smooth_field(tissue.shape, 16, rng)
    image = np.clip(contrast, 0.01, None)[tissue] + texture * (tissue > 0)
    image = ndimage.gaussian_filter(image, sigma=(0.4, 0.7, 0.7))
    image = image * np.exp(0.2 * smooth_field(tissue.shape, 3, rng))
    real, imaginary = rng.normal(scale=noise, size=(2, *tissue.shape))
    return np.asarray(rng.uniform(300, 900) * np.hypot(image + real, imaginary), dtype=np.float64)


def make_phantom(config: PhantomConfig, rng: np.random.Generator) -> Phantom:
    """Draw one case; labels are always plain RV, MYO, LV, with unannotated slices as IGNORE for that style."""
    grid = scene_coordinates(config.shape, rng)
    tissue = draw_chest(grid, rng)
    labels, papillary = draw_heart(grid, rng)
    blood, muscle = TISSUES.index("blood"), TISSUES.index("muscle")
    tissue[np.isin(labels, (RV, LV))] = blood
    tissue[(labels == MYO) | papillary] = muscle
    images = [render(tissue, channel, config.noise, rng) for channel in range(config.channels)]
    if config.style == "ignore":
        labels[rng.random(config.shape[0]) < 0.4] = IGNORE
    return Phantom(images=np.stack(images).astype(np.float32), labels=labels)


def dataset_json(config: PhantomConfig) -> dict[str, Any]:
    """nnU-Net's `dataset.json` for this configuration."""
    labels: dict[str, Any] = {"background": 0, "RV": RV, "MYO": MYO, "LV": LV}
    content: dict[str, Any] = {"name": "KAFPhantom", "description": "synthetic short-axis hearts"}
    if config.style == "ignore":
        labels["ignore"] = IGNORE
    if config.style == "regions":
        labels = {"background": 0, "heart": [RV, MYO, LV], "left_heart": [MYO, LV], "LV": LV}
        content["regions_class_order"] = [RV, MYO, LV]
    names = ("bright_blood", "dark_blood")[: config.channels]
    content["channel_names"] = {str(index): name for index, name in enumerate(names)}
    return content | {"labels": labels, "numTraining": config.training, "file_ending": ".nii.gz"}


def _write(array: npt.NDArray[Any], spacing: Sequence[float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed([float(value) for value in spacing])))  # SimpleITK wants (x, y, z)
    sitk.WriteImage(image, str(path), True)


def write_dataset(folder: Path, config: PhantomConfig) -> list[str]:
    """Write the dataset in nnU-Net's raw format and return the case identifiers, training cases first.

    Each case has its own generator, so the first cases stay the same when more are asked for. `dataset.json` comes
    last: a folder that has it is complete.
    """
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    cases = [("Tr", index) for index in range(config.training)] + [("Ts", index) for index in range(config.test)]
    identifiers = []
    for split, index in cases:
        rng = np.random.default_rng([config.seed, split == "Ts", index])
        # Test references are complete: an unannotated slice would make the score say less.
        style = config.style if split == "Tr" else "plain"
        phantom = make_phantom(replace(config, style=style), rng)
        identifier = f"phantom_{'t' if split == 'Ts' else ''}{index:03d}"
        for channel, image in enumerate(phantom.images):
            _write(image, config.spacing, folder / f"images{split}" / f"{identifier}_{channel:04d}.nii.gz")
        _write(phantom.labels, config.spacing, folder / f"labels{split}" / f"{identifier}.nii.gz")
        identifiers.append(identifier)
    (folder / "dataset.json").write_text(json.dumps(dataset_json(config), indent=2) + "\n", encoding="utf-8")
    return identifiers


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python examples/phantoms.py FOLDER [options]`."""
    default = PhantomConfig()
    parser = argparse.ArgumentParser(description="Write anatomical phantoms as an nnU-Net raw dataset.")
    parser.add_argument("folder", type=Path, help="dataset folder to write, named like Dataset900_KAFPhantom")
    parser.add_argument("--training", type=int, default=default.training, help="labelled training cases")
    parser.add_argument("--test", type=int, default=default.test, help="test cases")
    parser.add_argument("--channels", type=int, choices=(1, 2), default=default.channels, help="image channels")
    parser.add_argument("--shape", type=int, nargs=3, default=default.shape, help="voxels along z y x")
    parser.add_argument("--spacing", type=float, nargs=3, default=default.spacing, help="millimetres along z y x")
    parser.add_argument("--noise", type=float, default=default.noise, help="standard deviation of the noise")
    parser.add_argument("--style", choices=("plain", "regions", "ignore"), default=default.style, help="label style")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of every draw")
    options = vars(parser.parse_args(argv))
    folder = options.pop("folder")
    config = PhantomConfig(**options | {"shape": tuple(options["shape"]), "spacing": tuple(options["spacing"])})
    identifiers = write_dataset(folder, config)
    sys.stdout.write(f"{len(identifiers)} phantoms in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
