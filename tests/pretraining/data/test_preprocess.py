from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_kaf.errors import KAFError
from pretraining.data.bad_images import BadImages
from pretraining.data.preprocess import Preprocessor, cache_folder, preprocess_source
from pretraining.data.raw import RawSource, find_sources
from pretraining.task import Task, resolve_task

Texture = Callable[[tuple[int, ...], int], np.ndarray]


def plan_preprocessing(tiny: Any) -> None:
    """Add what nnU-Net's preprocessor needs to the tiny plans."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    for configuration in tiny.plans["configurations"].values():
        configuration["preprocessor_name"] = "DefaultPreprocessor"
        for kind in ("data", "seg"):
            configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    statistics = {"mean": 0.0, "std": 1.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0, "min": -9.0, "max": 9.0}
    tiny.plans["foreground_intensity_properties_per_channel"] = {"0": {**statistics, "median": 0.0}}
    tiny.plans["image_reader_writer"] = "SimpleITKIO"
    tiny.plans["transpose_forward"] = [0, 1, 2]
    tiny.write_plans()


@pytest.fixture(params=["2d", "3d_fullres"])
def configuration(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(tiny: Any, configuration: str) -> Task:
    plan_preprocessing(tiny)
    return resolve_task("123", configuration, "nnUNetPlans")


def write(path: Path, image: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 4.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = sitk.GetImageFromArray(image[0])
    volume.SetSpacing([float(s) for s in spacing])
    sitk.WriteImage(volume, str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path, make_texture: Texture) -> Path:
    for i in range(4):
        write(tmp_path / "images" / f"case_{i}_0000.nii.gz", make_texture((1, 6, 20 + i, 18), i) + 5)
    return tmp_path / "images"


def source_of(task: Task, folder: Path) -> RawSource:
    return find_sources(task, [], [folder], BadImages())[0]


def run(task: Task, folder: Path, workers: int = 1) -> dict[str, Path]:
    """All cases, none of which may be bad."""
    bad = BadImages()
    files = preprocess_source(task, source_of(task, folder), bad, workers)
    bad.finish(skip_bad=False)
    return files


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that nnU-Net preprocesses from now on."""
    called: list[str] = []
    original = DefaultPreprocessor.run_case

    def counted(self: Any, image_files: list[str], *args: Any) -> Any:
        called.append(Path(image_files[0]).name.split(".")[0][:-5])
        return original(self, image_files, *args)

    monkeypatch.setattr(DefaultPreprocessor, "run_case", counted)
    return called


def test_result_and_layout_are_nnunets(task: Task, tiny: Any, folder: Path, tmp_path: Path) -> None:
    write(folder / "coarse_0000.nii.gz", sitk.GetArrayFromImage(sitk.ReadImage(folder / "case_0_0000.nii.gz"))[None],
          (2.0, 1.5, 8.0))  # fmt: skip
    files = run(task, folder)
    plans = PlansManager(tiny.plans)
    config = plans.get_configuration(task.configuration)
    key = source_of(task, folder).key
    for case in ("case_0", "case_3", "coarse"):
        truncated = tmp_path / "truth" / case
        truncated.parent.mkdir(exist_ok=True)
        raw = [str(folder / f"{case}_0000.nii.gz")]
        description = str(tiny.folder / "dataset.json")
        DefaultPreprocessor(verbose=False).run_case_save(str(truncated), raw, None, plans, config, description)
        ours, theirs = blosc2.open(files[f"{key}/{case}"]), blosc2.open(f"{truncated}.b2nd")
        assert np.array_equal(ours[:], theirs[:])
        assert (ours.chunks, ours.blocks, ours.dtype) == (theirs.chunks, theirs.blocks, theirs.dtype)
    assert list(files) == [f"{key}/{case}" for case in ("case_0", "case_1", "case_2", "case_3", "coarse")]
    assert all(path.parent == task.image_folder.with_name(f"{task.image_folder.name}_kaf_images") / key
               for path in files.values())  # fmt: skip


