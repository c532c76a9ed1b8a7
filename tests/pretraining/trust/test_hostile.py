"""Files made to run a command: refused with one line that names the file, and nothing is imported or called."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import check_plans, kaf_plans, resolve_configuration
from nnunetv2_kaf.weights import load_encoder, save_pretraining_checkpoint
from pretraining import cli
from pretraining.exchange import export_cli

Change = Callable[[dict[str, Any], Path], None]
SMALL = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))
OPERATORS = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def operator(name: str, kind: str, dotted: str = "subprocess.Popen") -> Change:
    """An operator that is a command, with its arguments."""

    def change(entry: dict[str, Any], marker: Path) -> None:
        arguments = entry["arch_kwargs"]
        arguments[name] = dotted
        if kind == "kwargs":
            arguments[f"{name}_kwargs"] = {"args": ["touch", str(marker)]}
        if kind == "not listed":
            entry["_kw_requires_import"].remove(name)

    return change


def network(name: str) -> Change:
    def change(entry: dict[str, Any], marker: Path) -> None:
        entry["network_class_name"] = name
        entry["arch_kwargs"] = {**entry["arch_kwargs"], "args": ["touch", str(marker)]}

    return change


def extra(name: str, value: str) -> Change:
    """An option of its own that the file asks to import."""

    def change(entry: dict[str, Any], marker: Path) -> None:
        entry["arch_kwargs"][name] = value
        entry["_kw_requires_import"].append(name)

    return change


def module_on_path(entry: dict[str, Any], marker: Path) -> None:
    """A module that runs at its import."""
    (marker.parent / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Relu: pass\n")
    entry["arch_kwargs"]["nonlin"] = "evil_module.Relu"


def hidden_in_torch(entry: dict[str, Any], marker: Path) -> None:
    """A function that torch's own modules have imported."""
    entry["arch_kwargs"]["nonlin"] = "torch.nn.modules.os.system"


