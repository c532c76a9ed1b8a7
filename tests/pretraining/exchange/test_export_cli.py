from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans
from nnunetv2_kaf.weights import save_pretraining_checkpoint
from pretraining.exchange import export_cli
from pretraining.exchange.interop import initialize_encoder

SMALL = {"num_keypoints": 9, "token_dim": 8, "num_blocks": 1, "num_heads": 2, "position_hidden": (8,)}
UNETS = "dynamic_network_architectures.architectures.unet"


def build(architecture: dict[str, Any], channels: int = 1, deep_supervision: bool | None = True) -> nn.Module:
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        3,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
    return network


def from_plan(plan: dict[str, Any]) -> nn.Module:
    """The network as a reader of the format builds it."""
    names = {"network_class_name": "arch_class_name", "arch_kwargs": "arch_kwargs"}
    entry = {ours: plan["architecture_plans"][theirs] for ours, theirs in names.items()}
    entry["_kw_requires_import"] = plan["architecture_plans"]["arch_kwargs_requiring_import"]
    return build(entry, plan["pretrain_num_input_channels"])


class Pretrained:
    """A pretraining checkpoint of a small network."""

    def __init__(
        self, path: Path, plans: dict[str, Any], configuration: str = "3d_fullres", residual: bool = False,
        kaf: bool = True, **layers: Any,
    ) -> None:  # fmt: skip
        if residual:
            arguments = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
            arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
            plans["configurations"][configuration]["architecture"]["network_class_name"] = (
                f"{UNETS}.ResidualEncoderUNet"
            )
        plans = kaf_plans(plans, KAFConfig(**{**SMALL, **layers})) if kaf else plans
        self.path = path
        self.architecture = plans["configurations"][configuration]["architecture"]
        self.network = build(self.architecture)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.normal_()
        save_pretraining_checkpoint(
            path, self.network, plans=plans, configuration=configuration, num_input_channels=1,
            dataset_name="Dataset123_Tiny", fold=0, pretraining={"cases": ["patient_jane"], "epochs_done": 2},
        )  # fmt: skip


@pytest.fixture
def plans(tiny: Any) -> dict[str, Any]:
    plans: dict[str, Any] = tiny.plans
    return plans


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint_final.pth"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "nnssl.pth"


def export(source: Path, out: Path, *options: str) -> dict[str, Any]:
    assert export_cli.main([str(source), "--format", "nnssl", "-o", str(out), *options]) == 0
    content: dict[str, Any] = torch.load(out, weights_only=True)
    return content


@pytest.mark.parametrize("fusion", ["add", "concat"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_whole_network_makes_the_round_trip(
    source: Path, out: Path, plans: dict[str, Any], residual: bool, fusion: str
) -> None:
    pretrained = Pretrained(source, plans, residual=residual, fusion=fusion)
    content = export(source, out)
    plan = content["nnssl_adaptation_plan"]
    assert plan["architecture_plans"]["arch_class_name"] == "nnunetv2_kaf.unet.KAFUNet"
    from_plan(plan).load_state_dict(content["network_weights"])
    fresh = build(pretrained.architecture)
    report = initialize_encoder(fresh, out, 1)
    expected = {k: v for k, v in pretrained.network.state_dict().items() if k.startswith("encoder.")}
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in expected.items())
    assert sum(report.tensors.values()) == len(expected)
    assert (report.left, report.adapted) == ({}, {})


@pytest.mark.parametrize("residual", [False, True])
def test_plain_is_a_network_of_nnunet_with_our_convolutions(
    source: Path, out: Path, plans: dict[str, Any], residual: bool
) -> None:
    pretrained = Pretrained(source, plans, residual=residual)
    content = export(source, out, "--plain")
    plan = content["nnssl_adaptation_plan"]
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    assert plan["architecture_plans"]["arch_class_name"] == f"{UNETS}.{name}"
    network = from_plan(plan)
    assert type(network).__module__ == UNETS
    network.load_state_dict(content["network_weights"])
    ours = pretrained.network.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in network.state_dict().items())
    assert {k for k in ours if k not in content["network_weights"]} == {k for k in ours if "encoder.layers." in k}
    configuration = plan["pretrain_plan"]["configurations"]["3d_fullres"]
    assert configuration["architecture"]["network_class_name"] == f"{UNETS}.{name}"
    report = initialize_encoder(build(pretrained.architecture), out, 1)
    assert set(report.left) == {"encoder.layers"}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", [(), ("--plain",)])
