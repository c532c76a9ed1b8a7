import pytest
import torch
from torch.nn import functional

from nnunetv2_kaf import coordinates
from nnunetv2_kaf.errors import KAFError


def test_voxel_j_of_stride_s_covers_its_s_input_voxels() -> None:
    for stride in (1, 2, 3, 4):
        voxels = torch.arange(12.0).unsqueeze(-1)
        index = coordinates.voxel_index(voxels, [12 // stride], [stride])
        assert index.tolist() == [i // stride for i in range(12)]


def test_convention_is_that_of_transposed_convolutions() -> None:
    # a transposed convolution with kernel = stride copies voxel j of the coarse map to the input voxels it covers
    fine = functional.conv_transpose1d(torch.arange(4.0).view(1, 1, 4), torch.ones(1, 1, 3), stride=3).flatten()
    index = coordinates.voxel_index(torch.arange(12.0).unsqueeze(-1), [4], [3])
    assert index.tolist() == fine.tolist()


def test_rescale_there_and_back_is_the_identity() -> None:
    points = torch.rand(5, 7, 3) * 20
    there = coordinates.rescale(points, [1, 1, 1], [1, 2, 4])
    torch.testing.assert_close(coordinates.rescale(there, [1, 2, 4], [1, 1, 1]), points)
    centre = coordinates.rescale(torch.tensor([0.0]), [4], [1])
    assert centre.item() == 1.5


def test_voxel_index_is_row_major_in_array_order_and_clamped() -> None:
    points = torch.tensor([[1.0, 2.0], [0.0, 4.0], [9.0, -3.0]])
    assert coordinates.voxel_index(points, [3, 5], [1, 1]).tolist() == [7, 4, 10]
    with pytest.raises(KAFError, match="3 axes"):
        coordinates.voxel_index(torch.zeros(1, 3), [3, 5], [1, 1])


def test_flip_twice_is_the_identity_and_moves_with_the_image() -> None:
    image = torch.arange(2 * 5.0).view(2, 5)
    point = torch.tensor([[1.0, 3.0]])
    flipped = coordinates.flip(point, (2, 5), (1,))
    row, column = flipped[0].long().tolist()
    assert image.flip(1)[row, column] == image[1, 3]
    assert torch.equal(coordinates.flip(flipped, (2, 5), (1,)), point)


def test_affine_then_its_inverse_is_the_identity() -> None:
    matrix = torch.tensor([[0.8, -0.3], [0.4, 1.1]], dtype=torch.float64)
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    points = torch.rand(4, 2, dtype=torch.float64)
    moved = coordinates.affine(points, matrix, shift)
    back = coordinates.affine(moved - shift, torch.linalg.inv(matrix), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(back, points)


def test_positions_keep_proportions_in_millimetres() -> None:
    # 10 mm along z equals 10 mm along x, whatever the voxel size and the shape
    shape, spacing = (9, 64, 100), (10.0, 1.5, 1.0)
    centre = torch.tensor([4.0, 31.5, 49.5])
    one_slice_up = coordinates.normalize_mm(centre + torch.tensor([1.0, 0, 0]), shape, spacing)
    ten_voxels_right = coordinates.normalize_mm(centre + torch.tensor([0, 0, 10.0]), shape, spacing)
    torch.testing.assert_close(one_slice_up[0], ten_voxels_right[2])
    torch.testing.assert_close(coordinates.normalize_mm(centre, shape, spacing), torch.zeros(3))
    # the largest extent, 100 mm, runs over [-1, 1]
    torch.testing.assert_close(ten_voxels_right[2], torch.tensor(10 / 50))
    assert coordinates.to_mm(torch.tensor([2.0, 2.0]), (10.0, 1.5)).tolist() == [20.0, 3.0]
