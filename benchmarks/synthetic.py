"""A synthetic dataset as nnU-Net's preprocessing leaves it, with plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from scipy.ndimage import gaussian_filter

DATASET = "Dataset998_Synthetic"


@dataclass(frozen=True)
class Layout:
    """A configuration of nnU-Net's plans, and the volumes that go with it.

    Attributes:
        volume: Shape of the volumes (Z, Y, X).
        spacing: Voxel sizes of the volumes in mm.
        patch_size: Two values for a 2D configuration.
        batch_size: Entry of the plans.
        features: Channels of the encoder's stages.
        strides: Strides of the stages.
    """

    volume: tuple[int, int, int]
    spacing: tuple[float, float, float]
    patch_size: tuple[int, ...]
    batch_size: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def plan(self) -> dict[str, Any]:
        """The configuration as in nnU-Net's plans."""
        dims, stages = len(self.patch_size), len(self.features)
        # Thick slices are not convolved across until the planes are about as coarse.
        thick = [1, 3, 3] if self.spacing[0] > 3 * self.spacing[1] and dims == 3 else [3] * dims
        return {
            "data_identifier": self.folder,
            "batch_size": self.batch_size,
            "patch_size": list(self.patch_size),
            "spacing": list(self.spacing[-dims:]),
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "batch_dice": False,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": stages,
                    "features_per_stage": list(self.features),
                    "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                    "kernel_sizes": [thick if i < 2 else [3] * dims for i in range(stages)],
                    "strides": [list(stride) for stride in self.strides],
                    "n_conv_per_stage": [2] * stages,
                    "n_conv_per_stage_decoder": [2] * (stages - 1),
                    "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }

    @property
    def folder(self) -> str:
        """Folder of the preprocessed volumes; layouts of the same volumes share it."""
        return "volumes_" + "x".join(map(str, self.volume))


def write_dataset(root: Path, layouts: Mapping[str, Layout], patients: int, seed: int) -> Path:
    """Write a dataset as nnU-Net's preprocessing does, two images (phases) per patient.

    Args:
        root: Becomes `nnUNet_preprocessed`.
        layouts: Configurations by name.
        patients: Number of patients.
        seed: Seed of the images.

    Returns:
        The folder of the dataset.
    """
    folder = root / DATASET
    folder.mkdir(parents=True)
    plans = {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {name: layout.plan() for name, layout in layouts.items()},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    for layout in {layout.folder: layout for layout in layouts.values()}.values():
        images = folder / layout.folder
        images.mkdir()
        for patient in range(patients):
            for phase, image in enumerate(phases(layout.volume, layout.spacing, [seed, patient]), start=1):
                file = images / f"patient{patient:03d}_frame{phase:02d}.b2nd"
                blosc2.asarray(image, urlpath=str(file))
    return folder


def phases(shape: Sequence[int], spacing: Sequence[float], seed: Sequence[int]) -> list[np.ndarray]:
    """Make two images (1, Z, Y, X) of one patient: texture of three sizes, mostly shared, fading towards the edges."""
    generator = np.random.default_rng(seed)
    finest = min(spacing)

    def texture(size: float) -> np.ndarray:
        """Noise smoothed to structures of about `size` finest voxels, related between neighbouring slices."""
        sigma = [max(size * finest / s, 0.7) for s in spacing]
        smooth: np.ndarray = gaussian_filter(generator.standard_normal(shape), sigma)
        return smooth / max(float(smooth.std()), 1e-12)

    shared = sum((weight * texture(size) for size, weight in ((1.0, 0.5), (2.5, 1.0), (8.0, 2.0))), np.zeros(shape))
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape[1:]], indexing="ij")
    body = 1 / (1 + np.exp(12 * (np.sqrt(axes[0] ** 2 + axes[1] ** 2) - 1.1)))
    images = []
    for _ in range(2):
        image = (shared + 0.3 * texture(2.5) + 6) * body
        images.append(((image - image.mean()) / image.std())[None].astype(np.float32))
    return images
