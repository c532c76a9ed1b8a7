"""Every reader of the package with a good file of its kind, so that wrong ones can be made from it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from nnunetv2_kaf import architecture, weights
from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.files import append_checksum
from nnunetv2_kaf.inspect import open_model
from nnunetv2_kaf.locking import OWNER, folder_lock
from nnunetv2_kaf.plans import check_configuration, kaf_plans, read_description, read_plans
from nnunetv2_kaf.splits import read_splits
from pretraining.checkpoint import load_latest, run_identity, save_latest
from pretraining.config import PretrainConfig
from pretraining.data.cases import training_cases
from pretraining.exchange.interop import initialize_encoder
from pretraining.exchange.nnssl import export_nnssl
from pretraining.pairs.keypoint_cache import KeypointCache
from pretraining.run import build_state
from pretraining.task import Task
from reliability.mutations import damaged, mutated

LAYERS = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))
MEMORY = 2**26
"""Bytes: networks that a wrong file asks for are not built beyond this."""


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: What it reads.
        attempt: Writes a wrong file and reads it; anything but a KAFError is a failure.
    """

    name: str
    attempt: Callable[[random.Random], None]


def configuration(dims: int = 2) -> dict[str, Any]:
    """A configuration of plans for tiny images."""
    return {
        "data_identifier": f"nnUNetPlans_{dims}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 16, 16][-dims:],
        "spacing": [4.0, 1.0, 1.0][-dims:],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 2,
                "strides": [[1] * dims, [2] * dims],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
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


def plans() -> dict[str, Any]:
    """Plans with two configurations, one of which inherits."""
    return {
        "dataset_name": "Dataset900_Fuzz",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "configurations": {"2d": configuration(), "2d_more": {"inherits_from": "2d", "batch_size": 3}},
    }


DESCRIPTION = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}


