from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_kaf.errors import KAFError
from pretraining import distributed
from pretraining.config import PretrainConfig
from pretraining.objectives import pairwise
from pretraining.objectives.heads import DescriptorHead, GlobalHead, Matcher, masked_mean
from pretraining.objectives.losses import PretrainingLoss
from pretraining.objectives.model import Embeddings

PAIRS, POINTS, WIDTH = 6, 7, 8
CASES: dict[str, dict[str, Any]] = {
    "simclr": {"positives": "simclr"},
    "gcl": {"positives": "gcl", "partitions": 3},
    "pcl": {"positives": "pcl", "position_threshold": 0.3},
    "chunks": {"positives": "pcl"},
    "local only": {"weight_bottleneck": 0.0, "weight_keypoints": 0.0, "weight_transport": 0.0},
    "transport only": {"weight_bottleneck": 0.0, "weight_keypoints": 0.0, "weight_local": 0.0},
}


class Small(nn.Module):
    """Heads on given features: every kind of embedding, every parameter used by the active losses."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        losses = config.components
        self.descriptors = DescriptorHead([4], WIDTH)
        self.bottleneck = GlobalHead(5, 5, WIDTH) if "bottleneck" in losses else None
        self.keypoints = GlobalHead(WIDTH, WIDTH, WIDTH) if "keypoints" in losses else None
        self.matcher = Matcher(WIDTH, 1) if "transport" in losses else None

    def forward(self, vectors: Tensor, tokens: Tensor, valid: Tensor) -> Embeddings:
        descriptors = self.descriptors([tokens])
        one, two = descriptors.chunk(2)
        return Embeddings(
            None if self.bottleneck is None else self.bottleneck(vectors),
            None if self.keypoints is None else self.keypoints(masked_mean(descriptors, valid)),
            descriptors,
            None if self.matcher is None else torch.cat(self.matcher(one, two, *valid.chunk(2))),
            None if self.matcher is None else self.matcher.dustbin,
            valid,
        )


def batch() -> dict[str, Tensor]:
    """The global batch: the second half has fewer matches, some pairs have none, one view has no keypoint."""
    g = torch.Generator().manual_seed(0)
    valid = torch.rand(2 * PAIRS, POINTS, generator=g) > 0.2
    valid[5] = False
    matches = torch.stack([torch.randperm(POINTS, generator=g) for _ in range(PAIRS)])
    matches[torch.rand(PAIRS, POINTS, generator=g) > torch.linspace(0.9, 0.3, PAIRS).unsqueeze(1)] = -1
    matches[1] = matches[3] = -1
    return {
        "vectors": torch.randn(2 * PAIRS, 5, generator=g, dtype=torch.float64),
        "tokens": torch.randn(2 * PAIRS, POINTS, 4, generator=g, dtype=torch.float64),
        "valid": valid,
        "matches": matches,
        "positions": torch.rand(2 * PAIRS, 2, generator=g, dtype=torch.float64),
    }


def share(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Pairs rank * b .. (rank + 1) * b - 1 of first sides, then second sides (or of the matches)."""
    sides = tensor.split(PAIRS)
    return torch.cat([side.chunk(ranks)[rank] for side in sides])


