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


def test_a_class_that_is_hard_to_tell_gets_a_lower_threshold_after_an_epoch():
    thresholds = Thresholds(0.9, 3, False, CPU)
    hard = classes([0.99, 0.0, 0.01], [0.97, 0.02, 0.01], [0.2, 0.6, 0.2], [0.1, 0.8, 0.1])
    assert thresholds.label(hard).sure[0, 0, :, 0].tolist() == [True, True, False, False]
    thresholds.label(classes([0.98, 0.01, 0.01]))
    thresholds.next_epoch(ddp=False)
    assert thresholds.values[0].tolist() == pytest.approx([0.9 * 0.98, 0.9 * 0.7, 0.9], abs=1e-6), (
        "the third class was never the label: it keeps its own"
    )
    assert thresholds.label(hard).sure[0, 0, :, 0].tolist() == [True, True, False, True]


def test_every_epoch_counts_for_itself():
    thresholds = Thresholds(0.9, 2, False, CPU)
    for probability in (0.6, 0.8):
        thresholds.label(classes([1 - probability, probability], [0.96, 0.04]))
        thresholds.next_epoch(ddp=False)
        assert thresholds.values[0].tolist() == pytest.approx([0.9, 0.9 * probability / 0.96], abs=1e-6)


def test_presence_and_absence_of_every_region_have_thresholds_of_their_own():
    thresholds = Thresholds(0.9, 2, True, CPU)
    output = regions([0.7, 0.9], [0.05, 0.6], [0.15, 0.2])
    first = thresholds.label(output)
    assert first.target[0, :, :, 0].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert first.sure[0, :, :, 0].tolist() == [[False, True, False], [True, False, False]]
    thresholds.next_epoch(ddp=False)
    assert thresholds.values.tolist() == [
        pytest.approx([0.9, 0.9 * 0.7 / 0.9], abs=1e-6),
        pytest.approx([0.9, 0.9 * 0.75 / 0.8], abs=1e-6),
    ]
    assert thresholds.label(output).sure[0, :, :, 0].tolist() == [[True, True, False], [True, False, False]]


def test_a_saved_state_goes_on_exactly():
    thresholds, again = Thresholds(0.95, 3, False, CPU), Thresholds(0.95, 3, False, CPU)
    thresholds.label(torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0)))
    thresholds.next_epoch(ddp=False)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.values, thresholds.values)
    assert not torch.equal(again.values, Thresholds(0.95, 3, False, CPU).values)
