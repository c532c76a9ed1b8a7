import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from semisupervised.sampling import Geometry, Images, UnlabelledPatches, partner_of, share_of
from semisupervised.strong import StrongAugmentation


def patches(dataset, places=(0, 1, 2), total=3, crop=None, cutmix=0.5, seed=5):
    patch = tuple(dataset.plans["configurations"][dataset.name]["patch_size"])
    geometry = Geometry(crop or patch, patch, ComposeTransforms([]))
    images = Images(dataset.images, "command", ("p3", "p4", "p5"))
    return UnlabelledPatches(images, geometry, StrongAugmentation(), cutmix, seed, places, total)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_batch_depends_on_the_seed_and_the_step_alone(dims, make_dataset):
    dataset = make_dataset(dims=dims)
    first, second = patches(dataset), patches(dataset)
    second[7]
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    one, two = first[4], second[4]
    assert all(torch.equal(one[key], two[key]) for key in ("data", "intensity", "seeds", "boxes", "partners"))
    assert one["keys"] == two["keys"]
    assert not torch.equal(one["data"], first[5]["data"])
    assert not torch.equal(one["data"], patches(dataset, seed=6)[4]["data"])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_is_cut_out_of_its_image(dims, make_dataset):
    dataset = make_dataset(dims=dims)
    source = patches(dataset)
    reader = source.images.open()
    for step in range(5):
        batch = source[step]
        for patch, case in zip(batch["data"], batch["keys"], strict=True):
            image = torch.from_numpy(reader.read(case, (slice(None),) * 3))[0]
            shape = patch.shape[1:] if dims == 3 else (1, *patch.shape[1:])
            windows = image.unfold(0, shape[0], 1).unfold(1, shape[1], 1).unfold(2, shape[2], 1)
            wanted = patch.view(shape)
            assert (windows == wanted).flatten(-3).all(-1).any()


def test_patches_reach_over_the_border_by_the_margin_and_outside_is_0(make_dataset):
    dataset = make_dataset()
    source = patches(dataset, crop=(40, 24))  # the images have 20 x 28 voxels
    zeros = [(source[step]["data"] == 0).all(-1).sum(-1) for step in range(5)]
    assert all((rows >= 20).all() for rows in zeros)


def test_processes_share_the_global_batch(make_dataset):
    dataset = make_dataset()
    whole = patches(dataset, places=range(5), total=5)[3]
    seen = []
    for rank in range(2):
        places = share_of(5, rank, 2)
        part = patches(dataset, places=places, total=5)[3]
        for i, place in enumerate(places):
            assert torch.equal(part["data"][i], whole["data"][place])
            assert torch.equal(part["boxes"][i], whole["boxes"][place])
            partner = part["data"][part["partners"][i]]
            assert torch.equal(partner, whole["data"][whole["partners"][place]])
        assert len(part["boxes"]) == len(places)
        seen += places
    assert seen == list(range(5))


def test_neighbours_are_partners():
    assert [partner_of(i, 4) for i in range(4)] == [1, 0, 3, 2]
    assert [partner_of(i, 3) for i in range(3)] == [1, 0, 0]
    assert partner_of(0, 1) == 0
