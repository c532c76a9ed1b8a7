"""Whole runs through the command line, on a tiny dataset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.weights import read_checkpoint
from pretraining import checkpoint as checkpoint_module
from pretraining import cli, run
from pretraining.checkpoint import LATEST, load_latest
from pretraining.config import PretrainConfig
from pretraining.loop import METRICS
from pretraining.task import resolve_task

OPENED: list[str] = []
LISTENING = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if LISTENING and event == "open" and arguments and isinstance(arguments[0], (str, bytes, Path)):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_listen)


def folder_of(tiny: Any, configuration: str = "2d") -> Path:
    path: Path = tiny.results / "Dataset123_Tiny" / f"KAFPretraining__nnUNetPlans__{configuration}" / "fold_0"
    return path


def command(fast: list[str], *more: str, configuration: str = "2d") -> list[str]:
    return ["--dataset", "123", "-c", configuration, *fast, *more]


def history(path: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = torch.load(path, weights_only=True)["history"]
    return found


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_run_from_the_command_line(
    tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str], configuration: str
) -> None:
    global LISTENING
    tiny.add_cases(6)
    OPENED.clear()
    LISTENING = True
    try:
        assert cli.main(command(fast, configuration=configuration)) == 0
    finally:
        LISTENING = False
    assert [name for name in OPENED if name.endswith((".pkl", "_seg.b2nd")) or "gt_segmentations" in name] == []
    out = capsys.readouterr()
    folder = folder_of(tiny, configuration)
    assert str(folder / "checkpoint_final.pth") in out.out
    assert f"nnUNetv2_train 123 {configuration} 0 -tr nnUNetTrainerKAF" in out.out
    assert (folder / "progress.png").read_bytes()[:4] == b"\x89PNG"
    assert "epoch 2/2" in (folder / "pretraining.log").read_text()
    final = read_checkpoint(folder / "checkpoint_final.pth")
    task = resolve_task("123", configuration, "nnUNetPlans")
    network = task.build_network()
    network.load_state_dict(final["network_weights"])
    assert final["pretraining"]["epochs_done"] == 2
    assert set(final["pretraining"]["history"][0]) == {*METRICS, "learning_rate"}
    trained = torch.load(folder / LATEST, weights_only=True)["network"]
    assert all(torch.equal(trained[k], v) for k, v in final["network_weights"].items())


def test_same_seed_same_losses_and_threads_do_not_matter(tiny: Any, fast: list[str]) -> None:
    tiny.add_cases(6)
    folder = folder_of(tiny)
    histories = []
    for more in (["--num-workers", "0"], ["--num-workers", "3"], ["--seed", "1"]):
        assert cli.main(command(fast, *more)) == 0
        histories.append(history(folder / LATEST))
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]
    # runs without --continue keep the earlier ones
    assert len(list(folder.glob("checkpoint_final.pth.bak-*"))) == 2


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_full_disk_keeps_the_last_checkpoint_and_resume_equals_an_uninterrupted_run(
    tiny: Any,
    fast: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    configuration: str,
) -> None:
    tiny.add_cases(6)
    folder = folder_of(tiny, configuration)
    assert cli.main(command(fast, configuration=configuration)) == 0
    expected = torch.load(folder / LATEST, weights_only=True)
    (folder / LATEST).unlink()
    original, saves = torch.save, []

    def full_disk(obj: Any, handle: Any, *args: Any, **kwargs: Any) -> None:
        saves.append(obj)
        if len(saves) > 1:
            handle.write(b"half a file")
            raise OSError(28, "No space left on device")
        original(obj, handle, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert cli.main(command(fast, configuration=configuration)) == 2
    assert "No space left" in capsys.readouterr().err
    assert torch.load(folder / LATEST, weights_only=True)["epoch"] == 1
    assert cli.main(command(fast, "--continue", configuration=configuration)) == 0
    found = torch.load(folder / LATEST, weights_only=True)
    assert found["history"] == expected["history"]
    assert all(torch.equal(v, expected["model"][k]) for k, v in found["model"].items())


def test_continue_without_a_checkpoint_starts_and_says_so(
    tiny: Any, fast: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny.add_cases(6)
    assert cli.main(command(fast, "--continue")) == 0
    assert "starting a new run" in caplog.text
    before = history(folder_of(tiny) / LATEST)
    # a finished run is not trained further
    assert cli.main(command(fast, "--continue")) == 0
    assert history(folder_of(tiny) / LATEST) == before


def test_continue_with_other_options_names_them(tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add_cases(6)
    assert cli.main(command(fast)) == 0
    assert cli.main(command(fast, "--continue", "--epochs", "5", "--temperature", "0.2")) == 2
    message = capsys.readouterr().err
    assert "epochs: 2 != 5" in message
    assert "temperature: 0.1 != 0.2" in message


def test_unreadable_checkpoints(tiny: Any, fast: list[str], tmp_path: Path) -> None:
    tiny.add_cases(6)
    task = resolve_task("123", "2d", "nnUNetPlans")
    config = PretrainConfig()
    state = run.build_state(task, config, torch.device("cpu"))
    truncated = tmp_path / LATEST
    truncated.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(KAFError, match="truncated"):
        load_latest(truncated, state, config, {})
    torch.save({"weights": torch.zeros(1)}, truncated)
    with pytest.raises(KAFError, match="not a checkpoint of an unfinished"):
        load_latest(truncated, state, config, {})
    identity = checkpoint_module.run_identity(task, 0, ("a",), 2)
    checkpoint_module.save_latest(truncated, state, config, identity)
    other = checkpoint_module.run_identity(task, 1, ("a",), 2)
    with pytest.raises(KAFError, match="fold: 0 != 1"):
        load_latest(truncated, state, config, other)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_degenerate_volumes_train(
    tiny: Any, fast: list[str], caplog: pytest.LogCaptureFixture, configuration: str
) -> None:
    generator = np.random.default_rng(0)
    tiny.add("single_slice", generator.standard_normal((1, 1, 28, 20)).astype(np.float32))
    tiny.add("constant", np.zeros((1, 9, 28, 20), np.float32))
    tiny.add("tiny", generator.standard_normal((1, 2, 3, 2)).astype(np.float32))
    assert cli.main(command(fast, "--fold", "all", configuration=configuration)) == 0
    assert caplog.text.count("Case constant is constant") == 1


def test_nan_image_stops_with_its_name(tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add_cases(2)
    tiny.add("broken", np.full((1, 9, 28, 20), np.nan, np.float32))
    assert cli.main(command(fast, "--fold", "all")) == 2
    assert "broken.b2nd contains NaN" in capsys.readouterr().err


def test_wrong_number_of_channels(tiny: Any, fast: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add("two_channels", np.zeros((2, 9, 28, 20), np.float32))
    assert cli.main(command(fast, "--fold", "all")) == 2
    assert "has 2 channel(s)" in capsys.readouterr().err


def test_default_batch_size() -> None:
    assert [run.default_batch_size(n) for n in (1, 2, 12, 300)] == [2, 2, 12, 32]
