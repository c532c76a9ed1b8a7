"""Whole runs through the command line, on a tiny dataset with small keypoint layers."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans
from nnunetv2_kaf.weights import read_checkpoint
from pretraining import cli, recorder, run
from pretraining import prepare as prepare_module
from pretraining.checkpoint import LATEST
from pretraining.config import PRESETS, PretrainConfig
from pretraining.loop import Trainer
from pretraining.monitoring.monitor import MONITORED, Monitor
from pretraining.objectives.losses import PretrainingLoss
from pretraining.prepare import DataOptions, prepare
from pretraining.task import resolve_task

Command = Callable[..., list[str]]
CPU = torch.device("cpu")
FINAL = "checkpoint_final.pth"
SMALL = KAFConfig(num_keypoints=32, token_dim=16, num_blocks=1)
QUICK = ("--sinkhorn-iterations", "5", "--transport-layers", "1", "--descriptor-dim", "16")


@pytest.fixture
def command(tiny: Any, fast: list[str]) -> Command:
    """Build a command line; the plans have small keypoint layers."""
    plans = kaf_plans({**tiny.plans, "plans_name": "SmallPlans"}, SMALL)
    (tiny.folder / "SmallPlans.json").write_text(json.dumps(plans))
    tiny.add_cases(6)

    def build(*more: str, configuration: str = "2d", plans: str = "SmallPlans") -> list[str]:
        return ["--dataset", "123", "-c", configuration, "-p", plans, *fast, *QUICK, *more]

    return build


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than an epoch here."""
    monkeypatch.setattr(recorder, "plot_progress", lambda *_: None)


def folder_of(tiny: Any, configuration: str = "2d", plans: str = "SmallPlans", kind: str = "KAF") -> Path:
    path: Path = tiny.results / "Dataset123_Tiny" / f"{kind}Pretraining__{plans}__{configuration}" / "fold_0"
    return path


