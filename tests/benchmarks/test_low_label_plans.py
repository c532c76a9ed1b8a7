from __future__ import annotations

from typing import Any

import pytest
from low_label import plans

from nnunetv2_kaf.errors import KAFError


def plan(**changes: Any) -> dict[str, Any]:
    architecture = {"network_class_name": "a.PlainConvUNet", "arch_kwargs": {"strides": [[1, 1], [2, 2]]}}
    block = {"data_identifier": "d", "patch_size": [8, 6], "batch_size": 50, "batch_dice": True}
    return {"plans_name": "n", "configurations": {"2d": {**block, "architecture": architecture, **changes}}}


def test_all_arms_get_one_batch_and_patch() -> None:
    theirs = plan(patch_size=[16, 16], batch_size=3, batch_dice=False)
    ours = plans.same_batch(theirs, plan(), "2d", 9)["configurations"]["2d"]
    assert (ours["patch_size"], ours["batch_size"], ours["batch_dice"]) == ([8, 6], 9, True)
    assert plans.same_batch(theirs, plan(), "2d", None)["configurations"]["2d"]["batch_size"] == 50
    with pytest.raises(KAFError, match="data identifier"):
        plans.same_batch(plan(data_identifier="e"), plan(), "2d", 9)
    with pytest.raises(KAFError, match=r"pools by \[2, 2\].*patch \[8, 5\]"):
        plans.same_batch(plan(), plan(patch_size=[8, 5]), "2d", 9)


@pytest.mark.parametrize(("options", "expected"), [({}, 17), ({"num_keypoints": 64}, 64), ({"num_blocks": 1}, 17)])
def test_keypoints_suit_the_patch_unless_the_arm_says_how_many(options: dict[str, int], expected: int) -> None:
    assert plans.kaf_config(options, [56, 40], 4).num_keypoints == expected


@pytest.mark.parametrize(("options", "expected"), [({}, (1, 2)), ({"levels": [0, 2]}, (0, 2))])
def test_levels_are_those_of_plans_unless_the_arm_names_them(
    options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert plans.kaf_config(options, [56, 40], 4).levels == expected
