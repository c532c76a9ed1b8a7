from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import Inspection, open_model, view_case

Write = Callable[..., Path]


def files(data: Path, case: str = "phantom_t000") -> tuple[list[Path], Path]:
    return [data / "imagesTs" / f"{case}_0000.nii.gz"], data / "labelsTs" / f"{case}.nii.gz"


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_view_holds_what_the_network_saw(ndim: int, write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path / "m", ndim, folds=("0", "1")))
    images, label = files(phantom_data)
    view = view_case(model, images, label, mirror=False)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    assert view.name == "phantom_t000"
    assert view.original_reference is not None
    assert np.array_equal(view.original_reference, expected)
    assert view.original_prediction.shape == expected.shape
    assert view.disagreement is not None
    assert view.disagreement.shape == view.prediction.shape == view.image.shape[1:]
    assert set(np.unique(view.disagreement)) <= {0, 0.5, 1}
    size = [b.stop - b.start for b in view.box]
    assert size == ([1, 24, 24] if ndim == 2 else [8, 24, 24])
    # the same pass by hand
    patch = torch.from_numpy(view.image[(slice(None), *view.box)])[None]
    patch = patch[:, :, 0] if ndim == 2 else patch
    with Inspection(model.build(model.folds[0])) as seen, torch.no_grad():
        encoded = seen.encoder.forward_features(patch)
    assert view.keypoints is not None
    start = torch.tensor([b.start for b in view.box][-ndim:])
    points = encoded.keypoints.coords[0][encoded.keypoints.valid[0]] + start
    assert np.array_equal(view.keypoints[:, -ndim:], points.numpy())
    assert torch.equal(view.levels[1].attention, seen.levels[1].attention)
    if ndim == 2:
        assert (view.keypoints[:, 0] == view.box[0].start).all()
        reference = expected[view.box[0].start]
        assert (reference > 0).sum() == (expected > 0).sum((1, 2)).max()


def test_without_labels_and_in_a_plain_network_the_rest_is_there(
    write_model: Write, phantom_data: Path, tmp_path: Path
) -> None:
    images, _ = files(phantom_data)
    view = view_case(open_model(write_model(tmp_path / "m", network="plain")), images)
    assert view.reference is None
    assert view.original_reference is None
    assert view.keypoints is None
    assert view.disagreement is None
    assert not view.levels
    assert view.prediction.shape == view.image.shape[1:]


def test_an_image_smaller_than_the_patch_is_padded_as_nnunet_does(write_model: Write, tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path / "m"))
    generator = np.random.default_rng(0)
    image = sitk.GetImageFromArray(generator.normal(size=(5, 24, 21)).astype(np.float32))
    image.SetSpacing((1.5, 1.5, 3.0))
    sitk.WriteImage(image, str(tmp_path / "small_0000.nii.gz"))
    view = view_case(model, [tmp_path / "small_0000.nii.gz"])
    assert view.offset == (1, 0, 1)
    assert view.keypoints is not None
    inside = (view.keypoints >= 0).all(1) & (view.keypoints < np.array(view.image.shape[1:])).all(1)
    assert inside.any()


def test_what_cannot_be_shown_is_named(write_model: Write, phantom_data: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    images, label = files(phantom_data)
    model = open_model(folder)
    with pytest.raises(KAFError, match="expected 1"):
        view_case(model, images * 2)
    with pytest.raises(KAFError, match="does not exist"):
        view_case(model, [tmp_path / "missing_0000.nii.gz"])
    broken = tmp_path / "broken_0000.nii.gz"
    broken.write_text("no image")
    with pytest.raises(KAFError, match="cannot be preprocessed"):
        view_case(model, [broken])
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(KAFError, match="second stage of a cascade"):
        view_case(open_model(folder), images, label)
