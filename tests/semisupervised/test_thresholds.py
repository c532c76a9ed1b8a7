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


def test_at_first_all_classes_have_the_highest_threshold():
    labels = Thresholds(0.9, 2, False, CPU).label(classes([0.96, 0.04], [0.5, 0.5], [0.15, 0.85], [0.05, 0.95]))
    assert labels.target[0, 0, :, 0].tolist()[2:] == [1, 1]
    assert labels.sure[0, 0, :, 0].tolist() == [True, False, False, True]


def test_half_of_the_voxels_of_a_class_are_learned_after_an_epoch():
    thresholds = Thresholds(0.9, 3, False, CPU)
    easy = [[0.99, 0.0, 0.01], [0.97, 0.02, 0.01], [0.6, 0.2, 0.2]]
    hard = [[0.1, 0.805, 0.095], [0.1, 0.705, 0.195], [0.2, 0.605, 0.195], [0.2, 0.505, 0.295]]
    output = classes(*easy, *hard)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True, True, False, False, False, False, False]
    thresholds.next_epoch(ddp=False)
    assert thresholds.values.tolist() == pytest.approx([0.9, 0.7, 0.9]), "the third class keeps its own"
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True, True, False, True, True, False, False]


def test_every_epoch_counts_for_itself():
    thresholds = Thresholds(0.9, 2, False, CPU)
    for probability, expected in ((0.605, 0.6), (0.805, 0.8), (0.975, 0.9)):
        thresholds.label(classes([1 - probability, probability], [0.96, 0.04]))
        thresholds.next_epoch(ddp=False)
        assert thresholds.values.tolist() == pytest.approx([0.9, expected])


def test_presence_and_absence_of_every_region_have_thresholds_of_their_own():
    thresholds = Thresholds(0.9, 2, True, CPU)
    output = regions([0.705, 0.955], [0.05, 0.605], [0.155, 0.205])
    first = thresholds.label(output)
    assert first.target[0, :, :, 0].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert first.sure[0, :, :, 0].tolist() == [[False, True, False], [True, False, False]]
    thresholds.next_epoch(ddp=False)
    assert thresholds.values.tolist() == pytest.approx([0.9, 0.7, 0.79, 0.9])
    assert thresholds.label(output).sure[0, :, :, 0].tolist() == [[True, True, False], [True, False, True]]


def test_probabilities_of_0_and_1_are_counted():
    thresholds = Thresholds(0.9, 2, False, CPU)
    thresholds.label(torch.tensor([100.0, -100.0]).view(1, 2, 1, 1))
    thresholds.next_epoch(ddp=False)
    assert thresholds.values.tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("regions", [False, True])
def test_the_share_that_is_learned_of_many_voxels(regions):
    output = torch.randn(2, 4, 9, 10, 11, generator=torch.Generator().manual_seed(1))
    thresholds = Thresholds(0.99, 4, regions, CPU)
    thresholds.label(output)
    thresholds.next_epoch(ddp=False)
    target, sure = thresholds.label(output)
    for i in range(4):
        for k in (0, 1) if regions else (i,):
            chosen = target[:, i] == k if regions else target[:, 0] == k
            learned = (sure[:, i] if regions else sure[:, 0])[chosen].float().mean()
            assert 0.5 <= learned < 0.6


def test_a_saved_state_goes_on_exactly():
    thresholds, again = Thresholds(0.95, 3, False, CPU), Thresholds(0.95, 3, False, CPU)
    thresholds.label(torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0)))
    thresholds.next_epoch(ddp=False)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.values, thresholds.values)
    assert not torch.equal(again.values, Thresholds(0.95, 3, False, CPU).values)
