"""Well-formed files with wrong content: one line with file, found, expected and fix, and exit status 2."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.architecture import build_network
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import append_checksum
from nnunetv2_kaf.plans import kaf_plans
from nnunetv2_kaf.weights import load_encoder, save_pretraining_checkpoint
from pretraining import cli
from pretraining.checkpoint import LATEST
from pretraining.exchange import export_cli

SMALL = KAFConfig(num_keypoints=9, token_dim=8, num_blocks=1, num_heads=2, position_hidden=(8,))
Content = dict[str, Any]
GONE = object()


def put(content: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set an entry deep in a file; `GONE` removes it."""
    *parents, last = path
    for part in parents:
        content = content[part]
    if value is GONE:
        del content[last]
    else:
        content[last] = value


def one_line(error: str, *words: str) -> None:
    line = error.splitlines()[-1]
    assert "Traceback" not in error
    for word in words:
        assert word in line, line


# --- final checkpoints: KAF_PRETRAINED and kaf-export ---

FIRST = "encoder.stages.0.0.convs.0.conv.weight"
ARCH = ("architecture", "arch_kwargs")
FINAL: dict[str, tuple[tuple[Any, ...], Any]] = {
    **{
        f"no {key}": ((key,), GONE)
        for key in (
            "architecture",
            "plans",
            "network_weights",
            "num_input_channels",
            "configuration",
            "fold",
            "dataset_name",
            "pretraining",
            "versions",
            "format",
            "format_version",
        )
    },
    **{f"{key} is a list": ((key,), [1]) for key in ("architecture", "plans", "network_weights", "pretraining")},
    "weights are empty": (("network_weights",), {}),
    "a tensor is text": (("network_weights", FIRST), "text"),
    "a tensor is missing": (("network_weights", FIRST), GONE),
    "a tensor has another shape": (("network_weights", FIRST), torch.zeros(2, 2)),
    "a name is a number": (("network_weights", 3), torch.zeros(1)),
    "integer weights": (("network_weights", FIRST), torch.zeros(4, 1, 3, 3, dtype=torch.int64)),
    "complex weights": (("network_weights", FIRST), torch.zeros(4, 1, 3, 3, dtype=torch.complex64)),
    "sparse weights": (("network_weights", FIRST), torch.zeros(4, 9).to_sparse()),
    "NaN weights": (("network_weights", FIRST), torch.full((4, 1, 3, 3), math.nan)),
    "infinite weights": (("network_weights", FIRST), torch.full((4, 1, 3, 3), math.inf)),
    "diverged weights": (("network_weights", FIRST), torch.full((4, 1, 3, 3), 1e30)),
    "a huge view of little memory": (("network_weights", FIRST), torch.zeros(1).expand(4, 10**6, 3, 3)),
    "channels are text": (("num_input_channels",), "1"),
    "channels are a flag": (("num_input_channels",), True),
    "no channels": (("num_input_channels",), 0),
    "another configuration": (("configuration",), "3d_other"),
    "fold is a list": (("fold",), [0]),
    "dataset leads elsewhere": (("dataset_name",), "../../x"),
    "versions are numbers": (("versions",), {"torch": 2.6}),
    "kaf is null": ((*ARCH, "kaf"), None),
    "no kaf": ((*ARCH, "kaf"), GONE),
    "token_dim is huge": ((*ARCH, "kaf", "token_dim"), 10**9),
    "features are huge": ((*ARCH, "features_per_stage"), [10**9] * 3),
    "stages are text": ((*ARCH, "n_stages"), "3"),
    "strides are missing": ((*ARCH, "strides"), GONE),
    "conv_op is missing": ((*ARCH, "conv_op"), GONE),
    "norm of other axes": ((*ARCH, "norm_op_kwargs"), {"num_features": 3, "surplus": 1}),
    "an unknown option": ((*ARCH, "surplus"), 3),
    "imports are text": (("architecture", "_kw_requires_import"), "conv_op"),
    "plans without configurations": (("plans", "configurations"), GONE),
    "plans inherit in a circle": (("plans", "configurations", "2d", "inherits_from"), "2d"),
    "nothing but a list": ((), None),
}


@pytest.fixture
def final(tiny: Any, tmp_path: Path) -> tuple[Path, Content]:
    path, plans = tmp_path / "checkpoint_final.pth", kaf_plans(tiny.plans, SMALL)
    entry = plans["configurations"]["2d"]["architecture"]
    save_pretraining_checkpoint(
        path, build_network(entry, 1, 2, where="test"), plans=plans, configuration="2d", num_input_channels=1,
        dataset_name="Dataset123_Tiny", fold=0, pretraining={},
    )  # fmt: skip
    return path, plans


