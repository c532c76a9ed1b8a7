import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semisupervised.islands import ONE_PIECE, Islands
from semisupervised.losses import PseudoLabels

CPU = torch.device("cpu")


def patch(*rows: str) -> torch.Tensor:
    """(1, 1, *S) classes, one digit a voxel."""
    return torch.tensor([[[[int(digit) for digit in row] for row in rows]]])


def sure(like: torch.Tensor, value: bool = True) -> PseudoLabels:
    return PseudoLabels(like, torch.full(like.shape, value))


def taught(reference: torch.Tensor, structures: int = 1, regions: bool = False) -> Islands:
    islands = Islands(structures, regions, CPU)
    islands.learn(reference)
    islands.next_epoch(ddp=False)
    return islands


def test_the_largest_piece_stays_and_others_are_background():
    labels = sure(patch("110010", "110000", "000001"), value=False)
    found = taught(patch("111000")).remove(labels)
    assert found.target.equal(patch("110000", "110000", "000000"))
    assert found.sure.equal(patch("000010", "000000", "000001").bool()), "that it is background is known"
    assert labels.target.sum() == 6, "the teacher's labels are not changed"
    assert not labels.sure.any()


def test_pieces_that_touch_by_a_corner_are_one():
    found = taught(patch("11")).remove(sure(patch("1100", "0010", "0001")))
    assert found.target.equal(patch("1100", "0010", "0001"))


def test_an_island_that_touches_what_stays_is_left_out_of_the_loss():
    both = patch("1120", "1120", "0022")
    labels = patch("112200", "112211", "000000", "100000")
    found = taught(both, structures=2).remove(sure(labels))
    assert found.target.equal(patch("112200", "112211", "000000", "000000"))
    assert found.sure.equal(patch("111111", "111100", "111111", "111111").bool())


def test_an_island_of_two_structures_goes_as_a_whole():
    found = taught(patch("1122"), structures=2).remove(sure(patch("1122", "1122", "0000", "0120")))
    assert found.target.equal(patch("1122", "1122", "0000", "0000"))
    assert found.sure.all()


def test_pieces_of_the_same_size_stay():
    labels = sure(patch("110011"))
    assert taught(patch("11")).remove(labels).target.equal(labels.target)


def test_a_structure_of_several_pieces_keeps_them():
    labels = sure(patch("1110100", "0000022", "2000000"))
    islands = taught(patch("1100011", "0022200"), structures=2)
    assert islands.one_piece.tolist() == [False, True]
    assert islands.remove(labels).target.equal(patch("1110100", "0000022", "0000000"))


def test_a_structure_is_one_piece_if_little_lies_outside_of_it():
    for outside, expected in ((5, True), (6, False)):
        row = "1" * 95 + "0" + "1" * outside
        assert taught(patch(row)).one_piece.tolist() == [expected], ONE_PIECE


def test_all_epochs_and_patches_count():
    islands = taught(patch("11" * 10))
    assert islands.one_piece.tolist() == [True]
    islands.learn(torch.cat((patch("1100"), patch("1001"))))
    islands.learn(patch("0110"))
    islands.next_epoch(ddp=False)
    assert islands._before.tolist() == [[26], [1]]
    assert islands.one_piece.tolist() == [True]
    islands.learn(patch("1101101101"))
    islands.learn(patch("1100100010"))
    islands.next_epoch(ddp=False)
    assert islands._before.tolist() == [[37], [8]]
    assert islands.one_piece.tolist() == [False]


def test_nothing_is_an_island_before_a_labelled_patch_was_seen():
    labels = sure(patch("1101"))
    islands = Islands(1, False, CPU)
    assert islands.remove(labels).target.equal(labels.target)
    islands.next_epoch(ddp=False)
    assert islands.remove(labels).target.equal(labels.target)


def test_what_is_ignored_is_no_structure():
    islands = taught(patch("110202"))  # 2 is nnU-Net's ignore label
    assert islands._before.tolist() == [[2], [0]]
    regions = torch.tensor([[[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 1, 0, 1]]]])  # the last channel is what is ignored
    assert taught(regions, structures=2, regions=True)._before.tolist() == [[2, 1], [0, 0]]


def test_every_region_has_its_own_pieces():
    reference = torch.tensor([[[[1.0, 1, 1, 0, 0]], [[1.0, 1, 0, 0, 0]]]])
    target = torch.tensor([[[[1.0, 1, 1, 0, 1]], [[1.0, 1, 0, 1, 0]]]])
    islands = taught(reference, structures=2, regions=True)
    assert islands.one_piece.tolist() == [True, True]
    found = islands.remove(PseudoLabels(target, torch.zeros_like(target, dtype=torch.bool)))
    assert found.target.tolist() == [[[[1, 1, 1, 0, 0]], [[1, 1, 0, 0, 0]]]]
    assert found.target.dtype == target.dtype
    assert found.sure.tolist() == [[[[False] * 4 + [True]], [[False] * 3 + [True, False]]]]


def test_the_share_of_islands_is_that_of_an_epoch():
    islands = taught(patch("11"))
    islands.remove(sure(patch("11101")))
    islands.remove(sure(patch("11110")))
    assert islands.next_epoch(ddp=False) == pytest.approx(1 / 8)
    assert islands.next_epoch(ddp=False) == 0


def test_a_continued_training_judges_as_before():
    first = taught(patch("1100", "2000", "2002", "2000"), structures=2)
    again = Islands(2, False, CPU)
    again.load_state_dict(first.state_dict())
    assert again.one_piece.tolist() == first.one_piece.tolist() == [True, False]
    for islands in (first, again):
        islands.learn(patch("1" * 30 + "0" + "1"))
        islands.next_epoch(ddp=False)
    assert again.state_dict() == first.state_dict()


def naive(target: np.ndarray, one_piece: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """What is background and what is left out of one patch, structure by structure."""
    full = np.ones([3] * target.ndim)
    islands = np.zeros(target.shape, dtype=bool)
    for structure, single in enumerate(one_piece, start=1):
        number, count = ndimage.label(target == structure, full)
        sizes = [(number == i).sum() for i in range(1, count + 1)]
        for i, size in enumerate(sizes, start=1):
            islands |= (number == i) & single & (size < max(sizes))
    number, count = ndimage.label(target > 0, full)
    near = np.zeros_like(islands)
    for i in range(1, count + 1):
        near |= (number == i) & bool(((number == i) & ~islands).any())
    return islands & ~near, islands & near


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(9, 11), (5, 6, 7), (1, 8, 8)]), batch=st.integers(1, 3))
def test_it_equals_a_loop_over_structures(seed, shape, batch):
    generator = np.random.default_rng(seed)
    one_piece = generator.random(3) < 0.7
    target = generator.integers(0, 4, (batch, 1, *shape)) * (generator.random((batch, 1, *shape)) < 0.4)
    labels = PseudoLabels(torch.from_numpy(target), torch.from_numpy(generator.random(target.shape) < 0.5))
    islands = Islands(3, False, CPU)
    islands.one_piece = one_piece
    found = islands.remove(labels)
    for i in range(batch):
        background, left_out = naive(target[i, 0], one_piece.tolist())
        expected = np.where(background, 0, target[i, 0])
        np.testing.assert_array_equal(found.target[i, 0], expected)
        np.testing.assert_array_equal(found.sure[i, 0], (labels.sure[i, 0].numpy() | background) & ~left_out)
