import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from low_label import trainers as study
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.plans import kaf_plans
from semisupervised.trainer import nnUNetTrainerKAFSemi, nnUNetTrainerSemi

BOTH = [nnUNetTrainerSemi, nnUNetTrainerKAFSemi]


def losses(trainer):
    logged = trainer.logger.local_logger.my_fantastic_logging
    return [float(value) for key in ("train_losses", "val_losses") for value in logged[key]]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("dims", "channels", "style"), [(2, 1, "plain"), (2, 2, "ignore"), (3, 1, "plain"), (3, 2, "regions")]
)
def test_every_kind_of_dataset_trains(cls, dims, channels, style, make_dataset):
    """The unlabelled cases' label files are folders: a training that opened one would fail."""
    dataset = make_dataset(dims=dims, channels=channels, style=style)
    trainer = dataset.trainer(cls)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    record = json.loads((folder / "semi_unlabelled.json").read_text())
    assert record["count"] == 3
    assert set(record["cases"]) == {"p3", "p4", "p5"}
    assert record["origin"] == "KAF_UNLABELLED=321"
    history = json.loads((folder / "semi_training.json").read_text())
    assert [epoch["epoch"] for epoch in history["epochs"]] == [0, 1]
    assert history["classes"] == (["whole", "core"] if style == "regions" else ["a", "b"])
    assert all(np.isfinite(epoch["unlabelled_loss"]) and 0 <= epoch["sure"] <= 1 for epoch in history["epochs"])
    assert (folder / "semi_progress.png").stat().st_size > 1000
    assert "3 unlabelled images: KAF_UNLABELLED=321" in Path(trainer.log_file).read_text()
    assert all(np.isfinite(losses(trainer)))


def interrupted(trainer, epochs):
    """Train until the start of an epoch, as if the process were killed there."""

    class KilledError(Exception):
        pass

    begin = trainer.on_epoch_start

    def on_epoch_start():
        if trainer.current_epoch == epochs:
            raise KilledError
        begin()

    trainer.on_epoch_start = on_epoch_start
    with pytest.raises(KilledError):
        trainer.run_training()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("processes", [0, 2])
def test_a_continued_training_has_the_same_losses_and_weights(cls, processes, make_dataset, monkeypatch):
    dataset = make_dataset()
    monkeypatch.setenv("nnUNet_n_proc_DA", str(processes))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    whole = dataset.trainer(cls, num_epochs=3)
    whole.run_training()

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = dataset.trainer(cls, num_epochs=3)
    interrupted(first, 2)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    second = dataset.trainer(cls, num_epochs=3)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    monkeypatch.setenv("KAF_UNLABELLED", "")  # the images are those of the checkpoint
    second.run_training()
    assert losses(second) == losses(whole)
    assert same(second.network.state_dict().values(), whole.network.state_dict().values())
    assert same(second._teacher.state_dict().values(), whole._teacher.state_dict().values())
    assert second.semi_history == whole.semi_history


def test_a_finished_model_validates_and_predicts_without_its_unlabelled_images(make_dataset, monkeypatch):
    dataset = make_dataset()
    trainer = dataset.trainer()
    trainer.run_training()
    checkpoint = str(Path(trainer.output_folder) / "checkpoint_final.pth")
    for case in ("p3", "p4", "p5"):
        (dataset.images / f"{case}.b2nd").unlink()
    again = dataset.trainer()
    again.load_checkpoint(checkpoint)
    assert same(again.network.state_dict().values(), trainer.network.state_dict().values())
    plain = dataset.trainer(nnUNetTrainer)
    plain.load_checkpoint(checkpoint)
    assert same(plain.network.state_dict().values(), trainer.network.state_dict().values())
    again.current_epoch = 1
    with pytest.raises(KAFError, match=r"3 unlabelled image\(s\) that this training began with are gone"):
        again.on_train_start()