@pytest.mark.parametrize("case", FINAL)
def test_final_checkpoints(
    case: str, final: tuple[Path, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plans = final
    where, value = FINAL[case]
    content = torch.load(path, weights_only=True)
    if where:
        put(content, where, value)
    torch.save(content if where else [1, 2], path)
    for options in ((), ("--plain",)):
        assert export_cli.main([str(path), "-o", str(tmp_path / "out.pth"), *options]) == 2
        one_line(capsys.readouterr().err, str(path))
    assert not (tmp_path / "out.pth").exists()
    network = build_network(plans["configurations"]["2d"]["architecture"], 1, 2, where="test")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(KAFError, match="checkpoint_final"):
        load_encoder(network, path, plans, "2d")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_flipped_bit_in_the_weights_is_found(
    final: tuple[Path, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = final
    weight = torch.load(path, weights_only=True)["network_weights"][FIRST].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight) + 2] ^= 1
    path.write_bytes(data)
    assert export_cli.main([str(path), "-o", str(tmp_path / "out.pth")]) == 2
    one_line(capsys.readouterr().err, str(path), "damaged", "checksum")


# --- plans ---

CONFIGURATION = ("configurations", "2d")
ENTRY = (*CONFIGURATION, "architecture")
OPTIONS = (*ENTRY, "arch_kwargs")
PLANS: dict[str, tuple[tuple[Any, ...], Any]] = {
    **{f"no {key}": ((key,), GONE) for key in ("dataset_name", "plans_name", "configurations")},
    **{
        f"no {key} in a configuration": ((*CONFIGURATION, key), GONE)
        for key in ("data_identifier", "patch_size", "spacing", "batch_size", "normalization_schemes", "architecture")
    },
    **{
        f"{key} is {value!r}": ((*CONFIGURATION, key), value)
        for key, values in {
            "batch_size": ("3", 0, -1, True, None, 2.5, [3], 1e30),
            "spacing": ("1", [1, 1, 1, 1], [0.0, 1.0], [-1.0, 1.0], ["1", 1.0], None, [math.nan, 1.0], {}, [1.0]),
            "patch_size": ("24", [24], [24, 16.5], [0, 16], None, [[24, 16]], [24, 10**12]),
            "architecture": (None, [], "PlainConvUNet", {}),
            "data_identifier": ("../nnUNetPlans_2d", "", None, 3, "/tmp"),
            "normalization_schemes": ([], "ZScoreNormalization", None, [None]),
            "inherits_from": ("2d", "nowhere", None, 3, ["3d_fullres"]),
            "preprocessor_name": (None, 3, "", "os.system"),
        }.items()
        for value in values
    },
    **{
        f"kaf is {value!r}": ((*OPTIONS, "kaf"), value)
        for value in (
            None,
            3,
            [],
            "add",
            {"surplus": 1},
            {"mlp_ratio": math.inf},
            {"mlp_ratio": math.nan},
            {"mlp_ratio": "2"},
            {"token_dim": 10**9},
            {"token_dim": 0},
            {"num_blocks": 10**9},
            {"num_keypoints": 10**12},
            {"num_heads": 5},
            {"detection_scales": [0.8, 1.2, 1e9]},
            {"detection_scales": 3},
            {"detection_scales": [1, 2]},
            {"detection_scales": ["a", "b", "c"]},
            {"detection_threshold": math.inf},
            {"levels": [7]},
            {"levels": 1},
            {"levels": ["a"]},
            {"position_hidden": [10**9]},
            {"position_hidden": None},
            {"diffusion_channels": 10**9},
            {"detection_channels": []},
            {"detection_channels": [5]},
            {"fusion": ["add"]},
            {"fusion": None},
        )
    },
    **{
        f"{key} is {value!r}": ((*OPTIONS, key), value)
        for key, values in {
            "n_stages": (0, "3", 10**9, None, 2),
            "features_per_stage": ([4, 8], 10**9, "4", [[[4]]], [4, 8, -8]),
            "kernel_sizes": ([[3, 3]] * 2, [[3, 3, 3, 3]] * 3, "3", 10**6, [[2, 2]] * 3),
            "strides": ([[1, 1]], [[0, 0]] * 3, "1", None),
            "n_conv_per_stage": ([1, 1], "1", 10**9, 0),
            "n_conv_per_stage_decoder": ([1], None, 10**9),
            "norm_op_kwargs": (3, {"surplus": 3}, {"eps": [1]}, []),
            "nonlin_kwargs": ({"negative_slope": "text", "more": 1}, "text"),
            "conv_bias": ("yes", 3),
            "spacing": ([9.0, 9.0], "1", [1.0]),
        }.items()
        for value in values
    },
    "the network is unknown": ((*ENTRY, "network_class_name"), "somewhere.Primus"),
    "imports are unknown": ((*ENTRY, "_kw_requires_import"), ["conv_op", "kaf"]),
    "imports are missing": ((*ENTRY, "_kw_requires_import"), GONE),
    "configurations are a list": (("configurations",), [1]),
    "configurations are empty": (("configurations",), {}),
    "a configuration is text": (CONFIGURATION, "2d"),
    "a second configuration is damaged": (("configurations", "3d_fullres"), {"batch_size": 2}),
    "plans_name leads elsewhere": (("plans_name",), "../../elsewhere"),
    "dataset_name is a number": (("dataset_name",), 123),
    "reader is unknown": (("image_reader_writer",), "NoSuchReader"),
    "label manager is null": (("label_manager",), None),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, tiny: Any, capsys: pytest.CaptureFixture[str], fast: list[str]) -> None:
    where, value = PLANS[case]
    plans = kaf_plans(tiny.plans, SMALL)
    put(plans, where, value)
    (tiny.folder / "OddPlans.json").write_text(json.dumps(plans))
    assert cli.main(["-d", "123", "-c", "2d", "-p", "OddPlans", "--fold", "all", *fast]) == 2
    one_line(capsys.readouterr().err, "kaf-pretrain: error: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"text"', "[" * 10**5, "1" * 10**5, "\udcff", '{"configurations": 3}', "{}"]
)
def test_plans_that_are_no_plans(text: str, tiny: Any, capsys: pytest.CaptureFixture[str], fast: list[str]) -> None:
    (tiny.folder / "OddPlans.json").write_bytes(text.encode(errors="surrogateescape"))
    assert cli.main(["-d", "123", "-c", "2d", "-p", "OddPlans", "--fold", "all", *fast]) == 2
    one_line(capsys.readouterr().err, "OddPlans.json", "Restore")


def test_inheritance_in_a_circle(tiny: Any, capsys: pytest.CaptureFixture[str], fast: list[str]) -> None:
    plans = json.loads(json.dumps(tiny.plans))
    plans["configurations"]["a"], plans["configurations"]["b"] = {"inherits_from": "b"}, {"inherits_from": "a"}
    (tiny.folder / "OddPlans.json").write_text(json.dumps(plans))
    assert cli.main(["-d", "123", "-c", "2d", "-p", "OddPlans", "--fold", "all", *fast]) == 2
    one_line(capsys.readouterr().err, "configurations.b.inherits_from", "a -> b -> a")


# --- dataset.json ---


@pytest.mark.parametrize(
    "content",
    [
        {}, {"labels": {}}, {"labels": [0, 1]}, {"labels": {"background": "0"}, "channel_names": {"0": "MRI"}},
        {"labels": {"a": 1}, "channel_names": {"0": "MRI"}}, {"labels": {"background": 0}, "channel_names": {}},
        {"labels": {"background": 0, "a": 1}, "channel_names": ["MRI"]}, {"labels": {"background": 0, "a": [1, "2"]}},
        {"labels": {"background": 0, "a": [1, 2]}, "channel_names": {"0": "MRI"}}, [], None, 3,
    ],
)  # fmt: skip
def test_dataset_json(content: Any, tiny: Any, capsys: pytest.CaptureFixture[str], fast: list[str]) -> None:
    (tiny.folder / "dataset.json").write_text(json.dumps(content))
    assert cli.main(["-d", "123", "-c", "2d", "--fold", "all", *fast]) == 2
    one_line(capsys.readouterr().err, "dataset.json")


# --- unfinished runs: --continue ---

RUN: dict[str, tuple[tuple[Any, ...], Any]] = {
    **{
        f"no {key}": ((key,), GONE)
        for key in (
            "identity",
            "optimizer",
            "config",
            "step",
            "sums",
            "history",
            "network",
            "model",
            "scaler",
            "rng_cpu",
            "rng_cuda",
            "format",
            "format_version",
        )
    },
    **{f"{key} is text": ((key,), "text") for key in ("identity", "optimizer", "config", "step", "sums", "history")},
    **{f"{key} is a list": ((key,), [1]) for key in ("network", "model", "optimizer", "rng_cpu", "scaler")},
    "step is negative": (("step",), -1),
    "step is beyond the end": (("step",), 10**9),
    "an option is unknown": (("config", "surplus"), 1),
    "an option is text": (("config", "epochs"), "2"),
    "identity is empty": (("identity",), {}),
    "cases are numbers": (("identity", "cases"), [1, 2]),
    "random state of another size": (("rng_cpu",), torch.zeros(3, dtype=torch.uint8)),
    "random state of another type": (("rng_cpu",), torch.zeros(5056)),
    "random state of nonsense": (("rng_cpu",), torch.full((5056,), 255, dtype=torch.uint8)),
    "history without epochs": (("history",), [{"total": 1.0}]),
    "history of text": (("history",), [{"epoch": 1.0, "total": "low"}]),
    "history is too long": (("history",), [{"epoch": float(i)} for i in range(50)]),
    "sums of text": (("sums",), {"total": "low"}),
    "no groups": (("optimizer", "param_groups"), []),
    "other groups": (("optimizer", "param_groups", 0, "params"), [0, 1]),
    "other options of a group": (("optimizer", "param_groups", 0, "betas"), GONE),
    "moments of unknown parameters": (("optimizer", "state", 10**6), {"step": torch.zeros(())}),
    "moments of another shape": (("optimizer", "state", 0, "exp_avg"), torch.zeros(2, 7)),
    "moments of text": (("optimizer", "state", 0, "exp_avg"), "text"),
    "moments of NaN": (("optimizer", "state", 0, "exp_avg"), torch.full((4, 1, 3, 3), math.nan)),
    "moments by names": (("optimizer", "state"), {"first": {}}),
    "weights of NaN": (("network", FIRST), torch.full((4, 1, 3, 3), math.nan)),
    "weights of another network": (("network",), {"stem": torch.zeros(1)}),
    "weights of the model missing": (("model",), {"stem": torch.zeros(1)}),
}


@pytest.fixture(scope="module")
def kept() -> dict[str, bytes]:
    """The unfinished run, made once."""
    return {}


@pytest.fixture
def unfinished(
    tiny: Any, fast: list[str], kept: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[list[str], Path]:
    """The command of a run, and its checkpoint."""
    monkeypatch.setattr("pretraining.recorder.plot_progress", lambda *_: None, raising=False)
    (tiny.folder / "SmallPlans.json").write_text(
        json.dumps({**kaf_plans(tiny.plans, SMALL), "plans_name": "SmallPlans"})
    )
    tiny.add_cases(3)
    out = tmp_path / "run"
    command = ["-d", "123", "-c", "2d", "-p", "SmallPlans", "--fold", "all", *fast, "--preset", "simclr"]
    command += ["--epochs", "1", "--output", str(out)]
    if not kept:
        assert cli.main(command) == 0
        kept[LATEST] = (out / LATEST).read_bytes()
    out.mkdir(exist_ok=True)
    (out / LATEST).write_bytes(kept[LATEST])
    return command, out / LATEST


@pytest.mark.parametrize("case", RUN)
def test_unfinished_runs(case: str, unfinished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    command, path = unfinished
    content = torch.load(path, weights_only=True)
    put(content, *RUN[case])
    torch.save(content, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert cli.main([*command, "--continue"]) == 2
    one_line(capsys.readouterr().err, "kaf-pretrain: error: ", str(path))
    assert path.read_bytes() == before


def test_the_unfinished_run_itself_goes_on(unfinished: tuple[list[str], Path]) -> None:
    assert cli.main([*unfinished[0], "--continue"]) == 0


# --- caches ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def plain_array(path: Path) -> None:
    np.save(path, np.arange(7.0))


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, slice=np.arange(3))


def with_checksum(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        write(path)
        append_checksum(path)

    return both


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bits flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-70]) and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "a plain array": plain_array,
    "an npz": npz,
    "a plain array with a checksum": with_checksum(plain_array),
    "an npz with a checksum": with_checksum(npz),
    "another array with a checksum": with_checksum(lambda path: np.save(path, np.zeros(2, [("slice", "<f8")]))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_cached_keypoints(
    case: str, unfinished: tuple[list[str], Path], tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command, latest = unfinished
    latest.unlink()
    assert cli.main(command) == 0
    capsys.readouterr()
    file = sorted(tiny.folder.rglob("*_kaf_keypoints/**/*.npy"))[0]
    DAMAGE[case](file)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    one_line(error, str(file), "Delete it and run again", "rm ")
    file.unlink()
    assert cli.main(command) == 0
