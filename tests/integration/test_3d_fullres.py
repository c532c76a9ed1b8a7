"""3d_fullres on KAF plans: pretrain, train, `--c`, `--val`, predict both ways, export, install, predict again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from kaf_report import cli as report_cli
from nnunetv2_kaf import inspect

pytestmark = pytest.mark.integration
MODEL = ("KAFShort", "nnUNetKAFPlans", "3d_fullres")


@dataclass(frozen=True)
class Trained:
    """A finished run: where it is, what the pretraining file was, and the commands' output."""

    workspace: Any
    sha256: str
    checkpoint: dict[str, Any]
    output: str


@pytest.fixture(scope="module")
def trained(planned: Any) -> Trained:
    workspace = planned
    workspace.run(workspace.pretrain(*MODEL[1:]), workspace.train(*MODEL))
    pretraining = workspace.pretraining(*MODEL[1:])
    content = pretraining.read_bytes()
    checkpoint = torch.load(pretraining, map_location="cpu", weights_only=True)
    fold = workspace.model(*MODEL) / "fold_0"
    predictions, archive = workspace.folder / "predictions", workspace.folder / "model.zip"
    options = ("-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta")
    source = ("-i", workspace.raw / "imagesTs", "-o", workspace.folder / "from_folder", "-m", workspace.model(*MODEL))
    export = ("-d", workspace.number, "-o", archive, "-c", MODEL[2], "-tr", MODEL[0], "-p", MODEL[1], "-f", "0")
    output = workspace.run(
        ["remove", pretraining, fold / "checkpoint_final.pth", fold / "validation"],
        workspace.train(*MODEL, "--c"),
        ["remove", fold / "validation"],
        workspace.train(*MODEL, "--val"),
        workspace.predict(*MODEL, predictions),
        ["nnUNetv2_predict_from_modelfolder", *source, *options],
        ["nnUNetv2_export_model_to_zip", *export],
    )
    return Trained(workspace, hashlib.sha256(content).hexdigest(), checkpoint, output)


def _arrays(folder: Path) -> dict[str, Any]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def test_training_starts_from_the_pretraining_at_its_standard_place(trained: Trained) -> None:
    record = trained.workspace.initialization(*MODEL)
    assert record["sha256"] == trained.sha256
    assert record["tensors_loaded"] > 20
    assert "initialised from" in trained.workspace.logs(*MODEL)


def test_saved_plans_name_the_network(trained: Trained) -> None:
    assert trained.workspace.network(*MODEL) == "nnunetv2_kaf.unet.KAFUNet"


def test_pretraining_checkpoint_carries_the_whole_network(trained: Trained) -> None:
    model = trained.workspace.model(*MODEL) / "fold_0" / "checkpoint_final.pth"
    ours = torch.load(model, map_location="cpu", weights_only=False)["network_weights"]
    theirs = trained.checkpoint["network_weights"]
    assert set(ours) == set(theirs)
    assert all(ours[name].shape == theirs[name].shape for name in ours)


def test_continuing_and_validating_do_not_need_the_pretraining_file(trained: Trained) -> None:
    fold = trained.workspace.model(*MODEL) / "fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()
    assert trained.workspace.logs(*MODEL).count("initialised from") == 1
    # The record of the first start is still that of the file which is gone.
    assert trained.workspace.initialization(*MODEL)["sha256"] == trained.sha256


def test_data_are_preprocessed_once_for_both_plans(planned: Any) -> None:
    folders = sorted(path.name for path in planned.preprocessed.iterdir() if path.is_dir())
    data = ["nnUNetPlans_2d", "nnUNetPlans_3d_fullres"]
    # the keypoints of both configurations lie beside their images
    keypoints = [f"{name}_kaf_keypoints" for name in data]
    assert [name for name in folders if name not in keypoints] == ["gt_segmentations", *data]
    assert (planned.preprocessed / "nnUNetKAFPlans.json").is_file()


def test_predictions_have_the_geometry_of_their_images(trained: Trained) -> None:
    predictions = trained.workspace.folder / "predictions"
    for path in (trained.workspace.raw / "imagesTs").iterdir():
        image = sitk.ReadImage(str(path))
        prediction = sitk.ReadImage(str(predictions / path.name.replace("_0000.nii.gz", ".nii.gz")))
        assert prediction.GetSize() == image.GetSize()
        assert prediction.GetSpacing() == pytest.approx(image.GetSpacing())
        assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2, 3}


def test_predicting_from_the_model_folder_gives_the_same(trained: Trained) -> None:
    first, second = (_arrays(trained.workspace.folder / name) for name in ("predictions", "from_folder"))
    assert len(first) == 2
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_an_exported_model_installs_elsewhere_and_predicts_the_same(trained: Trained) -> None:
    elsewhere = trained.workspace.with_results("other_results")
    (elsewhere.folder / elsewhere.results_name).mkdir()
    output = elsewhere.folder / "after_install"
    archive = elsewhere.folder / "model.zip"
    elsewhere.run(["nnUNetv2_install_pretrained_model_from_zip", archive], elsewhere.predict(*MODEL, output))
    first, second = _arrays(trained.workspace.folder / "predictions"), _arrays(output)
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_looking_inside_predicts_the_same(trained: Trained) -> None:
    model = inspect.open_model(trained.workspace.model(*MODEL))
    for name, expected in _arrays(trained.workspace.folder / "predictions").items():
        image = trained.workspace.raw / "imagesTs" / name.replace(".nii.gz", "_0000.nii.gz")
        view = inspect.view_case(model, [image], trained.workspace.raw / "labelsTs" / name, mirror=False)
        np.testing.assert_array_equal(view.original_prediction, expected)
        assert view.keypoints is not None
    out = trained.workspace.folder / "report"
    images = ("-i", str(trained.workspace.raw / "imagesTs"), "-o", str(out), "--keypoints", "1", "--disable-mirroring")
    assert report_cli.main([str(trained.workspace.model(*MODEL)), *images]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert trained.sha256 in text
    assert "is not there any more" in text  # the file of the pretraining was removed
