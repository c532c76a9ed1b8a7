"""A tiny preprocessed dataset whose label files are folders: whoever opens one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from pretraining.config import PretrainConfig
from pretraining.data.images import PreprocessedImages
from pretraining.data.patients import group_by_patient
from pretraining.pairs.keypoint_cache import KeypointCache
from pretraining.pairs.loader import PairLoader
from pretraining.task import resolve_task

torch.set_num_threads(1)


def _configuration(dims: int) -> dict[str, Any]:
    conv, norm = f"torch.nn.modules.conv.Conv{dims}d", f"torch.nn.modules.instancenorm.InstanceNorm{dims}d"
    first = [1, 3, 3][-dims:]
    return {
        "data_identifier": "nnUNetPlans_2d" if dims == 2 else "nnUNetPlans_3d_fullres",
        "batch_size": 3,
        "patch_size": [8, 24, 16][-dims:],
        "spacing": [4.0, 1.0, 1.0][-dims:],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 8],
                "conv_op": conv,
                "kernel_sizes": [first, [3] * dims, [3] * dims],
                "strides": [[1] * dims, [1, 2, 2][-dims:], [2] * dims],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": norm,
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def textured(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth random texture (C, Z, Y, X), zero mean and unit variance."""
    generator = np.random.default_rng(seed)
    image = generator.standard_normal(shape).astype(np.float32)
    for axis in (1, 2, 3):
        image = image + np.roll(image, 1, axis) + np.roll(image, -1, axis)
    return ((image - image.mean()) / image.std()).astype(np.float32)


class TinyDataset:
    """Writes preprocessed cases under a temporary ``nnUNet_preprocessed``."""

    def __init__(self, root: Path) -> None:
        self.root = root / "preprocessed"
        self.folder = self.root / "Dataset123_Tiny"
        self.results = root / "results"
        self.results.mkdir(parents=True)
        self.folder.mkdir(parents=True)
        self.images = {c: self.folder / f"nnUNetPlans_{c}" for c in ("2d", "3d_fullres")}
        cascade = {**_configuration(3), "previous_stage": "3d_fullres"}
        self.plans = {
            "dataset_name": "Dataset123_Tiny",
            "plans_name": "nnUNetPlans",
            "label_manager": "LabelManager",
            "configurations": {"2d": _configuration(2), "3d_fullres": _configuration(3), "3d_cascade_fullres": cascade},
        }
        self.write_plans()
        description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
        (self.folder / "dataset.json").write_text(json.dumps(description))

    def preprocess_raw_images(self) -> None:
        """Give the plans what nnU-Net needs to preprocess images of folders and further datasets."""
        resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
        for configuration in self.plans["configurations"].values():
            configuration["preprocessor_name"] = "DefaultPreprocessor"
            for kind in ("data", "seg"):
                configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
                configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
        self.plans["foreground_intensity_properties_per_channel"] = {"0": {}}
        self.plans |= {"image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2]}
        self.write_plans()

    def write_plans(self) -> None:
        (self.folder / "nnUNetPlans.json").write_text(json.dumps(self.plans))

    def add(self, name: str, image: np.ndarray, numpy_format: bool = False) -> None:
        for folder in self.images.values():
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.pkl").mkdir()
            if numpy_format:
                np.savez_compressed(folder / f"{name}.npz", data=image, seg=np.array("never read"))
                continue
            (folder / f"{name}_seg.b2nd").mkdir()
            blosc2.asarray(np.ascontiguousarray(image), urlpath=str(folder / f"{name}.b2nd"))

    def add_cases(self, count: int, shape: tuple[int, ...] = (1, 10, 28, 20)) -> None:
        for i in range(count):
            self.add(f"case_{i:03d}", textured(shape, i))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    dataset = TinyDataset(tmp_path)
    monkeypatch.setenv("nnUNet_preprocessed", str(dataset.root))
    monkeypatch.setenv("nnUNet_results", str(dataset.results))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return dataset


@pytest.fixture
def make_texture() -> Callable[[tuple[int, ...], int], np.ndarray]:
    return textured


@pytest.fixture
def fast() -> list[str]:
    """Command-line options of a short CPU run."""
    return ["--device", "cpu", "--epochs", "2", "--iterations", "2", "--batch-size", "3", "--num-workers", "2"]


@pytest.fixture
def make_loader(tiny: TinyDataset) -> Callable[..., Any]:
    """Build the loader of a configuration of the tiny dataset, with its keypoints cached."""

    def make(configuration: str, workers: int = 0, **changes: Any) -> PairLoader:
        placement = {k: changes.pop(k) for k in ("rank", "world_size", "stream", "render_later") if k in changes}
        config = PretrainConfig(**changes)
        task = resolve_task("123", configuration, "nnUNetPlans")
        images = PreprocessedImages(task.image_folder, "command")
        layers = replace(task.layers, num_keypoints=48)
        cache = KeypointCache(tiny.folder / "keypoints", layers, task.patch_size, task.spacing)
        for case in images.identifiers:
            path = images.path(case)
            cache.create(case, path, images.read(case, (slice(None),) * 3), torch.device("cpu"))
        patients = group_by_patient(images.identifiers, config.patient_pattern)
        return PairLoader(
            images, cache, patients, task.patch_size, task.spacing, 4, config, num_workers=workers, **placement
        )

    return make
