"""2d as in the README: only nnU-Net's variables, a stock-named trainer, plain plans that name no KAF network."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.integration
MODEL = ("nnUNetTrainerKAF_1epoch", "nnUNetPlans", "2d")


@pytest.fixture(scope="module")
def trained(planned: Any) -> Any:
    planned.run_script(*planned.pretrain(*MODEL[1:]))
    # No plans are named here, as in the shortest command that a user types.
    planned.run_script("nnUNetv2_train", planned.number, "2d", "0", "-tr", MODEL[0], "-device", "cpu")
    predictions = planned.folder / "predictions_2d"
    planned.run_script(*planned.predict(*MODEL, predictions))
    references = ("-djfile", planned.raw / "dataset.json", "-pfile", planned.model(*MODEL) / "plans.json", "-np", "1")
    planned.run_script("nnUNetv2_evaluate_folder", planned.raw / "labelsTs", predictions, *references)
    return planned


def test_plain_plans_are_substituted_and_saved(trained: Any) -> None:
    assert trained.network(*MODEL) == "nnunetv2_kaf.unet.KAFUNet"
    plain = trained.read(trained.preprocessed / "nnUNetPlans.json")["configurations"]["2d"]
    assert plain["architecture"]["network_class_name"].endswith("PlainConvUNet")
    assert "KAFUNet" in trained.logs(*MODEL)


def test_pretraining_on_plain_plans_is_picked_up(trained: Any) -> None:
    record = trained.initialization(*MODEL)
    assert record["source"] == str(trained.pretraining(*MODEL[1:]))
    assert record["tensors_loaded"] > 20


def test_one_epoch_of_iterations_learns_something(trained: Any) -> None:
    summary = trained.read(trained.folder / "predictions_2d" / "summary.json")
    assert len(summary["metric_per_case"]) == 2
    assert summary["foreground_mean"]["Dice"] > 0.3
