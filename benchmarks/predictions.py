"""What `predict_time` compares: nnU-Net's prediction in this process, and its stock command."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dice_vs_plain import link
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from untrained import CHECKPOINT, TRAINERS, folders

Arm = Callable[[int], Callable[[], None]]
"""As `common.alternate` takes it: prepares a round and returns what is timed."""


def draw_cases(data: Path, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Link the images of some cases into a folder to predict; returns it and the cases."""
    ending = json.loads((data / "dataset.json").read_text())["file_ending"]
    first = sorted((data / "imagesTr").glob(f"*_0000{ending}"))
    if not first:
        raise FileNotFoundError(
            f"--data {data}: found no *_0000{ending} in imagesTr; give an nnU-Net raw dataset folder"
        )
    names = [file.name.removesuffix(f"_0000{ending}") for file in first]
    drawn = sorted(np.random.default_rng(args.seed).permutation(names)[: args.cases].tolist())
    folder: Path = args.work / "images" / data.name
    shutil.rmtree(folder, ignore_errors=True)
    for name in drawn:
        link(sorted((data / "imagesTr").glob(f"{name}_[0-9][0-9][0-9][0-9]{ending}")), folder)
    return folder, drawn


def plan(data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plan a dataset in the scratch folder with nnU-Net's command, once; nothing is preprocessed to disk."""
    raw = args.work / "nnUNet_raw" / data.name
    raw.parent.mkdir(parents=True, exist_ok=True)
    if not raw.exists():
        raw.symlink_to(data.resolve())
    file = args.work / "nnUNet_preprocessed" / data.name / "nnUNetPlans.json"
    if not file.exists():
        (args.work / "nnUNet_preprocessed").mkdir(exist_ok=True)
        workers = str(os.cpu_count() or 1)
        call(["nnUNetv2_plan_and_preprocess", "-d", data.name[7:10], "--no_pp", "-npfp", workers], args.work)
    plans: dict[str, Any] = json.loads(file.read_text())
    return plans


def call(command: Sequence[str], work: Path) -> None:
    """Run a command of nnU-Net on the scratch folders.

    Raises:
        RuntimeError: It failed; the message ends with its last output.
    """
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    own = {**os.environ, **folders(work), "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-3000:]}")


def in_process(
    model: Path, images: Path, output: Path, expected: Sequence[str], network: list[float], args: argparse.Namespace
) -> Arm:
    """Predict all images in this process.

    Args:
        model: The model folder.
        images: Folder of the images.
        output: Folder of the predictions; emptied before each round.
        expected: Files that a round must write.
        network: Takes the seconds that each image spends in the network.
        args: Command line.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            use_mirroring=not args.disable_tta, device=torch.device(args.device), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(model), (0,), CHECKPOINT)
    predict = predictor.predict_logits_from_preprocessed_data

    def timed(data: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        logits: torch.Tensor = predict(data)  # on the CPU when it returns, so nothing is left running
        network.append(time.perf_counter() - start)
        return logits

    predictor.predict_logits_from_preprocessed_data = timed

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            predictor.predict_from_files_sequential(str(images), str(output))

    return checked(work, output, expected)


def command(
    arm: str,
    data: str,
    configuration: str,
    images: Path,
    output: Path,
    expected: Sequence[str],
    args: argparse.Namespace,
) -> Arm:
    """Predict all images with the stock command; arguments as of `in_process`."""
    model = ["-d", data, "-c", configuration, "-f", "0", "-tr", TRAINERS[arm].__name__, "-chk", CHECKPOINT]
    workers = ["-npp", str(args.workers), "-nps", str(args.workers)]
    rest = ["-device", args.device, "--disable_progress_bar", *(["--disable_tta"] if args.disable_tta else [])]
    words = ["nnUNetv2_predict", "-i", str(images), "-o", str(output), *model, *workers, *rest]
    return checked(lambda: call(words, args.work), output, expected)


def checked(work: Callable[[], object], output: Path, expected: Sequence[str]) -> Arm:
    """An arm that empties the output, works, and makes sure that every case was written."""

    def prepare(_: int) -> Callable[[], None]:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)

        def run() -> None:
            work()
            missing = [name for name in expected if not (output / name).is_file()]
            if missing:
                raise RuntimeError(f"the prediction wrote no {missing} into {output}")

        return run

    return prepare