def test_a_training_goes_on_where_the_data_have_moved_to(make_dataset, monkeypatch, tmp_path):
    dataset = make_dataset()
    folder = tmp_path / "more"
    folder.mkdir()
    volume = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(9, 20, 28)).astype(np.float32))
    sitk.WriteImage(volume, str(folder / "q0_0000.nii.gz"))
    monkeypatch.setenv("KAF_UNLABELLED", f"{folder}{os.pathsep}321")
    first = dataset.trainer(num_epochs=3)
    interrupted(first, 2)
    moved = tmp_path / "scratch"
    dataset.folder.parent.rename(moved)
    (file,) = moved.rglob("q0-*.b2nd")
    file.rename(file.with_name(f"q0-{'0' * 16}.b2nd"))  # the raw file was copied, and prepared again
    monkeypatch.setenv("nnUNet_preprocessed", str(moved))
    second = dataset.trainer(num_epochs=3)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    second.run_training()
    assert len(second.semi_history) == 3
    record = json.loads((Path(second.output_folder) / "semi_unlabelled.json").read_text())
    assert all(str(moved) in path for path in record["cases"].values())
    assert "1 of them preprocessed again since then" in record["origin"]


def test_missing_data_name_the_command(make_dataset):
    dataset = make_dataset()
    shutil.rmtree(dataset.images)
    for cls in BOTH:
        with pytest.raises(KAFError, match=r"nnUNetPlans_2d do not exist.*nnUNetv2_preprocess -d 321 "):
            dataset.trainer(cls).run_training()


def test_every_epoch_measures_the_teacher(make_dataset):
    trainer = make_dataset().trainer(guard_every=4)  # an epoch has 3 steps
    trainer.run_training()
    assert [record["known"] > 0 for record in trainer.semi_history] == [True, True]


def test_a_training_without_unlabelled_images_stops_before_it_starts(make_dataset, monkeypatch):
    dataset = make_dataset()
    monkeypatch.setenv("KAF_UNLABELLED", "")
    for cls in BOTH:
        trainer = dataset.trainer(cls)
        with pytest.raises(KAFError, match=r"no unlabelled image for Dataset321_Small, 2d, fold 0.*KAF_UNLABELLED"):
            trainer.run_training()
        assert trainer.network is None


def test_the_second_stage_of_a_cascade_is_refused(make_dataset):
    dataset = make_dataset(dims=3)
    for cls in BOTH:
        with pytest.raises(KAFError, match=r"3d_cascade_fullres, the second stage of a cascade.*3d_lowres"):
            dataset.trainer(cls, configuration="3d_cascade_fullres")


def test_the_weight_grows_over_the_ramp_and_the_guard_lowers_it(make_dataset):
    trainer = make_dataset().trainer(num_epochs=10, unlabelled_ramp=0.5, unlabelled_weight=2.0)
    trainer.initialize()
    assert trainer.current_weight() == 0, "nothing is known of the teacher yet"
    trainer._guard.known = 1.0
    weights = []
    for step in range(31):
        trainer._step = step
        weights.append(trainer.current_weight())
    assert weights[0] == pytest.approx(2 * np.exp(-5))
    assert weights == sorted(weights)
    assert weights[15:] == [2.0] * 16
    trainer._guard.factor = 0.25
    assert trainer.current_weight() == 0.5
    trainer._guard.known = 0.5
    assert trainer.current_weight() == 0.25


def test_a_collapse_is_said_in_the_log_and_lowers_the_weight(make_dataset):
    trainer = make_dataset().trainer(num_epochs=3, unlabelled_ramp=0.0)
    trainer.on_train_start()
    trainer._guard.largest, trainer._guard.present = [0.5, 0.5], [9, 9]
    trainer.on_train_epoch_start()
    background = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    trainer._sums.add_pseudo_labels(background, background == 0)
    trainer._sums.add_labelled(background + 1, background + 1, background + 1)
    trainer.on_train_epoch_end([{"loss": np.array(1.0)}])
    assert "WARNING: class a vanishes from the pseudo-labels" in Path(trainer.log_file).read_text()
    assert trainer.current_weight() == 0.5
    assert len(trainer.semi_history[0]["collapse"]) == 2
    assert trainer.semi_history[0]["agreements"] == [1.0, None]


