import pytest
import torch

from semisupervised.thresholds import Thresholds

CPU = torch.device("cpu")


def classes(*probabilities: list[float]) -> torch.Tensor:
    """Logits (1, C, N, 1) of voxels with these probabilities."""
    return torch.tensor(probabilities).log().T[None, :, :, None]


def regions(*probabilities: list[float]) -> torch.Tensor:
    """Logits (1, R, N, 1) of voxels with these probabilities."""
    return torch.tensor(probabilities).logit().T[None, :, :, None]


def test_at_first_all_classes_have_the_usual_threshold():
    labels = Thresholds(0.9, 2, False, CPU).label(classes([0.96, 0.04], [0.5, 0.5], [0.15, 0.85], [0.05, 0.95]))
    assert labels.target[0, 0, :, 0].tolist()[2:] == [1, 1]
    assert labels.sure[0, 0, :, 0].tolist() == [True, False, False, True]


def test_half_of_the_voxels_of_a_structure_are_learned_after_an_epoch():
    thresholds = Thresholds(0.9, 3, False, CPU)
    easy = [[0.99, 0.0, 0.01], [0.97, 0.02, 0.01], [0.6, 0.2, 0.2]]
    hard = [[0.1, 0.805, 0.095], [0.1, 0.705, 0.195], [0.2, 0.605, 0.195], [0.2, 0.505, 0.295]]
    output = classes(*easy, *hard)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True, True, False, False, False, False, False]
    thresholds.next_epoch(ddp=False)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True, True, False, True, True, False, False]
    assert thresholds.values.tolist()[1] == pytest.approx(0.7, abs=0.02)
    assert thresholds.values.tolist()[2] == pytest.approx(0.9), "a class that was not given keeps its own"


def test_the_least_sure_background_is_left_out():
    sure, less = [0.9999, 0.0001], [0.97, 0.03]
    thresholds = Thresholds(0.9, 2, False, CPU)
    output = classes(*[sure] * 95, *[less] * 5)
    assert thresholds.label(output).sure.all()
    thresholds.next_epoch(ddp=False)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True] * 95 + [False] * 5
    unsure = Thresholds(0.9, 2, False, CPU)
    unsure.label(classes(*[[0.6, 0.4]] * 9, sure))
    unsure.next_epoch(ddp=False)
    assert unsure.values.tolist()[0] >= 0.8999, "never below the usual threshold"


def test_every_epoch_counts_for_itself():
    thresholds = Thresholds(0.9, 2, False, CPU)
    for probability, expected in ((0.605, 0.6), (0.805, 0.8), (0.975, 0.9)):
        thresholds.label(classes([1 - probability, probability]))
        thresholds.next_epoch(ddp=False)
        assert thresholds.values.tolist() == pytest.approx([0.9, expected], abs=0.02)


def test_presence_and_absence_of_every_region_have_thresholds_of_their_own():
    thresholds = Thresholds(0.9, 2, True, CPU)
    output = regions([0.705, 0.955], [0.05, 0.605], [0.155, 0.205])
    first = thresholds.label(output)
    assert first.target[0, :, :, 0].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert first.sure[0, :, :, 0].tolist() == [[False, True, False], [True, False, False]]
    thresholds.next_epoch(ddp=False)
    values = thresholds.values.tolist()
    assert values[1::2] == pytest.approx([0.7, 0.9], abs=0.02)
    assert min(values[0::2]) >= 0.8999
    assert thresholds.label(output).sure[0, :, :, 0].tolist() == [[True, True, False], [True, False, False]]


def test_probabilities_of_0_and_1_are_counted():
    thresholds = Thresholds(0.9, 2, False, CPU)
    output = torch.tensor([100.0, -100.0]).view(1, 2, 1, 1)
    thresholds.label(output)
    thresholds.next_epoch(ddp=False)
    assert thresholds.label(output).sure.all(), "the surest background is always learned"


@pytest.mark.parametrize("regions", [False, True])
def test_the_share_that_is_learned_of_many_voxels(regions):
    output = torch.randn(2, 4, 9, 10, 11, generator=torch.Generator().manual_seed(1))
    for usual, background in ((0.99, False), (0.01, True)):
        thresholds = Thresholds(usual, 4, regions, CPU)
        thresholds.label(output)
        thresholds.next_epoch(ddp=False)
        target, sure = thresholds.label(output)
        for i in range(4):
            label = int(not background) if regions else i
            if not regions and background != (i == 0):
                continue
            chosen = target[:, i] == label if regions else target[:, 0] == label
            learned = (sure[:, i] if regions else sure[:, 0])[chosen].float().mean()
            low, high = (0.85, 0.95) if background else (0.5, 0.6)
            assert low <= learned <= high


def test_a_saved_state_goes_on_exactly():
    thresholds, again = Thresholds(0.95, 3, False, CPU), Thresholds(0.95, 3, False, CPU)
    thresholds.label(torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0)))
    thresholds.next_epoch(ddp=False)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.values, thresholds.values)
    assert not torch.equal(again.values, Thresholds(0.95, 3, False, CPU).values)
