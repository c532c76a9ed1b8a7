from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from low_label import __main__ as command
from low_label import commands, config, grid, jobs, splits, worker
from low_label.layout import Layout, read_json
from low_label.worker import Step

from nnunetv2_kaf.errors import KAFError

CONTENT = {
    "comment": "c",
    "device": "cpu",
    "labelled": [2, "all"],
    "draws": 2,
    "epochs": 2,
    "iterations": 3,
    "pretraining": {"epochs": 4, "iterations": 5},
    "pretraining_seeds": 2,
    "tasks": {"heart": {"data": "Dataset001_Heart", "configuration": "2d", "validation_patients": 2}},
    "arms": {
        "plain": {"trainer": "plain"},
        "plain_pcl": {"trainer": "plain", "pretraining": {"preset": "pcl"}},
        "kaf": {"trainer": "kaf", "pretraining": {}},
        "kaf_slow": {"trainer": "kaf", "pretraining": {}, "training": {"initial_lr": 0.001}},
    },
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(CONTENT))
    study = config.load(file)
    layout = Layout(study, study.tasks[0], tmp_path / "work", tmp_path / "out")
    layout.raw.mkdir(parents=True)
    (layout.raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1}}))
    return layout


@pytest.fixture
def split(layout: Layout) -> splits.Split:
    return splits.draw([f"p{i:02d}" for i in range(10)], layout.study, layout.task)


def arm(layout: Layout, name: str) -> config.Arm:
    return next(arm for arm in layout.arms if arm.name == name)


def test_a_training_starts_goes_on_or_only_validates(layout: Layout, split: splits.Split) -> None:
    fold, pcl, kaf = split.folds[0], arm(layout, "plain_pcl"), arm(layout, "kaf")
    fresh = commands.train(layout, pcl, fold, split)
    assert fresh.command[:4] == ["nnUNetv2_train", "950", "2d", "0"]
    assert fresh.command[-2:] == ["-pretrained_weights", str(layout.pretraining(pcl, fold) / "checkpoint_final.pth")]
    assert "-pretrained_weights" not in commands.train(layout, kaf, fold, split).command
    variable = commands.train(layout, kaf, fold, split).environment["KAF_PRETRAINED"]
    assert variable == str(layout.pretraining(kaf, fold) / "checkpoint_final.pth")
    folder = layout.fold_folder(pcl, fold)
    folder.mkdir(parents=True)
    for file, flag in (("checkpoint_latest.pth", "--c"), ("checkpoint_final.pth", "--val")):
        (folder / file).write_text("")
        command = commands.train(layout, pcl, fold, split).command
        assert command[-1] == flag
        assert "-pretrained_weights" not in command


def test_equal_pretrainings_are_shared_and_leave_out_validation(layout: Layout, split: splits.Split) -> None:
    made = grid.training_jobs(layout, split)
    pretrainings = [job for job in made if job.name.startswith("pretrain_")]
    # two networks, two seeds; kaf and kaf_slow differ in their training only
    assert len(pretrainings) == 4
    assert len(made) == 4 + 4 * 4
    needs = {job.name: job.needs for job in made}
    assert needs["kaf_M2_draw0"] == needs["kaf_slow_Mall_draw0"] != needs["kaf_M2_draw1"]
    assert needs["plain_M2_draw0"] is None
    command = pretrainings[0].steps()[0].command
    fold = split.nnunet()[int(command[command.index("--fold") + 1])]
    assert fold == {"train": split.cases_of(split.training), "val": split.cases_of(split.validation)}


def test_an_arm_may_take_part_with_some_numbers_of_patients_only(layout: Layout, split: splits.Split) -> None:
    kaf = replace(arm(layout, "kaf"), labelled=("all",))
    fewer = replace(layout, study=replace(layout.study, arms=(arm(layout, "plain"), kaf)))
    names = [f"{one.name}_{fold.name}" for one, fold in fewer.runs(split)]
    assert names == [
        "plain_M2_draw0",
        "plain_M2_draw1",
        *(f"{n}_Mall_draw{k}" for k in (0, 1) for n in ("plain", "kaf")),
    ]
    assert grid.finished(fewer, "validation") == (0, 6)


HISTORY = [{"epoch": 0.0, "uniformity": -2.0}, {"epoch": 1.0, "uniformity": -1.5}]


