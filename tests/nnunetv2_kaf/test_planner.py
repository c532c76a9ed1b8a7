import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_kaf import planner
from nnunetv2_kaf.config import KAFConfig

CHANNELS = {"0": "T1", "1": "T2"}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Raw dataset.json, empty image files and a fingerprint: what planning reads."""
    for variable in ("raw", "preprocessed", "results"):
        (tmp_path / variable / "Dataset991_Plan").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    raw, preprocessed = tmp_path / "raw/Dataset991_Plan", tmp_path / "preprocessed/Dataset991_Plan"
    labels = {"background": 0, "organ": 1, "lesion": 2}
    description = {
        "channel_names": CHANNELS, "labels": labels, "numTraining": 10, "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(description))
    for folder, suffixes in (("imagesTr", ["_0000", "_0001"]), ("labelsTr", [""])):
        (raw / folder).mkdir()
        for case in range(10):
            for suffix in suffixes:
                (raw / folder / f"case{case}{suffix}.nii.gz").touch()
    intensities = {
        str(c): {k: 1.0 for k in ("mean", "std", "median", "min", "max", "percentile_00_5", "percentile_99_5")}
        for c in range(2)
    }
    fingerprint = {
        "spacings": [[3.0, 1.0, 1.0]] * 10,
        "shapes_after_crop": [[24, 96, 80]] * 10,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": intensities,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return preprocessed


def test_plans_name_the_kaf_network_and_share_preprocessed_data(dataset: Path) -> None:
    planner.nnUNetPlannerKAF("Dataset991_Plan").plan_experiment()
    plans = json.loads((dataset / "nnUNetKAFPlans.json").read_text())
    plain = json.loads((dataset / "nnUNetPlans.json").read_text())
    assert plans["experiment_planner_used"] == "nnUNetPlannerKAF"
    for name in ("2d", "3d_fullres"):
        ours, theirs = plans["configurations"][name], plain["configurations"][name]
        assert ours["data_identifier"] == theirs["data_identifier"] == f"nnUNetPlans_{name}"
        assert ours["architecture"]["network_class_name"] == "nnunetv2_kaf.unet.KAFUNet"
        options = ours["architecture"]["arch_kwargs"]
        assert options["spacing"] == ours["spacing"]
        assert KAFConfig.from_dict(options["kaf"]) == KAFConfig(detection_channels=(0, 1)).planned(
            ours["patch_size"], options["n_stages"]
        )
        assert theirs["architecture"]["network_class_name"].endswith("PlainConvUNet")


def test_existing_plain_plans_are_not_touched(dataset: Path) -> None:
    ExperimentPlanner("Dataset991_Plan").plan_experiment()
    file = dataset / "nnUNetPlans.json"
    plans: dict[str, Any] = json.loads(file.read_text())
    # planned for another spacing: its data must not be shared
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    file.write_text(json.dumps(plans))
    before = file.read_bytes()
    ours = planner.nnUNetPlannerKAF("Dataset991_Plan").plan_experiment()["configurations"]
    assert file.read_bytes() == before
    assert ours["3d_fullres"]["data_identifier"] == "nnUNetKAFPlans_3d_fullres"
    assert ours["2d"]["data_identifier"] == "nnUNetPlans_2d"


@pytest.mark.parametrize("size", ["M", "L", "XL"])
def test_residual_presets(size: str, dataset: Path) -> None:
    cls = getattr(planner, f"nnUNetPlannerKAFResEnc{size}")
    plans = cls("Dataset991_Plan").plan_experiment()
    assert plans["plans_name"] == f"nnUNetKAFResEncUNet{size}Plans"
    options = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert "n_blocks_per_stage" in options
    assert "kaf" in options
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"


def test_paper_preset(dataset: Path) -> None:
    plans = planner.nnUNetPlannerKAFPaper("Dataset991_Plan", gpu_memory_target_in_gb=40).plan_experiment()
    entry = plans["configurations"]["2d"]
    options = entry["architecture"]["arch_kwargs"]
    every = tuple(range(options["n_stages"] - 1))
    expected = KAFConfig.paper(detection_channels=(0, 1), levels=every).planned(
        entry["patch_size"], options["n_stages"]
    )
    assert KAFConfig.from_dict(options["kaf"]) == expected


def test_kaf_layers_count_in_the_memory_estimate(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a budget that the plain network just fills leaves less room with the layers
    plain = ExperimentPlanner("Dataset991_Plan", 2.0).plan_experiment()["configurations"]["3d_fullres"]
    ours = planner.nnUNetPlannerKAF("Dataset991_Plan", 2.0).plan_experiment()["configurations"]["3d_fullres"]
    size = [int(np.prod(c["patch_size"]) * c["batch_size"]) for c in (plain, ours)]
    assert size[1] <= size[0]
    estimates = []
    for entry in (plain["architecture"], ours["architecture"]):
        estimates.append(
            ExperimentPlanner.static_estimate_VRAM_usage(
                plain["patch_size"],
                2,
                3,
                entry["network_class_name"],
                entry["arch_kwargs"],
                entry["_kw_requires_import"],
            )
        )
    assert estimates[1] > 1.03 * estimates[0]


@pytest.mark.parametrize("kind", ["KAF", "KAFResEncM"])
def test_data_are_not_shared_if_the_intensities_differ(kind: str, dataset: Path) -> None:
    """Plain plans of fewer cases: CT would be normalised otherwise."""
    ExperimentPlanner("Dataset991_Plan").plan_experiment()
    file = dataset / "nnUNetPlans.json"
    plans: dict[str, Any] = json.loads(file.read_text())
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 10
    file.write_text(json.dumps(plans))
    ours = getattr(planner, f"nnUNetPlanner{kind}")("Dataset991_Plan").plan_experiment()
    for name in ("2d", "3d_fullres"):
        assert ours["configurations"][name]["data_identifier"] == f"{ours['plans_name']}_{name}"