def latest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / LATEST, weights_only=True)
    return found


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two runs have the same history (a value may be NaN in both), weights and optimiser."""
    same = repr(found["history"]) == repr(expected["history"]) and found["step"] == expected["step"]
    same &= all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
    states = [checkpoint["optimizer"]["state"] for checkpoint in (found, expected)]
    return same and all(torch.equal(states[0][i][k], v) for i in states[1] for k, v in states[1][i].items())


RUNS = [(preset, "kaf") for preset in PRESETS] + [(preset, "plain") for preset in ("simclr", "gcl", "pcl")]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(("preset", "network"), RUNS)
def test_every_preset_from_the_command_line(
    tiny: Any, command: Command, capsys: pytest.CaptureFixture[str], configuration: str, preset: str, network: str
) -> None:
    plain = network == "plain"
    plans = "nnUNetPlans" if plain else "SmallPlans"
    options = ("--preset", preset, *(("--network", "plain") if plain else ()))
    assert cli.main(command(*options, configuration=configuration, plans=plans)) == 0
    captured = capsys.readouterr()
    folder = folder_of(tiny, configuration, plans, "Plain" if plain else "KAF")
    path = folder / FINAL
    start = f"nnUNetv2_train 123 {configuration} 0"
    following = f"{start} -pretrained_weights {path}" if plain else f"{start} -tr nnUNetTrainerKAF -p SmallPlans"
    assert captured.out.splitlines() == [
        f"Checkpoint: {path}",
        f"Curves:     {folder / 'progress.png'}",
        f"Next:       {following}",
    ]
    assert "Traceback" not in captured.err
    visible = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert visible == {FINAL, LATEST, "progress.png", "pretraining.log", "tensorboard"}

    final = read_checkpoint(path)
    summary = final["pretraining"]
    config = PretrainConfig.from_preset(preset, {"network": network})
    history = summary["history"]
    assert [record["epoch"] for record in history] == [0.0, 1.0, 2.0]
    assert set(history[0]) == {"epoch", *MONITORED}
    for record in history[1:]:
        assert set(record) == {"epoch", "total", *config.components, "matched", "learning_rate", *MONITORED}
        expected = sum(weight * record[name] for name, weight in config.components.items())
        assert record["total"] == pytest.approx(expected, rel=1e-5)
        assert 0 < record["matched"] <= 1
    assert history[0]["alignment"] != history[1]["alignment"]
    assert summary["epochs_done"] == 2
    assert summary["config"]["positives"] == config.positives
    assert len(summary["cases"]) == 4  # of 6: one validates, one of the other five is held out

    task = resolve_task("123", configuration, plans, network)
    built = task.build_network()
    assert type(built).__name__ == ("PlainConvUNet" if plain else "KAFUNet")
    built.load_state_dict(final["network_weights"])
    if plain:
        fresh = task.build_network()
        load_pretrained_weights(fresh, path)  # type: ignore[no-untyped-call]
        loaded = fresh.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in final["network_weights"].items() if k.startswith("encoder."))
    trained = latest(folder)["network"]
    assert all(torch.equal(trained[k], v) for k, v in final["network_weights"].items())
    begun = run.build_state(task, config, CPU).network.state_dict()
    moved = [k for k, v in trained.items() if not torch.equal(v, begun[k])]
    assert moved
    assert all(k.startswith(("encoder.", "decoder.encoder.")) for k in moved)  # the decoder holds the same encoder

    assert (folder / "progress.png").read_bytes()[:4] == b"\x89PNG"
    log = (folder / "pretraining.log").read_text()
    assert f"{network} encoder: 4 training images, 3 pairs per batch" in log
    assert "epoch 2/2: " in log
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("global/alignment")] == [0, 1, 2]
    total = [event.value for event in events.Scalars("loss/total")]
    assert total == pytest.approx([record["total"] for record in history[1:]])


@pytest.mark.usefixtures("no_plot")
def test_the_first_record_is_the_state_before_training(tiny: Any, command: Command) -> None:
    assert cli.main(command()) == 0
    task = resolve_task("123", "2d", "SmallPlans")
    saved = latest(folder_of(tiny))
    config = PretrainConfig.from_dict(saved["config"])
    data = prepare(task, config, DataOptions(), CPU, 3)
    monitor = Monitor(data.held_out, CPU)
    fresh = run.build_state(task, config, CPU)
    assert saved["history"][0] == {"epoch": 0.0, **monitor.evaluate(fresh.model, None)}
    fresh.model.load_state_dict(saved["model"])
    after = monitor.evaluate(fresh.model, None)
    assert {name: saved["history"][-1][name] for name in MONITORED} == after


@pytest.mark.usefixtures("no_plot")
def test_same_seed_same_losses_and_threads_do_not_matter(tiny: Any, command: Command) -> None:
    folder = folder_of(tiny)
    found = []
    for more in (["--num-workers", "0"], ["--num-workers", "3"], ["--seed", "1"]):
        assert cli.main(command(*more)) == 0
        found.append(latest(folder))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])
    # runs without --continue keep the earlier ones, TensorBoard's folder included
    for name in (FINAL, LATEST, "pretraining.log", "tensorboard"):
        assert len(list(folder.glob(f"{name}.bak-*"))) == 2, name
    assert len(list((folder / "tensorboard").iterdir())) == 1


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_full_disk_keeps_the_last_checkpoint_and_resume_equals_an_uninterrupted_run(
    tiny: Any,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    configuration: str,
) -> None:
    folder = folder_of(tiny, configuration)
    assert cli.main(command(configuration=configuration)) == 0
    expected = latest(folder)
    original, saves = torch.save, []

    def full_disk(obj: Any, handle: Any, *args: Any, **kwargs: Any) -> None:
        saves.append(obj)
        if len(saves) > 1:
            handle.write(b"half a file")
            raise OSError(28, "No space left on device")
        original(obj, handle, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert cli.main(command(configuration=configuration)) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(folder.glob(".*.tmp")) == []
    assert latest(folder)["step"] == 2
    assert cli.main(command("--continue", configuration=configuration)) == 0
    assert equal(latest(folder), expected)


def signal_after(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Send this process a signal during a step."""
    original = Trainer.step

    def stepped(self: Trainer, batches: Any) -> dict[str, float]:
        values = original(self, batches)
        if self.state.step == step:
            signal.raise_signal(number)
        return values

    monkeypatch.setattr(Trainer, "step", stepped)


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 4), ("SIGUSR1", 2), ("SIGTERM", 3), ("SIGUSR1", 6)])
def test_a_signal_saves_at_once_and_continuing_equals_an_uninterrupted_run(
    tiny: Any,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    step: int,
) -> None:
    folder = folder_of(tiny)
    number = getattr(signal, name)
    before = signal.getsignal(number)
    options = command("--iterations", "3", "--save-every", "2", "--accumulate", "2")
    assert cli.main(options) == 0
    expected = latest(folder)
    with monkeypatch.context() as patch:
        signal_after(patch, number, step)
        assert cli.main(options) == 0
    captured = capsys.readouterr()
    assert signal.getsignal(number) == before
    assert latest(folder)["step"] == step
    if step < 6:
        message = f"{name}: stopped after step {step} of 6; everything is saved in {folder / LATEST}."
        assert f"{message} The same command with --continue goes on." in captured.err
        assert not (folder / FINAL).exists()
    else:  # after the last step the run is finished as if nothing had come
        assert "Next:" in captured.out.split("Checkpoint:")[-1]
    assert len(latest(folder)["history"]) == 1 + step // 3
    assert cli.main([*options, "--continue"]) == 0
    assert equal(latest(folder), expected)
    assert read_checkpoint(folder / FINAL)["pretraining"]["epochs_done"] == 2
    steps = [e.step for e in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("global/alignment")]
    assert steps == [0, 1, 2]


