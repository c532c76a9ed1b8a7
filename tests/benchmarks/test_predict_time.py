import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import phantoms
import predict_time
import predictions
import pytest
import torch
import untrained
from synthetic import Layout

from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.unet import KAFUNet

NAME = "Dataset907_Phantom"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / NAME
    phantoms.write_dataset(folder, phantoms.PhantomConfig(training=3, test=0, shape=(6, 32, 24)))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def _args(data: Path, work: Path, *more: str) -> Any:
    fixed = ["--device", "cpu", "--cases", "2", "--rounds", "2", "--warmup", "1", "--command-rounds", "0"]
    line = ["--data", str(data), "--work", str(work), "-c", "2d", "--threads", "1", "--disable-tta", *fixed, *more]
    return predict_time.parser().parse_args(line)


@pytest.fixture(scope="module")
def plans(work: Path) -> dict[str, Any]:
    """As nnU-Net would plan, with a small network."""
    layout = Layout((6, 32, 24), (3.0, 1.5, 1.5), (32, 24), 2, (4, 4, 4), ((1, 1), (2, 2), (2, 2)))
    resampling: dict[str, Any] = {"preprocessor_name": "DefaultPreprocessor"}
    for kind in ("data", "seg", "probabilities"):
        options = {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
        resampling[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{kind}_kwargs"] = options
    found = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"2d": {**layout.plan(), **resampling}},
    }
    file = work / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    return found


def test_models_are_what_nnunet_predicts_with(data: Path, work: Path, plans: dict[str, Any]) -> None:
    before = dict(os.environ)
    dataset_json = json.loads((data / "dataset.json").read_text())
    networks = {}
    for arm, trainer in untrained.TRAINERS.items():
        state = torch.random.get_rng_state()
        folder = untrained.write_model(arm, plans, dataset_json, "2d", work, seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert folder == work / "nnUNet_results" / NAME / f"{trainer.__name__}__nnUNetPlans__2d"
        predictor = predictions.nnUNetPredictor(device=torch.device("cpu"))
        predictor.initialize_from_trained_model_folder(str(folder), (0,), untrained.CHECKPOINT)
        assert predictor.allowed_mirroring_axes == (0, 1)
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        networks[arm] = predictor.network
    assert "continue_training" not in plans
    assert dict(os.environ) == before
    assert not isinstance(networks["plain"], KAFUNet)
    layers = [layer for layer in networks["kaf"].modules() if isinstance(layer, KAFLayer)]
    assert layers
    assert all(layer.diffusion.last.weight.abs().max() > 0 for layer in layers)


def test_the_document_and_its_table(
    data: Path, work: Path, plans: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "predict_time.json", torch.get_num_threads()
    document = predict_time.run(_args(data, work, "--out", str(out)))
    assert torch.get_num_threads() == threads
    assert json.loads(out.read_text()) == document
    assert {"machine", "versions", "seed", "torch_threads", "mirroring"} <= set(document)
    (result,) = document["results"]
    assert len(result["cases"]) == 2
    assert result["command"] == "not measured"
    for kind in ("in_process", "network"):
        assert result[kind]["rounds"] == 2
    assert 0 < result["network"]["plain"]["seconds"] < result["in_process"]["plain"]["seconds"]
    for arm in untrained.TRAINERS:
        written = {file.name for file in (work / "predictions" / arm).glob("*.nii.gz")}
        assert written == {f"{case}.nii.gz" for case in result["cases"]}
    result["in_process"].update(plain={"seconds": 2.0}, kaf={"seconds": 2.5}, ratio={"median": 1.254})
    out.write_text(json.dumps(document))
    capsys.readouterr()
    predict_time.main(["--table", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(f"| {NAME} | `2d` | 2 | 2.00 s, 2.50 s, **1.25** |")
    assert lines[2].endswith("| not measured |")


def test_an_old_model_does_not_keep_its_layers(data: Path, work: Path, plans: dict[str, Any]) -> None:
    dataset_json = json.loads((data / "dataset.json").read_text())
    file = untrained.write_model("kaf", plans, dataset_json, "2d", work, seed=3) / "plans.json"
    written = json.loads(file.read_text())
    kaf = predict_time.kaf_block(file.parent, "2d")
    written["configurations"]["2d"]["architecture"]["arch_kwargs"]["kaf"] = {**kaf, "num_blocks": 7}
    file.write_text(json.dumps(written))
    untrained.write_model("kaf", plans, dataset_json, "2d", work, seed=3)
    assert predict_time.kaf_block(file.parent, "2d") == kaf


def test_a_prediction_without_output_is_an_error(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "b.nii.gz").touch()  # of an earlier round
    arm = predictions.checked(lambda: (output / "a.nii.gz").touch(), output, ["a.nii.gz", "b.nii.gz"])
    with pytest.raises(RuntimeError, match=r"wrote no \['b.nii.gz'\]"):
        arm(0)()
    predictions.checked(lambda: (output / "b.nii.gz").touch(), output, ["b.nii.gz"])(0)()


def test_command_is_the_stock_command(data: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], Path]] = []
    monkeypatch.setattr(predictions, "call", lambda words, folder: calls.append((words, folder)))
    output = tmp_path / "out"
    predictions.command("kaf", NAME, "2d", tmp_path / "in", output, [], _args(data, work))(0)()
    ((words, folder),) = calls
    assert folder == work
    assert words[0] == "nnUNetv2_predict"
    options = dict(pairwise(words))
    assert options["-tr"] == "nnUNetTrainerKAFScratch"
    assert (options["-d"], options["-c"], options["-f"], options["-device"]) == (NAME, "2d", "0", "cpu")
    assert "--disable_tta" in words


def test_a_dataset_is_planned_once_with_the_stock_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def call(words: list[str], folder: Path) -> None:
        calls.append(words)
        file = folder / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"plans_name": "nnUNetPlans"}))

    monkeypatch.setattr(predictions, "call", call)
    for _ in range(2):
        assert predictions.plan(data, _args(data, tmp_path)) == {"plans_name": "nnUNetPlans"}
    (words,) = calls
    assert words[:3] == ["nnUNetv2_plan_and_preprocess", "-d", "907"]
    assert (tmp_path / "nnUNet_raw" / NAME / "dataset.json").samefile(data / "dataset.json")


def test_a_failing_command_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exited with 3") as error:
        predictions.call(["sh", "-c", "echo the reason; exit 3"], tmp_path)
    assert "the reason" in str(error.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    with pytest.raises(FileNotFoundError, match=r"no \*_0000.nii.gz in imagesTr"):
        predictions.draw_cases(tmp_path, _args(tmp_path, tmp_path / "work"))
