from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pretrain_learning
import pytest
import torch
from synthetic import Layout, write_dataset

from pretraining.checkpoint import FINAL, LATEST
from pretraining.cli import main as kaf_pretrain

LAYOUTS = {"2d": Layout((4, 40, 32), (6.0, 1.5, 1.5), (32, 24), 3, (4, 8), ((1, 1), (2, 2)))}
Run = Callable[..., dict[str, object]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run kaf-pretrain within this process: the import of torch takes longer than the runs."""
    seen: list[list[str]] = []

    def within(arguments: Sequence[str], log: Path) -> int:
        seen.append(list(arguments))
        return kaf_pretrain(arguments)

    monkeypatch.setattr(pretrain_learning, "pretrain", within)
    return seen


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    write_dataset(tmp_path / "data", LAYOUTS, patients=5, seed=0)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "data"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    out = tmp_path / "out.json"

    def run(*further: str, arms: Sequence[str] = ("kaf", "gcl_plain")) -> dict[str, object]:
        short = ["--epochs", "2", "--iterations", "1", "--batch-size", "2", "--num-workers", "0"]
        where = ["--dataset", "998", "--work", str(tmp_path / "work"), "--configurations", "2d", "--out", str(out)]
        pretrain_learning.main([*where, *short, "--arms", *arms, *further])
        document: dict[str, object] = json.loads(out.read_text())
        return document

    return run


def test_runs_once_and_reports_the_history(
    bench: Run, calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = bench("--learning-rate", "0.0005")
    assert len(calls) == 2
    kaf, plain = document["runs"]  # type: ignore[misc]
    assert (kaf["preset"], kaf["network"], plain["preset"], plain["network"]) == ("kaf", "kaf", "gcl", "plain")
    history = torch.load(tmp_path / "work/2d/kaf" / FINAL, weights_only=True)["pretraining"]["history"]
    assert len(history) == 3
    assert set(kaf["loss"]) == {"total", "bottleneck", "keypoints", "local", "transport"}
    assert set(plain["loss"]) == {"total", "bottleneck"}
    for name, values in kaf["loss"].items():
        assert values == {"first_epoch": history[1][name], "last_epoch": history[2][name]}
    for name, values in kaf["metrics"].items():
        assert values == {"before": history[0][name], "after": history[2][name]}
    assert kaf["metrics"]["alignment"]["before"] != kaf["metrics"]["alignment"]["after"]
    assert (kaf["epochs"], kaf["iterations"], kaf["batch_size"], kaf["learning_rate"]) == (2, 1, 2, 0.0005)
    assert kaf["seconds"] > 0
    again = bench("--learning-rate", "0.0005")
    assert len(calls) == 2
    assert again["runs"] == document["runs"]
    capsys.readouterr()
    pretrain_learning.main(["--table", "--out", str(tmp_path / "out.json")])
    assert capsys.readouterr().out == pretrain_learning.table(document) + "\n"


def test_an_unfinished_run_is_continued(
    bench: Run, calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(history: Sequence[object], path: Path) -> None:
        if len(history) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretraining.recorder.plot_progress", interrupt)
        with pytest.raises(SystemExit, match="code 130"):
            bench(arms=["simclr"])
    state = tmp_path / "work/2d/simclr" / LATEST
    assert torch.load(state, weights_only=True)["step"] == 1
    document = bench(arms=["simclr"])
    assert document["runs"][0]["attempts"] == len(calls) == 2  # type: ignore[index]
    # Continued, not started again: the earlier state was not put aside.
    assert not list(state.parent.glob("*.bak-*"))
    assert document["runs"][0]["seconds"] > 0  # type: ignore[index]


def test_other_options_in_the_same_folder_are_refused(bench: Run, calls: list[list[str]]) -> None:
    bench(arms=["simclr_plain"])
    with pytest.raises(SystemExit, match="other options"):
        bench("--learning-rate", "0.1", arms=["simclr_plain"])
    assert len(calls) == 1


def test_seconds_of_a_killed_attempt_stay_unknown(bench: Run, calls: list[list[str]], tmp_path: Path) -> None:
    bench(arms=["pcl_plain"])
    record = tmp_path / "work/2d/pcl_plain/attempts.json"
    attempts = json.loads(record.read_text())
    record.write_text(json.dumps([{**attempts[0], "seconds": None}, *attempts]))
    document = bench(arms=["pcl_plain"])
    assert document["runs"][0]["seconds"] is None  # type: ignore[index]


def test_results_of_finished_runs_alone(bench: Run, calls: list[list[str]]) -> None:
    bench(arms=["pcl_plain"])
    document = bench("--finished", arms=["pcl_plain", "simclr_plain"])
    assert [run["arm"] for run in document["runs"]] == ["pcl_plain"]  # type: ignore[attr-defined]
    assert len(calls) == 1


def test_arms_of_the_local_loss_differ_in_their_negatives_alone() -> None:
    args = pretrain_learning.parser().parse_args(["--dataset", "1", "--work", "w"])
    ours, paper = (pretrain_learning.command(args, "2d", arm, Path("f"), []) for arm in ("local", "local_unmatched"))
    assert paper == [*ours, "--ambiguous", "unmatched"]
    assert ours[ours.index("--weight-bottleneck") + 1] == "0"


def test_schedule_depends_on_the_configuration() -> None:
    args = pretrain_learning.parser().parse_args(["--dataset", "1", "--work", "w", "--epochs", "7"])
    flat, deep = (pretrain_learning.command(args, c, "pcl_plain", Path("f"), []) for c in ("2d", "3d_fullres"))
    for command, iterations in ((flat, 100), (deep, 50)):
        options = dict(pairwise(command))
        assert options["--epochs"] == "7"
        assert options["--iterations"] == str(iterations)
        assert (options["--preset"], options["--network"]) == ("pcl", "plain")


def test_table_shows_changes_and_gaps() -> None:
    pair = {"before": 0.25, "after": 0.5}
    run = {
        "configuration": "2d",
        "arm": "kaf",
        "preset": "kaf",
        "network": "kaf",
        "loss": {
            "total": {"first_epoch": 9.0, "last_epoch": 8.5},
            "bottleneck": {"first_epoch": 3.0, "last_epoch": 2.0},
            "local": {"first_epoch": 6.0, "last_epoch": 6.5},
        },
        "metrics": {
            "recall_at_1": pair,
            "recall_at_5": {"before": None, "after": 0.5},
            "alignment": pair,
            "uniformity": pair,
            "effective_rank": pair,
        },
    }
    row = pretrain_learning.table({"runs": [run]}).splitlines()[2]
    losses = "| bottleneck 3.000 to 2.000<br>local 6.000 to 6.500 |"
    assert f"{losses} 25.0 to 50.0 | n/a to 50.0 | 0.250 to 0.500 |" in row
