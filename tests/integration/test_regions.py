"""Region labels (overlapping, with a sigmoid head) in 2d on KAF plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

pytestmark = pytest.mark.integration
MODEL = ("KAFShort", "nnUNetKAFPlans", "2d")


@pytest.fixture(scope="module")
def trained(make_workspace: Any) -> Any:
    workspace = make_workspace(903, style="regions")
    workspace.plan("2d")
    workspace.run(
        workspace.pretrain(*MODEL[1:]),
        workspace.train(*MODEL),
        workspace.predict(*MODEL, workspace.folder / "predictions"),
    )
    return workspace


def test_validation_scores_the_regions(trained: Any) -> None:
    summary = trained.read(trained.model(*MODEL) / "fold_0" / "validation" / "summary.json")
    assert set(summary["mean"]) == {"(1, 2, 3)", "(2, 3)", "3"}


def test_pretraining_fits_although_heads_differ_from_softmax(trained: Any) -> None:
    assert trained.initialization(*MODEL)["tensors_loaded"] > 20


def test_predictions_hold_the_labels_that_regions_are_made_of(trained: Any) -> None:
    files = list((trained.folder / "predictions").glob("*.nii.gz"))
    assert len(files) == 2
    for file in files:
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))) <= {0, 1, 2, 3}
