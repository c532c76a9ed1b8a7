"""Saving, continuing and setting aside; whole runs are in test_run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from pretraining.checkpoint import (
    FINAL,
    FORMAT_VERSION,
    LATEST,
    load_latest,
    put_back,
    run_identity,
    save_latest,
    set_aside,
    tidy,
)
from pretraining.config import PretrainConfig
from pretraining.run import build_state
from pretraining.task import resolve_task

CPU = torch.device("cpu")
CONFIG = PretrainConfig.from_preset("simclr", {"projection_dim": 4})


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint in the middle of an epoch, and the identity of its run."""
    task = resolve_task("123", "2d", "nnUNetPlans")
    state = build_state(task, CONFIG, CPU)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step, state.sums, state.history = 7, {"total": 2.5}, [{"epoch": 0.0, "alignment": 0.5}]
    identity = run_identity(task, 0, ("a", "b"), 2, "abc")
    torch.manual_seed(11)
    save_latest(tmp_path / LATEST, state, CONFIG, identity)
    return tmp_path / LATEST, identity


def fresh() -> Any:
    return build_state(
        resolve_task("123", "2d", "nnUNetPlans"), PretrainConfig.from_dict({**CONFIG.to_dict(), "seed": 9}), CPU
    )


def test_everything_is_restored(saved: tuple[Path, dict[str, Any]]) -> None:
    path, identity = saved
    expected = torch.load(path, weights_only=True)
    state = fresh()
    known = {key: value for key, value in identity.items() if key != "init"}
    # what is not known any more is taken from the file
    assert load_latest(path, state, CONFIG, known) == identity
    assert (state.step, state.sums, state.history) == (7, {"total": 2.5}, [{"epoch": 0.0, "alignment": 0.5}])
    assert all(torch.equal(v, expected["model"][k]) for k, v in state.model.state_dict().items())
    moments = state.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i]["exp_avg"], v["exp_avg"]) for i, v in expected["optimizer"]["state"].items())
    assert len(moments) > 10
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fold": "1"}, "fold: 0 != 1"),
        ({"init": "other"}, "init: abc != other"),
        ({"cases": ["a", "b", "c", "d", "e"]}, r"cases: \['a', 'b'\] != 5 cases \['a', 'b'\]\.\.\."),
        ({"batch_size": 4, "plans": "Mine"}, "plans: nnUNetPlans != Mine; batch_size: 2 != 4"),
    ],
)
def test_a_run_about_something_else_is_not_continued(
    saved: tuple[Path, dict[str, Any]], changed: dict[str, Any], message: str
) -> None:
    path, identity = saved
    state = fresh()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(KAFError, match=message):
        load_latest(path, state, CONFIG, {**identity, **changed})
    assert state.step == 0
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())


def test_unreadable_checkpoints(saved: tuple[Path, dict[str, Any]]) -> None:
    path, identity = saved
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(KAFError, match=rf"{LATEST} \(\d+ bytes\) cannot be read .* truncated"):
            load_latest(path, fresh(), CONFIG, identity)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(KAFError, match="not a checkpoint of an unfinished"):
        load_latest(path, fresh(), CONFIG, identity)
    path.write_bytes(whole)
    other = torch.load(path, weights_only=True)
    torch.save({**other, "format_version": FORMAT_VERSION + 1}, path)
    with pytest.raises(KAFError, match="another version"):
        load_latest(path, fresh(), CONFIG, identity)
    torch.save({**other, "network": {"stem": torch.zeros(1)}}, path)
    with pytest.raises(KAFError, match="another network"):
        load_latest(path, fresh(), CONFIG, identity)


def test_an_earlier_run_is_set_aside_completely_and_never_overwritten(tmp_path: Path) -> None:
    names = (LATEST, FINAL, "progress.png", "pretraining.log", "nonfinite_batch.json")
    for run in range(3):
        for name in names:
            (tmp_path / name).write_text(f"run {run}")
        for name in ("tensorboard", "wandb"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "events").write_text(f"run {run}")
        (tmp_path / "notes.txt").write_text("of the user")
        moved = set_aside(tmp_path)
        assert len(moved) == 7
        assert all(path.parent == tmp_path for path in moved.values())
    for name in names:
        kept = sorted(path.read_text() for path in tmp_path.glob(f"{name}.bak-*"))
        assert kept == ["run 0", "run 1", "run 2"]
        assert not (tmp_path / name).exists()
    for name in ("tensorboard", "wandb"):
        assert sorted(p.read_text() for p in tmp_path.glob(f"{name}.bak-*/events")) == ["run 0", "run 1", "run 2"]
    assert (tmp_path / "notes.txt").read_text() == "of the user"
    assert set_aside(tmp_path) == {}


def test_tidy_removes_what_a_killed_run_left_and_nothing_of_others(tmp_path: Path) -> None:
    others = (LATEST, ".draft.tmp", ".report.docx.tmp", "a.1-2.tmp", f".{LATEST}.1.tmp")
    for name in (*others, f".{LATEST}.1-2.tmp"):
        (tmp_path / name).write_text("half")
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_what_was_set_aside_is_put_back(tmp_path: Path) -> None:
    for name in (LATEST, FINAL):
        (tmp_path / name).write_text(name)
    (tmp_path / "tensorboard").mkdir()
    moved = set_aside(tmp_path)
    (tmp_path / FINAL).write_text("new")
    put_back(moved)
    assert (tmp_path / LATEST).read_text() == LATEST
    assert (tmp_path / FINAL).read_text() == "new", "nothing new is lost"
    assert (tmp_path / "tensorboard").is_dir()


def test_a_run_goes_on_where_loss_scaling_is_needed(saved: tuple[Path, dict[str, Any]]) -> None:
    """Saved in float32 or bfloat16, without a state of loss scaling; continued in float16."""
    path, identity = saved
    state = fresh()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    load_latest(path, state, CONFIG, identity)
    assert state.step == 7
    assert state.scaler.get_scale() > 1