def test_the_number_of_workers_does_not_matter(task: Task, folder: Path) -> None:
    reference = {name: blosc2.open(path)[:] for name, path in run(task, folder, 1).items()}
    for path in (cache_folder(task) / source_of(task, folder).key).iterdir():
        path.unlink()
    parallel = run(task, folder, 4)
    assert list(parallel) == list(reference)
    assert all(np.array_equal(blosc2.open(path)[:], reference[name]) for name, path in parallel.items())


def test_only_changes_are_preprocessed_again(
    task: Task, tiny: Any, folder: Path, make_texture: Texture, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = counting(monkeypatch)
    before = run(task, folder)
    assert sorted(called) == [f"case_{i}" for i in range(4)]
    called.clear()
    assert run(task, folder) == before
    assert called == []

    write(folder / "case_1_0000.nii.gz", make_texture((1, 5, 9, 8), 9))
    write(folder / "case_1-0123456789abcdef_0000.nii.gz", make_texture((1, 5, 9, 8), 10))  # a similar name
    after = run(task, folder)
    assert sorted(called) == ["case_1", "case_1-0123456789abcdef"]
    assert len(list(cache_folder(task).rglob("*"))) == 1 + 5  # the outdated one is gone, the similar one is not
    changed = [name for name in before if before[name] != after[name]]
    assert [name.split("/")[1] for name in changed] == ["case_1"]
    run(task, folder)
    assert len(list(cache_folder(task).rglob("*"))) == 1 + 5

    called.clear()
    tiny.plans["configurations"][task.configuration]["batch_size"] = 7  # does not change an image
    tiny.write_plans()
    run(resolve_task("123", task.configuration, "nnUNetPlans"), folder)
    assert called == []
    tiny.plans["configurations"][task.configuration]["normalization_schemes"] = ["CTNormalization"]
    tiny.write_plans()
    run(resolve_task("123", task.configuration, "nnUNetPlans"), folder)
    assert len(called) == 5


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("plans", "image_reader_writer", "NibabelIO"),
        ("plans", "transpose_forward", [2, 0, 1]),
        ("plans", "foreground_intensity_properties_per_channel", {"0": {"mean": 3.0}}),
        ("configuration", "spacing", [2.0, 1.0, 1.0]),
        ("configuration", "normalization_schemes", ["CTNormalization"]),
        ("configuration", "use_mask_for_norm", [True]),
        ("configuration", "resampling_fn_data_kwargs", {"order": 1}),
        ("task", "channels", 2),
        ("nothing", "patch_size", [8, 8, 8]),
        ("nothing", "batch_size", 99),
    ],
)
@pytest.mark.parametrize("configuration", ["3d_fullres"])
def test_the_file_name_follows_all_that_changes_an_image(
    task: Task, folder: Path, configuration: str, place: str, key: str, value: Any
) -> None:
    source = source_of(task, folder)
    before = Preprocessor(task).target(source, "case_0")
    plans = json.loads(json.dumps(task.plans))
    if place == "task":
        task = replace(task, **{key: value})
    (plans if place == "plans" else plans["configurations"][configuration])[key] = value
    after = Preprocessor(replace(task, plans=plans)).target(source, "case_0")
    assert (after == before) is (place == "nothing")


