"""Short pretrainings on phantoms leave collapse, and what they learn is of use: more than that they run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pretraining.config import PretrainConfig
from pretraining.prepare import DataOptions
from pretraining.run import RunOptions, build_state, pretrain
from pretraining.task import resolve_task

PAIRS = 8
PATIENTS = 10
NOISE = 0.5


def frames(patient: int) -> tuple[np.ndarray, np.ndarray]:
    """Two frames of a patient (1, 8, 48, 48): discs that grow along the volume, with stripes of the patient's own.

    Direction and width of the stripes are the patient's; their phase, the contrast and the noise are the frame's.
    """
    generator = np.random.default_rng(patient)
    angle, width = generator.uniform(0, np.pi), generator.uniform(3, 8)
    z, y, x = np.meshgrid(np.arange(8), *[np.arange(48) - 23.5] * 2, indexing="ij")
    disc = 1 / (1 + np.exp(np.hypot(y, x) - 8 - 1.5 * z))
    out = []
    for contrast in (1.0, 1.4):
        stripes = np.sin((np.cos(angle) * y + np.sin(angle) * x) * 2 * np.pi / width + generator.uniform(0, 2 * np.pi))
        image = disc * (1 + 0.7 * contrast * stripes) + NOISE * generator.standard_normal(z.shape)
        out.append(((image - image.mean()) / image.std())[None].astype(np.float32))
    return out[0], out[1]


def retrieval(network: torch.nn.Module) -> float:
    """Share of 40 unseen patients whose second frame is the one most similar to the first, by pooled bottlenecks."""
    pairs = [frames(1000 + patient) for patient in range(40)]
    encoder = network.get_submodule("encoder").eval()
    vectors = []
    for side in range(2):
        slices = torch.from_numpy(np.concatenate([pair[side][0] for pair in pairs])).unsqueeze(1)
        with torch.no_grad():
            features = encoder(slices)[-1]
        pooled = features.mean((2, 3)).unflatten(0, (len(pairs), -1)).mean(1)
        vectors.append(functional.normalize(pooled - pooled.mean(0), dim=1))
    nearest = (vectors[0] @ vectors[1].T).argmax(1)
    return float((nearest == torch.arange(len(pairs))).float().mean())


@pytest.mark.parametrize(
    ("preset", "network"), [("kaf", "kaf"), ("pcl", "plain"), ("simclr", "plain"), ("gcl", "plain")]
)
def test_global_losses_leave_collapse(tiny: Any, tmp_path: Path, preset: str, network: str) -> None:
    plans = tiny.plans["configurations"]["2d"]
    plans["patch_size"] = [32, 32]
    plans["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 32]
    tiny.write_plans()
    for patient in range(PATIENTS):
        for name, image in zip(("frame1", "frame2"), frames(patient), strict=True):
            tiny.add(f"p{patient:02d}_{name}", image)
    options = {"network": network, "epochs": 3, "iterations": 60, "batch_size": PAIRS}
    config = PretrainConfig.from_preset(preset, options)
    task = resolve_task("123", "2d", "nnUNetPlans", network)
    run = RunOptions(data=DataOptions(fold="all"), folder=tmp_path / "run", device=torch.device("cpu"))
    file = pretrain(task, config, run)
    checkpoint = torch.load(file, weights_only=True)
    last = checkpoint["pretraining"]["history"][-1]
    collapse = math.log(2 * PAIRS - 1)
    losses = {name: last[name] for name in ("bottleneck", "keypoints") if name in last}
    assert losses
    assert all(value < collapse - 0.3 for value in losses.values()), losses
    assert last["uniformity"] < -1
    untrained = build_state(task, config, torch.device("cpu")).network
    trained = build_state(task, config, torch.device("cpu")).network
    trained.load_state_dict(checkpoint["network_weights"])
    assert retrieval(trained) > retrieval(untrained)
