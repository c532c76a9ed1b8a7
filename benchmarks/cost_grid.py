"""Is the rule that chooses where the fusion's convolutions are evaluated right? Sparse, dense and "auto" on a grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from common import alternate, markdown, stopwatch
from kaf_parts import diffusion_work
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_kaf.fusion import Diffusion

LOGGER = logging.getLogger("scaling")
WIDTHS: tuple[tuple[int, int | None, int], ...] = (
    (96, None, 32),
    (96, None, 128),
    (96, None, 320),
    (256, 64, 32),
    (256, 64, 128),
    (256, 64, 320),
)
"""(D, H, C): the default layer and the paper's at three levels of nnU-Net's encoder."""
EDGES = {2: (8, 32, 128, 256), 3: (4, 8, 16, 32, 48)}
"""Of square and cubic maps."""
KEYPOINTS = (64, 256, 1024, 4096)


def measure_grid(
    dims: Sequence[int], rounds: int, warmup: int, max_gflop: float, seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time forward and backward pass of `Diffusion` over the grid, both evaluations in alternation.

    Args:
        dims: 2, 3 or both.
        rounds: Timed repetitions.
        warmup: Repetitions before them.
        max_gflop: Points whose dense evaluation takes more are left out.
        seed: Seed of tokens and places.
        device: CPU or CUDA.

    Returns:
        One row per point; what "auto" picks is "sparse", "dense" or, where the two convolutions differ, "mixed".
    """
    rows = []
    for ndim in dims:
        for (dim, hidden, channels), edge, keypoints in product(WIDTHS, EDGES[ndim], KEYPOINTS):
            diffusion = Diffusion(dim, channels, hidden, (3,) * ndim).to(device)
            diffusion.evaluation = "dense"
            work = diffusion_work(diffusion, keypoints, edge**ndim)
            if keypoints > edge**ndim or work.flops > 1e9 * max_gflop:
                continue
            point = {"D": dim, "H": hidden, "C": channels, "shape": [edge] * ndim, "keypoints": keypoints}
            rows.append({**point, **measure_point(diffusion, keypoints, [edge] * ndim, rounds, warmup, seed)})
            LOGGER.info("%s", rows[-1])
    return rows


def measure_point(
    diffusion: Diffusion, keypoints: int, shape: Sequence[int], rounds: int, warmup: int, seed: int
) -> dict[str, Any]:
    """Time one module with random tokens on distinct voxels."""
    device = diffusion.spread.weight.device
    step = make_step(diffusion, keypoints, shape, seed)
    pick = picked(step)
    names = ["sparse", "dense", *(["auto"] if pick == "mixed" else [])]
    arms = {name: lambda _, name=name: lambda: step(name) for name in names}
    times = alternate(arms, stopwatch(device), rounds, warmup)
    seconds = {name: float(np.median([wall for wall, _ in pairs])) for name, pairs in times.items()}
    auto = seconds["auto" if pick == "mixed" else pick]
    return {"seconds": seconds, "auto": pick, "loss": auto / min(seconds.values())}


def make_step(diffusion: Diffusion, keypoints: int, shape: Sequence[int], seed: int) -> Callable[[str], None]:
    """A forward and backward pass under a given evaluation."""
    generator = torch.Generator().manual_seed(seed)
    device, voxels = diffusion.spread.weight.device, math.prod(shape)
    tokens = torch.randn(1, keypoints, diffusion.spread.in_channels, generator=generator).to(device).requires_grad_()
    index = torch.randperm(voxels, generator=generator)[:keypoints].unsqueeze(0).to(device)
    valid = torch.ones(1, keypoints, dtype=torch.bool, device=device)
    with torch.no_grad():
        gradient = torch.ones_like(diffusion(tokens, index, valid, shape))

    def step(evaluation: str) -> None:
        diffusion.evaluation = evaluation
        out = diffusion(tokens, index, valid, shape)
        out.backward(gradient)
        diffusion.zero_grad(set_to_none=True)
        tokens.grad = None

    return step


def picked(step: Callable[[str], None]) -> str:
    """What "auto" does here, told by the operations it does: "sparse", "dense" or "mixed"."""
    flops = {}  # by operator: in total, both take as many where every voxel has a keypoint
    for evaluation in ("sparse", "dense", "auto"):
        with FlopCounterMode(display=False) as counter:
            step(evaluation)
        flops[evaluation] = counter.get_flop_counts()["Global"]
    same = [name for name in ("sparse", "dense") if flops[name] == flops["auto"]]
    return same[0] if same else "mixed"


def summarise_grid(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Worst and mean loss of "auto", and how often it picked the fastest."""
    losses = np.array([row["loss"] for row in rows])
    worst = rows[int(losses.argmax())]
    return {
        "points": len(rows),
        "worst_loss": float(losses.max()),
        "worst_point": {key: worst[key] for key in ("D", "H", "C", "shape", "keypoints", "auto")},
        "mean_loss": float(losses.mean()),
        "share_of_points_within_5_percent": float((losses <= 1.05).mean()),
    }


def grid_table(grid: Mapping[str, Any], most: int = 12) -> str:
    """Markdown table of the points where "auto" loses most."""
    header = ["D", "H", "C", "map", "keypoints", "sparse (ms)", "dense (ms)", "auto (ms)", "auto picks", "auto / best"]
    rows = []
    for row in sorted(grid["rows"], key=lambda row: float(row["loss"]), reverse=True)[:most]:
        seconds = {**row["seconds"], "auto": row["loss"] * min(row["seconds"].values())}
        size = " x ".join(map(str, row["shape"]))
        widths = [str(row["D"]), str(row["H"] or "-"), str(row["C"]), size, str(row["keypoints"])]
        times = [f"{1000 * seconds[name]:.2f}" for name in ("sparse", "dense", "auto")]
        rows.append([*widths, *times, row["auto"], f"{row['loss']:.2f}"])
    return markdown(header, rows)