@pytest.fixture(autouse=True)
def pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints that the fake workers write are empty: what a pretraining has learned is given here."""
    monkeypatch.setattr(grid, "read_checkpoint", lambda path: {"pretraining": {"history": HISTORY}})


def fake_launch(fail: Sequence[str] = (), when: str = "then") -> tuple[Callable[..., int], list[str]]:
    started: list[str] = []

    def launch(job: jobs.Job, steps: Sequence[Step], threads: int) -> int:
        started.append(job.name)
        if job.name in fail:
            return 1

        def run(words: Sequence[str]) -> None:
            product = Path(next(s.product for s in steps if s.command == list(words)))
            product.parent.mkdir(parents=True, exist_ok=True)
            cases = {"p00": {"1": {"dice": 0.5, "hd95": 1.0}}}
            measured = {"when": when, "training_seconds": 1.5, "cases": cases}
            product.write_text(json.dumps(measured) if "measure" in words[0] else "{}")

        worker.run_steps(steps, run)
        return 0

    return launch, started


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_failure_is_reported_and_the_others_go_on(layout: Layout, split: splits.Split, at_once: int) -> None:
    made = grid.training_jobs(layout, split)
    broken = next(job.needs for job in made if job.name == "kaf_M2_draw1")
    assert broken is not None
    launch, started = fake_launch([broken, "plain_Mall_draw0"])
    failures = jobs.run_jobs(made, at_once, 1, launch)
    assert len(failures) == 1 + 1 + 4
    assert any(
        f"heart/plain_Mall_draw0: ended with code 1; see {layout.log('plain_Mall_draw0')}" in f for f in failures
    )
    assert sum(f"not started, because {broken} failed" in f for f in failures) == 4
    assert grid.finished(layout, "validation") == (11, 16)
    launch, started = fake_launch()
    assert jobs.run_jobs(grid.training_jobs(layout, split), at_once, 1, launch) == []
    assert len(started) == 1 + 1 + 4
    assert grid.finished(layout, "validation") == (16, 16)


def test_a_run_says_what_it_was_and_what_it_cost(layout: Layout, split: splits.Split) -> None:
    launch, _ = fake_launch()
    jobs.run_jobs(grid.training_jobs(layout, split), 1, 1, launch)
    run: dict[str, Any] = read_json(layout.run_file("validation", arm(layout, "kaf_slow"), "M2_draw1"))
    assert (run["arm"], run["labelled"], run["draw"], run["fold"]) == ("kaf_slow", 2, 1, 1)
    assert run["split_sha256"] == split.sha256()
    assert run["definition"]["training"] == {"initial_lr": 0.001}
    assert run["cost"]["training_iterations"] == 6
    assert run["cost"]["pretraining_iterations"] == 20
    assert run["cost"]["pretraining_seconds"] is not None
    assert run["cases"] == {"p00": {"1": {"dice": 0.5, "hd95": 1.0}}}
    curves = [read_json(file) for file in sorted((layout.results / "pretraining").glob("*.json"))]
    assert len(curves) == 4, "one for each pretraining, whoever shares it"
    assert all(one["history"] == HISTORY for one in curves)
    assert {one["network"] for one in curves} == {"plain", "kaf"}
    slower = replace(arm(layout, "kaf_slow"), training={})
    changed = replace(layout, study=replace(layout.study, arms=(slower,)))
    with pytest.raises(KAFError, match="other options"):
        grid.finished(changed, "validation")


def test_a_result_stays_until_it_is_measured_anew(
    layout: Layout, split: splits.Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "commit", lambda: "first")
    jobs.run_jobs(grid.training_jobs(layout, split), 1, 1, fake_launch()[0])
    file = layout.run_file("validation", arm(layout, "plain"), "M2_draw0")
    first = read_json(file)
    monkeypatch.setattr(grid, "commit", lambda: "second")
    jobs.run_jobs(grid.training_jobs(layout, split), 1, 1, fake_launch()[0])
    assert read_json(file) == first
    # The same study from another scratch folder, into the same results.
    again = replace(layout, work=tmp_path / "again")
    shutil.copytree(layout.raw, again.raw)
    jobs.run_jobs(grid.training_jobs(again, split), 1, 1, fake_launch(when="now")[0])
    assert (read_json(file)["when"], read_json(file)["commit"]) == ("now", "second")


def test_the_test_set_is_opened_once_after_all_trainings(layout: Layout, split: splits.Split) -> None:
    with pytest.raises(KAFError, match="lacks 16 trainings"):
        grid.open_test(layout, split)
    assert not layout.opened_file.exists()
    launch, _ = fake_launch()
    jobs.run_jobs(grid.training_jobs(layout, split), 1, 1, launch)
    grid.open_test(layout, split)
    marker = read_json(layout.opened_file)
    assert len(marker["runs"]) == 16
    launch, started = fake_launch()
    for _ in range(2):
        grid.open_test(layout, split)
        assert jobs.run_jobs(grid.test_jobs(layout, split), 1, 1, launch) == []
    assert len(started) == 16
    assert read_json(layout.opened_file) == marker
    later = replace(arm(layout, "plain"), name="later")
    more = replace(layout, study=replace(layout.study, arms=(*layout.arms, later)))
    with pytest.raises(KAFError, match=r"was opened on .* not among them: later_M2_draw0"):
        grid.open_test(more, split)


def test_a_work_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    with jobs.processes(tmp_path), pytest.raises(KAFError, match="in use"), jobs.processes(tmp_path):
        pass
    with jobs.processes(tmp_path):
        pass


def test_sigterm_ends_the_study_and_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workers: list[subprocess.Popen[bytes]] = []

    def run(args: object) -> int:
        with jobs.processes(tmp_path) as launch:
            workers.append(subprocess.Popen(["sleep", "60"]))
            launch.running.add(workers[0])
            os.kill(os.getpid(), signal.SIGTERM)
            workers[0].wait(60)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "_main", run)
    assert command.main([]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert workers[0].wait(10) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
