import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_kaf import trainer as trainer_module
from nnunetv2_kaf import weights
from nnunetv2_kaf.config import KAFConfig
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import is_kaf, kaf_plans, pretraining_folder
from nnunetv2_kaf.trainer import nnUNetTrainerKAF, nnUNetTrainerKAFScratch

Plans = dict[str, Any]
Make = Callable[..., nnUNetTrainerKAF]
DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}


@pytest.fixture
def make(plain_plans: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Trainers of a dataset whose preprocessed folders exist."""
    for variable in ("raw", "preprocessed", "results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    monkeypatch.delenv("KAF_PRETRAINED", raising=False)
    for configuration in ("2d", "3d"):
        folder = tmp_path / "preprocessed" / "Dataset990_Tiny" / f"nnUNetPlans_{configuration}"
        folder.mkdir(parents=True)
        (folder / "case.b2nd").touch()

    def build(cls: type[nnUNetTrainerKAF] = nnUNetTrainerKAF, configuration: str = "2d", **options: Any) -> Any:
        plans = options.pop("plans", json.loads(json.dumps(plain_plans)))
        dataset = options.pop("dataset", DATASET)
        plans["continue_training"] = False
        return cls(plans, configuration, options.pop("fold", 0), dataset, torch.device("cpu"))

    return build


def log(trainer: nnUNetTrainerKAF) -> str:
    return Path(trainer.log_file).read_text()


def start(trainer: nnUNetTrainerKAF, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`on_train_start` without nnU-Net's data loaders; returns the record it wrote."""
    monkeypatch.setattr(trainer_module.nnUNetTrainer, "on_train_start", lambda self: None)
    trainer.on_train_start()
    record: dict[str, Any] = json.loads((Path(trainer.output_folder) / "kaf_initialization.json").read_text())
    return record


def pretrain(trainer: nnUNetTrainerKAF, fold: int | str = "all", path: Path | None = None) -> tuple[Path, nn.Module]:
    """A checkpoint of a random network at the standard place."""
    torch.manual_seed(7)
    manager = trainer.plans_manager
    network = trainer.build_network_architecture(manager, trainer.configuration_manager, 1, 3, True)
    name, plans = manager.dataset_name, manager.plans_name
    path = path or pretraining_folder(name, plans, trainer.configuration_name, fold) / "checkpoint_final.pth"
    weights.save_pretraining_checkpoint(
        path, network, plans=manager.plans, configuration=trainer.configuration_name, num_input_channels=1,
        dataset_name=name, fold=fold, pretraining={},
    )  # fmt: skip
    return path, network


def encoder_equal(trainer: nnUNetTrainerKAF, network: nn.Module) -> bool:
    ours, theirs = trainer.network.encoder.state_dict(), network.get_submodule("encoder").state_dict()
    return all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"])
def test_plain_plans_get_the_kaf_network_and_say_so(configuration: str, make: Make) -> None:
    trainer = make(configuration=configuration)
    trainer.initialize()
    assert type(trainer.network).__name__ == "KAFUNet"
    assert is_kaf(trainer.plans_manager.plans, configuration)
    assert trainer.my_init_kwargs["plans"] is trainer.plans_manager.plans
    assert "KAF: replaced the PlainConvUNet of nnUNetPlans by KAFUNet" in log(trainer)
    assert f"'num_keypoints': {trainer.kaf_config.num_keypoints}" in log(trainer)


def test_cascade_input_has_one_hot_channels_but_detection_has_not(make: Make) -> None:
    trainer = make(configuration="3d_cascade_fullres")
    trainer.initialize()
    assert trainer.network.encoder.input_channels == 3
    assert trainer.network.encoder.detector.channels == [0]


def test_region_and_ignore_labels_change_the_heads(make: Make) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    trainer = make(dataset={**DATASET, "labels": labels, "regions_class_order": [1, 2]})
    trainer.initialize()
    assert trainer.network.decoder.num_classes == 2


def test_explicit_kaf_plans_are_used_as_given(make: Make, plain_plans: Plans) -> None:
    config = KAFConfig(num_keypoints=9, fusion="concat")
    trainer = make(plans=kaf_plans(plain_plans, config))
    assert trainer.kaf_config == config
    assert "KAF: replaced" not in log(trainer)


def test_a_saved_model_keeps_its_layers_when_defaults_change(make: Make, plain_plans: Plans) -> None:
    old = KAFConfig(num_keypoints=77, token_dim=32)
    first = make()
    saved = Path(first.output_folder_base) / "plans.json"
    saved.write_text(json.dumps(kaf_plans(plain_plans, old)))
    again = make()
    assert again.kaf_config == old
    assert str(saved) in log(again)
    replanned = json.loads(json.dumps(plain_plans))
    replanned["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 4, 4]
    changed = make(plans=replanned)
    assert changed.kaf_config == old, "the layers are kept, the rest follows the plans"
    assert changed.configuration_manager.network_arch_init_kwargs["features_per_stage"] == [4, 4, 4]
    cascade = make(configuration="3d_cascade_fullres")
    manager = cascade.configuration_manager
    planned = KAFConfig().planned(manager.patch_size, manager.network_arch_init_kwargs["n_stages"])
    assert cascade.kaf_config == planned, "another configuration has its own folder"


def test_plans_that_cannot_carry_layers_are_refused(make: Make, plain_plans: Plans) -> None:
    plain_plans["configurations"]["2d"]["architecture"]["network_class_name"] = "elsewhere.Primus"
    with pytest.raises(KAFError, match=r"elsewhere\.Primus"):
        make(plans=plain_plans)


def test_missing_preprocessed_data_name_the_command(make: Make, plain_plans: Plans) -> None:
    plain_plans["configurations"]["2d"]["data_identifier"] = "nnUNetPlans_gone"
    trainer = make(plans=plain_plans)
    with pytest.raises(KAFError, match=r"nnUNetPlans_gone do not exist.*nnUNetv2_preprocess -d 990 .*-c 2d"):
        trainer.initialize()


def test_scratch_when_there_is_no_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    record = start(trainer, monkeypatch)
    assert (record["source"], record["tensors_loaded"]) == (None, 0)
    assert "no pretraining checkpoint is loaded" in log(trainer)


def test_checkpoint_at_its_standard_place_is_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network = pretrain(make())
    trainer = make()
    record = start(trainer, monkeypatch)
    assert encoder_equal(trainer, network)
    assert record["source"] == str(path)
    assert record["tensors_loaded"] == len(network.get_submodule("encoder").state_dict())
    assert "without labels" in record["note"], "pretraining on all cases saw the validation images"
    assert record["sha256"] in log(trainer)


def test_the_folds_own_checkpoint_comes_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(make())
    path, _ = pretrain(make(), fold=0)
    record = start(make(), monkeypatch)
    assert record["source"] == str(path)
    assert "without labels" not in record["note"]
    assert "fold_all" in start(make(fold=1), monkeypatch)["source"]


def test_other_configurations_are_hinted_at_not_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = pretrain(make(configuration="3d_fullres"))
    record = start(make(), monkeypatch)
    assert record["source"] is None
    assert str(path) in record["note"]


def test_environment_variable_overrides(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrain(make())
    monkeypatch.setenv("KAF_PRETRAINED", "none")
    assert start(make(), monkeypatch)["source"] is None
    other, network = pretrain(make(), path=tmp_path / "elsewhere.pth")
    monkeypatch.setenv("KAF_PRETRAINED", str(other))
    trainer = make()
    assert start(trainer, monkeypatch)["source"] == str(other)
    assert encoder_equal(trainer, network)
    monkeypatch.setenv("KAF_PRETRAINED", str(tmp_path / "missing.pth"))
    with pytest.raises(KAFError, match=r"missing\.pth does not exist"):
        start(make(), monkeypatch)


def test_misfit_is_an_error_never_a_partial_load(
    make: Make, monkeypatch: pytest.MonkeyPatch, plain_plans: Plans
) -> None:
    path, _ = pretrain(make())
    monkeypatch.setenv("KAF_PRETRAINED", str(path))
    with pytest.raises(KAFError, match="num_blocks: checkpoint 2, training 3"):
        start(make(plans=kaf_plans(plain_plans, KAFConfig(num_blocks=3))), monkeypatch)


def test_an_unfinished_pretraining_of_the_fold_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    final, _ = pretrain(make(), fold=0)
    latest = final.with_name("checkpoint_latest.pth")
    final.rename(latest)
    pretrain(make(), fold="all")
    with pytest.raises(
        KAFError,
        match=r"fold_0/checkpoint_latest\.pth and no checkpoint_final\.pth.*"
        r"kaf-pretrain --dataset Dataset990_Tiny -c 2d -p nnUNetPlans --fold 0 --continue.*KAF_PRETRAINED=none",
    ):
        start(make(), monkeypatch)
    assert "fold_all" in start(make(fold=1), monkeypatch)["source"], "another fold is not concerned"
    assert start(make(nnUNetTrainerKAFScratch), monkeypatch)["source"] is None
    monkeypatch.setenv("KAF_PRETRAINED", "none")
    assert start(make(), monkeypatch)["source"] is None
    monkeypatch.delenv("KAF_PRETRAINED")
    latest.with_name("checkpoint_final.pth").write_bytes(latest.read_bytes())
    assert start(make(), monkeypatch)["source"] == str(final), "a finished run keeps both files"


def test_one_channel_pretraining_of_several_channels_is_recorded(
    make: Make, monkeypatch: pytest.MonkeyPatch, plain_plans: Plans
) -> None:
    path, network = pretrain(make())
    plain_plans["configurations"]["2d"]["normalization_schemes"] = ["ZScoreNormalization"] * 2
    dataset = {**DATASET, "channel_names": {"0": "T1", "1": "T2"}}
    trainer = make(plans=plain_plans, dataset=dataset)
    record = start(trainer, monkeypatch)
    assert record["source"] == str(path)
    weight, name = trainer.network.encoder.stages[0][0].convs[0].conv.weight, "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(weight, network.state_dict()[name].repeat(1, 2, 1, 1) / 2)
    assert "repeated for 2" in record["adapted"][name]
    assert "adapted: {'encoder.stages.0.0.convs.0" in log(trainer)


def test_scratch_trainer_never_loads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network = pretrain(make())
    monkeypatch.setenv("KAF_PRETRAINED", str(path))
    trainer = make(nnUNetTrainerKAFScratch)
    assert start(trainer, monkeypatch)["source"] is None
    assert not encoder_equal(trainer, network)


def test_resumed_and_externally_initialised_trainings_are_left_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, network = pretrain(make())
    first = make()
    start(first, monkeypatch)
    first.current_epoch = 4
    first.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    record = Path(first.output_folder) / "kaf_initialization.json"
    path.unlink()
    with torch.no_grad():
        next(network.parameters()).fill_(0)
    resumed = make()
    resumed.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    before = record.read_text()
    leftover = Path(resumed.output_folder) / ".checkpoint_latest.pth.1-1.tmp"
    leftover.write_text("half")
    resumed.on_train_start()
    assert not leftover.exists()
    assert record.read_text() == before
    assert resumed.current_epoch == 5
    assert all(torch.equal(a, b) for a, b in zip(resumed.network.parameters(), first.network.parameters(), strict=True))
    given = make()
    given.initialize()  # what nnU-Net does before it loads -pretrained_weights
    assert "-pretrained_weights" in start(given, monkeypatch)["note"]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


WRONG: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "no weights": (("network_weights",), None, "network_weights"),
    "no optimiser": (("optimizer_state",), "text", "optimizer_state"),
    "no epoch": (("current_epoch",), "3", "current_epoch"),
    "no log": (("logging",), [], "logging"),
    "other weights": (("network_weights",), {"stem": torch.zeros(1)}, "another network"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_training_is_not_continued_from_a_wrong_file(case: str, make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    (key,), value, message = WRONG[case]
    content = torch.load(file, weights_only=False)
    torch.save({**content, key: value}, file)
    with pytest.raises(KAFError, match=rf"checkpoint_latest\.pth.*{message}"):
        make().load_checkpoint(str(file))
    torch.save(content, file)
    make().load_checkpoint(str(file))


def test_a_file_to_continue_from_runs_nothing(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.initialize()
    file, marker = tmp_path / "checkpoint_latest.pth", tmp_path / "marker"
    trainer.save_checkpoint(str(file))
    torch.save({**torch.load(file, weights_only=False), "more": Evil(marker)}, file)
    with pytest.raises(KAFError, match=r"checkpoint_latest\.pth is unsafe"):
        make().load_checkpoint(str(file))
    assert not marker.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_training_that_diverges_stops(value: float, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    trainer.initialize()
    monkeypatch.setattr(trainer_module.nnUNetTrainer, "on_train_epoch_end", lambda self, outputs: None)
    trainer.on_train_epoch_end([])
    with torch.no_grad():
        next(trainer.network.parameters()).view(-1)[0] = value
    with pytest.raises(KAFError, match=r"weights have diverged.*checkpoints in .*fold_0 are from before"):
        trainer.on_train_epoch_end([])


def test_an_unfinished_pretraining_of_all_folds_is_an_error_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    final, _ = pretrain(make(), fold="all")
    final.rename(final.with_name("checkpoint_latest.pth"))
    with pytest.raises(KAFError, match=r"of all folds is unfinished: .*fold_all.*--fold all --continue"):
        start(make(), monkeypatch)
    pretrain(make(), fold=0)
    assert "fold_0" in start(make(), monkeypatch)["source"], "the fold's own comes first"


def test_what_was_set_aside_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    final, _ = pretrain(make(), fold=0)
    kept = final.rename(final.with_name("checkpoint_final.pth.bak-20260101-000000"))
    trainer = make()
    assert str(kept) in start(trainer, monkeypatch)["note"]
    assert str(kept) in log(trainer)


def test_full_disk_keeps_the_last_good_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = make()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def full_disk(obj: object, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.torch.save", full_disk)
    with pytest.raises(KAFError, match=r"could not save .*checkpoint_latest\.pth.*No space left.*--c"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint_latest.pth"]


def test_checkpoint_stores_the_substituted_plans(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert is_kaf(stored["init_args"]["plans"], "2d")
    assert stored["trainer_name"] == "nnUNetTrainerKAF"


def test_nan_image_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    loss = {"loss": np.float32("nan")}
    monkeypatch.setattr(trainer_module.nnUNetTrainer, "train_step", lambda self, batch: loss)
    data = torch.zeros(2, 1, 4, 4)
    assert trainer.train_step({"data": data, "keys": ["a", "b"]}) is loss, "an overflow is left to the loss scaler"
    data[1, 0, 2, 2] = torch.nan
    with pytest.raises(KAFError, match=r"\['b'\].*NaN"):
        trainer.train_step({"data": data, "keys": ["a", "b"]})


@pytest.mark.parametrize("base", ["nnUNetTrainerKAF", "nnUNetTrainerKAFScratch"])
@pytest.mark.parametrize("epochs", [1, 7, 250])
def test_schedule_variants(base: str, epochs: int, make: Make) -> None:
    name = f"{base}_{epochs}epoch{'s' * (epochs > 1)}"
    cls = getattr(trainer_module, name)
    assert pickle.loads(pickle.dumps(cls)) is cls
    trainer = make(cls)
    assert trainer.num_epochs == epochs
    assert trainer.use_pretraining == (base == "nnUNetTrainerKAF")
    assert Path(trainer.output_folder_base).name == f"{name}__nnUNetPlans__2d"


def test_the_log_tells_the_expected_end_until_the_last_epoch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    trainer.num_epochs = 2

    def end(self: nnUNetTrainerKAF) -> None:
        self.current_epoch += 1

    monkeypatch.setattr(trainer_module.nnUNetTrainer, "on_epoch_start", lambda self: None)
    monkeypatch.setattr(trainer_module.nnUNetTrainer, "on_epoch_end", end)
    for _ in range(2):
        trainer.on_epoch_start()
        trainer.on_epoch_end()
    assert log(trainer).count("expected end of the training") == 1


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerKAF_0epochs", "nnUNetTrainerKAF_1epochs", "nnUNetTrainerKAF_05epochs", "nnUNetTrainerKAF_5epoch",
     "nnUNetTrainerKAFNew_5epochs", "PlansManager_5epochs", "nnUNetTrainerKAF_5epochs_5epochs_"],
)  # fmt: skip
def test_other_names_are_no_trainers(name: str) -> None:
    assert not hasattr(trainer_module, name)


def test_the_plans_of_the_caller_stay_as_they_were(make: Make, plain_plans: Plans) -> None:
    plans = json.loads(json.dumps(plain_plans))
    trainer = make(plans=plans)
    assert not is_kaf(plans, "2d")
    assert is_kaf(trainer.my_init_kwargs["plans"], "2d")
