"""Dice of the KAF trainer against plain nnU-Net: same cases, same number of iterations, stock commands, one run.

    python benchmarks/dice_vs_plain.py --data <nnU-Net raw dataset folder> --work <scratch folder>

Draws the training and the test cases with a seed (test cases are used once, after training), plans, trains each arm
for the same number of iterations of the planned batch, predicts the test cases, evaluates them with
nnUNetv2_evaluate_folder, and writes one JSON. The arms differ from nnU-Net's and our trainers
in their length only. Interrupted runs continue: a finished step is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import processor

from nnunetv2_kaf.files import versions

LOGGER = logging.getLogger("dice_vs_plain")
DATASET = "Dataset941_DiceVsPlain"
PLANS = "nnUNetPlans"
ARMS = {"plain": "PlainShort", "kaf_scratch": "KAFScratchShort", "kaf_pretrained": "KAFShort"}
# nnU-Net's own way to change a schedule: trainers of the user, found through nnUNet_extTrainer (nnunetv2 >= 2.8)
TRAINERS = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_kaf.trainer import nnUNetTrainerKAF, nnUNetTrainerKAFScratch


class Short:
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {epochs}, {iterations}, 5


class PlainShort(Short, nnUNetTrainer): ...


class KAFShort(Short, nnUNetTrainerKAF): ...


class KAFScratchShort(Short, nnUNetTrainerKAFScratch): ...
"""
PRETRAINING = ("--epochs", "10", "--iterations", "50")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="nnU-Net raw dataset folder")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; kept, so that a run can continue")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--train-cases", type=int, default=40)
    parser.add_argument("--test-cases", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200, help="per epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dice_vs_plain.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    check_work(args)
    (args.work / "trainers").mkdir(parents=True, exist_ok=True)
    source = TRAINERS.format(epochs=args.epochs, iterations=args.iterations)
    (args.work / "trainers" / "short_trainers.py").write_text(source)
    test_cases = prepare(args)
    plan(args)
    summaries = {arm: run_arm(arm, args) for arm in args.arms}
    results = {arm: report(summary, test_cases, args.seed) for arm, summary in summaries.items()}
    for arm in args.arms:
        results[arm]["seconds"] = {
            p.stem.split(".")[-1]: float(p.read_text()) for p in marker(args, arm, "*").parent.glob(f"{arm}.*.done")
        }
    document = {
        "what": "foreground Dice of test cases, equal numbers of iterations, last checkpoint",
        "data": args.data.name,
        "configuration": args.configuration,
        "train_cases": args.train_cases,
        "test_cases": test_cases,
        "seed": args.seed,
        "iterations": args.epochs * args.iterations,
        "epochs": args.epochs,
        "pretraining": " ".join(PRETRAINING),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": args.device,
            "system": platform.platform(),
        },
        "versions": versions(),
        "results": results,
        "difference_to_plain": differences(results, args.seed),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    sys.stdout.write(table(document) + f"\n{args.out}\n")


def check_work(args: argparse.Namespace) -> None:
    """Refuse a work folder of other options, whose finished steps would be taken for those of this run."""
    options = {key: str(value) for key, value in vars(args).items() if key not in ("work", "arms", "out")}
    file: Path = args.work / "options.json"
    known = json.loads(file.read_text()) if file.is_file() else options
    differ = [f"{key} {known.get(key)} != {value}" for key, value in options.items() if known.get(key) != value]
    if differ:
        sys.exit(f"--work {args.work} holds a run with other options ({', '.join(differ)}). Name another folder.")
    args.work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options, indent=2) + "\n")


def prepare(args: argparse.Namespace) -> list[str]:
    """Write the training cases as a raw dataset of links, draw the test cases."""
    description = json.loads((args.data / "dataset.json").read_text())
    ending, channels = description["file_ending"], len(description["channel_names"])
    cases = sorted(p.name.removesuffix(ending) for p in (args.data / "labelsTr").glob(f"*{ending}"))
    order = np.random.default_rng(args.seed).permutation(len(cases))
    drawn = [cases[i] for i in order[: args.train_cases + args.test_cases]]
    training, test = drawn[: args.train_cases], sorted(drawn[args.train_cases :])
    raw = args.work / "nnUNet_raw" / DATASET
    for folder, names, kind in (("Tr", training, "train"), ("Ts", test, "test")):
        for name in names:
            images = [f"{name}_{c:04d}{ending}" for c in range(channels)]
            link([args.data / "imagesTr" / i for i in images], raw / f"images{folder}")
            link([args.data / "labelsTr" / f"{name}{ending}"], raw / f"labels{folder}")
        LOGGER.info("%d %s cases", len(names), kind)
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(training)}))
    # all labelled cases train; two of them also fill nnU-Net's validation part, whose result is not used
    splits = args.work / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits.parent.mkdir(parents=True, exist_ok=True)
    splits.write_text(json.dumps([{"train": sorted(training), "val": sorted(training)[:2]}]))
    return test


