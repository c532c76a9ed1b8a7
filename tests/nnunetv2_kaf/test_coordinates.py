import math

import numpy as np
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


def test_centre_and_share_of_images_of_any_size() -> None:
    for shape in ((4, 7), (1, 2)):
        middle = (np.asarray(shape) - 1) / 2
        assert coordinates.from_centre(middle, shape).tolist() == [0, 0]
        assert coordinates.share_of_extent(middle, shape).tolist() == [0.5, 0.5]
        edges = np.stack([np.full(2, -0.5), np.asarray(shape) - 0.5])
        assert coordinates.share_of_extent(edges, shape).tolist() == [[0, 0], [1, 1]]


def test_millimetres_there_and_back_for_tensors_and_arrays() -> None:
    spacing = (4.0, 1.5)
    points = torch.rand(5, 2) * 20
    torch.testing.assert_close(coordinates.from_mm(coordinates.to_mm(points, spacing), spacing), points)
    array = coordinates.to_mm(points.double().numpy(), spacing)
    np.testing.assert_allclose(array, coordinates.to_mm(points.double(), spacing).numpy())


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (1, 4), (3, 4, 6)])
def test_grid_sample_finds_the_voxel_that_the_coordinates_name(shape: tuple[int, ...], border: bool) -> None:
    image = torch.arange(float(math.prod(shape))).view(1, 1, *shape)
    points = torch.cartesian_prod(*[torch.arange(float(n)) for n in shape])
    grid = coordinates.to_grid_sample(points, shape, border=border).view(1, *[1] * (len(shape) - 1), -1, len(shape))
    found = functional.grid_sample(image, grid, padding_mode="border", align_corners=not border)
    torch.testing.assert_close(found.flatten(), image.flatten(), rtol=1e-4, atol=1e-4)


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
