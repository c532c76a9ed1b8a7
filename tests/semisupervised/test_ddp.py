"""Two processes equal one on the same global batch. DDP of nnU-Net wants GPUs; here the CPU takes their place.

Run as a script it is one of the processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from semisupervised.trainer import nnUNetTrainerSemi

STEPS, BATCH = 3, 4


class OnCPU(nnUNetTrainerSemi):
    """The trainer of a process without a GPU."""

    guard_every = 1
    unlabelled_ramp = 0.0
    confidence_threshold = 0.35

    def initialize(self) -> None:
        self.device, self.grad_scaler = torch.device("cpu"), None
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        super().initialize()


def labelled(step: int, dims: int, classes: int, scales: list[list[float]]) -> dict[str, Any]:
    """A global batch of labelled patches, as nnU-Net's loader gives it."""
    generator = torch.Generator().manual_seed(step)
    shape = [8, 16, 24][-dims:]
    target = torch.randint(0, classes, (BATCH, 1, *shape), generator=generator)
    targets = [target[(..., *(slice(None, None, round(1 / s)) for s in scale))] for scale in scales]
    return {
        "data": torch.randn(BATCH, 1, *shape, generator=generator),
        "target": targets,
        "keys": [f"p{i % 2}" for i in range(BATCH)],
    }


def train(folder: Path, configuration: str, batch_dice: bool, rank: int, ranks: int) -> dict[str, Any]:
    """A few steps; returns weights, the teacher's weights and the record of the epoch."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    plans["configurations"][configuration] |= {"batch_size": BATCH, "batch_dice": batch_dice}
    trainer: Any = OnCPU(
        plans, configuration, 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
    )
    trainer.num_iterations_per_epoch = STEPS
    trainer.on_train_start()
    trainer._guard.known = 1.0
    trainer._islands.one_piece[:] = True
    trainer.on_train_epoch_start()
    scales = trainer._get_deep_supervision_scales()
    if ranks == 1:  # nnU-Net gives the coarsest output a weight of 1e-6 under DDP, of 0 otherwise
        weights = np.array([0.5**i for i in range(len(scales))])
        weights[-1] = 1e-6
        trainer.loss.weight_factors = trainer._unlabelled_loss.weights = tuple(weights / weights.sum())
    for step in range(2 * STEPS):
        if step == STEPS:  # an epoch has ended
            trainer._excess.next_epoch(trainer.is_ddp, torch.tensor([0.1, 0.1]))
        batch = labelled(step, len(plans["configurations"][configuration]["patch_size"]), 3, scales)
        own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        part = {"data": batch["data"][own], "target": [t[own] for t in batch["target"]], "keys": batch["keys"][own]}
        trainer.train_step(part)
    network = getattr(trainer.network, "module", trainer.network)
    record = trainer._sums.finish(trainer.is_ddp)
    most = trainer._amounts.next_epoch(trainer.is_ddp, 1.5)
    record["amounts"] = trainer._amounts.state_dict()
    record |= trainer._excess.next_epoch(trainer.is_ddp, most)
    record["cut"] = trainer._excess.cut[1:].tolist()
    trainer._thresholds.next_epoch(trainer.is_ddp)
    record["thresholds"] = trainer._thresholds.values.tolist()
    record["islands"] = trainer._islands.next_epoch(trainer.is_ddp)
    record["pieces"] = trainer._islands.state_dict()
    return {"network": network.state_dict(), "teacher": trainer._teacher.state_dict(), "record": record}


def worker(folder: str, configuration: str, batch_dice: str, out: str) -> None:
    """One of two processes."""
    dist.init_process_group("gloo")
    nnUNetTrainer.DDP = lambda network, device_ids: DistributedDataParallel(network)
    result = train(Path(folder), configuration, batch_dice == "True", dist.get_rank(), 2)
    torch.save(result, f"{out}/{dist.get_rank()}.pt")
    dist.barrier()  # none leaves while the other may still talk to it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of torch can abort a process while its interpreter ends; all that is compared is written


@pytest.mark.parametrize(("dims", "batch_dice"), [(2, True), (3, False)])
def test_two_processes_equal_one(dims, batch_dice, make_dataset, tmp_path):
    dataset = make_dataset(dims=dims)
    alone = train(dataset.folder, dataset.name, batch_dice, 0, 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, str(dataset.folder), dataset.name, str(batch_dice), str(tmp_path)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        for key in ("network", "teacher"):
            for name, tensor in alone[key].items():
                torch.testing.assert_close(result[key][name], tensor, atol=2e-5, rtol=1e-4, msg=f"{rank} {key} {name}")
        assert result["record"]["sure"] == pytest.approx(alone["record"]["sure"], abs=1e-4)
        assert result["record"]["shares"] == pytest.approx(alone["record"]["shares"], abs=1e-4)
        assert result["record"]["thresholds"] == pytest.approx(alone["record"]["thresholds"], abs=1e-5)
        assert result["record"]["cut"] == pytest.approx(alone["record"]["cut"], abs=1e-5)
        assert result["record"]["given"] == pytest.approx(alone["record"]["given"], abs=1e-4)
        assert result["record"]["excess"] == pytest.approx(alone["record"]["excess"], abs=1e-3)
        assert result["record"]["amounts"] == alone["record"]["amounts"]
        assert result["record"]["islands"] == pytest.approx(alone["record"]["islands"], abs=1e-3)
        assert result["record"]["pieces"] == alone["record"]["pieces"]
        for key in ("agreement", "known"):
            assert result["record"][key] == pytest.approx(alone["record"][key], abs=1e-3)
    assert len({round(value, 4) for value in alone["record"]["thresholds"]}) > 1
    assert alone["record"]["excess"] > 0
    assert min(voxels[0] for voxels in alone["record"]["amounts"]["voxels"]) > 0
    assert alone["record"]["islands"] > 0
    assert sum(alone["record"]["pieces"]["labelled"][0]) > 0
    assert alone["record"]["sure"] > 0.1, "the comparison must include unlabelled voxels"


if __name__ == "__main__":
    worker(*sys.argv[1:])
