from __future__ import annotations

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.objectives.positives import partition_positives, position_positives, simclr_positives


def test_simclr_positives() -> None:
    assert simclr_positives(4).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert simclr_positives(0).shape == (0, 0)


def test_position_positives() -> None:
    positions = torch.tensor([[0.10], [0.50], [0.55], [0.58]])
    expected = [[0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]]
    assert position_positives(positions, 0.1).int().tolist() == expected
    # in 3D all axes must be close
    assert position_positives(torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.1, 0.1], [0.1, 0.1]]), 0.2).int().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 1, 1, 0],
    ]


def test_partition_positives_hand_computed() -> None:
    # parts 0, 1, 1, 3: pairs (0, 2) and (1, 3) are positive although their parts differ; 1 and 2 share a part
    positions = torch.tensor([[0.0], [0.25], [0.49], [1.0]])
    expected = [[0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]
    assert partition_positives(positions, 4).int().tolist() == expected
    # the end of the volume belongs to the last part
    assert partition_positives(torch.tensor([[1.0], [0.0], [0.0], [0.9]]), 4).int().tolist()[0] == [0, 0, 1, 1]


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_partition_positives_equal_naive(axes: int, partitions: int) -> None:
    positions = torch.rand(12, axes, generator=torch.Generator().manual_seed(axes))
    mask = partition_positives(positions, partitions)
    for i, a in enumerate(positions.tolist()):
        for j, b in enumerate(positions.tolist()):
            same = all(int(x * partitions) == int(y * partitions) for x, y in zip(a, b, strict=True))
            assert bool(mask[i, j]) == (i != j and (same or abs(i - j) == 6))


@pytest.mark.parametrize("axes", [1, 2])
def test_masks_are_symmetric_without_diagonal_and_hold_every_pair(axes: int) -> None:
    positions = torch.rand(10, axes, generator=torch.Generator().manual_seed(0))
    for mask in (simclr_positives(10), partition_positives(positions, 3), position_positives(positions, 0.2)):
        assert torch.equal(mask, mask.T)
        assert not mask.diagonal().any()
        assert mask[torch.arange(5), torch.arange(5) + 5].all()
    # one part and the largest threshold: everything is positive
    everything = ~torch.eye(10, dtype=torch.bool)
    assert torch.equal(partition_positives(positions, 1), everything)
    assert torch.equal(position_positives(positions, 1.0), everything)


def test_errors() -> None:
    with pytest.raises(KAFError, match="first sides"):
        position_positives(torch.zeros(3, 1), 0.1)
    with pytest.raises(KAFError, match="first sides"):
        partition_positives(torch.zeros(4), 4)
    with pytest.raises(KAFError, match="first sides"):
        simclr_positives(5)
    with pytest.raises(KAFError, match="partitions is 0"):
        partition_positives(torch.zeros(4, 1), 0)
