from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nnunetv2_kaf.errors import KAFError
from pretraining.config import COMPONENTS
from pretraining.monitoring import tracking
from pretraining.monitoring.tracking import open_trackers, tagged

TAGS = {
    "loss/total": 3.0,
    "loss/bottleneck": 1.0,
    "loss/keypoints": 1.5,
    "loss/local": 0.5,
    "loss/transport": 0.25,
    "keypoints/matched": 0.4,
    "keypoints/recall_at_1": 0.1,
    "keypoints/recall_at_5": 0.3,
    "global/alignment": 1.2,
    "global/uniformity": -2.5,
    "global/effective_rank": 14.0,
    "optimiser/learning_rate": 0.001,
}
RECORD = {"epoch": 1.0, **{tag.split("/")[1]: value for tag, value in TAGS.items()}}


@pytest.fixture(autouse=True)
def _no_wandb_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (tracking.WANDB_ENABLED, tracking.WANDB_PROJECT, tracking.WANDB_MODE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are read in the order of the second in their names: sessions must not begin in the same one."""
    ticks = itertools.count(1_700_000_000)
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer.time", SimpleNamespace(time=lambda: float(next(ticks)))
    )


def session(folder: Path, epochs: Mapping[int, float], resume: bool) -> None:
    """Log a total loss for some epochs."""
    tracker = open_trackers(folder, {}, resume)
    for epoch, total in epochs.items():
        tracker.log({"epoch": float(epoch), "total": total}, epoch)
    tracker.close()


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value as TensorBoard shows them; fails if a step appears twice."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len(dict(points)) == len(points), f"{tag} has several values at a step: {points}"
        shown[tag] = dict(points)
    return shown


def test_tensorboard_shows_every_number_in_its_group(tmp_path: Path) -> None:
    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log({"epoch": 0.0, "alignment": 2.0}, 0)
    tracker.log(RECORD, 1)
    tracker.close()
    shown = scalars(tmp_path)
    assert shown.pop("global/alignment") == pytest.approx({0: 2.0, 1: 1.2})
    assert {tag: values[1] for tag, values in shown.items()} == pytest.approx(
        {tag: value for tag, value in TAGS.items() if tag != "global/alignment"}
    )


def test_every_component_is_a_loss() -> None:
    assert set(tagged(dict.fromkeys(COMPONENTS, 1.0))) == {f"loss/{name}" for name in COMPONENTS}


def test_tags_leave_out_the_epoch_and_what_is_not_finite() -> None:
    assert tagged({"epoch": 3.0, "total": math.nan, "local": math.inf, "matched": 0.0}) == {"keypoints/matched": 0.0}
    assert tagged({"seconds": 12.5}) == {"other/seconds": 12.5}


def test_an_epoch_is_on_disk_before_the_next(tmp_path: Path) -> None:
    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log(RECORD, 1)
    assert scalars(tmp_path)["loss/total"] == {1: 3.0}
    tracker.close()


@pytest.mark.usefixtures("_clock")
def test_epochs_done_again_do_not_appear_twice(tmp_path: Path) -> None:
    session(tmp_path, {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0}, resume=False)
    session(tmp_path, {2: 7.5, 3: 6.5}, resume=True)
    assert scalars(tmp_path)["loss/total"] == {0: 9.0, 1: 8.0, 2: 7.5, 3: 6.5}
    session(tmp_path, {3: 5.5, 4: 4.5}, resume=True)
    assert scalars(tmp_path)["loss/total"] == {0: 9.0, 1: 8.0, 2: 7.5, 3: 5.5, 4: 4.5}


@pytest.mark.usefixtures("_clock")
def test_a_later_tag_of_a_killed_session_disappears_when_its_epoch_is_done_again(tmp_path: Path) -> None:
    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log({"total": 2.0}, 1)
    tracker.log({"total": 1.0, "local": 1.0}, 2)  # no close: killed
    session(tmp_path, {2: 1.5}, resume=True)
    assert scalars(tmp_path) == {"loss/total": {1: 2.0, 2: 1.5}, "loss/local": {}}
    tracker.close()


@pytest.mark.usefixtures("_clock")
def test_a_new_run_hides_the_events_of_an_earlier_one(tmp_path: Path) -> None:
    session(tmp_path, {0: 9.0, 1: 8.0, 2: 7.0}, resume=False)
    session(tmp_path, {1: 5.0}, resume=False)
    assert scalars(tmp_path)["loss/total"] == {1: 5.0}


def test_writes_nothing_before_the_first_epoch(tmp_path: Path) -> None:
    open_trackers(tmp_path, {}, resume=True).close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").touch()
    session(tmp_path, {1: 2.0, 2: 1.0, 3: 0.5}, resume=False)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "TensorBoard failed" in caplog.text
    assert "No epoch from 1 on" in caplog.text


def test_a_full_disk_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log({"total": 2.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "flush", full)
        tracker.log({"total": 1.0}, 2)
        tracker.log({"total": 0.5}, 3)
    tracker.log({"total": 0.25}, 4)
    tracker.close()
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert scalars(tmp_path)["loss/total"][1] == 2.0
    assert 4 not in scalars(tmp_path)["loss/total"]


def test_closing_fails_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log({"total": 2.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "close", full)
        tracker.close()
        tracker.close()
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard could not be closed: OSError: [Errno 28] No space left on device"
    ]


class FakeRun:
    """What is used of a run of wandb."""

    def __init__(self, arguments: dict[str, Any], step: int) -> None:
        self.arguments = arguments
        self.step = step
        self.options: dict[str, Any] = {}
        self.config = SimpleNamespace(update=self._update)
        self.logged: list[tuple[int, dict[str, float], bool]] = []
        self.finished = 0

    def _update(self, options: dict[str, Any], allow_val_change: bool = False) -> None:
        assert allow_val_change or not self.arguments["id"], "a changed option would be refused"
        self.options.update(options)

    def log(self, data: dict[str, float], step: int, commit: bool = False) -> None:
        self.logged.append((step, data, commit))

    def finish(self) -> None:
        self.finished += 1


class FakeWandb(ModuleType):
    """Stands for the package."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.step = 0

    def init(self, **arguments: Any) -> FakeRun:
        self.runs.append(FakeRun(arguments, self.step))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """An installed and enabled wandb."""
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv(tracking.WANDB_ENABLED, "1")
    return module


def earlier_wandb_run(folder: Path, name: str = "offline-run-20250101_000000-a1b2") -> None:
    run = folder / "wandb" / name
    run.mkdir(parents=True)
    (run / "run-a1b2.wandb").touch()
    (run / "logs").mkdir()
    (folder / "wandb" / "latest-run").symlink_to(name)


def test_wandb_gets_the_options_and_the_numbers(tmp_path: Path, wandb: FakeWandb) -> None:
    tracker = open_trackers(tmp_path, {"epochs": 50, "preset": "kaf"}, resume=False)
    tracker.log(RECORD, 1)
    tracker.log({"epoch": 2.0, "total": 2.0}, 2)
    tracker.close()
    (run,) = wandb.runs
    assert run.arguments == {
        "project": "nnunet",
        "dir": str(tmp_path),
        "id": None,
        "mode": "online",
        "resume": "never",
    }
    assert run.options == {"epochs": 50, "preset": "kaf"}
    assert run.logged == [(1, TAGS, True), (2, {"loss/total": 2.0}, True)]
    assert run.finished == 1
    assert scalars(tmp_path)["loss/total"] == {1: 3.0, 2: 2.0}, "TensorBoard is written as well"


def test_wandb_takes_project_and_mode_from_the_environment(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_wandb_project", "hearts")
    monkeypatch.setenv("nnUNet_wandb_mode", "offline")
    open_trackers(tmp_path, {}, resume=False)
    assert (wandb.runs[0].arguments["project"], wandb.runs[0].arguments["mode"]) == ("hearts", "offline")


def test_wandb_goes_on_with_the_latest_run_and_skips_what_it_has(tmp_path: Path, wandb: FakeWandb) -> None:
    earlier_wandb_run(tmp_path)
    wandb.step = 4
    tracker = open_trackers(tmp_path, {"save_every": 2}, resume=True)
    for epoch in (3, 4, 5):
        tracker.log({"total": float(epoch)}, epoch)
    run = wandb.runs[0]
    assert (run.arguments["id"], run.arguments["resume"]) == ("a1b2", "allow")
    assert [step for step, _, _ in run.logged] == [4, 5]


def test_a_new_wandb_run_takes_nothing_from_an_earlier_one(tmp_path: Path, wandb: FakeWandb) -> None:
    earlier_wandb_run(tmp_path)
    wandb.step = 4
    tracker = open_trackers(tmp_path, {}, resume=False)
    tracker.log({"total": 1.0}, 1)
    assert (wandb.runs[0].arguments["id"], wandb.runs[0].arguments["resume"]) == (None, "never")
    assert [step for step, _, _ in wandb.runs[0].logged] == [1]
    assert (tmp_path / "wandb" / "latest-run" / "run-a1b2.wandb").is_file()


@pytest.mark.parametrize("damage", ["no folder", "empty", "broken link"])
def test_wandb_starts_anew_where_there_is_nothing_to_go_on_with(tmp_path: Path, wandb: FakeWandb, damage: str) -> None:
    if damage != "no folder":
        earlier_wandb_run(tmp_path)
        (tmp_path / "wandb" / "latest-run" / "run-a1b2.wandb").unlink()
    if damage == "broken link":
        (tmp_path / "wandb" / "latest-run").unlink()
        (tmp_path / "wandb" / "latest-run").symlink_to("gone")
    open_trackers(tmp_path, {}, resume=True)
    assert (wandb.runs[0].arguments["id"], wandb.runs[0].arguments["resume"]) == (None, "allow")


def test_a_failing_wandb_is_one_warning_and_leaves_tensorboard_alone(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError

    tracker = open_trackers(tmp_path, {}, resume=False)
    monkeypatch.setattr(wandb.runs[0], "log", unreachable)
    tracker.log({"total": 2.0}, 1)
    tracker.log({"total": 1.0}, 2)
    tracker.close()
    assert [r.getMessage() for r in caplog.records] == [
        "Weights & Biases failed: ConnectionError. No epoch from 1 on is logged there until the run is continued."
    ]
    assert wandb.runs[0].finished == 1
    assert scalars(tmp_path)["loss/total"] == {1: 2.0, 2: 1.0}


def test_wandb_that_does_not_start_ends_the_run_before_training(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(KAFError, match=r"nnUNet_wandb_enabled.*api_key not configured.*nnUNet_wandb_mode=offline"):
        open_trackers(tmp_path, {}, resume=False)


@pytest.mark.parametrize("found", ["nothing", "an output folder"])
def test_wandb_that_is_not_installed_names_the_variable_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setitem(sys.modules, "wandb", None if found == "nothing" else ModuleType("wandb"))  # type: ignore
    with pytest.raises(KAFError, match=r"nnUNet_wandb_enabled .*pip install wandb"):
        open_trackers(tmp_path, {}, resume=False)


@pytest.mark.parametrize("value", [None, "0", "False", "false", "1", "True", "true"])
def test_enabled_is_read_as_nnunet_reads_it(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("nnUNet_wandb_enabled")
    else:
        monkeypatch.setenv("nnUNet_wandb_enabled", value)
    open_trackers(tmp_path, {}, resume=False)
    assert len(wandb.runs) == (value in ("1", "True", "true"))


@pytest.mark.parametrize("value", ["yes", "", "TRUE"])
def test_another_value_of_enabled_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("nnUNet_wandb_enabled", value)
    with pytest.raises(KAFError, match=f"nnUNet_wandb_enabled is '{value}'; expected 0"):
        open_trackers(tmp_path, {}, resume=False)


def test_leaves_the_random_states_alone(tmp_path: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    session(tmp_path, {0: 2.0, 1: 1.0}, resume=False)
    after = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)
    assert (after[1].tolist(), after[2]) == (numpy_before[1].tolist(), numpy_before[2])


def test_importing_the_module_does_not_import_tensorboard() -> None:
    code = (
        "import sys, pretraining.monitoring.tracking; sys.exit('tensorboard' in sys.modules or 'wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
