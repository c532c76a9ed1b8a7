from __future__ import annotations

import torch

from pretraining.batch import PairSample, collate


def sample(case: str, reference: tuple[int, ...] | None, value: float) -> PairSample:
    crop = None if reference is None else torch.full((1, *reference), value)
    return PairSample(
        case=case,
        views=torch.stack([torch.full((1, 4, 5), value), torch.full((1, 4, 5), -value)]),
        grids=torch.full((2, 4, 5, 2), value),
        extents=torch.tensor([value, value]),
        positions=torch.tensor([[value], [value + 1]]),
        known_transform=value > 1,
        references=None if crop is None else (crop, -crop),
        origins=torch.tensor([[value, 0], [0, value]]),
    )


def test_first_sides_come_before_second_sides() -> None:
    batch = collate([sample("a", (6, 7), 1), sample("b", (8, 3), 2)])
    assert batch.cases == ("a", "b")
    assert batch.views[:, 0, 0, 0].tolist() == [1, 2, -1, -2]
    assert batch.extents[:, 0].tolist() == [1, 2, 1, 2]
    assert batch.positions[:, 0].tolist() == [1, 2, 2, 3]
    assert batch.known_transform.tolist() == [False, True]


def test_references_are_padded_never_cut() -> None:
    batch = collate([sample("a", (6, 7), 1), sample("b", (8, 3), 2)])
    assert batch.references is not None
    assert batch.references.shape == (4, 1, 8, 7)
    for row, value in zip(batch.references, (1, 2, -1, -2), strict=True):
        assert (row == value).all()
    assert collate([sample("a", None, 1)]).references is None


def test_moving_keeps_everything() -> None:
    batch = collate([sample("a", (6, 7), 1)]).to(torch.device("cpu"))
    assert batch.cases == ("a",)
    assert batch.references is not None
