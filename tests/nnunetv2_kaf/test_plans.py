import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import (
    NETWORK_CLASS,
    check_configuration,
    is_kaf,
    kaf_plans,
    pretraining_folder,
    resolve_configuration,
)

Plans = dict[str, Any]


def options(plans: Plans, configuration: str) -> Plans:
    found: Plans = resolve_configuration(plans, configuration)["architecture"]["arch_kwargs"]
    return found


def test_substitution_keeps_every_option_and_leaves_the_input_alone(plain_plans: Plans) -> None:
    before = copy.deepcopy(plain_plans)
    plans = kaf_plans(plain_plans)
    assert plain_plans == before
    for name in plans["configurations"]:
        assert is_kaf(plans, name)
        assert not is_kaf(plain_plans, name)
        old, new = options(plain_plans, name), options(plans, name)
        assert {k: new[k] for k in old} == old
        assert set(new) - set(old) == {"kaf", "spacing"}
        assert new["spacing"] == resolve_configuration(plans, name)["spacing"]
        patch = resolve_configuration(plans, name)["patch_size"]
        assert KAFConfig.from_dict(new["kaf"]) == KAFConfig().planned(patch, new["n_stages"])
    assert plans["configurations"]["3d_cascade_fullres"] == before["configurations"]["3d_cascade_fullres"]
    assert json.loads(json.dumps(plans)) == plans
    assert kaf_plans(plans) == plans, "a second substitution changes nothing"


def test_a_small_patch_gets_fewer_keypoints(plain_plans: Plans) -> None:
    plain_plans["configurations"]["2d"]["patch_size"] = [56, 40]
    plain_plans["configurations"]["3d_fullres"]["patch_size"] = [40, 56, 40]
    # a configuration that inherits its architecture but not its patch
    plain_plans["configurations"]["small"] = {"inherits_from": "3d_fullres", "patch_size": [8, 16, 16]}
    plans = kaf_plans(plain_plans)
    found = {name: options(plans, name)["kaf"]["num_keypoints"] for name in ("2d", "3d_fullres", "small")}
    assert found == {"2d": 17, "3d_fullres": 256, "small": 16}
    given = kaf_plans(plain_plans, KAFConfig(num_keypoints=100))
    assert options(given, "2d")["kaf"]["num_keypoints"] == 100, "a number that is given is kept"


def test_partial_kaf_block_is_written_out(plain_plans: Plans) -> None:
    plans = kaf_plans(plain_plans)
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["kaf"] = {"num_keypoints": 40}
    assert options(kaf_plans(plans), "2d")["kaf"] == KAFConfig(num_keypoints=40).to_dict()


def test_keypoints_are_detected_in_the_image_channels(plain_plans: Plans) -> None:
    plain_plans["configurations"]["2d"]["normalization_schemes"] = ["ZScoreNormalization"] * 3
    assert options(kaf_plans(plain_plans), "2d")["kaf"]["detection_channels"] == [0, 1, 2]


def test_other_networks_are_left_alone_and_named(plain_plans: Plans) -> None:
    plain_plans["configurations"]["2d"]["architecture"]["network_class_name"] = "elsewhere.SwinUNETR"
    plans = kaf_plans(plain_plans)
    assert plans["configurations"]["2d"] == plain_plans["configurations"]["2d"]
    with pytest.raises(KAFError, match=r"elsewhere\.SwinUNETR.*PlainConvUNet"):
        check_configuration(plans, "2d")


@pytest.mark.parametrize(
    ("configuration", "change", "message"),
    [
        ("2d", {"spacing": [1.0, 1.0]}, r"spacing \[1.5, 1.0\] differs from the configuration's \[1.0, 1.0\]"),
        ("2d", {"patch_size": [22, 40]}, r"patch \[22, 40\] cannot be pooled by \[4, 4\] in 3 stages"),
        ("2d", {"patch_size": [4, 4]}, r"num_keypoints: found 256, more than the 16 voxels"),
    ],
)
def test_what_cannot_run_is_named(configuration: str, change: Plans, message: str, plain_plans: Plans) -> None:
    plans = kaf_plans(plain_plans, KAFConfig())
    plans["configurations"][configuration].update(change)
    with pytest.raises(KAFError, match=message):
        check_configuration(plans, configuration)


def test_unknown_key_in_the_kaf_block(plain_plans: Plans) -> None:
    plans = kaf_plans(plain_plans)
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["kaf"]["keypoints"] = 3
    with pytest.raises(KAFError, match=r"unknown key.*keypoints.*known keys"):
        check_configuration(plans, "2d")
    del plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kaf"]
    with pytest.raises(KAFError, match="lacks"):
        check_configuration(plans, "3d_fullres")


def test_missing_configuration_lists_what_exists(plain_plans: Plans) -> None:
    with pytest.raises(KAFError, match=r"'4d'.*3d_fullres"):
        is_kaf(plain_plans, "4d")


def test_check_returns_the_layers(plain_plans: Plans) -> None:
    config = KAFConfig(num_keypoints=50)
    assert check_configuration(kaf_plans(plain_plans, config), "3d_fullres") == config
    assert NETWORK_CLASS == "nnunetv2_kaf.unet.KAFUNet"


def test_standard_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    place = pretraining_folder("Dataset990_Tiny", "nnUNetPlans", "2d", "all")
    assert place == tmp_path / "Dataset990_Tiny" / "KAFPretraining__nnUNetPlans__2d" / "fold_all"
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(KAFError, match="nnUNet_results is not set"):
        pretraining_folder("Dataset990_Tiny", "nnUNetPlans", "2d", "all")
