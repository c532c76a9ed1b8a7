import pytest
import torch

from semisupervised.thresholds import Thresholds

CPU = torch.device("cpu")
NO_LIMIT = torch.full((8,), torch.inf)


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
    thresholds.next_epoch(ddp=False, most=NO_LIMIT)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True, True, False, True, True, False, False]
    assert thresholds.values.tolist()[1] == pytest.approx(0.7, abs=0.02)
    assert thresholds.values.tolist()[2] == pytest.approx(0.9), "a class that was not given keeps its own"


def test_the_least_sure_background_is_left_out():
    sure, less = [0.9999, 0.0001], [0.97, 0.03]
    thresholds = Thresholds(0.9, 2, False, CPU)
    output = classes(*[sure] * 95, *[less] * 5)
    assert thresholds.label(output).sure.all()
    thresholds.next_epoch(ddp=False, most=NO_LIMIT)
    assert thresholds.label(output).sure[0, 0, :, 0].tolist() == [True] * 95 + [False] * 5
    unsure = Thresholds(0.9, 2, False, CPU)
    unsure.label(classes(*[[0.6, 0.4]] * 9, sure))
    unsure.next_epoch(ddp=False, most=NO_LIMIT)
    assert unsure.values.tolist()[0] >= 0.8999, "never below the usual threshold"


def test_every_epoch_counts_for_itself():
    thresholds = Thresholds(0.9, 2, False, CPU)
    for probability, expected in ((0.605, 0.6), (0.805, 0.8), (0.975, 0.9)):
        thresholds.label(classes([1 - probability, probability]))
        thresholds.next_epoch(ddp=False, most=NO_LIMIT)
        assert thresholds.values.tolist() == pytest.approx([0.9, expected], abs=0.02)


def test_presence_and_absence_of_every_region_have_thresholds_of_their_own():
    thresholds = Thresholds(0.9, 2, True, CPU)
    output = regions([0.705, 0.955], [0.05, 0.605], [0.155, 0.205])
    first = thresholds.label(output)
    assert first.target[0, :, :, 0].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert first.sure[0, :, :, 0].tolist() == [[False, True, False], [True, False, False]]
    thresholds.next_epoch(ddp=False, most=NO_LIMIT)
    values = thresholds.values.tolist()
    assert values[1::2] == pytest.approx([0.7, 0.9], abs=0.02)
    assert min(values[0::2]) >= 0.8999
    assert thresholds.label(output).sure[0, :, :, 0].tolist() == [[True, True, False], [True, False, False]]


def test_probabilities_of_0_and_1_are_counted():
    thresholds = Thresholds(0.9, 2, False, CPU)
    output = torch.tensor([100.0, -100.0]).view(1, 2, 1, 1)
    thresholds.label(output)
    thresholds.next_epoch(ddp=False, most=NO_LIMIT)
    assert thresholds.label(output).sure.all(), "the surest background is always learned"


@pytest.mark.parametrize("regions", [False, True])
def test_the_share_that_is_learned_of_many_voxels(regions):
    output = torch.randn(2, 4, 9, 10, 11, generator=torch.Generator().manual_seed(1))
    for usual, background in ((0.99, False), (0.01, True)):
        thresholds = Thresholds(usual, 4, regions, CPU)
        thresholds.label(output)
        thresholds.next_epoch(ddp=False, most=NO_LIMIT)
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
    thresholds.next_epoch(ddp=False, most=torch.tensor([0.1, 0.2]))
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.values, thresholds.values)
    assert torch.equal(again.excess, thresholds.excess)
    for each in (thresholds, again):
        each.label(torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1)))
        each.refresh(ddp=False)
    assert torch.equal(again.excess, thresholds.excess)
    assert torch.isfinite(thresholds.excess[1:]).all()
    assert not torch.equal(again.values, Thresholds(0.95, 3, False, CPU).values)


def test_the_least_sure_voxels_beyond_the_limit_are_taught_as_background():
    thresholds = Thresholds(0.9, 2, False, CPU)
    output = classes(*[[0.96, 0.04]] * 60, *[[0.305, 0.695]] * 10, *[[0.055, 0.945]] * 20, *[[0.005, 0.995]] * 10)
    first = thresholds.label(output)
    assert first.target.sum() == 40
    record = thresholds.next_epoch(ddp=False, most=torch.tensor([0.1]))
    assert record == {"given": pytest.approx([0.4]), "excess": 0}, "of the epoch that has ended"
    second = thresholds.label(output)
    assert second.target[0, 0, :, 0].tolist() == [0] * 90 + [1] * 10
    assert second.sure[0, 0, 60:, 0].all(), "that it is too much is known"
    record = thresholds.next_epoch(ddp=False, most=torch.tensor([0.1]))
    assert record == {"given": pytest.approx([0.4]), "excess": pytest.approx(0.75)}
    assert first.target.sum() == 40, "what was handed out stays"
    assert thresholds.label(output).target.sum() == 10, "the limit goes by what the teacher gives, not by what is left"


