import numpy as np
import pytest
import torch

from semisupervised.cut_mix import box_mask, cut_mix, draw_box

SHAPES = {2: (12, 17), 3: (6, 11, 14)}


def test_boxes_stay_inside_and_are_drawn_as_often_as_asked_for():
    boxes = torch.stack([draw_box(np.random.default_rng(i), (10, 7), 0.5) for i in range(500)])
    sizes = boxes[..., 1] - boxes[..., 0]
    assert (boxes >= 0).all()
    assert (boxes[..., 1] <= torch.tensor([10, 7])).all()
    assert (sizes.prod(1) > 0).float().mean() == pytest.approx(0.5, abs=0.07)
    assert sizes[sizes[:, 0] > 0].prod(1).max() <= 0.75 * 70


@pytest.mark.parametrize("dims", [2, 3])
def test_image_labels_and_confidence_move_together(dims):
    shape = SHAPES[dims]
    place = torch.arange(3 * int(np.prod(shape))).view(3, 1, *shape)
    boxes = torch.stack([draw_box(np.random.default_rng(i), shape, 1.0) for i in range(2)])
    inside = box_mask(boxes, shape, torch.device("cpu"))
    partners = torch.tensor([2, 0])
    image, label = cut_mix(inside, partners, place.float().repeat(1, 2, *(1,) * dims), place)
    for i, partner in enumerate(partners.tolist()):
        box = tuple(slice(low, high) for low, high in boxes[i].tolist())
        expected = place[i].clone()
        expected[(0, *box)] = place[partner][(0, *box)]
        assert torch.equal(label[i], expected)
        assert torch.equal(image[i], expected.float().repeat(2, *(1,) * dims))