def test_the_raw_folder_is_not_written(task: Task, folder: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    modified = folder.stat().st_mtime_ns
    run(task, folder)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert folder.stat().st_mtime_ns == modified


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bad_files_are_all_found_and_good_ones_stay(
    task: Task, folder: Path, make_texture: Texture, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    cut = folder / "case_0_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "case_2_0000.nii.gz").write_bytes(b"")
    write(folder / "two_0000.nii.gz", make_texture((1, 6, 9, 8), 0))
    write(folder / "two_0001.nii.gz", make_texture((1, 6, 9, 8), 1))
    bad = BadImages()
    files = preprocess_source(task, source_of(task, folder), bad, num_workers)
    assert [name.split("/")[1] for name in files] == ["case_1", "case_3"]
    with pytest.raises(KAFError, match=r"^3 bad image") as caught:
        bad.finish(skip_bad=False)
    for name in ("case_0_0000", "case_2_0000", "two_0000"):
        assert name in str(caught.value)
    called = counting(monkeypatch)
    assert preprocess_source(task, source_of(task, folder), BadImages(), num_workers) == files
    assert called == []  # good ones are cached, bad ones do not get that far


def test_a_failing_preprocessor_is_a_bad_image(task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DefaultPreprocessor.run_case

    def failing(self: Any, files: list[str], *args: Any) -> Any:
        if "case_1" in files[0]:
            raise ValueError("cannot resample\nbecause of this")
        data, seg, properties = original(self, files, *args)
        return (data[:, :0] if "case_2" in files[0] else data), seg, properties

    monkeypatch.setattr(DefaultPreprocessor, "run_case", failing)
    with pytest.raises(KAFError) as caught:
        run(task, folder)
    assert "case_1_0000.nii.gz: found an image that nnU-Net cannot preprocess (ValueError: because of this" in str(
        caught.value
    )
    assert "case_2_0000.nii.gz: found shape (1, 0, " in str(caught.value)


def test_a_full_disk_stops_the_run(task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = blosc2.asarray

    def short(array: np.ndarray, **kwargs: Any) -> Any:
        return original(np.zeros_like(array), **kwargs)

    for replacement in (short, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no space"))):
        with monkeypatch.context() as patch:
            patch.setattr(blosc2, "asarray", replacement)
            with pytest.raises(KAFError, match="could not save"):
                run(task, folder)
        assert [path for path in cache_folder(task).rglob("*") if path.is_file()] == []
    assert len(run(task, folder)) == 4


def test_leftovers_of_killed_runs_are_removed(task: Task, folder: Path) -> None:
    place = cache_folder(task) / source_of(task, folder).key
    place.mkdir(parents=True)
    old, young = place / ".case_0-00.b2nd.1-1.tmp", place / ".case_0-00.b2nd.2-2.tmp"
    for path in (old, young):
        path.write_bytes(b"half an image")
    os.utime(old, (time.time() - 7200,) * 2)
    assert len(run(task, folder)) == 4
    assert not old.exists()
    assert young.exists()  # perhaps of a run that is going on


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from pretraining.data.bad_images import BadImages
    from pretraining.data.preprocess import preprocess_source
    from pretraining.data.raw import find_sources
    from pretraining.task import resolve_task

    task, done, replace = resolve_task("123", sys.argv[1], "nnUNetPlans"), [], os.replace

    def kill_third(source, target):
        done.append(target)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill_third
    source, = find_sources(task, [], [Path(sys.argv[2])], BadImages())
    preprocess_source(task, source, BadImages(), 1)
"""


@pytest.mark.parametrize("configuration", ["3d_fullres"])  # once is enough: it starts a process
def test_kill_9_leaves_a_state_to_go_on_from(
    task: Task, configuration: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [sys.executable, "-c", textwrap.dedent(KILLED), configuration, str(folder)]
    killed = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = list(cache_folder(task).rglob("*.b2nd"))
    assert len(finished) == 2
    called = counting(monkeypatch)
    files = run(task, folder)
    assert len(called) == 2
    assert set(finished) < set(files.values())


def test_two_runs_at_once(task: Task, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run(task, folder, 2), range(2))
    assert first == second
    assert sorted(path for path in cache_folder(task).rglob("*.b2nd")) == sorted(first.values())
    assert all(np.isfinite(blosc2.open(path)[:]).all() for path in first.values())


def test_far_spacings_and_constant_images_are_mentioned(
    task: Task, folder: Path, make_texture: Texture, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "near_0000.nii.gz", make_texture((1, 6, 9, 8), 0), (1.9, 0.6, 4.0))
    write(folder / "far_0000.nii.gz", make_texture((1, 6, 9, 8), 1), (3.0, 1.0, 4.0))
    write(folder / "slices_0000.nii.gz", make_texture((1, 6, 9, 8), 2), (1.0, 1.0, 20.0))
    write(folder / "flat_0000.nii.gz", np.full((1, 6, 9, 8), 3.0, np.float32))
    with caplog.at_level("INFO"):
        run(task, folder)
    in_2d = task.configuration == "2d"  # the distance of slices is not changed in 2D
    assert f"{1 if in_2d else 2} image(s) have a spacing" in caplog.text
    assert "1.0, 3.0)" in caplog.text
    assert "flat_0000.nii.gz is constant" in caplog.text