def test_the_adaptation_plan_is_complete(
    source: Path, out: Path, plans: dict[str, Any], residual: bool, options: tuple[str, ...]
) -> None:
    Pretrained(source, plans, residual=residual)
    content = export(source, out, *options)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert set(plan) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
    }  # fmt: skip
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert plan["key_to_lpe"] is None
    assert plan["pretrain_num_input_channels"] == 1
    assert plan["recommended_downstream_patchsize"] == [8, 24, 16]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert (configuration["patch_size"], configuration["spacing"]) == ([8, 24, 16], [4.0, 1.0, 1.0])
    # a reader loads the tensors under the two prefixes, strictly, into the modules of those names
    network = from_plan(plan)
    for key in ("key_to_encoder", "key_to_stem"):
        part = {k[len(plan[key]) + 1 :]: v for k, v in weights.items() if k.startswith(f"{plan[key]}.")}
        network.get_submodule(plan[key]).load_state_dict(part)
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1] == 1


def test_names_of_cases_stay_at_home(source: Path, out: Path, plans: dict[str, Any]) -> None:
    Pretrained(source, plans)
    assert b"patient_jane" in source.read_bytes()
    content = export(source, out)
    assert b"patient_jane" not in out.read_bytes()
    assert content["nnunetv2_kaf"]["pretraining"] == {"epochs_done": 2}
    assert content["nnunetv2_kaf"]["dataset_name"] == "Dataset123_Tiny"


def test_a_plain_pretraining_is_exported_as_it_is(source: Path, out: Path, plans: dict[str, Any]) -> None:
    pretrained = Pretrained(source, plans, kaf=False)
    content = export(source, out)
    assert content["nnssl_adaptation_plan"]["architecture_plans"]["arch_class_name"] == f"{UNETS}.PlainConvUNet"
    assert set(content["network_weights"]) == set(pretrained.network.state_dict())
    assert export(source, out, "--plain", "--force")["network_weights"].keys() == content["network_weights"].keys()


