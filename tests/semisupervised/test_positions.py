import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from semisupervised.positions import Positions, labelled_positions
from semisupervised.sampling import Geometry, Images, UnlabelledPatches
from semisupervised.strong import StrongAugmentation

LABELLED = ("p0", "p1")


@pytest.mark.parametrize("most", [10_000, 20, 1])
@pytest.mark.parametrize("style", ["plain", "ignore"])
def test_places_are_those_of_the_labelled_voxels_relative_to_their_images(style, most, make_dataset, monkeypatch):
    monkeypatch.setattr("semisupervised.positions.VOXELS", most)
    of_a_case = max(1, most // 2)
    folder = str(make_dataset(style=style).images)
    places = labelled_positions(nnUNetDatasetBlosc2(folder), LABELLED, 0.33)
    assert places.share == 0.33
    expected = []
    for label in (1, 2, (1, 2)):
        voxels = [nnUNetDatasetBlosc2(folder, [case]).load_case(case)[3]["class_locations"][label] for case in LABELLED]
        expected.append(np.concatenate([(v[:: -(-len(v) // of_a_case), 1:] + 0.5) / (9, 20, 28) for v in voxels]))
    assert len(places.by_class) == 3, "all that is not ignored is no structure"
    for found, wanted in zip(places.by_class, expected, strict=True):
        assert len(found) <= len(LABELLED) * of_a_case
        np.testing.assert_array_equal(found, wanted)


def test_a_share_of_the_patches_is_drawn_from_all_structures_alike():
    generator = np.random.default_rng(0)
    places = Positions(0.5, (np.full((1, 3), 0.25), np.tile(np.full((1, 3), 0.75), (999, 1))))
    drawn = [places.draw(generator) for _ in range(2000)]
    anywhere = sum(place is None for place in drawn) / 2000
    first = sum(place is not None and place[0] == 0.25 for place in drawn) / 2000
    assert anywhere == pytest.approx(0.5, abs=0.05)
    assert first == pytest.approx(0.25, abs=0.05)


def test_without_structures_patches_come_from_anywhere():
    assert Positions(1.0, ()).draw(np.random.default_rng(0)) is None


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("place", [(0.5, 0.5, 0.5), (0.0, 0.99, 0.3), (1.0, 1.0, 1.0)])
def test_patches_show_the_place_anywhere_in_them(dims, margin, place, make_dataset):
    dataset = make_dataset(dims=dims)
    patch = (4, 6, 5)[-dims:]
    images = Images(dataset.images, "command", ("p3",))
    crop = tuple(n + margin for n in patch)
    geometry = Geometry(crop, patch, ComposeTransforms([]))
    patches = UnlabelledPatches(
        images, geometry, StrongAugmentation(), 0.5, 5, (0,), 1, structures=Positions(1.0, (np.array([place]),))
    )
    shape = (9, 20, 28)
    voxel = [min(n - 1, int(p * n)) for p, n in zip(place, shape, strict=True)]
    image = images.open().read("p3", tuple(slice(0, n) for n in shape))
    value = float(image[(0, *voxel)])
    assert (image == value).sum() == 1
    first = margin // 2
    middle = tuple(slice(first, first + n) for n in patch)
    seen = torch.cat([torch.nonzero(patches[step]["data"][(0, 0, *middle)] == value) for step in range(60)])
    assert len(seen) == 60, "every patch shows the place"
    if place == (0.5, 0.5, 0.5):  # far from the border
        for axis, n in enumerate(patch):
            assert set(seen[:, axis].tolist()) == set(range(n))


def test_the_trainer_takes_them_from_the_labelled_cases_of_the_fold(make_dataset):
    dataset = make_dataset()
    trainer = dataset.trainer(oversample_foreground_percent=0.7)
    trainer.on_train_start()
    found = trainer._stream.batches.structures
    expected = labelled_positions(nnUNetDatasetBlosc2(str(dataset.images)), LABELLED, 0.7)
    assert found.share == 0.7
    assert all(np.array_equal(a, b) for a, b in zip(found.by_class, expected.by_class, strict=True))