@pytest.mark.usefixtures("no_plot")
def test_a_signal_before_training_stops_at_once(
    tiny: Any, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while a file is read, where every other exception means that the file is bad."""
    original = blosc2.open

    def opened(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    assert cli.main(command("--epochs", "1", "--iterations", "1", "--fold", "all")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(blosc2, "open", opened)
        patch.setattr(prepare_module, "ThreadPoolExecutor", InThisThread)
        for path in tiny.images["2d"].glob("case_00?.b2nd"):
            path.touch()  # checked anew
        assert cli.main(command("--epochs", "1", "--iterations", "1")) == 0
    captured = capsys.readouterr()
    assert "SIGTERM: stopped before the training began; nothing was lost." in captured.err
    assert "bad image" not in captured.err
    assert not (folder_of(tiny) / LATEST).exists()


class InThisThread:
    """A pool whose only worker is the caller."""

    def __init__(self, workers: int) -> None:
        assert workers > 0

    def __enter__(self) -> InThisThread:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        return [work(item) for item in items]


@pytest.mark.usefixtures("no_plot")
def test_continue_without_a_checkpoint_starts_and_says_so(
    tiny: Any, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tiny)
    folder.mkdir(parents=True)
    (folder / f".{LATEST}.123-456.tmp").write_bytes(b"half a file")
    assert cli.main(command("--continue")) == 0
    assert "starting a new run" in caplog.text
    before = latest(folder)
    (folder / f".{FINAL}.123-456.tmp").write_bytes(b"half a file")
    # a finished run is not trained further
    assert cli.main(command("--continue")) == 0
    assert equal(latest(folder), before)
    assert list(folder.glob(".*.tmp")) == []
    assert list(folder.glob("*.bak-*")) == []


@pytest.mark.usefixtures("no_plot")
def test_a_command_with_a_mistake_leaves_an_earlier_result_where_it_is(
    tiny: Any, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--preset", "simclr", "--iterations", "1", "--epochs", "1")
    assert cli.main(command(*few)) == 0
    folder = folder_of(tiny)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for mistake in (("--images", str(tmp_path / "nowhere")), ("--init", str(tmp_path / "nothing.pth"))):
        assert cli.main(command(*few, *mistake)) == 2
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert cli.main(command(*few)) == 0
    assert len(list(folder.glob("checkpoint_final.pth.bak-*"))) == 1


@pytest.mark.usefixtures("no_plot")
def test_continue_with_other_options_names_them(
    tiny: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command()) == 0
    before = (folder_of(tiny) / FINAL).read_bytes()
    assert cli.main(command("--continue", "--epochs", "5", "--temperature", "0.3", "--batch-size", "4")) == 2
    message = capsys.readouterr().err
    for difference in ("epochs: 2 != 5", "temperature: 0.2 != 0.3", "batch_size: 3 != 4"):
        assert difference in message
    assert (folder_of(tiny) / FINAL).read_bytes() == before
    tiny.add("case_006", np.random.default_rng(0).standard_normal((1, 9, 28, 20)).astype(np.float32))
    assert cli.main(command("--continue")) == 2
    assert "cases: " in capsys.readouterr().err
    # what does not change the result may be changed
    assert cli.main(command("--continue", "--save-every", "7", "--fold", "all")) == 0


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_degenerate_volumes_train(
    tiny: Any, command: Command, caplog: pytest.LogCaptureFixture, configuration: str
) -> None:
    for folder in tiny.images.values():
        for path in folder.glob("case_*.b2nd"):
            path.unlink() if path.is_file() else path.rmdir()
    generator = np.random.default_rng(0)
    tiny.add("single_slice", generator.standard_normal((1, 1, 28, 20)).astype(np.float32))
    tiny.add("constant", np.zeros((1, 9, 28, 20), np.float32))
    tiny.add("tiny", generator.standard_normal((1, 2, 3, 2)).astype(np.float32))
    assert cli.main(command("--fold", "all", configuration=configuration)) == 0
    assert caplog.text.count("Case constant is constant") == 1


@pytest.mark.usefixtures("no_plot")
def test_a_loss_that_is_not_finite_stops_with_the_cases(
    tiny: Any, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = PretrainingLoss.forward, []

    def forward(self: PretrainingLoss, *args: Any) -> dict[str, torch.Tensor]:
        losses = original(self, *args)
        calls.append(losses)
        return {**losses, "total": losses["total"] * math.nan} if len(calls) == 4 else losses

    folder = folder_of(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingLoss, "forward", forward)
        assert cli.main(command()) == 2
    message = capsys.readouterr().err
    record = json.loads((folder / "nonfinite_batch.json").read_text())
    assert record["step"] == 3
    assert record["losses"]["total"] == "nan"
    names = {case for case in (f"case_{i:03d}" for i in range(6))}
    assert 1 <= len(record["cases"]) <= 3
    assert set(record["cases"]) <= names
    assert ", ".join(record["cases"]) in message
    assert str(folder / "nonfinite_batch.json") in message
    # the epoch before is saved; it can be continued, and a new run sets the record aside
    assert latest(folder)["step"] == 2
    assert cli.main(command("--continue")) == 0
    assert cli.main(command("--epochs", "1")) == 0
    assert len(list(folder.glob("nonfinite_batch.json.bak-*"))) == 1


def save_nnunet(path: Path, task: Any, seed: int) -> dict[str, torch.Tensor]:
    """Write a checkpoint as nnU-Net's trainer does; returns its weights."""
    torch.manual_seed(seed)
    network = task.build_network()
    weights: dict[str, torch.Tensor] = network.state_dict()
    name = "nnUNetTrainer"
    torch.save({"network_weights": weights, "trainer_name": name, "init_args": {"configuration": "2d"}}, path)
    return weights


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("network", ["kaf", "plain"])
def test_init_gives_the_first_weights_and_is_part_of_the_run(
    tiny: Any, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str
) -> None:
    plans = "nnUNetPlans" if network == "plain" else "SmallPlans"
    plain_task = resolve_task("123", "2d", "nnUNetPlans", "plain")
    weights = save_nnunet(tmp_path / "init.pth", plain_task, 5)
    save_nnunet(tmp_path / "other.pth", plain_task, 6)
    preset = ("--preset", "pcl", "--network", network)
    # a rate so small that the weights stay where they start
    options = command(*preset, "--learning-rate", "1e-12", plans=plans)
    assert cli.main([*options, "--init", str(tmp_path / "init.pth")]) == 0
    folder = folder_of(tiny, plans=plans, kind="Plain" if network == "plain" else "KAF")
    final = read_checkpoint(folder / FINAL)
    convolutions = [k for k in weights if k.startswith("encoder.stages.")]
    assert len(convolutions) > 10
    for name in convolutions:
        assert torch.allclose(final["network_weights"][name], weights[name], atol=1e-6), name
    assert len(final["pretraining"]["init"]) == 64
    assert "--init: " in (folder / "pretraining.log").read_text()
    capsys.readouterr()

    assert cli.main([*options, "--init", str(tmp_path / "other.pth"), "--continue"]) == 2
    assert f"init: {final['pretraining']['init']} != " in capsys.readouterr().err
    assert cli.main([*options, "--continue"]) == 2
    assert f"init: {final['pretraining']['init']} != None" in capsys.readouterr().err
    # the weights are in the checkpoint, so the file may be gone
    (tmp_path / "init.pth").unlink()
    assert cli.main([*options, "--init", str(tmp_path / "init.pth"), "--continue"]) == 0
    assert read_checkpoint(folder / FINAL)["pretraining"] == final["pretraining"]
    assert cli.main([*options, "--init", str(tmp_path / "init.pth")]) == 2
    assert "init.pth does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plot")
