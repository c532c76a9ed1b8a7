import json

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from semisupervised.history import foreground_names, log_lines, write_history


def record(**changes):
    values = {
        "epoch": 3, "weight": 0.5, "sure": 0.25, "shares": [0.1, 0.0], "agreements": [0.9, None], "agreement": 0.9,
        "known": 0.625, "labelled_loss": 0.75, "unlabelled_loss": 0.5, "islands": 0.125, "excess": 0.375,
        "given": [0.2, 0.3], "limits": [0.25, float("inf")], "guard": 0.5, "collapse": [],
    }  # fmt: skip
    return {**values, **changes}


def test_classes_have_the_names_of_the_dataset_in_the_order_of_the_outputs():
    classes = LabelManager({"background": 0, "left": 2, "right": 1, "ignore": 3}, None)
    assert foreground_names(classes) == ["right", "left"]
    regions = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    assert foreground_names(regions) == ["whole", "core"]


def test_an_epoch_in_words():
    assert log_lines(record(shares=[0.1, 0.2]), ["left", "right"]) == [
        "KAF: labelled loss 0.7500, unlabelled loss 0.5000 with weight 0.500; teacher sure of 25.0 % of the voxels, "
        "12.5 % of its structures taken out as islands and 37.5 % of the rest as excess, its Dice on labelled training "
        "patches 0.625, agreement with the network 0.900"
    ]
    assert log_lines(record(shares=[0.1, 0.2], given=[0.3, 0.3]), ["left", "right"])[0].endswith(
        "agreement with the network 0.900; beyond their limits: left"
    )
    lines = log_lines(record(collapse=["class 2 vanishes", "they agree less"]), ["left", "right"])
    assert lines[0].endswith("agreement with the network 0.900; not in its labels: right")
    assert lines[1:] == [
        "KAF: WARNING: class 2 vanishes; the unlabelled loss goes on with 0.5 of its weight",
        "KAF: WARNING: they agree less; the unlabelled loss goes on with 0.5 of its weight",
    ]


@pytest.mark.parametrize("draw", [False, True])
def test_the_file_holds_all_epochs_and_the_curves_are_drawn_when_asked_for(draw, tmp_path):
    write_history(tmp_path, ["1", "2"], [record(epoch=0)], draw)
    write_history(tmp_path, ["1", "2"], [record(epoch=0), record(epoch=1)], draw)
    content = json.loads((tmp_path / "semi_training.json").read_text())
    written = [record(epoch=epoch, limits=[0.25, None]) for epoch in (0, 1)]
    assert content == {"classes": ["1", "2"], "epochs": written}
    assert (tmp_path / "semi_progress.png").is_file() == draw


def test_what_is_no_number_becomes_null(tmp_path):
    write_history(
        tmp_path,
        ["1"],
        [record(labelled_loss=float("nan"), unlabelled_loss=float("inf"), limits=[0.25, float("inf")])],
        draw=True,
    )
    text = (tmp_path / "semi_training.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    epoch = json.loads(text)["epochs"][0]
    assert epoch["labelled_loss"] is None
    assert epoch["unlabelled_loss"] is None
    assert epoch["limits"] == [0.25, None]
    assert epoch["sure"] == 0.25
