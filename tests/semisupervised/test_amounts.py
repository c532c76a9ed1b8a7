import math

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from semisupervised.amounts import Amounts

CPU = torch.device("cpu")


def patch(*rows: str) -> torch.Tensor:
    """(1, 1, *S) classes, one digit a voxel."""
    return torch.tensor([[[[int(digit) for digit in row] for row in rows]]])


def test_a_structure_has_its_largest_share_in_a_case():
    amounts = Amounts(2, False, ["b", "a"], CPU)
    amounts.learn(torch.cat((patch("1120000000"), patch("1200000000"))), ["a", "b"])
    assert amounts.next_epoch(ddp=False).tolist() == pytest.approx([0.2, 0.1])
    amounts.learn(patch("2222200000"), ["b"])
    amounts.learn(patch("1111111111"), ["b"])
    assert amounts.next_epoch(ddp=False).tolist() == pytest.approx([11 / 30, 0.2]), "all patches of a case so far count"


def test_of_a_structure_that_no_patch_has_shown_nothing_is_known():
    amounts = Amounts(2, False, ["a"], CPU)
    assert amounts.next_epoch(ddp=False).tolist() == [math.inf, math.inf]
    amounts.learn(patch("10"), ["a"])
    assert amounts.next_epoch(ddp=False).tolist() == [0.5, math.inf]


def test_what_is_ignored_does_not_count():
    amounts = Amounts(1, False, ["a"], CPU)
    amounts.learn(patch("1000222222"), ["a"])  # 2 is nnU-Net's ignore label
    assert amounts.next_epoch(ddp=False).tolist() == [0.25]
    regions = Amounts(2, True, ["a"], CPU)
    regions.learn(torch.tensor([[[[1.0, 1, 1, 0]], [[1.0, 0, 0, 0]], [[0, 0, 1, 1]]]]), ["a"])
    assert regions.next_epoch(ddp=False).tolist() == [1, 0.5]


def test_regions_may_overlap():
    amounts = Amounts(2, True, ["a"], CPU)
    amounts.learn(torch.tensor([[[[1.0, 1, 1, 0]], [[1.0, 0, 0, 0]]]]), ["a"])
    assert amounts.next_epoch(ddp=False).tolist() == [0.75, 0.25]


def test_a_saved_state_goes_on_exactly():
    amounts, again = Amounts(1, False, ["a", "b"], CPU), Amounts(1, False, ["b", "a"], CPU)
    amounts.learn(torch.cat((patch("1100"), patch("1000"))), ["a", "b"])
    amounts.next_epoch(ddp=False)
    again.load_state_dict(amounts.state_dict())
    for each in (amounts, again):
        each.learn(patch("1111"), ["b"])
    assert torch.equal(amounts.next_epoch(ddp=False), again.next_epoch(ddp=False))


def test_a_state_of_other_labelled_cases_is_refused():
    state = Amounts(1, False, ["a", "b"], CPU).state_dict()
    with pytest.raises(
        KAFError, match=r"found a, b, expected those of this fold, a, c\. splits_final\.json has changed"
    ):
        Amounts(1, False, ["a", "c"], CPU).load_state_dict(state)