def step(name: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Losses and parameter gradients of one step."""
    config = PretrainConfig(**CASES[name])
    torch.manual_seed(1)
    small: nn.Module = Small(config).double()
    if ranks > 1:
        small = DistributedDataParallel(small)
    data = {key: share(value, rank, ranks) for key, value in batch().items()}
    # Two pairs a chunk in the local loss.
    pairwise.MAX_ELEMENTS = 6 * POINTS**2 if name == "chunks" else 2**24
    losses = PretrainingLoss(config)(
        small(data["vectors"], data["tokens"], data["valid"]), data["matches"], data["positions"]
    )
    losses["total"].backward()
    out = {key: value.detach() for key, value in losses.items()}
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None, key
        out[f"gradient of {key.removeprefix('module.')}"] = parameter.grad
    return out


def gather_case(rank: int, ranks: int) -> dict[str, Tensor]:
    """Every rank differentiates its own function of the gathered and of the summed tensor."""
    x = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    weights = torch.arange(6.0 * ranks).view(2 * ranks, 3) + 100 * rank
    gathered = distributed.gather(x.T.contiguous().T)
    (of_gather,) = torch.autograd.grad((gathered * weights).sum(), x)
    summed = distributed.sum_over_ranks(x)
    (of_sum,) = torch.autograd.grad((summed * weights[:2]).sum(), x)
    flags = [distributed.any_rank(flag, "cpu") for flag in (False, rank == 1, True)]
    return {
        "gathered": gathered.detach(),
        "gathered bool": distributed.gather(x > 4),
        "gradient of gather": of_gather,
        "summed": summed.detach(),
        "gradient of sum": of_sum,
        "input after the sum": x.detach(),
        "flags": torch.tensor(flags),
        "place": torch.tensor([distributed.rank(), distributed.world_size()]),
    }


def worker(folder: str) -> None:
    """Run in a process of its own, with the environment that torchrun gives."""
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.is_distributed()
        rank, ranks = distributed.rank(), distributed.world_size()
        results: dict[str, dict[str, Tensor]] = {name: step(name, rank, ranks) for name in CASES}
        results["gather"] = gather_case(rank, ranks)
        assert sorted(distributed.gather_names(["a", "b"][: rank + 1])) == ["a", "a", "b"]
        torch.save(results, Path(folder) / f"{rank}.pt")
        distributed.barrier()
        assert (Path(folder) / f"{1 - rank}.pt").exists()
    assert not distributed.is_distributed()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['worker'](sys.argv[2])"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(folder)],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(
    ranks: list[dict[str, dict[str, Tensor]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", pairwise.MAX_ELEMENTS)
    alone = step(name, 0, 1)
    assert set(PretrainConfig(**CASES[name]).components) < set(alone)
    for rank in ranks:
        assert rank[name].keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(rank[name][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    assert any(value.abs().max() > 1e-3 for key, value in alone.items() if key.startswith("gradient"))
    if name in ("local only", "transport only"):
        # the pairs' mean over all ranks is not the mean of the ranks' means
        single = alone["total"]
        halves = [half_loss(name, rank) for rank in range(2)]
        assert abs(float(sum(halves) / 2 - single)) > 1e-6


def half_loss(name: str, rank: int) -> Tensor:
    """The loss of one rank's share on its own."""
    config = PretrainConfig(**CASES[name])
    torch.manual_seed(1)
    small = Small(config).double()
    data = {key: share(value, rank, 2) for key, value in batch().items()}
    embeddings = small(data["vectors"], data["tokens"], data["valid"])
    return PretrainingLoss(config)(embeddings, data["matches"], data["positions"])["total"].detach()


def test_gather_and_sum(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    x = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(2)]
    weights = [torch.arange(12.0).view(4, 3) + 100 * rank for rank in range(2)]
    for rank, results in enumerate(ranks):
        found = results["gather"]
        assert torch.equal(found["gathered"], torch.cat(x))
        assert torch.equal(found["gathered bool"], torch.cat(x) > 4)
        assert torch.equal(found["gradient of gather"], (weights[0] + weights[1])[2 * rank : 2 * rank + 2])
        assert torch.equal(found["summed"], x[0] + x[1])
        assert torch.equal(found["gradient of sum"], weights[0][:2] + weights[1][:2])
        assert torch.equal(found["input after the sum"], x[rank])
        assert found["flags"].tolist() == [False, True, True]
        assert found["place"].tolist() == [rank, 2]


def test_one_process_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x = torch.randn(3, requires_grad=True)
    assert distributed.gather(x) is x
    assert distributed.sum_over_ranks(x) is x
    assert distributed.any_rank(True, "cpu") is True
    assert distributed.any_rank(False, "cpu") is False
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert list(distributed.gather_names(["b", "a"])) == ["b", "a"]
    distributed.barrier()
    for world in (None, "1"):
        if world is not None:
            monkeypatch.setenv("WORLD_SIZE", world)
        with distributed.process_group("cpu") as device:
            assert device == torch.device("cpu")
            assert not distributed.is_distributed()


def test_environment_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(KAFError, match="WORLD_SIZE is 'two'"), distributed.process_group("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KAFError, match="RANK is None"), distributed.process_group("cpu"):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(KAFError, match="LOCAL_RANK is 3"), distributed.process_group("cuda"):
        pass