def test_without_deep_supervision_there_is_one_output(make_dataset):
    trainer = make_dataset().trainer(enable_deep_supervision=False)
    trainer.run_training()
    assert trainer._unlabelled_loss.weights == (1.0,)
    assert all(np.isfinite(epoch["unlabelled_loss"]) for epoch in trainer.semi_history)


def test_residual_encoder_plans_train_with_nnunets_own_network(make_dataset):
    dataset = make_dataset()
    architecture = dataset.plans["configurations"]["2d"]["architecture"]
    architecture["network_class_name"] = architecture["network_class_name"].replace("PlainConv", "ResidualEncoder")
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    (dataset.folder / "nnUNetPlans.json").write_text(json.dumps(dataset.plans))
    for cls, name in ((nnUNetTrainerSemi, "ResidualEncoderUNet"), (nnUNetTrainerKAFSemi, "KAFUNet")):
        trainer = dataset.trainer(cls)
        trainer.run_training()
        assert type(trainer.network).__name__ == name
        assert all(np.isfinite(losses(trainer)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("predict_with", "both"), ("confidence_threshold", 95), ("teacher_decay", 1.0), ("unlabelled_share", 0),
     ("unlabelled_weight", float("inf")), ("unlabelled_ramp", "0.2"), ("cutmix_probability", -0.1),
     ("guard_every", 2.5), ("remove_islands", "no"), ("excess_limit", 0.5), ("strong_augmentation", {"p_blur": 0.1})],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_their_names(name, value, make_dataset):
    with pytest.raises(KAFError, match=rf"nnUNetTrainerSemi\.{name}: found {re.escape(repr(value))}, expected"):
        make_dataset().trainer(**{name: value}).run_training()


@pytest.mark.parametrize("remove", [True, False])
def test_the_network_learns_no_islands_of_what_is_one_piece_in_the_labelled_patches(remove, make_dataset):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    trainer = make_dataset().trainer(remove_islands=remove, cutmix_probability=0.0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert not trainer._islands.one_piece.any(), "judged after an epoch"
    trainer.on_train_epoch_end([out])
    assert trainer._islands.one_piece.all(), "the phantom's structures"
    assert trainer.semi_history[0]["one_piece"] == [True, True]

    def teach(image):
        logits = torch.full((len(image), 3, *image.shape[2:]), -10.0)
        logits[:, 0] = 0
        logits[:, 1, 2:6, 2:6] = logits[:, 1, -1, -1] = 10
        return logits

    trainer._teach = teach
    _, labels = trainer._strong_batch(next(trainer._stream))
    assert labels.target[:, 0, 2:6, 2:6].eq(1).all()
    assert labels.target[:, 0, -1, -1].eq(0 if remove else 1).all()
    assert labels.sure.all()


@pytest.mark.parametrize(("limit", "left"), [(1.5, False), (float("inf"), True)])
def test_a_structure_that_swells_beyond_the_labelled_patches_is_taught_as_background(limit, left, make_dataset):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    trainer = make_dataset().trainer(excess_limit=limit, remove_islands=False, cutmix_probability=0.0, guard_every=1)

    def teach(image):
        logits = torch.full((len(image), 3, *image.shape[2:]), -4.0)
        logits[:, 0] = 0
        logits[:, 2] = 1
        logits[:, 2, :2, :2] = 4
        return logits

    trainer._teach = teach
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    out = trainer.train_step(next(trainer.dataloader_train))
    trainer.on_train_epoch_end([out])
    record = trainer.semi_history[0]
    assert record["excess"] == 0, "judged after an epoch"
    voxels = trainer._amounts._before.double()
    shares = voxels[:, 1:] / voxels[:, :1]
    factors = (shares.amax(0) / shares.amin(0)).clamp_min(limit)
    assert record["limits"] == pytest.approx((shares.amax(0) * factors).tolist())
    assert record["given"] == [0, 1]
    _, labels = trainer._strong_batch(next(trainer._stream))
    assert labels.target[:, 0, :2, :2].eq(2).all()
    assert labels.target[:, 0, 2:].eq(2 if left else 0).all()
    assert left or labels.sure[:, 0, 2:].all()
    trainer._excess.most[:] = 1
    trainer.train_step(next(trainer.dataloader_train))
    assert torch.isfinite(trainer._excess.cut).any() is not left, "judged at the beginning of a step"
    trainer.train_step(next(trainer.dataloader_train))
    assert not torch.isfinite(trainer._excess.cut).any(), "and again within the epoch"
    assert ("beyond their limits: b" in Path(trainer.log_file).read_text()) is not left


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_final_checkpoint_holds_the_weights_that_predict(which, make_dataset):
    trainer = make_dataset().trainer(predict_with=which, teacher_decay=0.9)
    trainer.run_training()
    final = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    teacher = final["optimizer_state"]["semisupervised"]["teacher"]
    equal = same(final["network_weights"].values(), teacher.values())
    assert equal == (which == "teacher")


def continued(dataset, change):
    """A trainer that continues from a checkpoint whose part of this package was changed."""
    trainer = dataset.trainer()
    interrupted(trainer, 1)
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    content = torch.load(file, weights_only=False)
    change(content["optimizer_state"]["semisupervised"])
    torch.save(content, file)
    again = dataset.trainer()
    again.load_checkpoint(str(file))  # as --val does, which needs the network alone
    return again


def test_a_training_of_another_version_is_not_continued(make_dataset):
    again = continued(make_dataset(), lambda state: state.pop("thresholds"))
    with pytest.raises(
        KAFError, match=r"optimizer_state\.semisupervised: found no thresholds, expected all of teacher"
    ):
        again.run_training()


def test_a_training_with_other_labelled_cases_is_not_continued(make_dataset):
    again = continued(make_dataset(), lambda state: state["amounts"]["cases"].append("p9"))
    with pytest.raises(KAFError, match=r"labelled training cases of this fold: found them without p9"):
        again.run_training()


@pytest.mark.parametrize("cls", BOTH)
def test_the_gradients_are_those_of_the_sum_of_both_losses(cls, make_dataset, monkeypatch):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    trainer = make_dataset().trainer(cls, unlabelled_weight=0.7, unlabelled_ramp=0.0, confidence_threshold=0.4)
    trainer.on_train_start()
    trainer._guard.known = 1.0
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    strong, labels = trainer._strong_batch(trainer._stream.batches[0])
    known = trainer.loss(trainer.network(batch["data"]), batch["target"])
    guessed = trainer._unlabelled_loss(trainer.network(strong), labels)
    (known + 0.7 * guessed).backward()
    torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
    expected = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
    network = trainer.network
    out = trainer.train_step(batch)
    assert trainer.network is network
    assert out["loss"] == pytest.approx(known.item(), rel=1e-5), "the loss in nnU-Net's log is the labelled one"
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    assert abs(guessed.item()) > 1e-3
    record = trainer._sums.finish(False)
    assert record["unlabelled_loss"] == pytest.approx(guessed.item(), rel=1e-4)
    assert record["labelled_loss"] == pytest.approx(known.item(), rel=1e-4)


@pytest.mark.parametrize("cls", BOTH)
def test_on_a_cpu_network_and_teacher_normalise_the_quick_way(cls, make_dataset):
    trainer = make_dataset(dims=3).trainer(cls)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    with torch.profiler.profile() as seen:
        trainer.train_step(next(trainer.dataloader_train))
    names = {event.key for event in seen.key_averages()}
    assert {"aten::native_group_norm", "aten::native_group_norm_backward"} <= names
    assert "aten::native_batch_norm" not in names


@pytest.mark.parametrize("cls", BOTH)
def test_a_step_in_half_precision_is_close_to_one_in_single(cls, make_dataset):
    dataset, found = make_dataset(), []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        trainer = dataset.trainer(cls, unlabelled_ramp=0.0, confidence_threshold=0.4, guard_every=1)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            trainer.train_step(next(trainer.dataloader_train))
        found.append(trainer._sums.finish(False))
        assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    for key in ("labelled_loss", "unlabelled_loss"):
        assert found[1][key] == pytest.approx(found[0][key], abs=0.1)
    assert found[0]["sure"] > 0


@pytest.mark.parametrize("cls", BOTH)
def test_compiled_networks_train_and_continue(cls, make_dataset, monkeypatch):
    """nnU-Net compiles on GPUs only; here the tracing is tested, without the code generation."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="eager"))
    monkeypatch.setattr(cls, "_do_i_compile", lambda self: True)
    dataset = make_dataset()
    trainer = dataset.trainer(cls, num_epochs=2, num_iterations_per_epoch=2)
    interrupted(trainer, 1)
    again = dataset.trainer(cls, num_epochs=2, num_iterations_per_epoch=2)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    again.run_training()
    assert all(np.isfinite(losses(again)))
    assert len(again.semi_history) == 2


def test_kaf_plans_and_the_pretrained_start_are_those_of_the_kaf_trainer(make_dataset):
    dataset = make_dataset()
    trainer = dataset.trainer(nnUNetTrainerKAFSemi)
    trainer.on_train_start()
    assert type(trainer.network).__name__ == "KAFUNet"
    assert (Path(trainer.output_folder) / "kaf_initialization.json").is_file()
    plain = dataset.trainer(nnUNetTrainerSemi)
    plain.on_train_start()
    assert type(plain.network).__name__ == "PlainConvUNet"
    (dataset.folder / "nnUNetPlans.json").write_text(json.dumps(kaf_plans(dataset.plans)))
    explicit = dataset.trainer(nnUNetTrainerKAFSemi, plans=kaf_plans(dataset.plans))
    explicit.on_train_start()
    assert type(explicit.network).__name__ == "KAFUNet"


def test_the_studies_mixin_fits_and_labelled_batches_are_paired_with_plain_nnunet(make_dataset, tmp_path):
    file = tmp_path / "study_trainers_semi.py"
    source = Path(study.__file__).read_text()
    options = "epochs, iterations, validation_iterations, seeds = 2, 3, 1, (7,)"
    file.write_text(
        f"{source}\n"
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "from semisupervised.trainer import nnUNetTrainerKAFSemi, nnUNetTrainerSemi\n"
        f"class Plain(Study, nnUNetTrainer):\n    {options}\n"
        f"class Semi(Study, nnUNetTrainerSemi):\n    {options}\n    attributes = {{'teacher_decay': 0.5}}\n"
        f"class KAFSemi(Study, nnUNetTrainerKAFSemi):\n    {options}\n    warmup_epochs = 1\n"
    )
    spec = importlib.util.spec_from_file_location("study_trainers_semi", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dataset = make_dataset()
    seen = {}
    for name in ("Plain", "Semi", "KAFSemi"):
        trainer = dataset.trainer(getattr(module, name))
        trainer.num_epochs = 2
        seen[name] = []
        step = trainer.train_step

        def watched(batch, step=step, batches=seen[name]):
            batches.append(batch["data"].clone())
            return step(batch)

        trainer.train_step = watched
        trainer.run_training()
        if name == "Semi":
            assert trainer._teacher.decay == 0.5
    for name in ("Semi", "KAFSemi"):
        for ours, plain in zip(seen[name], seen["Plain"], strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