def link(files: Sequence[Path], folder: Path) -> None:
    """Symbolic links, so that the data folder is never written to."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


def marker(args: argparse.Namespace, arm: str, step: str) -> Path:
    """File that holds the seconds a finished step took."""
    work: Path = args.work
    return work / f"{arm}.{step}.done"


def run(args: argparse.Namespace, arm: str, step: str, command: Sequence[str]) -> None:
    """Run a command once; its output goes to a log beside the marker."""
    done = marker(args, arm, step)
    if done.exists():
        return
    LOGGER.info("%s: %s", arm, " ".join(command))
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(args.work / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")},
        "nnUNet_extTrainer": str(args.work / "trainers"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"],
    }
    start = time.perf_counter()
    with (args.work / f"{arm}.{step}.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    done.write_text(f"{time.perf_counter() - start:.1f}")


def plan(args: argparse.Namespace) -> None:
    """Plan and preprocess; `nnUNetPlannerKAF` also writes the plain `nnUNetPlans` that all arms use."""
    command = ["nnUNetv2_plan_and_preprocess", "-d", DATASET[7:10], "-pl", "nnUNetPlannerKAF", "-c", args.configuration]
    run(args, "all", "plan", [*command, "-npfp", "2", "-np", "2"])


def run_arm(arm: str, args: argparse.Namespace) -> Path:
    """Train, predict, evaluate; returns nnU-Net's summary.json."""
    trainer, plans = ARMS[arm], PLANS
    number, configuration = DATASET[7:10], args.configuration
    if arm == "kaf_pretrained":
        flags = ["-p", plans, "--fold", "all", "--seed", str(args.seed), "--device", args.device, *PRETRAINING]
        run(args, arm, "pretrain", ["kaf-pretrain", "--dataset", number, "-c", configuration, *flags])
    model = ["-tr", trainer, "-p", plans]
    run(args, arm, "train", ["nnUNetv2_train", number, configuration, "0", *model, "-device", args.device])
    raw, predictions = args.work / "nnUNet_raw" / DATASET, args.work / "predictions" / arm
    folders = ["-i", str(raw / "imagesTs"), "-o", str(predictions), "-d", number, "-c", configuration, "-f", "0"]
    run(args, arm, "predict", ["nnUNetv2_predict", *folders, *model, "-device", args.device, "-npp", "1", "-nps", "1"])
    result = args.work / "nnUNet_results" / DATASET / f"{trainer}__{plans}__{configuration}"
    files = ["-djfile", str(result / "dataset.json"), "-pfile", str(result / "plans.json"), "-np", "2"]
    run(args, arm, "evaluate", ["nnUNetv2_evaluate_folder", str(raw / "labelsTs"), str(predictions), *files])
    summary: Path = predictions / "summary.json"
    return summary


def report(summary_file: Path, test_cases: Sequence[str], seed: int) -> dict[str, Any]:
    """Per-case foreground Dice (mean over the classes) from nnU-Net's summary, with a bootstrap interval."""
    summary = json.loads(summary_file.read_text())
    per_case: dict[str, dict[str, float]] = {}
    for case in summary["metric_per_case"]:
        name = Path(case["prediction_file"]).name.split(".")[0]
        per_case[name] = {label: float(m["Dice"]) for label, m in case["metrics"].items()}
    means = np.array([np.nanmean(list(per_case[name].values())) for name in test_cases])
    return {
        "dice_mean": round(float(means.mean()), 4),
        "dice_interval_95": interval(means, seed),
        "dice_per_class": {c: round(float(np.nanmean([v[c] for v in per_case.values()])), 4) for c in summary["mean"]},
        "dice_per_case": {n: round(float(m), 4) for n, m in zip(test_cases, means, strict=True)},
    }


def interval(values: np.ndarray, seed: int, draws: int = 10000) -> list[float]:
    """95 % bootstrap interval of the mean over cases."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return [round(float(q), 4) for q in np.percentile(means, [2.5, 97.5])]


def differences(results: dict[str, Any], seed: int) -> dict[str, Any]:
    """Paired difference of each arm to plain nnU-Net."""
    if "plain" not in results:
        return {}
    plain = np.array(list(results["plain"]["dice_per_case"].values()))
    out = {}
    for arm in results:
        if arm != "plain":
            paired = np.array(list(results[arm]["dice_per_case"].values())) - plain
            out[arm] = {"mean": round(float(paired.mean()), 4), "interval_95": interval(paired, seed)}
    return out


def table(document: dict[str, Any]) -> str:
    """Markdown table of the results."""
    rows = [
        "| arm | foreground Dice | 95 % interval | paired difference to plain | 95 % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, result in document["results"].items():
        low, high = result["dice_interval_95"]
        row = f"| `{arm}` | {result['dice_mean']:.4f} | {low:.4f} to {high:.4f} |"
        difference = document["difference_to_plain"].get(arm)
        if difference is None:
            rows.append(row + " | |")
            continue
        low, high = difference["interval_95"]
        rows.append(row + f" {difference['mean']:+.4f} | {low:+.4f} to {high:+.4f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
