from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from low_label import plans
from low_label.config import Task, load

from nnunetv2_kaf.errors import KAFError

CLASS = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def task(**changes: Any) -> Task:
    """A task of a config file with some keys replaced."""
    study = load(Path(__file__).parents[2] / "benchmarks" / "low_label" / "smoke.json")
    return replace(study.tasks[0], **{"batch_size": None, **changes})


def plan(**changes: Any) -> dict[str, Any]:
    architecture = {
        "network_class_name": CLASS,
        "_kw_requires_import": [],
        "arch_kwargs": {"strides": [[1, 1], [2, 2]]},
    }
    block = {
        "data_identifier": "d",
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "patch_size": [8, 6],
        "batch_size": 50,
        "batch_dice": True,
    }
    return {"plans_name": "n", "configurations": {"2d": {**block, "architecture": architecture, **changes}}}


def test_all_arms_get_one_batch_and_patch() -> None:
    theirs = plan(patch_size=[16, 16], batch_size=3, batch_dice=False)
    ours = plans.same_batch(theirs, plan(), "2d", task(batch_size=9))["configurations"]["2d"]
    assert (ours["patch_size"], ours["batch_size"], ours["batch_dice"]) == ([8, 6], 9, True)
    assert plans.same_batch(theirs, plan(), "2d", task())["configurations"]["2d"]["batch_size"] == 50
    with pytest.raises(KAFError, match="data identifier"):
        plans.same_batch(plan(data_identifier="e"), plan(), "2d", task(batch_size=9))
    with pytest.raises(KAFError, match=r"pools by \[2, 2\].*patch \[8, 5\]"):
        plans.same_batch(plan(), plan(patch_size=[8, 5]), "2d", task(batch_size=9))


def network(**kwargs: Any) -> dict[str, Any]:
    """The architecture of a configuration with four stages."""
    given = {
        "n_stages": 4,
        "features_per_stage": [32, 64, 128, 200],
        "strides": [[1, 1], [2, 2], [2, 2], [2, 2]],
        "kernel_sizes": [[3, 3]] * 4,
        "n_conv_per_stage": [2, 2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2, 2],
        "conv_bias": True,
    }
    return {"network_class_name": CLASS, "_kw_requires_import": [], "arch_kwargs": {**given, **kwargs}}


def test_a_task_sets_patch_width_and_depth_for_all_arms() -> None:
    ours = plan(architecture=network())
    small = plans.same_batch(ours, plan(), "2d", task(patch_size=[64, 32], features=16, n_stages=3))
    block = small["configurations"]["2d"]
    assert block["patch_size"] == [64, 32]
    assert block["architecture"]["arch_kwargs"] == {
        "n_stages": 3,
        "features_per_stage": [16, 32, 64],
        "strides": [[1, 1], [2, 2], [2, 2]],
        "kernel_sizes": [[3, 3]] * 3,
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "conv_bias": True,
    }
    wide = plans.resized(plan(architecture=network())["configurations"]["2d"], task(features=64))
    assert wide["architecture"]["arch_kwargs"]["features_per_stage"] == [64, 128, 200, 200]
    with pytest.raises(KAFError, match=r"n_stages: found 5.* has 4 stages"):
        plans.same_batch(ours, plan(), "2d", task(n_stages=5))
    with pytest.raises(KAFError, match=r"pools by \[8, 8\].*patch \[12, 16\]"):
        plans.same_batch(ours, plan(), "2d", task(patch_size=[12, 16]))
    with pytest.raises(KAFError, match=r"patch_size: found \[8, 8, 8\], expected 2 numbers"):
        plans.same_batch(ours, plan(), "2d", task(patch_size=[8, 8, 8]))


@pytest.mark.parametrize(("options", "expected"), [({}, 17), ({"num_keypoints": 64}, 64), ({"num_blocks": 1}, 17)])
def test_keypoints_suit_the_patch_unless_the_arm_says_how_many(options: dict[str, int], expected: int) -> None:
    assert plans.kaf_config(options, [56, 40], 4).num_keypoints == expected


@pytest.mark.parametrize(("options", "expected"), [({}, (1, 2)), ({"levels": [0, 2]}, (0, 2))])
def test_levels_are_those_of_plans_unless_the_arm_names_them(
    options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert plans.kaf_config(options, [56, 40], 4).levels == expected
