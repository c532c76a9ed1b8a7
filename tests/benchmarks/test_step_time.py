from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import networks
import pytest
import step_time
import torch
from common import ratios, stopwatch
from step_table import NOT_MEASURED, TARGETS, findings, table
from synthetic import Layout

from nnunetv2_kaf.config import KAFConfig

STRIDES = {2: ((1, 1), (2, 2), (2, 2)), 3: ((1, 1, 1), (1, 2, 2), (1, 2, 2))}
CASES = {
    "flat": networks.Case(Layout((4, 32, 24), (6.0, 1.5, 1.5), (32, 24), 3, (4, 8, 8), STRIDES[2]), 3, 2),
    "64^3": networks.Case(
        Layout((4, 16, 24), (6.0, 1.5, 1.5), (4, 16, 24), 2, (4, 8, 8), STRIDES[3]), 2, 1, arms=networks.WITH_PAPER
    ),
    "huge": networks.Case(Layout((4, 16, 24), (6.0, 1.5, 1.5), (4, 16, 24), 2, (4, 8, 8), STRIDES[3]), 2, None),
}


@pytest.fixture(autouse=True)
def _small_paper_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KAFConfig.paper(token_dim=32, num_blocks=1, diffusion_channels=8)
    for name in ("paper_sparse", "paper_dense"):
        monkeypatch.setitem(networks.ARMS, name, (config, name.removeprefix("paper_")))


def arguments(out: Path, cases: list[str]) -> argparse.Namespace:
    args = step_time.parser().parse_args(["--rounds", "2", "--warmup", "1", "--profiled", "1", "--out", str(out)])
    args.cases = cases
    return args


def test_the_document_and_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    step_time.run(arguments(out, ["64^3", "huge"]), CASES)
    first = json.loads(out.read_text())["devices"]["cpu"]["cases"]
    step_time.run(arguments(out, ["flat"]), CASES)
    document = json.loads(out.read_text())
    section = document["devices"]["cpu"]
    assert {"machine", "versions", "setting"} <= set(section)
    assert document["devices"]["cuda"] == NOT_MEASURED
    assert list(section["cases"]) == ["flat", "64^3", "huge"]
    assert section["cases"]["64^3"] == first["64^3"]
    assert section["cases"]["huge"] == NOT_MEASURED
    cube = section["cases"]["64^3"]
    assert list(cube["arms"]) == list(networks.WITH_PAPER)
    assert cube["arms"]["plain"]["step_ratio"]["median"] == cube["arms"]["plain"]["memory_ratio"] == 1.0
    assert cube["arms"]["paper_dense"]["peak_bytes"] > cube["arms"]["plain"]["peak_bytes"]
    assert 0 < cube["arms"]["kaf"]["valid_keypoints"] <= cube["arms"]["kaf"]["keypoints_at_most"]
    assert (cube["batch_size"], cube["planned_batch_size"], cube["rounds"]) == (1, 2, 2)

    cube["arms"]["kaf"]["step_seconds"], cube["arms"]["kaf"]["memory_ratio"] = 4.321, 7.89
    out.write_text(json.dumps(document))
    capsys.readouterr()
    step_time.main(["--table", "--out", str(out)])
    measured, targets = capsys.readouterr().out.strip().split("\n\n")
    for lines in (measured.splitlines(), targets.splitlines()):
        assert len({line.count("|") for line in lines}) == 1
    # Two arms, four arms, the case that is not for a CPU, and the GPU.
    assert len(measured.splitlines()) == 2 + 2 + 4 + 1 + 1
    assert "4321" in measured
    assert "| GPU | not measured |" in measured
    assert "| CPU | memory | 1.20 | 64^3 | 7.890 | not met |" in targets
    assert "| GPU | detection | 0.02 |  | not measured |  |" in targets


