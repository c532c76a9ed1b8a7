"""Which weights a training starts from, for two input channels and an ignore label."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.integration
MODEL = ("KAFShort", "nnUNetPlans", "3d_fullres")
START = ("KAFStart", "nnUNetPlans", "3d_fullres")
SCRATCH = ("KAFStartScratch", "nnUNetPlans", "3d_fullres")


@pytest.fixture(scope="module")
def trained(make_workspace: Any) -> Any:
    workspace = make_workspace(902, channels=2, style="ignore")
    workspace.plan("3d_fullres")
    workspace.run(
        workspace.pretrain(*MODEL[1:]),
        workspace.train(*MODEL),
        workspace.predict(*MODEL, workspace.folder / "predictions"),
        workspace.train(*SCRATCH),
    )
    return workspace


def test_two_channels_and_an_ignore_label(trained: Any) -> None:
    assert trained.initialization(*MODEL)["tensors_loaded"] > 20
    assert len(list((trained.folder / "predictions").glob("*.nii.gz"))) == 2
    saved = trained.read(trained.model(*MODEL) / "plans.json")["configurations"]["3d_fullres"]
    assert saved["architecture"]["arch_kwargs"]["kaf"]["detection_channels"] == [0, 1]


def test_scratch_never_loads_a_pretraining(trained: Any) -> None:
    record = trained.initialization(*SCRATCH)
    assert record["source"] is None
    assert record["tensors_loaded"] == 0
    assert trained.pretraining(*MODEL[1:]).is_file()


def test_the_variable_and_nnunets_own_option(trained: Any) -> None:
    """One process: `KAF_PRETRAINED=<path>`, then `none`, then `-pretrained_weights` with our checkpoint."""
    checkpoint = trained.pretraining(*MODEL[1:])
    copy = trained.folder / "copy.pth"
    copy.write_bytes(checkpoint.read_bytes())
    fold = trained.model(*START) / "fold_0"
    trained.run(["set", "KAF_PRETRAINED", copy], trained.train(*START))
    named = trained.initialization(*START)
    assert named["source"] == str(copy)
    output = trained.run(
        ["remove", fold],
        ["set", "KAF_PRETRAINED", "none"],
        trained.train(*START, fold="1"),
        trained.train(*START, "-pretrained_weights", checkpoint, fold="2"),
    )
    none = trained.initialization(*START, fold="1")
    assert none["source"] is None
    assert "KAF_PRETRAINED=none" in none["note"]
    stock = trained.initialization(*START, fold="2")
    assert stock["source"] is None
    assert "-pretrained_weights" in stock["note"]
    assert "Loading pretrained weights from file" in output
