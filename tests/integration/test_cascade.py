"""A cascade, 3d_lowres -> 3d_cascade_fullres, whose second stage sees the first one's labels as extra channels."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

pytestmark = pytest.mark.integration
PLANS = "nnUNetKAFCascadePlans"
LOWRES, CASCADE = ("KAFShort", PLANS, "3d_lowres"), ("KAFShort", PLANS, "3d_cascade_fullres")


def _add_cascade(plans: dict[str, Any]) -> dict[str, Any]:
    """Add both stages as nnU-Net's documentation of the plans file describes; small images get none by themselves."""
    plans = copy.deepcopy(plans) | {"plans_name": PLANS}
    fullres = plans["configurations"]["3d_fullres"]
    lowres = copy.deepcopy(fullres)
    lowres["data_identifier"] = f"{PLANS}_3d_lowres"
    lowres["spacing"] = [fullres["spacing"][0], *(1.25 * value for value in fullres["spacing"][1:])]
    lowres["architecture"]["arch_kwargs"]["spacing"] = lowres["spacing"]
    lowres["patch_size"] = [fullres["patch_size"][0], 32, 32]
    lowres["next_stage"] = "3d_cascade_fullres"
    plans["configurations"]["3d_lowres"] = lowres
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return plans


@pytest.fixture(scope="module")
def trained(planned: Any) -> Any:
    plans = _add_cascade(planned.read(planned.preprocessed / "nnUNetKAFPlans.json"))
    (planned.preprocessed / f"{PLANS}.json").write_text(json.dumps(plans), encoding="utf-8")
    lowres, cascade = (planned.folder / f"predictions_{name}" for name in ("lowres", "cascade"))
    planned.run_script("nnUNetv2_preprocess", "-d", planned.number, "-plans_name", PLANS, "-c", "3d_lowres", "-np", "1")
    planned.run(
        [*planned.pretrain(PLANS, "3d_lowres"), "--fold", "all"],
        # Fold "all" predicts every case for the next stage.
        planned.train(*LOWRES, fold="all"),
        planned.train(*CASCADE),
        planned.predict(*LOWRES, lowres, "-f", "all"),
        planned.predict(*CASCADE, cascade, "-prev_stage_predictions", lowres),
    )
    return planned


def test_both_stages_predict(trained: Any) -> None:
    for name in ("lowres", "cascade"):
        assert len(list((trained.folder / f"predictions_{name}").glob("*.nii.gz"))) == 2


def test_first_stage_starts_from_its_pretraining(trained: Any) -> None:
    assert trained.initialization(*LOWRES, fold="all")["source"] == str(trained.pretraining(PLANS, "3d_lowres"))


def test_second_stage_has_no_pretraining_of_its_own_and_says_so(trained: Any) -> None:
    record = trained.initialization(*CASCADE)
    assert record["source"] is None
    assert "3d_cascade_fullres" in record["note"]


def test_keypoints_never_come_from_the_one_hot_channels(trained: Any) -> None:
    """Four input channels, one of them the image."""
    configurations = trained.read(trained.model(*CASCADE) / "plans.json")["configurations"]
    assert configurations["3d_fullres"]["architecture"]["arch_kwargs"]["kaf"]["detection_channels"] == [0]