def test_an_interrupted_run_keeps_the_cases_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"

    def measure(case: networks.Case, *_: Any) -> dict[str, Any]:
        if case is CASES["64^3"]:
            raise KeyboardInterrupt
        return {"arms": {}, "patch_size": [1, 1]}

    monkeypatch.setattr(step_time, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        step_time.run(arguments(out, ["flat", "64^3"]), CASES)
    assert list(json.loads(out.read_text())["devices"]["cpu"]["cases"]) == ["flat"]


@pytest.mark.parametrize("key", ["machine", "versions", "setting"])
def test_numbers_of_other_conditions_are_kept_apart(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    step_time.run(arguments(out, ["huge"]), CASES)
    document = json.loads(out.read_text())
    document["devices"]["cpu"][key]["torch_threads" if key == "setting" else "other"] = 99
    out.write_text(json.dumps(document))
    monkeypatch.setattr(step_time, "measure", lambda *_: {"arms": {}, "patch_size": [1, 1]})
    step_time.run(arguments(out, ["flat"]), CASES)
    assert json.loads((tmp_path / "result.earlier1.json").read_text()) == document
    now = json.loads(out.read_text())["devices"]["cpu"]
    assert list(now["cases"]) == ["flat"], "huge was measured under other conditions"
    assert now[key] != document["devices"]["cpu"][key]
    step_time.run(arguments(out, ["huge"]), CASES)
    assert list(json.loads(out.read_text())["devices"]["cpu"]["cases"]) == ["flat", "huge"]
    assert not (tmp_path / "result.earlier2.json").exists()


def test_numbers_of_another_device_stay(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    step_time.run(arguments(out, ["huge"]), CASES)
    document = json.loads(out.read_text())
    document["devices"]["cuda"] = {"machine": {}, "cases": {"flat": NOT_MEASURED}}
    out.write_text(json.dumps(document))
    step_time.run(arguments(out, ["huge"]), CASES)
    assert json.loads(out.read_text()) == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        step_time.main(["--device", "cuda", "--out", str(tmp_path / "x.json")])


def test_plain_is_always_measured(tmp_path: Path) -> None:
    args = arguments(tmp_path / "x.json", ["flat"])
    args.arms = ["kaf"]
    found = step_time.measure(CASES["flat"], 1, torch.device("cpu"), False, args)
    assert list(found["arms"]) == ["plain", "kaf"]
    assert "sparse_to_dense" not in found


def test_targets_are_about_their_cases() -> None:
    shares = {"detection": {"forward": 0.01, "backward": 0.002}}
    kaf = {"step_ratio": {"median": 1.1}, "memory_ratio": 1.3, "shares": shares}
    flat = {"patch_size": [8, 8], "arms": {"kaf": kaf}}
    cube = {"patch_size": [8, 8, 8], "arms": {"kaf": kaf}, "sparse_to_dense": {"median": 0.4}}
    cases = {"flat": flat, "cube": cube, "64^3": cube, "128^3": NOT_MEASURED, "bare": {**flat, "arms": {}}}
    found = {target: list(findings(target, cases)) for target in TARGETS["cpu"]}
    assert found["step 3d"] == [("cube", 1.1), ("64^3", 1.1)]
    assert found["step 2d"] == [("flat", 1.1)]
    assert found["memory"] == [("flat", 1.3), ("cube", 1.3), ("64^3", 1.3)]
    assert found["paper sparse/dense 64^3"] == [("64^3", 0.4)]
    assert [round(value, 4) for _, value in found["detection"]] == [0.012] * 3
    assert list(findings("paper sparse/dense 128^3", cases)) == []


def test_nothing_measured_makes_tables_that_say_so() -> None:
    text = table({"devices": {"cpu": NOT_MEASURED, "cuda": NOT_MEASURED}})
    assert text.count(NOT_MEASURED) == 2 + len(TARGETS["cpu"]) + len(TARGETS["cuda"])


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is three times slower in the last rounds; every round says 2.
    seconds = {"a": [(1.0, 0.0), (3.0, 0.0), (3.0, 0.0)], "b": [(2.0, 0.0), (6.0, 0.0), (6.0, 0.0)]}
    assert ratios(seconds, "a")["b"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
    assert ratios({**seconds, "c": [(0.5, 0.0), (3.0, 0.0), (4.5, 0.0)]}, "a")["c"]["median"] == 1.0


def test_the_stopwatch_runs_forward() -> None:
    clock = stopwatch(torch.device("cpu"))
    (wall, processor), (later, later_processor) = clock(), clock()
    assert later >= wall
    assert later_processor >= processor