def test_up_to_the_limit_nothing_is_excess():
    output = classes(*[[0.96, 0.04]] * 60, *[[0.305, 0.695]] * 40)
    for most, left in ((0.4, 40), (0.39, 0)):
        thresholds = Thresholds(0.5, 2, False, CPU)
        thresholds.label(output)
        thresholds.next_epoch(ddp=False, most=torch.tensor([most]))
        assert thresholds.label(output).target.sum() == left
        assert torch.isfinite(thresholds.excess).tolist() == [False, left == 0]


def test_of_very_sure_voxels_the_surest_stay():
    margins = [20.05, 25.05, 30.05, 35.05]  # their probability is 1 in single precision
    output = torch.tensor([[-m / 2, m / 2] for m in margins] + [[50.0, -50.0]] * 4).T[None, :, :, None]
    thresholds = Thresholds(0.9, 2, False, CPU)
    thresholds.label(output)
    thresholds.next_epoch(ddp=False, most=torch.tensor([0.25]))
    labels = thresholds.label(output)
    assert labels.target[0, 0, :, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert labels.sure.all()


def test_excess_inside_another_structure_is_left_out_of_the_loss():
    thresholds = Thresholds(0.3, 3, False, CPU)
    inside, outside = [0.05, 0.405, 0.545], [0.405, 0.05, 0.545]
    output = classes([0.02, 0.03, 0.95], inside, outside, *[[0.98, 0.01, 0.01]] * 7)
    thresholds.label(output)
    thresholds.next_epoch(ddp=False, most=torch.tensor([1.0, 0.1]))
    labels = thresholds.label(output)
    assert labels.target[0, 0, :3, 0].tolist() == [2, 0, 0]
    assert labels.sure[0, 0, :3, 0].tolist() == [True, False, True]


def test_a_teacher_that_gives_less_again_is_soon_believed_again():
    thresholds = Thresholds(0.9, 2, False, CPU)
    much, little = (classes(*[[0.96, 0.04]] * (100 - n), *[[0.305, 0.695]] * n) for n in (40, 5))
    thresholds.label(much)
    thresholds.next_epoch(ddp=False, most=torch.tensor([0.1]))
    found = []
    for _ in range(8):
        found.append(int(thresholds.label(little).target.sum()))
        thresholds.refresh(ddp=False)
    assert found[0] == 0
    assert found[-1] == 5, "within the epoch: what was given lately counts most"
    assert found == sorted(found)


def test_a_structure_that_swells_within_an_epoch_is_cut_in_it():
    thresholds = Thresholds(0.9, 2, False, CPU)
    thresholds.label(classes(*[[0.96, 0.04]] * 95, *[[0.305, 0.695]] * 5))
    thresholds.next_epoch(ddp=False, most=torch.tensor([0.1]))
    much = classes(*[[0.96, 0.04]] * 60, *[[0.305, 0.695]] * 40)
    assert thresholds.label(much).target.sum() == 40
    thresholds.refresh(ddp=False)
    assert thresholds.label(much).target.sum() == 0


def test_every_region_has_a_limit_of_its_own():
    thresholds = Thresholds(0.9, 2, True, CPU)
    output = regions(*[[0.705, 0.705]] * 5, *[[0.955, 0.055]] * 5, *[[0.705, 0.955]] * 5)
    thresholds.label(output)
    record = thresholds.next_epoch(ddp=False, most=torch.tensor([0.5, 1.0]))
    assert record["given"] == pytest.approx([1, 10 / 15])
    labels = thresholds.label(output)
    assert labels.target[0, :, :, 0].tolist() == [[0] * 5 + [1] * 5 + [0] * 5, [1] * 5 + [0] * 5 + [1] * 5]
    inside = labels.sure[0, 0, :, 0].tolist()
    assert inside == [False] * 5 + [True] * 5 + [False] * 5, "absence is not taught where a region inside it stays"
    assert labels.target.is_floating_point()
    alone = Thresholds(0.9, 2, True, CPU)
    alone.label(output)
    alone.next_epoch(ddp=False, most=torch.tensor([0.34, 0.01]))
    assert alone.label(output).target.sum() == 5
    assert alone.label(output).sure[0, :, :5].all()
