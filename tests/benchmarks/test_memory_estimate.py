"""What the planner counts of the KAF layers is what they keep, on networks of nnU-Net's plans."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from networks import CASES, build, make_batch, make_loss
from torch import Tensor, nn

CPU = torch.device("cpu")


def estimate(network: nn.Module, patch: tuple[int, ...]) -> float:
    return float(network.compute_conv_feature_map_size(patch))  # type: ignore[operator]


def kept_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Memory of the tensors that a forward pass keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    pieces: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for piece, size in pieces.items() if piece not in own)


@pytest.mark.parametrize(
    ("name", "patch", "batch"),
    [("Hippocampus 2d", (56, 40), 4), ("ACDC 2d", (128, 96), 2), ("Hippocampus 3d_fullres", (24, 40, 32), 2),
     ("ACDC 3d_fullres", (10, 96, 64), 1)],
)  # fmt: skip
@pytest.mark.parametrize("arm", ["kaf", "paper"])
def test_the_estimate_grows_with_the_layers_as_memory_does(
    name: str, patch: tuple[int, ...], batch: int, arm: str
) -> None:
    layout = dataclasses.replace(CASES[name].layout, patch_size=patch)
    case = dataclasses.replace(CASES[name], layout=layout)
    data, loss = make_batch(case, batch, 0, CPU), make_loss(case, compiled=False)
    kept, estimates = [], []
    for one in ("plain", arm):
        network = build(case, one, 0, CPU)
        kept.append(kept_bytes(network, lambda network=network: loss(network(data.data), data.targets)))
        estimates.append(estimate(network, patch))
    assert estimates[1] / estimates[0] == pytest.approx(kept[1] / kept[0], rel=0.15)
