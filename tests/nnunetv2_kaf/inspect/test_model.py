from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.inspect import open_model
from nnunetv2_kaf.unet import KAFUNet

Write = Callable[..., Path]


def test_a_model_of_ours_and_a_plain_one_are_read(write_model: Write, tmp_path: Path) -> None:
    ours = open_model(write_model(tmp_path / "ours", folds=("0", "10", "2")))
    assert [fold.name for fold in ours.folds] == ["0", "2", "10"]
    assert ours.is_kaf
    assert ours.configuration == "3d_fullres"
    assert ours.folds[0].seconds == 180
    network = ours.build(ours.folds[1])
    assert isinstance(network, KAFUNet)
    assert not network.training
    saved = torch.load(tmp_path / "ours" / "fold_2" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    plain = open_model(write_model(tmp_path / "plain", network="plain"))
    assert not plain.is_kaf
    assert type(plain.build(plain.folds[0])).__name__ == "PlainConvUNet"


def test_fold_all_joins_no_ensemble_unless_asked_for(write_model: Write, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", folds=("0", "1", "all"))
    assert [fold.name for fold in open_model(folder).folds] == ["0", "1"]
    assert [fold.name for fold in open_model(folder, ["all"]).folds] == ["all"]
    for fold in ("0", "1"):
        (folder / f"fold_{fold}" / "checkpoint_final.pth").unlink()
    with pytest.raises(KAFError, match="fold_0"):
        open_model(folder, ["0"])


def test_bad_folders_are_named(write_model: Write, tmp_path: Path) -> None:
    with pytest.raises(KAFError, match="does not exist"):
        open_model(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KAFError, match=r"holds no plans\.json"):
        open_model(tmp_path / "empty")
    folder = write_model(tmp_path / "m")
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint.rename(checkpoint.with_name("checkpoint_best.pth"))
    with pytest.raises(KAFError, match=r"checkpoint_best\.pth: choose with --checkpoint"):
        open_model(folder)
    assert len(open_model(folder, checkpoint="checkpoint_best.pth").folds) == 1
    (folder / "plans.json").write_text("{")
    with pytest.raises(KAFError, match=r"plans\.json"):
        open_model(folder, checkpoint="checkpoint_best.pth")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_a_checkpoint_that_would_run_code_is_not_read(
    write_model: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "m")
    torch.save({"network_weights": {}, "x": Evil()}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(KAFError, match="could run code"):
        open_model(folder)
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_network_are_an_error(write_model: Write, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    (folder / "plans.json").write_text(json.dumps(plans))
    model = open_model(folder)
    with pytest.raises(KAFError, match="builds another network than its plans describe"):
        model.build(model.folds[0])


CHECKPOINT = {
    "network_weights": [],
    "trainer_name": 7,
    "init_args": "3d_fullres",
    "inference_allowed_mirroring_axes": "all",
}


@pytest.mark.parametrize("name", [*CHECKPOINT, "logging"])
def test_a_damaged_checkpoint_is_named_with_the_entry(name: str, write_model: Write, tmp_path: Path) -> None:
    file = write_model(tmp_path / "m") / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content[name] = {"train_losses": ["a"]} if name == "logging" else CHECKPOINT[name]
    torch.save(content, file)
    with pytest.raises(KAFError, match=name) as caught:
        open_model(tmp_path / "m")
    assert str(file) in str(caught.value)


def test_plans_that_name_a_command_are_refused(
    write_model: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "m")
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "subprocess.Popen"
    architecture["arch_kwargs"]["args"] = ["touch", "evil"]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(KAFError, match=r"subprocess\.Popen"):
        open_model(folder).build(None)
    assert not (tmp_path / "evil").exists()
