import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from semisupervised.guard import ESTABLISHED, LOWEST, EpochSums, Guard


def test_a_healthy_training_keeps_its_weight():
    guard = Guard(["a", "b"])
    for epoch in range(20):
        assert not guard.judge([0.1, 0.02], 1.0, [0.5 + epoch / 50, 0.9], learned=True)
    assert guard.factor == 1


def healthy(guard, epochs=ESTABLISHED):
    for _ in range(epochs):
        assert not guard.judge([0.1, 0.02], 1.0, [0.9, 0.9], learned=True)
    return guard


def test_a_class_that_vanishes_lowers_the_weight_until_it_is_back():
    guard = healthy(Guard(["a", "b"]))
    (reason,) = guard.judge([0.1, 0.0005], 1.0, [0.9, 0.9], learned=True)
    assert "class b vanishes" in reason
    assert guard.factor == 0.5
    for _ in range(10):
        guard.judge([0.1, 0.0], 1.0, [0.9, None], learned=True)
    assert guard.factor == LOWEST
    healthy(guard, 4)
    assert guard.factor == 1


def test_a_class_that_comes_and_goes_by_a_few_voxels_does_not_vanish():
    guard = Guard(["a", "b"])
    for share in (0.0, 1e-6, 0.0, 0.0):
        assert not guard.judge([0.1, share], 1.0, [0.9, None], learned=True)
    assert guard.factor == 1


def test_falling_agreement_lowers_the_weight():
    guard = Guard(["a"])
    guard.judge([0.1], 1.0, [0.99], learned=False)
    guard.judge([0.1], 1.0, [0.8], learned=True)
    assert not guard.judge([0.1], 1.0, [0.7], learned=True), "what was before the ramp-up's end does not count"
    (reason,) = guard.judge([0.1], 1.0, [0.5], learned=True)
    assert "agree less on labelled training patches (by 0.28 than" in reason
    assert guard.factor == 0.5


def test_a_new_class_that_the_network_finds_before_its_teacher_is_no_collapse():
    guard = Guard(["a", "b"])
    for agreements in ([0.9, None], [0.9, 0.0], [0.9, 0.3], [0.9, 0.8]):
        assert not guard.judge([0.1, 0.02], 1.0, agreements, learned=True)
    (reason,) = guard.judge([0.1, 0.02], 1.0, [0.9, 0.2], learned=True)
    assert "agree less" in reason, "a class that was known to both"


def test_the_unlabelled_loss_counts_as_much_as_the_teacher_knows():
    guard = Guard(["a", "b"])
    assert guard.weight == 0, "nothing is known of the teacher before the first epoch"
    guard.judge([0.1, 0.02], 0.3, [0.9, 0.9], learned=False)
    assert guard.weight == 0.3
    healthy(guard)
    guard.judge([0.1, 0.0], 0.8, [0.9, 0.9], learned=True)
    assert guard.weight == pytest.approx(0.8 * 0.5)
    other = Guard(["a", "b"])
    other.load_state_dict(guard.state_dict())
    assert other.weight == guard.weight


def test_a_continued_guard_judges_alike():
    first = healthy(Guard(["a", "b"]))
    second = Guard(["a", "b"])
    second.load_state_dict(first.state_dict())
    reasons = second.judge([0.001, 0.02], 1.0, [0.9, 0.9], learned=True)
    assert reasons == first.judge([0.001, 0.02], 1.0, [0.9, 0.9], learned=True)
    assert len(reasons) == 1
    assert second == first


@pytest.mark.parametrize("best", [0.9, [0.9]])
def test_a_state_of_another_form_is_refused(best):
    state = {**Guard(["a", "b"]).state_dict(), "best": best}
    with pytest.raises(KAFError, match=r"guard\.best: found .*, expected a number for each of a, b\..*another version"):
        Guard(["a", "b"]).load_state_dict(state)


def test_the_sums_are_those_of_a_naive_count():
    sums = EpochSums(2, torch.device("cpu"))
    target = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]]).view(2, 1, 4)
    sure = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.bool).view(2, 1, 4)
    sums.add_pseudo_labels(target, sure)
    student = torch.tensor([[0, 1, 0, 2], [2, 1, 0, 0]]).view(2, 1, 4)
    reference = torch.tensor([[0, 1, 2, 2], [3, 3, 0, 1]]).view(2, 1, 4)  # 3 is the ignore label
    sums.add_labelled(target, student, reference)
    sums.add_losses(1.0, torch.tensor(3.0))
    sums.add_losses(2.0, torch.tensor(5.0))
    record = sums.finish(ddp=False)
    assert record["sure"] == pytest.approx(6 / 8)
    assert record["shares"] == pytest.approx([1 / 6, 2 / 6])
    dice = (2 * 1 / (2 + 2), 2 * 2 / (3 + 2))
    assert record["agreements"] == pytest.approx(dice)
    assert record["agreement"] == pytest.approx(sum(dice) / 2)
    known = (2 * 1 / (2 + 2), 2 * 1 / (1 + 2))
    assert record["known"] == pytest.approx(sum(known) / 2)
    assert record["labelled_loss"] == pytest.approx(1.5)
    assert record["unlabelled_loss"] == pytest.approx(4)
    empty = sums.finish(ddp=False)
    assert empty["sure"] == 0, "every epoch starts from 0"
    assert empty["agreements"] == [None, None]


def test_regions_are_counted_one_by_one():
    sums = EpochSums(2, torch.device("cpu"))
    target = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    sums.add_pseudo_labels(target, torch.ones(1, 2, 3, dtype=torch.bool))
    assert sums.finish(ddp=False)["shares"] == pytest.approx([2 / 6, 1 / 6])


def test_regions_are_compared_with_the_reference_where_it_is_not_ignored():
    sums = EpochSums(2, torch.device("cpu"))
    teacher = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]])
    student = torch.zeros_like(teacher)
    reference = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]])  # the last channel is the ignore label's
    sums.add_labelled(teacher, student, reference)
    record = sums.finish(ddp=False)
    assert record["known"] == pytest.approx((2 * 1 / (2 + 1) + 2 * 1 / (1 + 1)) / 2)
    assert record["agreement"] == 0


def test_without_an_ignore_label_every_voxel_of_regions_counts():
    sums = EpochSums(1, torch.device("cpu"))
    sums.add_labelled(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([[[True, True, True, False]]]))
    record = sums.finish(ddp=False)
    assert record["known"] == pytest.approx(2 * 3 / (4 + 3))
    assert record["agreement"] == 1
