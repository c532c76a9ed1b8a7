from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_kaf.errors import KAFError
from pretraining.objectives import pairwise


def squares(values: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return (values**2 * other).sum(1), other.any(1)


@pytest.mark.parametrize("limit", [1, 20, 30, 10**6])
def test_chunks_give_the_same_values_and_gradients(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    other = torch.rand(7, 3, generator=g) > 0.5
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", limit)
    sizes = []

    def recorded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(a))
        return squares(a, b)

    per_pair, counted = pairwise.in_chunks(recorded, 10, values, other)
    expected, expected_counted = squares(values, other)
    assert sizes == {1: [1] * 7, 20: [2, 2, 2, 1], 30: [3, 3, 1], 10**6: [7]}[limit]
    assert torch.equal(per_pair, expected)
    assert torch.equal(counted, expected_counted)
    weights = torch.arange(7.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((per_pair * weights).sum(), values)
    assert torch.equal(gradient, torch.autograd.grad((expected * weights).sum(), values)[0])


def test_chunks_keep_nothing_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "MAX_ELEMENTS", 2 * 50 * 50)
    descriptors = torch.randn(8, 50, 4, requires_grad=True)
    valid = torch.ones(8, 50, dtype=torch.bool)
    saved: list[int] = []

    def gram(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bmm(a, a.transpose(1, 2)).exp().sum((1, 2)), b.any(1)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pairwise.in_chunks(gram, 50 * 50, descriptors, valid)
        assert max(saved, default=0) < 50 * 50
        monkeypatch.setattr(pairwise, "MAX_ELEMENTS", 8 * 50 * 50)
        pairwise.in_chunks(gram, 50 * 50, descriptors, valid)
        assert max(saved) == 8 * 50 * 50


def test_no_pairs_and_no_elements() -> None:
    per_pair, counted = pairwise.in_chunks(squares, 0, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    assert per_pair.shape == counted.shape == (0,)


def test_usable_matches() -> None:
    valid_first = torch.tensor([[True, True, False, True]])
    valid_second = torch.tensor([[True, False]])
    matched, partners = pairwise.usable_matches(torch.tensor([[0, 1, 0, -1]]), valid_first, valid_second)
    assert matched.tolist() == [[True, False, False, False]]
    assert partners.tolist() == [[0, 2, 2, 2]]
    matched, partners = pairwise.usable_matches(torch.full((1, 4), -1), valid_first, valid_second[:, :0])
    assert not matched.any()
    assert partners.tolist() == [[0] * 4]


def test_row_mean() -> None:
    values = torch.tensor([[1.0, 2.0, torch.inf], [torch.nan, 1.0, 1.0]], requires_grad=True)
    mean = pairwise.row_mean(values, torch.tensor([[True, True, False], [False] * 3]))
    assert mean.tolist() == [1.5, 0.0]
    mean.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [0.0] * 3]


@pytest.mark.parametrize("wrong", range(5))
def test_shape_errors(wrong: int) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    case = [torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), mask, torch.ones(2, 5, dtype=torch.bool), mask.long()]
    pairwise.check_shapes(*case)
    case[wrong] = torch.zeros(2, 6, 7) if wrong < 2 else torch.zeros(2, 4)
    with pytest.raises(KAFError, match="matches"):
        pairwise.check_shapes(*case)


def test_ambiguous_keypoints_by_hand() -> None:
    """One line: 0 matches 0 at 0 mm; 1 lies beside it; 2 of each view lack a partner 5 mm apart; 3 is far from all."""
    first = torch.tensor([[[0.0], [1.5], [20.0], [90.0]]])
    second = torch.tensor([[[0.0], [-1.0], [25.0], [60.0]]])
    matches = torch.tensor([[0, -1, -1, -1]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    matched, partners = pairwise.usable_matches(matches, valid, valid)
    found = pairwise.ambiguous(matched, partners, first, second, torch.tensor([2.0]), torch.tensor([8.0]))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = True  # beside the partner; (0, 0) is the match itself
    expected[1, 0] = expected[1, 1] = True  # beside the anchor, and within reach without a partner
    expected[2, 2] = True  # within reach, lacking a partner
    assert torch.equal(found.across[0], expected)
    assert found.first[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    assert found.second[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    near = pairwise.within(first, second, torch.tensor([8.0]))
    assert near[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]]


def test_two_matches_within_reach_are_strangers_unless_at_the_same_place() -> None:
    first = torch.tensor([[[0.0, 0.0], [0.0, 5.0]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    matched, partners = pairwise.usable_matches(torch.tensor([[0, 1]]), valid, valid)
    near = pairwise.ambiguous(matched, partners, first, first, torch.tensor([2.0]), torch.tensor([8.0]))
    assert not near.across.any()
    closer = pairwise.ambiguous(matched, partners, first / 5, first / 5, torch.tensor([2.0]), torch.tensor([8.0]))
    assert closer.across[0].tolist() == [[False, True], [True, False]]
