from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pretrain_throughput
import pytest
import torch
from common import alternate, environment, one_core, write_json
from gpu_busy import busy
from synthetic import Layout, phases, write_dataset

from pretraining.config import PretrainConfig
from pretraining.loop import Trainer
from pretraining.pairs.batch import Batch
from pretraining.pairs.loader import PairLoader
from pretraining.prepare import DataOptions, prepare
from pretraining.run import build_state
from pretraining.task import Task, resolve_task

CPU = torch.device("cpu")
VOLUME, SPACING, FEATURES = (4, 40, 32), (6.0, 1.5, 1.5), (4, 8)
LAYOUTS = {
    "2d": Layout(VOLUME, SPACING, (32, 24), 3, FEATURES, ((1, 1), (2, 2))),
    "3d": Layout(VOLUME, SPACING, (4, 32, 24), 2, FEATURES, ((1, 1, 1), (1, 2, 2))),
}


@pytest.fixture(params=["2d", "3d"])
def task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    write_dataset(tmp_path / "data", LAYOUTS, patients=2, seed=0)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "data"))
    return resolve_task("998", request.param, "nnUNetPlans")


@pytest.fixture
def loader(task: Task) -> PairLoader:
    return prepare(task, PretrainConfig(), DataOptions(fold="all", num_workers=0), CPU, 3).loader


def test_detecting_anew_gives_the_batches_of_the_cache(loader: PairLoader) -> None:
    arms = pretrain_throughput.arms_of(loader)
    matched = 0
    for step in range(3):
        cached, anew = arms["cached"](step)(), arms["detected_anew"](step)()
        assert isinstance(cached, Batch)
        assert isinstance(anew, Batch)
        assert cached.cases == anew.cases
        tensors = [(batch.views, *batch.keypoints, batch.matches, batch.positions) for batch in (cached, anew)]
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
        matched += int((cached.matches >= 0).sum())
    assert matched > 5  # small patches have few keypoints


def test_detecting_anew_does_not_read_the_cache(loader: PairLoader) -> None:
    anew = pretrain_throughput.arms_of(loader)["detected_anew"]
    for file in loader.keypoints.folder.iterdir():
        file.unlink()
    assert isinstance(anew(0)(), Batch)


def test_the_parts_are_those_of_the_pipeline(loader: PairLoader) -> None:
    arms = pretrain_throughput.arms_of(loader)
    for step in range(2):
        batch = loader.batch(step)
        views, matches = arms["rendering"](step)(), arms["keypoints_and_matching"](step)()
        assert isinstance(views, list)
        assert isinstance(matches, list)
        assert torch.equal(torch.stack(views, 1).flatten(0, 1), batch.views)
        assert torch.equal(torch.stack(matches), batch.matches)


def test_one_core_is_restored() -> None:
    before = torch.get_num_threads(), _affinity()
    torch.set_num_threads(2)
    try:
        with one_core() as setting:
            assert torch.get_num_threads() == 1
            assert setting["torch_threads"] == 1
            assert before[1] is None or _affinity() == {setting["pinned_to_core"]}
        assert (torch.get_num_threads(), _affinity()) == (2, before[1])
        with pytest.raises(RuntimeError, match="inside"), one_core():
            raise RuntimeError("inside")
        assert (torch.get_num_threads(), _affinity()) == (2, before[1])
    finally:
        torch.set_num_threads(before[0])


def _affinity() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAF_ONE", "before")
    monkeypatch.delenv("KAF_TWO", raising=False)
    with environment(KAF_ONE="inside", KAF_TWO="inside"):
        assert os.environ["KAF_ONE"] == os.environ["KAF_TWO"] == "inside"
    assert os.environ["KAF_ONE"] == "before"
    assert "KAF_TWO" not in os.environ