def test_output_accumulate_and_compile(
    tiny: Any, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, compiled = torch.compile, []

    def without_code_generation(module: Any, **_: Any) -> Any:
        compiled.append(type(module).__name__)
        return original(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_code_generation)
    out = tmp_path / "elsewhere" / "run"
    preset = ("--preset", "simclr", "--epochs", "1")
    assert cli.main(command(*preset, "--output", str(out), "--accumulate", "2")) == 0
    following = f"KAF_PRETRAINED={out / FINAL} nnUNetv2_train 123 2d 0 -tr nnUNetTrainerKAF -p SmallPlans"
    assert f"Next:       {following}\n" in capsys.readouterr().out
    assert not folder_of(tiny).exists()
    plain = latest(out)
    assert plain["step"] == 2  # steps of two batches each
    assert compiled == []
    assert cli.main(command(*preset, "--output", str(out), "--accumulate", "2", "--compile")) == 0
    assert compiled == ["PretrainingModel"]
    again = latest(out)
    assert set(again["model"]) == set(plain["model"])
    assert again["history"][1]["total"] == pytest.approx(plain["history"][1]["total"], rel=1e-3)
    assert cli.main(command(*preset, "--output", str(out))) == 0
    assert latest(out)["history"][1]["total"] != plain["history"][1]["total"]


@pytest.mark.usefixtures("no_plot")
def test_save_every(tiny: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    original = recorder.save_latest

    def save(path: Path, state: Any, *args: Any) -> None:
        saved.append(state.step)
        original(path, state, *args)

    monkeypatch.setattr(recorder, "save_latest", save)
    few = ("--preset", "simclr", "--iterations", "1")
    assert cli.main(command(*few, "--epochs", "5", "--save-every", "2")) == 0
    assert saved == [2, 4, 5]
    # a long epoch is saved within as well; here after every step
    saved.clear()
    within = ("--preset", "simclr", "--iterations", "2", "--epochs", "2", "--save-every", "2", "--save-minutes", "0")
    assert cli.main(command(*within)) == 0
    assert saved == [1, 2, 3, 4]


@pytest.mark.usefixtures("no_plot")
def test_a_run_killed_right_after_an_epoch_loses_none_of_its_history(
    tiny: Any, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was saved last, the record of a finished epoch is in it or is made again."""
    options = command("--preset", "simclr", "--save-every", "5", "--save-minutes", "0")
    assert cli.main(options) == 0
    expected = latest(folder_of(tiny))
    original = run._Run._record

    def killed(self: Any, record: dict[str, float]) -> None:
        if record["epoch"] == 1.0:
            raise KeyboardInterrupt  # nothing is saved on the way out
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(run._Run, "_record", killed)
        assert cli.main(options) == 130
    assert cli.main([*options, "--continue"]) == 0
    assert equal(latest(folder_of(tiny)), expected)


def test_an_unusable_output_folder(
    tiny: Any, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(command("--output", str(tmp_path / "file"))) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert "--output" in error


def test_default_batch_size() -> None:
    assert [run.default_batch_size(n) for n in (1, 2, 12, 300)] == [2, 2, 12, 32]
    assert [run.default_batch_size(n, 4) for n in (1, 12, 300)] == [8, 48, 128]


def test_a_batch_that_the_processes_cannot_share(
    tiny: Any, command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run.distributed, "world_size", lambda: 2)
    options = run.RunOptions(device=CPU)
    task = resolve_task("123", "2d", "SmallPlans")
    with pytest.raises(KAFError, match=r"--batch-size is 3, which 2 processes .* multiple of 2"):
        run.pretrain(task, PretrainConfig(batch_size=3), options)
    assert not folder_of(tiny).exists()
    assert "no negatives" not in caplog.text
    monkeypatch.undo()
    assert run._batch_size(task, PretrainConfig(batch_size=1)) == 1
    assert "no negatives" in caplog.text


def test_the_public_function_does_what_the_command_does(tiny: Any, command: Command, no_plot: None) -> None:
    """As the documentation has it, with the public names only."""
    from pretraining import DataOptions, PretrainConfig, RunOptions, pretrain, resolve_task

    command()  # writes dataset and plans
    task = resolve_task("123", "2d", "SmallPlans")
    config = PretrainConfig(epochs=1, iterations=1, batch_size=2, sinkhorn_iterations=5, descriptor_dim=16)
    path = pretrain(task, config, RunOptions(device=CPU, data=DataOptions(fold="all")))
    assert path == folder_of(tiny).with_name("fold_all") / FINAL
    assert read_checkpoint(path)["pretraining"]["epochs_done"] == 1
