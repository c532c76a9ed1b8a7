"""Time of a training step with unlabelled images against the same trainer without, loading and augmentation included.

    python benchmarks/semi_step_time.py
    python benchmarks/semi_step_time.py --cases "organ 2d" --rounds 20
    python benchmarks/semi_step_time.py --table

Trains nnU-Net's trainers and ours on a synthetic preprocessed dataset in a temporary folder. A step is everything that
happens between two steps in a training without data-loading processes (`nnUNet_n_proc_DA=0`): the labelled batch with
its augmentation, the unlabelled one with both views, teacher, network, optimiser. All arms take their steps in
alternation in one process; ratios are medians of the ratios within a round. On a CPU they are those of the processor
seconds, which other work on the machine disturbs less. Batches are those that a CPU can train.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from common import alternate, environment, load_average, machine, markdown, ratios, stopwatch, write_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pretrain_throughput import LAYOUTS
from synthetic import DATASET, Layout, write_dataset

from nnunetv2_kaf.files import versions
from nnunetv2_kaf.trainer import nnUNetTrainerKAF
from semisupervised.trainer import nnUNetTrainerKAFSemi, nnUNetTrainerSemi

LOGGER = logging.getLogger("semi_step_time")
RESULT = Path(__file__).parent / "results" / "semi_step_time.json"
TARGET = 2.3
PATIENTS = 4
CASES = {
    "organ 2d": replace(LAYOUTS["3d_isotropic"], patch_size=(56, 40), batch_size=9, strides=((1, 1), *[(2, 2)] * 3)),
    "organ 3d": replace(LAYOUTS["3d_isotropic"], batch_size=2),
    "heart 2d": replace(LAYOUTS["2d"], batch_size=4),
}
"""Plans of a small organ and of a heart, with batches for a CPU."""
ARMS: dict[str, tuple[type, str]] = {
    "plain": (nnUNetTrainer, "plain"),
    "plain_semi": (nnUNetTrainerSemi, "plain"),
    "kaf": (nnUNetTrainerKAF, "kaf"),
    "kaf_semi": (nnUNetTrainerKAFSemi, "kaf"),
}
"""Trainer, and the arm that it is compared with."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or show its results."""
    args = parser().parse_args(arguments)
    if not args.table:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        write_json(run(args), args.out)
    sys.stdout.write(table(json.loads(args.out.read_text())) + ("\n" if args.table else f"\n{args.out}\n"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of every arm")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    return parser


def run(args: argparse.Namespace, cases: Mapping[str, Layout] = CASES) -> dict[str, Any]:
    """Measure the chosen cases and return the document of results."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    return {
        "what": "seconds (on a CPU: of the processor) of a training step with unlabelled images against the same "
        "trainer without, medians",
        "target": TARGET,
        "machine": machine(device),
        "versions": versions(),
        "setting": {"torch_threads": torch.get_num_threads(), "rounds": args.rounds, "warmup": args.warmup},
        "cases": {name: measure(cases[name], device, args) for name in args.cases},
    }


def measure(layout: Layout, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of all arms on one layout, in alternation."""
    configuration = "2d" if len(layout.patch_size) == 2 else "3d_fullres"
    before = load_average()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(
            environment(
                nnUNet_preprocessed=str(root / "preprocessed"),
                nnUNet_results=str(root / "results"),
                nnUNet_raw=str(root),
                nnUNet_n_proc_DA="0",
                KAF_UNLABELLED=DATASET,
                KAF_PRETRAINED="none",
            )
        )
        folder = write_labelled(root / "preprocessed", {configuration: layout}, args.seed)
        steps = {}
        for name, (cls, _) in ARMS.items():
            steps[name] = partial(_prepared, _start(cls, folder, configuration, device, args.seed))
            LOGGER.info("%s is ready", name)
        seconds = alternate(steps, stopwatch(device), args.rounds, args.warmup)
    which = 1 if device.type == "cpu" else 0
    compared = {name: [(pair[which], pair[1 - which]) for pair in times] for name, times in seconds.items()}
    arms = {}
    for name, (_, baseline) in ARMS.items():
        median = float(np.median([first for first, _ in compared[name]]))
        arms[name] = {"step_seconds": round(median, 5), "ratio": ratios(compared, baseline)[name], "to": baseline}
    return {
        "patch_size": list(layout.patch_size),
        "batch_size": layout.batch_size,
        "features": list(layout.features),
        "load_average": {"start": before, "end": load_average()},
        "arms": arms,
    }


def write_labelled(root: Path, layouts: Mapping[str, Layout], seed: int) -> Path:
    """Write a dataset of which one patient is labelled and one validates; the others have no labels."""
    folder = write_dataset(root, layouts, PATIENTS, seed)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans |= {
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset_fingerprint.json").write_text("{}")
    for layout in layouts.values():
        images = folder / layout.folder
        for file in sorted(images.glob("patient00[01]_*.b2nd")):
            label = (blosc2.open(urlpath=str(file))[:] > 1).astype(np.int16)
            blosc2.asarray(label, urlpath=str(file.with_name(f"{file.stem}_seg.b2nd")))
            file.with_suffix(".pkl").write_bytes(pickle.dumps({"class_locations": {1: np.argwhere(label == 1)}}))
    split = [{key: [f"patient{p:03d}_frame{f:02d}" for f in (1, 2)] for p, key in enumerate(("train", "val"))}]
    (folder / "splits_final.json").write_text(json.dumps(split))
    return folder


def _start(cls: type, folder: Path, configuration: str, device: torch.device, seed: int) -> Any:
    """A trainer in its first epoch."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # nnU-Net's loaders draw from it
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    description = json.loads((folder / "dataset.json").read_text())
    # nnU-Net's trainers talk to stdout, which is for the result here
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer: Any = cls(plans, configuration, 0, description, device)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        if isinstance(trainer, nnUNetTrainerSemi):
            trainer._islands.one_piece[:] = True  # islands are looked for from the second epoch on
    return trainer


def _prepared(trainer: Any, _: int) -> Callable[[], object]:
    return lambda: trainer.train_step(next(trainer.dataloader_train))


def table(document: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = []
    for name, case in document["cases"].items():
        for arm, found in case["arms"].items():
            low, high = found["ratio"]["quartiles"]
            ratio = "" if arm == found["to"] else f"{found['ratio']['median']:.2f} ({low:.2f} to {high:.2f})"
            verdict = "" if not ratio else "met" if found["ratio"]["median"] <= document["target"] else "missed"
            rows.append(
                [name, str(case["batch_size"]), f"`{arm}`", f"{1000 * found['step_seconds']:.0f}", ratio, verdict]
            )
    header = [
        "case",
        "batch",
        "trainer",
        "ms",
        "times the same without unlabelled images",
        f"target {document['target']}",
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