class Files:
    """A folder with one good file of every kind.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans = kaf_plans(plans(), LAYERS)
        self.entry = self.plans["configurations"]["2d"]["architecture"]
        self.final = folder / "good_final.pth"
        weights.save_pretraining_checkpoint(
            self.final, self.network(), plans=self.plans, configuration="2d", num_input_channels=1,
            dataset_name="Dataset900_Fuzz", fold=0, pretraining={"history": [{"epoch": 0.0}]},
        )  # fmt: skip
        self.options = PretrainConfig.from_preset("simclr", {"projection_dim": 4})
        self.task = Task(
            "Dataset900_Fuzz", 900, folder, "nnUNetPlans", self.plans, "kaf", "2d", folder, (16, 16), (1.0, 1.0), 2,
            1, 2,
        )  # fmt: skip
        state = build_state(self.task, self.options, torch.device("cpu"))
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        state.step, state.history = 7, [{"epoch": 0.0}]
        self.identity = run_identity(self.task, 0, ("a", "b"), 2, None)
        self.latest = folder / "good_latest.pth"
        save_latest(self.latest, state, self.options, self.identity)
        self.cache = KeypointCache(folder / "cache", LAYERS, (16, 16), (1.0, 1.0))
        self.image = folder / "image.b2nd"
        self.image.write_bytes(b"an image")
        noise = np.random.default_rng(0).standard_normal((1, 2, 24, 24)).astype(np.float32)
        self.cache.create("case", self.image, noise, torch.device("cpu"))
        self.keypoints = self.cache.path("case", self.image)
        self.safetensors = b""
        self.keypoint_bytes = self.keypoints.read_bytes()

    def network(self) -> torch.nn.Module:
        """A fresh network of the plans."""
        return build_network(self.entry, 1, 2, where="fuzz")

    def readers(self) -> list[Reader]:
        """All readers."""
        found = {
            "plans": self._plans,
            "plans, as bytes": lambda rng: self._bytes(rng, json.dumps(plans()).encode(), self._read_plans),
            "dataset.json": lambda rng: self._json(rng, DESCRIPTION, read_description),
            "splits_final.json": self._splits,
            "kaf block": lambda rng: self._built(KAFConfig.from_dict, mutated(LAYERS.to_dict(), rng)),
            "options of a run": lambda rng: self._built(PretrainConfig.from_dict, mutated(self.options.to_dict(), rng)),
            "checkpoint_final.pth": lambda rng: self._torch(rng, self.final, self._read_final),
            "checkpoint_final.pth, as bytes": lambda rng: self._bytes(rng, self.final.read_bytes(), self._read_final),
            "checkpoint_latest.pth": lambda rng: self._torch(rng, self.latest, self._read_latest),
            "checkpoint_latest.pth, as bytes": lambda rng: self._bytes(
                rng, self.latest.read_bytes(), self._read_latest
            ),
            "checkpoint of nnU-Net (--init)": self._nnunet,
            "checkpoint of nnssl (--init)": self._nnssl,
            "model folder": self._model,
            "safetensors (--init)": self._safetensors,
            "cached keypoints, as bytes": self._cached_bytes,
            "cached keypoints with a checksum": self._cached_array,
            "owner of a folder": self._owner,
        }
        return [Reader(name, attempt) for name, attempt in found.items()]

    def _write(self, data: bytes) -> Path:
        path = self.folder / "wrong"
        path.write_bytes(data)
        return path

    def _bytes(self, rng: random.Random, data: bytes, read: Callable[[Path], object]) -> None:
        read(self._write(damaged(data, rng)))

    def _json(self, rng: random.Random, content: Any, read: Callable[[Path], object]) -> None:
        read(self._write(json.dumps(mutated(content, rng)).encode()))

    def _torch(self, rng: random.Random, good: Path, read: Callable[[Path], object]) -> None:
        path = self.folder / "wrong"
        torch.save(mutated(torch.load(good, weights_only=True), rng, tensors=True), path)
        read(path)

    def _built(self, build: Callable[[Any], object], content: Any) -> None:
        if isinstance(content, dict):
            build(content)

    def _plans(self, rng: random.Random) -> None:
        base = plans() if rng.random() < 0.5 else self.plans
        self._json(rng, base, self._read_plans)

    def _read_plans(self, path: Path) -> None:
        found = kaf_plans(read_plans(path))
        for name in found["configurations"]:
            check_configuration(found, name)
            entry = found["configurations"][name].get("architecture", self.entry)
            with mock.patch.object(architecture, "memory", return_value=MEMORY):
                build_network(entry, 1, 2, where=str(path))

    def _splits(self, rng: random.Random) -> None:
        cases = [f"case_{i}" for i in range(6)]
        good = [{"train": cases[:4], "val": cases[4:]}, {"train": cases[2:], "val": cases[:2]}]
        self._json(rng, good, read_splits)
        target = self.folder / "splits_final.json"
        target.write_bytes((self.folder / "wrong").read_bytes())
        training_cases(cases, self.folder, rng.randint(0, 3), self.options.patient_pattern)

    def _read_final(self, path: Path) -> None:
        with mock.patch.object(architecture, "memory", return_value=MEMORY):
            weights.load_encoder(self.network(), path, self.plans, "2d")
            export_nnssl(path, self.folder / "exported.pth", force=True)

    def _read_latest(self, path: Path) -> None:
        state = build_state(self.task, self.options, torch.device("cpu"))
        load_latest(path, state, self.options, self.identity)

    def _nnunet(self, rng: random.Random) -> None:
        arguments = {"plans": plans(), "configuration": "2d", "fold": 0}
        content = {"network_weights": dict(self.network().state_dict()), "init_args": arguments, "trainer_name": "x"}
        self._init(mutated(content, rng, tensors=True))

    def _nnssl(self, rng: random.Random) -> None:
        names = {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stages.0"}
        plan = {"architecture_plans": {"arch_class_name": "x"}, "pretrain_plan": plans(), **names}
        content = {"network_weights": dict(self.network().state_dict()), "nnssl_adaptation_plan": plan}
        self._init(mutated(content, rng, tensors=True))

    def _init(self, content: Any) -> None:
        path = self.folder / "wrong"
        torch.save(content, path)
        initialize_encoder(self.network(), path, 1)

    def _model(self, rng: random.Random) -> None:
        folder = self.folder / "nnUNetTrainerKAF__nnUNetPlans__2d"
        (folder / "fold_0").mkdir(parents=True, exist_ok=True)
        arguments = {"plans": plans(), "configuration": "2d", "fold": 0}
        content: Any = {
            "network_weights": dict(self.network().state_dict()), "init_args": arguments, "trainer_name": "x",
            "inference_allowed_mirroring_axes": [0, 1], "logging": {"train_losses": [1.0]},
        }  # fmt: skip
        described: Any = DESCRIPTION
        planned: Any = self.plans
        kind = rng.random()
        if kind < 0.4:
            content = mutated(content, rng, tensors=True)
        elif kind < 0.6:
            described = mutated(described, rng)
        else:
            planned = mutated(planned, rng)
        (folder / "plans.json").write_text(json.dumps(planned), encoding="utf-8")
        (folder / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
        torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
        with mock.patch.object(architecture, "memory", return_value=MEMORY):
            model = open_model(folder)
            model.build(model.folds[0])

    def _safetensors(self, rng: random.Random) -> None:
        path = self.folder / "wrong.safetensors"
        if not self.safetensors:
            export_nnssl(self.final, path, force=True)
            self.safetensors = path.read_bytes()
        path.write_bytes(damaged(self.safetensors, rng))
        initialize_encoder(self.network(), path, 1)

    def _cached_bytes(self, rng: random.Random) -> None:
        self.keypoints.write_bytes(damaged(self.keypoint_bytes, rng))
        self._read_cache()

    def _cached_array(self, rng: random.Random) -> None:
        records = [("slice", "<f8"), ("coords", "<f4", (2,)), ("descriptor", "<f2", (81,))]
        kinds: tuple[Any, ...] = ("<f4", "<i8", "U3", records[:1], records)
        array = np.zeros([rng.randint(0, 3) for _ in range(rng.randint(0, 3))], dtype=rng.choice(kinds))
        with self.keypoints.open("wb") as file:
            if rng.random() < 0.3:
                np.savez(file, slice=array)
            else:
                np.save(file, array)
        append_checksum(self.keypoints)
        self._read_cache()

    def _read_cache(self) -> None:
        cache = KeypointCache(self.folder / "cache", LAYERS, (16, 16), (1.0, 1.0))
        cache.read("case", self.image, 0)

    def _owner(self, rng: random.Random) -> None:
        place = self.folder / "run"
        place.mkdir(exist_ok=True)
        good = {"host": "elsewhere", "pid": 7, "since": "today"}
        data = json.dumps(mutated(good, rng)).encode()
        (place / OWNER).write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)
        with folder_lock(place, ""):
            pass
