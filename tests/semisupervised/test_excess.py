import pytest
import torch

from semisupervised.excess import HALF_LIFE, Excess
from semisupervised.losses import PseudoLabels, hard_labels

CPU = torch.device("cpu")
BACKGROUND = [0.0, -9.0]


def voxels(*logits: list[float]) -> torch.Tensor:
    """Logits (1, C, N, 1)."""
    return torch.tensor(logits).T[None, :, :, None]


def one(*pairs: tuple[float, int]) -> torch.Tensor:
    """Logits of one structure: so sure, in so many voxels; the rest of 100 is background."""
    rows = [[0.0, sure] for sure, count in pairs for _ in range(count)]
    return voxels(*rows, *[BACKGROUND] * (100 - len(rows)))


def removed(excess: Excess, logits: torch.Tensor, sure: bool = True) -> PseudoLabels:
    target, _ = hard_labels(logits, excess.regions)
    return excess.remove(logits, PseudoLabels(target, torch.full(target.shape, sure)))


def left(excess: Excess, logits: torch.Tensor) -> int:
    return int(removed(excess, logits).target.sum())


def limited(logits: torch.Tensor, *most: float, regions: bool = False) -> Excess:
    """After an epoch with these logits."""
    excess = Excess(len(most), regions, CPU)
    removed(excess, logits)
    excess.next_epoch(ddp=False, most=torch.tensor(most))
    return excess


def test_the_least_sure_voxels_beyond_the_limit_are_taught_as_background():
    logits = one((5.05, 10), (1.05, 10), (3.05, 20))
    excess = Excess(1, False, CPU)
    first = removed(excess, logits)
    assert first.target.sum() == 40
    record = excess.next_epoch(ddp=False, most=torch.tensor([0.1]))
    assert record == {"given": pytest.approx([0.4]), "excess": 0}, "of the epoch that has ended"
    second = removed(excess, logits, sure=False)
    assert second.target[0, 0, :, 0].tolist() == [1] * 10 + [0] * 90
    assert second.sure[0, 0, :, 0].tolist() == [False] * 10 + [True] * 30 + [False] * 60, "that it is too much is known"
    record = excess.next_epoch(ddp=False, most=torch.tensor([0.1]))
    assert record == {"given": pytest.approx([0.4]), "excess": pytest.approx(0.75)}
    assert first.target.sum() == 40, "what was handed out stays"
    assert left(excess, logits) == 10, "the limit goes by what the teacher gives, not by what is left"


def test_up_to_the_limit_nothing_is_excess():
    logits = one((1.05, 40))
    assert left(limited(logits, 0.4), logits) == 40
    assert left(limited(logits, 0.39), logits) == 0


def test_of_voxels_whose_probability_is_one_the_surest_stay():
    logits = one((20.05, 10), (30.05, 10), (25.05, 10))
    assert hard_labels(logits, False)[1][:, :, :30].eq(1).all()
    assert removed(limited(logits, 0.15), logits).target[0, 0, :30, 0].tolist() == [0] * 10 + [1] * 10 + [0] * 10


def test_the_surest_of_all_always_stay():
    for sure in (41.0, 1e5):
        logits = one((sure, 10), (3.0, 5))
        assert left(limited(logits, 0.01), logits) == 10


def test_excess_is_left_out_where_the_second_guess_is_another_structure():
    inside, outside = [-1.0, 0.0, 1.0], [0.0, -1.0, 1.0]
    logits = voxels([0, 0, 9.0], inside, outside, *[[0, -9.0, -9.0]] * 7)
    labels = removed(limited(logits, 1.0, 0.1), logits)
    assert labels.target[0, 0, :3, 0].tolist() == [2, 0, 0]
    assert labels.sure[0, 0, :3, 0].tolist() == [True, False, True]
    both = removed(limited(logits, 0.0, 0.1), logits)
    assert both.sure[0, 0, :3, 0].tolist() == [True, False, True], "the other one does not occur, so it is not beyond"