def test_a_2d_network_is_exported_with_a_warning(
    source: Path, out: Path, plans: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    Pretrained(source, plans, configuration="2d")
    assert export(source, out)["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] == [24, 16]
    assert "3D only" in caplog.text


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert export_cli.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kaf-export: error: ")
    return error


def test_an_existing_file_is_replaced_only_with_force(
    source: Path, out: Path, plans: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Pretrained(source, plans)
    out.parent.mkdir()
    out.write_text("precious")
    assert "--force" in failing(capsys, source, "-o", out)
    assert out.read_text() == "precious"
    export(source, out, "--force")
    assert [p.name for p in out.parent.iterdir()] == [out.name], "no temporary file is left"
    before = source.read_bytes()
    assert "is the checkpoint that is exported" in failing(capsys, source, "-o", source, "--force")
    assert source.read_bytes() == before
    (out.parent / "folder.pth").mkdir()
    assert "is a folder" in failing(capsys, source, "-o", out.parent / "folder.pth", "--force")


def test_bad_input(source: Path, out: Path, plans: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in failing(capsys, source, "-o", out)
    Pretrained(source, plans, fusion="concat")
    error = failing(capsys, source, "-o", out, "--plain")
    assert "concat fusion" in error
    assert "leave out --plain" in error
    content = torch.load(source, weights_only=True)
    del content["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    torch.save(content, source)
    assert "do not fit the network that it describes" in failing(capsys, source, "-o", out)
    source.write_bytes(source.read_bytes()[:500])
    assert "truncated" in failing(capsys, source, "-o", out)
    assert not out.exists()
    with pytest.raises(SystemExit) as done:
        export_cli.main([str(source), "-o", str(out), "--format", "keras"])
    assert done.value.code == 2


@pytest.mark.parametrize("residual", [False, True])
def test_the_folder_finetunes_in_a_network_that_stock_packages_build(
    source: Path, tmp_path: Path, plans: dict[str, Any], residual: bool
) -> None:
    pretrained = Pretrained(source, plans, residual=residual)
    folder = tmp_path / "shared" / "model"
    assert export_cli.main([str(source), "-o", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"adaptation_plan.json", "checkpoint_final.pth", "config.json"}
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    plan = json.loads((folder / "adaptation_plan.json").read_text())
    assert plan == content["nnssl_adaptation_plan"]
    citations = json.loads((folder / "config.json").read_text())["citations"]
    assert citations == content["citations"]
    # as nnU-Net's finetuning prints them
    assert all({"type", "name"} <= c.keys() and all(isinstance(p, str) for p in c["apa_citations"]) for c in citations)
    assert any("Keypoint-augmented" in paper for c in citations for paper in c["apa_citations"])
    # as nnU-Net's finetuning builds and loads: its own UNets only, stem and encoder strictly, by the keys of the plan
    assert plan["architecture_plans"]["arch_class_name"].endswith(("PlainConvUNet", "ResidualEncoderUNet"))
    network = from_plan(plan)
    assert type(network).__module__ == UNETS
    for ours, theirs in (("key_to_encoder", network.key_to_encoder), ("key_to_stem", network.key_to_stem)):
        prefix = plan[ours]
        part = {
            k.replace(prefix, "").removeprefix("."): v
            for k, v in content["network_weights"].items()
            if k.startswith(prefix)
        }
        network.get_submodule(theirs).load_state_dict(part)
    expected = pretrained.network.state_dict()
    names = [name for name in network.state_dict() if name.startswith(("encoder.stages.", "encoder.stem."))]
    assert len(names) > 10
    for name in names:
        assert torch.equal(network.state_dict()[name], expected[name]), name
    # and --init takes the folder, also if the plan is beside the weights only
    for strip in (False, True):
        if strip:
            del content["nnssl_adaptation_plan"]
            torch.save(content, folder / "checkpoint_final.pth")
        fresh = build(pretrained.architecture)
        report = initialize_encoder(fresh, folder, 1)
        assert set(report.left) == {"encoder.layers"}
        assert all(torch.equal(fresh.state_dict()[name], expected[name]) for name in names)


def test_folders_that_cannot_be_written_or_read(
    source: Path, tmp_path: Path, plans: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Pretrained(source, plans, fusion="concat")
    folder = tmp_path / "model"
    assert "concat fusion" in failing(capsys, source, "-o", folder)
    Pretrained(source, plans, configuration="2d")
    assert "3D only" in failing(capsys, source, "-o", folder)
    assert not folder.exists()
    Pretrained(source, plans)
    folder.mkdir()
    (folder / "config.json").write_text("of others")
    assert "config.json already" in failing(capsys, source, "-o", folder)
    assert (folder / "config.json").read_text() == "of others"
    assert export_cli.main([str(source), "-o", str(folder), "--force"]) == 0
    (tmp_path / "file").write_text("")
    assert "is a file" in failing(capsys, source, "-o", tmp_path / "file")
    (folder / "checkpoint_final.pth").unlink()
    with pytest.raises(KAFError, match=r"found a folder without checkpoint_final\.pth"):
        initialize_encoder(build(Pretrained(source, plans).architecture), folder, 1)


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "nnunet", "--plain"), ("--fold", "0"), ("--format", "safetensors"), ("--format", "onnx"),
        ("--format", "nnunet"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    source: Path, out: Path, plans: dict[str, Any], options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Pretrained(source, plans)
    failing(capsys, source, "-o", out, *options)
    assert not out.exists()


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_cli, "_run", interrupted)
    assert export_cli.main(["a.pth", "-o", "b.pth"]) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_help_lists_everything_without_torch() -> None:
    code = (
        "import sys, pretraining.exchange.export_cli as c; c.build_parser().print_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("CHECKPOINT", "--format", "nnssl", "--output", "--plain", "--force"):
        assert word in done.stdout