def test_arms_alternate_and_preparation_is_not_timed() -> None:
    now, calls = [0.0], []

    def arm(name: str, prepare: float, work: float):  # type: ignore[no-untyped-def]
        def prepared(step: int):  # type: ignore[no-untyped-def]
            now[0] += prepare

            def run() -> None:
                calls.append((step, name))
                now[0] += work

            return run

        return prepared

    arms = {"a": arm("a", 100.0, 2.0), "b": arm("b", 0.0, 3.0)}
    seconds = alternate(arms, lambda: (now[0], now[0] / 2), repetitions=3, warmup=1)
    assert seconds == {"a": [(2.0, 1.0)] * 3, "b": [(3.0, 1.5)] * 3}
    assert [step for step, _ in calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [name for step, name in calls if step == 1] == ["a", "b"]
    assert [name for step, name in calls if step == 2] == ["b", "a"]


def test_summary_is_the_median_rate() -> None:
    summary = pretrain_throughput.summarise({"arm": [(1.0, 0.5), (2.0, 1.0), (100.0, 2.0)]}, pairs=8)["arm"]
    assert summary["pairs_per_second"] == 4.0
    assert summary["milliseconds_per_pair"] == 250.0
    assert summary["pairs_per_processor_second"] == 8.0
    assert summary["quartiles"] == [2.0, 6.0]


def test_busy_share_counts_waiting_for_batches(task: Task, loader: PairLoader, tmp_path: Path) -> None:
    config = PretrainConfig.from_preset("simclr", {})
    state = build_state(task, config, CPU)
    trainer = Trainer(state, config, task.patch_size, CPU, tmp_path / "nonfinite.json")
    ready = [loader.batch(0)] * 3

    def slow() -> Iterator[Batch]:
        for batch in ready:
            time.sleep(0.3)
            yield batch

    at_once = busy(trainer, iter(ready), steps=2, warmup=1)
    waiting = busy(trainer, slow(), steps=2, warmup=1)
    assert 0.5 < at_once["busy"] <= 1.0
    # The two waits are not part of the work.
    assert waiting["busy"] <= 1 - 0.6 / (2 * 3 / waiting["pairs_per_second"]) + 0.01
    assert state.step == 6


def test_synthetic_volumes_are_images_of_one_patient() -> None:
    first, second = phases((6, 40, 32), (10.0, 1.5, 1.5), [0, 1])
    assert first.shape == (1, 6, 40, 32)
    assert first.dtype == np.float32
    other = phases((6, 40, 32), (10.0, 1.5, 1.5), [0, 2])[0]
    alike, unlike, slices = (
        float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        for a, b in ((first, second), (first, other), (first[:, 1:], first[:, :-1]))
    )
    assert alike > unlike + 0.02
    assert slices > 0.5
    assert np.array_equal(first, phases((6, 40, 32), (10.0, 1.5, 1.5), [0, 1])[0])


def test_the_document_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--repetitions", "2", "--warmup", "1", "--pairs", "2", "2", "--rounds", "2", "--steps", "2"]
    args = pretrain_throughput.parser().parse_args([*arguments, "--out", str(out)])
    before = dict(os.environ)
    document = pretrain_throughput.run(args, LAYOUTS)
    assert dict(os.environ) == before
    write_json(document, out)
    stored = json.loads(out.read_text())
    assert {"machine", "versions", "seed", "setting", "pipeline"} <= set(stored)
    for name, layout in LAYOUTS.items():
        result = stored["pipeline"][name]
        assert set(result["arms"]) == set(pretrain_throughput.ARMS)
        assert result["patch_size"] == list(layout.patch_size)
        assert 0 < result["matches_per_pair"] < result["valid_keypoints_per_view"] <= result["keypoints_at_most"]
        rates = [one["pairs_per_second"] for one in result["rounds"]]
        assert len(rates) == 2
        assert result["arms"]["cached"]["pairs_per_second"] == max(rates)
        assert {"start", "end"} <= set(result["load_average"])
    if not torch.cuda.is_available():
        assert set(stored["share_of_time_that_the_gpu_is_busy"]["results"].values()) == {"not measured"}
    stored["pipeline"]["2d"]["arms"]["cached"]["pairs_per_second"] = 4321.0
    stored["share_of_time_that_the_gpu_is_busy"]["results"]["3d"] = {"busy": 0.934}
    write_json(stored, out)
    capsys.readouterr()
    pretrain_throughput.main(["--table", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "4321.0" in lines[2]
    assert "93 %" in lines[3]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    write_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}