def test_structures_that_swell_together_do_not_shield_each_other():
    logits = voxels(*[[0, 2.0, 1.0]] * 20, *[[0, 1.0, 2.0]] * 20, *[[9.0, 0, 0]] * 60)
    labels = removed(limited(logits, 0.1, 0.1), logits)
    assert labels.target.sum() == 0
    assert labels.sure.all()
    alone = removed(limited(logits, 0.1, 0.3), logits)
    assert alone.sure[0, 0, :, 0].tolist() == [False] * 20 + [True] * 80


def test_what_was_taken_out_before_does_not_count():
    logits = one((1.0, 40))
    excess = Excess(1, False, CPU)
    target = hard_labels(logits, False)[0]
    target[:, :, 5:] = 0  # islands
    excess.remove(logits, PseudoLabels(target, torch.ones_like(target, dtype=torch.bool)))
    assert excess.next_epoch(ddp=False, most=torch.tensor([0.1]))["given"] == pytest.approx([0.05])
    assert left(excess, logits) == 40


def test_a_teacher_that_gives_less_again_is_soon_believed_again():
    excess, little = limited(one((1.0, 40)), 0.1), one((1.0, 5))
    found = []
    for _ in range(3 * HALF_LIFE):
        found.append(left(excess, little))
        excess.refresh(ddp=False)
    assert found == [0] * found.count(0) + [5] * found.count(5)
    assert 1 < found.count(0) < HALF_LIFE
    lasting = limited(one(*[(1.0, 40)]), 0.1)
    lasting.refresh(ddp=False)
    assert left(lasting, little) == 0, "without new labels there is nothing to judge by"


def test_what_was_given_half_a_life_ago_counts_half():
    excess = limited(one((1.0, 40)), 1.0)
    for _ in range(HALF_LIFE):
        removed(excess, one())
    excess.refresh(ddp=False)
    assert excess._recent[1].sum() == pytest.approx(20)
    assert excess._recent.sum() == pytest.approx(50 + 100 * HALF_LIFE)


def test_a_structure_that_swells_within_an_epoch_is_cut_in_it():
    excess = limited(one((1.0, 5)), 0.1)
    much = one((1.0, 40))
    assert left(excess, much) == 40
    excess.refresh(ddp=False)
    assert left(excess, much) == 0


def test_every_region_has_a_limit_of_its_own():
    logits = voxels(*[[1.0, 1.0]] * 5, *[[3.0, -3.0]] * 5, *[[1.0, 3.0]] * 5)
    excess = Excess(2, True, CPU)
    removed(excess, logits)
    assert excess.next_epoch(ddp=False, most=torch.tensor([0.5, 1.0]))["given"] == pytest.approx([1, 10 / 15])
    labels = removed(excess, logits)
    assert labels.target[0, :, :, 0].tolist() == [[0] * 5 + [1] * 5 + [0] * 5, [1] * 5 + [0] * 5 + [1] * 5]
    expected = [False] * 5 + [True] * 5 + [False] * 5
    assert labels.sure[0, 0, :, 0].tolist() == expected, "absence is not taught where another region stays"
    assert labels.target.is_floating_point()
    both = removed(limited(logits, 0.34, 0.01, regions=True), logits)
    assert both.target.sum() == 5
    assert both.sure[0, :, :5].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_enough(dtype):
    logits = one((5.0, 10), (1.0, 30))
    excess = limited(logits, 0.1)
    assert left(excess, logits.to(dtype)) == 10


def test_a_teacher_without_numbers_stops_nothing():
    logits = torch.full((1, 2, 100, 1), torch.nan)
    assert not removed(limited(one((1.0, 40)), 0.1), logits, sure=False).sure.any()


def test_a_saved_state_goes_on_exactly():
    excess, again = Excess(2, False, CPU), Excess(2, False, CPU)
    batches = [torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    removed(excess, batches[0])
    excess.next_epoch(ddp=False, most=torch.tensor([0.1, 0.2]))
    again.load_state_dict(excess.state_dict())
    assert torch.equal(again.cut, excess.cut)
    assert torch.isfinite(excess.cut[1:]).all()
    labels = [removed(each, batches[1]) for each in (excess, again)]
    assert torch.equal(labels[0].target, labels[1].target)
    records = [each.next_epoch(ddp=False, most=torch.tensor([0.1, 0.2])) for each in (excess, again)]
    assert records[0] == records[1]
    assert torch.equal(again.cut, excess.cut)
