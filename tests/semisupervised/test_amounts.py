import math

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from semisupervised.amounts import Amounts

CPU = torch.device("cpu")


def patch(*rows: str) -> torch.Tensor:
    """(1, 1, *S) classes, one digit a voxel."""
    return torch.tensor([[[[int(digit) for digit in row] for row in rows]]])


def limits(amounts: Amounts, times: float = 1.0) -> list[float]:
    return amounts.next_epoch(ddp=False, times=times).tolist()


def test_a_structure_may_have_so_many_times_its_largest_share_in_a_case():
    amounts = Amounts(2, False, ["b", "a"], CPU)
    amounts.learn(torch.cat((patch("1122000000"), patch("1220000000"))), ["a", "b"])
    assert limits(amounts, 3.0) == pytest.approx([0.6, 0.6])
    amounts.learn(patch("2222200000"), ["b"])
    assert limits(amounts, 20.0) == pytest.approx([4, 7]), "all patches of a case so far count: 2 of 10, 7 of 20"


def test_what_differs_between_cases_may_differ_as_much_beyond_them():
    amounts = Amounts(2, False, ["a", "b", "c"], CPU)
    amounts.learn(torch.cat((patch("1112000000"), patch("1222200000"), patch("1120000000"))), ["a", "b", "c"])
    assert limits(amounts, 1.5) == pytest.approx([0.9, 1.6])
    assert limits(amounts, 3.5) == pytest.approx([1.05, 1.6])


def test_a_structure_that_a_case_does_not_show_has_no_limit():
    amounts = Amounts(2, False, ["a", "b"], CPU)
    assert limits(amounts) == [math.inf, math.inf]
    amounts.learn(patch("12"), ["a"])
    assert limits(amounts) == [math.inf, math.inf]
    amounts.learn(patch("10"), ["b"])
    assert limits(amounts) == [0.5, math.inf]
    assert limits(amounts, math.inf) == [math.inf, math.inf]


def test_what_is_ignored_does_not_count():
    amounts = Amounts(1, False, ["a"], CPU)
    amounts.learn(patch("1000222222"), ["a"])  # 2 is nnU-Net's ignore label
    assert limits(amounts) == [0.25]
    regions = Amounts(2, True, ["a"], CPU)
    regions.learn(torch.tensor([[[[1.0, 1, 1, 0]], [[1.0, 0, 0, 0]], [[0, 0, 1, 1]]]]), ["a"])
    assert limits(regions) == [1, 0.5]


def test_regions_may_overlap():
    amounts = Amounts(2, True, ["a"], CPU)
    amounts.learn(torch.tensor([[[[1.0, 1, 1, 0]], [[1.0, 0, 0, 0]]]]), ["a"])
    assert limits(amounts) == [0.75, 0.25]


def test_a_saved_state_goes_on_exactly():
    amounts, again = Amounts(1, False, ["a", "b"], CPU), Amounts(1, False, ["b", "a"], CPU)
    amounts.learn(torch.cat((patch("1100"), patch("1000"))), ["a", "b"])
    amounts.next_epoch(ddp=False, times=1.5)
    again.load_state_dict(amounts.state_dict())
    for each in (amounts, again):
        each.learn(patch("1111"), ["b"])
    assert limits(amounts) == limits(again)


def test_a_state_of_other_labelled_cases_is_refused():
    state = Amounts(1, False, ["a", "b"], CPU).state_dict()
    with pytest.raises(KAFError, match=r"found them without b and with c, d, expected those that the training began"):
        Amounts(1, False, ["a", "c", "d"], CPU).load_state_dict(state)
    with pytest.raises(KAFError, match=r"found them with c, expected"):
        Amounts(1, False, ["a", "b", "c"], CPU).load_state_dict(state)