HOSTILE: dict[str, Change] = {
    **{f"{name} is a command": operator(name, "kwargs") for name in OPERATORS},
    "nonlin by os.system": operator("nonlin", "plain", "os.system"),
    "nonlin that is not listed": operator("nonlin", "not listed"),
    "norm_op that is not listed": operator("norm_op", "not listed"),
    "network is a command": network("subprocess.Popen"),
    "network is a module of ours": network("nnunetv2_kaf.probes.run_probe"),
    "network by its last name": network("evil_module.PlainConvUNet"),
    "network is builtins.eval": network("builtins.eval"),
    "block is a command": extra("block", "subprocess.Popen"),
    "another option is imported": extra("deep_supervision", "subprocess.Popen"),
    "arch_kwargs.kaf is imported": extra("kaf", "subprocess.Popen"),
    "a module that runs at import": module_on_path,
    "a function inside torch": hidden_in_torch,
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "marker"


@pytest.fixture
def plans(tiny: Any) -> dict[str, Any]:
    return kaf_plans(tiny.plans, SMALL)


@pytest.fixture
def checkpoint(plans: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_final.pth"
    entry = plans["configurations"]["2d"]["architecture"]
    save_pretraining_checkpoint(
        path, build_network(entry, 1, 2, where="test"), plans=plans, configuration="2d", num_input_channels=1,
        dataset_name="Dataset123_Tiny", fold=0, pretraining={},
    )  # fmt: skip
    return path


def refused(error: str, marker: Path, *words: str) -> None:
    assert not marker.exists(), "the file has run a command"
    assert "Traceback" not in error
    assert error.count("\n") == 1, "one line"
    for word in words:
        assert word in error


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_cannot_name_what_is_called(
    case: str, checkpoint: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    HOSTILE[case](content["architecture"], marker)
    HOSTILE[case](content["plans"]["configurations"]["2d"]["architecture"], marker)
    torch.save(content, checkpoint)
    for options in ((), ("--plain",)):
        assert export_cli.main([str(checkpoint), "-o", str(tmp_path / "out.pth"), *options]) == 2
        refused(capsys.readouterr().err, marker, str(checkpoint), "architecture")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_the_trainers_reader_refuses_it_too(case: str, checkpoint: Path, marker: Path, plans: dict[str, Any]) -> None:
    fresh = build_network(plans["configurations"]["2d"]["architecture"], 1, 2, where="test")
    content = torch.load(checkpoint, weights_only=True)
    HOSTILE[case](content["architecture"], marker)
    torch.save(content, checkpoint)
    with pytest.raises(KAFError, match="checkpoint_final"):
        load_encoder(fresh, checkpoint, plans, "2d")
    assert not marker.exists()


@pytest.mark.parametrize("network_option", ["kaf", "plain"])
@pytest.mark.parametrize("case", HOSTILE)
def test_plans_cannot_name_what_is_called(
    case: str, network_option: str, tiny: Any, marker: Path, capsys: pytest.CaptureFixture[str], fast: list[str]
) -> None:
    HOSTILE[case](tiny.plans["configurations"]["2d"]["architecture"], marker)
    (tiny.folder / "EvilPlans.json").write_text(json.dumps({**tiny.plans, "plans_name": "EvilPlans"}))
    preset = ["--preset", "pcl", "--network", network_option]
    assert cli.main(["-d", "123", "-c", "2d", "-p", "EvilPlans", "--fold", "all", *preset, *fast]) == 2
    refused(capsys.readouterr().err.splitlines(keepends=True)[-1], marker, "EvilPlans")


@pytest.mark.parametrize("case", HOSTILE)
def test_the_trainer_builds_nothing_else(
    case: str, tiny: Any, plans: dict[str, Any], marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2_kaf.trainer import nnUNetTrainerKAF

    HOSTILE[case](plans["configurations"]["2d"]["architecture"], marker)
    manager = PlansManager(plans)
    with pytest.raises(KAFError, match="architecture"):
        nnUNetTrainerKAF.build_network_architecture(manager, manager.get_configuration("2d"), 1, 2, True)
    assert not marker.exists()


NAMED = {
    "preprocessor_name": (
        "configuration",
        ["subprocess", "os", "DefaultPreprocessor.run_case", "resample_data_or_seg"],
    ),
    "normalization_schemes": ("configuration", [["os"], ["subprocess"], ["ImageNormalization", "np"]]),
    "resampling_fn_data": ("configuration", ["os", "DefaultPreprocessor", "np"]),
    "resampling_fn_seg": ("configuration", ["os", "torch", "partial"]),
    "resampling_fn_probabilities": ("configuration", ["sys", "map_coordinates", "F"]),
    "image_reader_writer": ("plans", ["os", "np", "determine_reader_writer_from_dataset_json", "glob"]),
    "label_manager": ("plans", ["os", "lru_cache", "recursive_find_python_class"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_that_nnunet_looks_up_stand_for_what_they_should(name: str, tiny: Any) -> None:
    place, values = NAMED[name]
    check_plans(tiny.plans, "plans.json")
    for value in values:
        plans = json.loads(json.dumps(tiny.plans))
        (plans if place == "plans" else plans["configurations"]["2d"])[name] = value
        with pytest.raises(KAFError, match=rf"plans\.json.*{name}.*expected"):
            check_plans(plans, "plans.json")


@pytest.mark.parametrize("name", ["dataset_name", "plans_name", "data_identifier", "configuration"])
@pytest.mark.parametrize("value", ["../elsewhere", "/tmp/x", "a/b", "..", ".hidden", "a\\b", "a\nb", "", "x" * 300])
def test_names_in_plans_do_not_lead_elsewhere(name: str, value: str, tiny: Any) -> None:
    plans = json.loads(json.dumps(tiny.plans))
    if name == "configuration":
        plans["configurations"][value] = plans["configurations"]["2d"]
    else:
        (plans["configurations"]["2d"] if name == "data_identifier" else plans)[name] = value
    with pytest.raises(KAFError, match=r"plans\.json"):
        check_plans(plans, "plans.json")


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickles(marker: Path) -> dict[str, bytes]:
    """The same command in every kind of file that torch reads."""
    evil: dict[str, Any] = {"format": "nnunetv2_kaf.pretraining", "network_weights": {"x": Command(marker)}}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(evil, new)
    torch.save(evil, old, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(evil))
        file.writestr("archive/version", "3")
    return {
        "zip": new.getvalue(),
        "old format": old.getvalue(),
        "plain pickle": pickle.dumps(evil),
        "hand-made zip": archive.getvalue(),
    }


@pytest.mark.parametrize("kind", ["zip", "old format", "plain pickle", "hand-made zip"])
def test_pickles_are_called_unsafe_and_do_not_run(
    kind: str, marker: Path, tmp_path: Path, plans: dict[str, Any], tiny: Any, fast: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "evil.pth"
    path.write_bytes(pickles(marker)[kind])
    assert export_cli.main([str(path), "-o", str(tmp_path / "out.pth")]) == 2
    refused(capsys.readouterr().err, marker, str(path), "unsafe", "system")
    tiny.add_cases(2)
    assert cli.main(["-d", "123", "-c", "2d", "--fold", "all", *fast, "--init", str(path)]) == 2
    refused(capsys.readouterr().err.splitlines(keepends=True)[-1], marker, f"--init {path}", "unsafe")
    fresh = build_network(resolve_configuration(plans, "2d")["architecture"], 1, 2, where="test")
    with pytest.raises(KAFError, match=r"evil\.pth is unsafe"):
        load_encoder(fresh, path, plans, "2d")
    assert not marker.exists()
