from __future__ import annotations

from typing import Any

import pytest

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.unet import KAFUNet
from pretraining.task import resolve_task


@pytest.mark.parametrize("dataset", ["123", "Dataset123_Tiny"])
@pytest.mark.parametrize(("configuration", "dims"), [("2d", 2), ("3d_fullres", 3)])
def test_resolves_and_builds(tiny: Any, dataset: str, configuration: str, dims: int) -> None:
    task = resolve_task(dataset, configuration, "nnUNetPlans")
    assert (task.dataset_id, task.channels, task.outputs, task.batch_size) == (123, 1, 2, 3)
    assert len(task.patch_size) == len(task.spacing) == dims
    assert task.image_folder == tiny.images[configuration]
    assert isinstance(task.build_network(), KAFUNet)
    assert task.preprocess_command == f"nnUNetv2_preprocess -d 123 -plans_name nnUNetPlans -c {configuration}"


def test_a_plain_network_is_nnunets_own(tiny: Any) -> None:
    task, kaf = (resolve_task("123", "2d", "nnUNetPlans", network) for network in ("plain", "kaf"))
    assert type(task.build_network()).__name__ == "PlainConvUNet"
    assert task.folder.name == "PlainPretraining__nnUNetPlans__2d"
    assert kaf.folder.name == "KAFPretraining__nnUNetPlans__2d"
    assert task.layers.num_keypoints == kaf.layers.num_keypoints
    tiny.plans["configurations"]["2d"]["architecture"] = kaf.plans["configurations"]["2d"]["architecture"]
    tiny.write_plans()
    assert resolve_task("123", "2d", "nnUNetPlans").layers == kaf.layers
    with pytest.raises(KAFError, match="--network plain: the plans nnUNetPlans hold a keypoint-augmented network"):
        resolve_task("123", "2d", "nnUNetPlans", "plain")


def test_missing_things_list_what_exists(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KAFError, match="Dataset123_Tiny"):
        resolve_task("7", "2d", "nnUNetPlans")
    with pytest.raises(KAFError, match="found: nnUNetPlans"):
        resolve_task("123", "2d", "OtherPlans")
    with pytest.raises(KAFError, match="2d, 3d_cascade_fullres, 3d_fullres"):
        resolve_task("123", "3d_lowres", "nnUNetPlans")
    (tiny.root / "Dataset123_Twin").mkdir()
    with pytest.raises(KAFError, match="ambiguous"):
        resolve_task("123", "2d", "nnUNetPlans")
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(KAFError, match="not set"):
        resolve_task("123", "2d", "nnUNetPlans")


def test_cascade_names_the_way_out(tiny: Any) -> None:
    with pytest.raises(KAFError, match="non-cascade"):
        resolve_task("123", "3d_cascade_fullres", "nnUNetPlans")


def test_broken_json(tiny: Any) -> None:
    (tiny.folder / "nnUNetPlans.json").write_text("{")
    with pytest.raises(KAFError, match="not valid JSON"):
        resolve_task("123", "2d", "nnUNetPlans")
