"""A tiny preprocessed dataset of which some cases are labelled, and trainers of a few steps on it.

The label files of the unlabelled cases are folders: whoever opens one fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from semisupervised.trainer import nnUNetTrainerSemi

torch.set_num_threads(1)
NAME = "Dataset321_Small"
LABELLED = ("p0", "p1")
VALIDATION = ("p2",)
LABELS: dict[str, dict[str, Any]] = {
    "plain": {"labels": {"background": 0, "a": 1, "b": 2}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
}


def configuration(dims: int, channels: int) -> dict[str, Any]:
    return {
        "data_identifier": f"nnUNetPlans_{dims}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 3,
        "patch_size": [8, 16, 24][-dims:],
        "spacing": [4.0, 1.0, 1.0][-dims:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * (channels - 1) + [channels > 1],
        "batch_dice": dims == 2,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 6, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 3,
                "strides": [[1] * dims, [1, 2, 2][-dims:], [2] * dims],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
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


class SmallDataset:
    """Cases p0 and p1 are labelled, p2 validates, the others have no label that can be read."""

    def __init__(self, root: Path, dims: int = 2, channels: int = 1, style: str = "plain") -> None:
        self.root, self.dims, self.channels = root, dims, channels
        self.folder = root / "preprocessed" / NAME
        self.images = self.folder / f"nnUNetPlans_{dims}d"
        self.images.mkdir(parents=True)
        self.name = "2d" if dims == 2 else "3d_fullres"
        self.description = {
            "channel_names": {str(i): f"MR{i}" for i in range(channels)},
            "file_ending": ".nii.gz",
            **LABELS[style],
        }
        cascade = {"inherits_from": self.name, "previous_stage": self.name}
        self.plans: dict[str, Any] = {
            "dataset_name": NAME,
            "plans_name": "nnUNetPlans",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "experiment_planner_used": "ExperimentPlanner",
            "foreground_intensity_properties_per_channel": {str(i): {} for i in range(channels)},
            "configurations": {self.name: configuration(dims, channels), "3d_cascade_fullres": cascade},
        }
        for name, content in (
            ("dataset.json", self.description),
            ("dataset_fingerprint.json", {}),
            ("nnUNetPlans.json", self.plans),
            ("splits_final.json", [{"train": list(LABELLED), "val": list(VALIDATION)}]),
        ):
            (self.folder / name).write_text(json.dumps(content))
        for i, case in enumerate((*LABELLED, *VALIDATION)):
            self.add(case, i, labelled=True, ignore=style == "ignore")
        for i in range(3, 6):
            self.add(f"p{i}", i, labelled=False)

    def add(self, case: str, seed: int, *, labelled: bool, ignore: bool = False) -> None:
        generator = np.random.default_rng(seed)
        shape = (9, 20, 28)
        middle = [n * generator.uniform(0.4, 0.6) for n in shape]
        distance = np.sqrt(sum(((g - m) / n) ** 2 for g, m, n in zip(np.indices(shape), middle, shape, strict=True)))
        label = ((distance < 0.35).astype(np.int16) + (distance < 0.2))[None]
        image = np.stack([(i + 1) * label[0] + generator.normal(0, 0.3, shape) for i in range(self.channels)])
        image[:, :, :2] = 0
        image = image.astype(np.float32)
        if not labelled:
            blosc2.asarray(image, urlpath=str(self.images / f"{case}.b2nd"))
            (self.images / f"{case}_seg.b2nd").mkdir()
            (self.images / f"{case}.pkl").mkdir()
            return
        if ignore:
            label[:, :3] = 3
        label[:, :, :2] = -1  # outside of the mask
        locations: dict[Any, Any] = {c: np.argwhere(label == c) for c in (1, 2)}
        locations[(1, 2)] = np.argwhere(label >= 1)
        locations[tuple([-1, 0, 1, 2])] = np.argwhere(label != 3)
        nnUNetDatasetBlosc2.save_case(
            image, label, {"class_locations": locations}, str(self.images / case), image.shape, image.shape
        )

    def trainer(self, cls: type[nnUNetTrainerSemi] = nnUNetTrainerSemi, **options: Any) -> Any:
        """A trainer of two epochs of three steps."""
        plans = json.loads(json.dumps(options.pop("plans", self.plans)))
        plans["continue_training"] = False
        configuration_name = options.pop("configuration", self.name)
        trainer: Any = cls(plans, configuration_name, options.pop("fold", 0), self.description, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 3, 1
        trainer.save_every = 1
        trainer.logger.plot_progress_png = lambda folder: None  # nnU-Net's takes longer than all the rest
        for name, value in options.items():
            assert hasattr(trainer, name)
            setattr(trainer, name, value)
        return trainer


@pytest.fixture
def make_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SmallDataset]:
    def make(**options: Any) -> SmallDataset:
        for name in ("raw", "results"):
            (tmp_path / name).mkdir()
        for name in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        monkeypatch.setenv("KAF_UNLABELLED", "321")
        monkeypatch.delenv("KAF_PRETRAINED", raising=False)
        return SmallDataset(tmp_path, **options)

    return make
