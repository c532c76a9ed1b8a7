"""Does pretraining learn? Short runs of every preset in 2D and 3D, measured on held-out pairs before and after.

    python benchmarks/pretrain_learning.py --dataset 27 --work <scratch folder>
    python benchmarks/pretrain_learning.py --dataset 27 --work <scratch folder> --learning-rate 0.0005
    python benchmarks/pretrain_learning.py --table

Runs kaf-pretrain through its command line, one run after the other. Options that are not its own are passed on. A
finished run is not repeated, an unfinished one is continued. Writes one JSON; `--table` shows an existing one. The
runs are far too short to say which objective is best; losses of different objectives are not comparable.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import load_average, machine, markdown, write_json

from nnunetv2_kaf.files import versions
from nnunetv2_kaf.weights import read_checkpoint
from pretraining.checkpoint import FINAL
from pretraining.config import COMPONENTS
from pretraining.monitoring.monitor import MONITORED

LOGGER = logging.getLogger("pretrain_learning")
RESULT = Path(__file__).parent / "results" / "pretrain_learning.json"
_LOCAL = ("--weight-bottleneck", "0", "--weight-keypoints", "0", "--weight-transport", "0")
ARMS = {
    **{preset: (preset, "kaf", ()) for preset in ("kaf", "simclr", "gcl", "pcl")},
    **{f"{preset}_plain": (preset, "plain", ()) for preset in ("simclr", "gcl", "pcl")},
    "local": ("kaf", "kaf", _LOCAL),
    "local_unmatched": ("kaf", "kaf", (*_LOCAL, "--ambiguous", "unmatched")),
}
"""Preset, network and further options of every arm."""
SCHEDULES = {
    2: {"epochs": 5, "iterations": 100, "batch_size": 8},
    3: {"epochs": 5, "iterations": 50, "batch_size": 4},
}
"""Per number of axes: long enough to leave collapse, short enough for a GPU's few minutes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results, or show them."""
    args, further = parser().parse_known_args(arguments)
    if not args.table:
        if args.dataset is None or args.work is None:
            parser().error("--dataset and --work are needed to run (--table shows existing results)")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        write_json(run(args, further), args.out)
    sys.stdout.write(table(json.loads(args.out.read_text())) + ("\n" if args.table else f"\n{args.out}\n"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", help="number or name of a preprocessed dataset")
    parser.add_argument("--work", type=Path, help="folder of the runs; kept, so that the benchmark can continue")
    parser.add_argument("--configurations", nargs="+", default=["2d", "3d_fullres"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=1)
    for name in ("epochs", "iterations", "batch-size"):
        key = name.replace("-", "_")
        text = f"default: {SCHEDULES[2][key]} in 2D, {SCHEDULES[3][key]} in 3D"
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--finished", action="store_true", help="run nothing, write the results of finished runs")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    return parser


def run(args: argparse.Namespace, further: Sequence[str]) -> dict[str, Any]:
    """Do the runs that are missing and return the document of results."""
    before = load_average()
    runs = []
    for configuration in args.configurations:
        for arm in args.arms:
            folder = args.work / configuration / arm
            if args.finished and not (folder / FINAL).is_file():
                continue
            finish(command(args, configuration, arm, folder, further), folder)
            preset, network, _ = ARMS[arm]
            runs.append(
                {"configuration": configuration, "arm": arm, "preset": preset, "network": network, **report(folder)}
            )
    return {
        "what": "short pretraining runs: losses of the first and the last epoch; metrics on held-out pairs before "
        "training and after the last epoch",
        "dataset": args.dataset,
        "plans": args.plans,
        "fold": args.fold,
        "seed": args.seed,
        "passed_on": " ".join(further),
        "machine": machine(torch.device(args.device)),
        "load_average": {"start": before, "end": load_average()},
        "versions": versions(),
        "runs": runs,
    }


def command(args: argparse.Namespace, configuration: str, arm: str, folder: Path, further: Sequence[str]) -> list[str]:
    """The arguments of kaf-pretrain for a run; those of the user come last and win."""
    preset, network, options = ARMS[arm]
    schedule = {
        name: value if getattr(args, name) is None else getattr(args, name)
        for name, value in SCHEDULES[2 if configuration.startswith("2d") else 3].items()
    }
    return [
        *("--dataset", args.dataset, "-c", configuration, "-p", args.plans, "--fold", args.fold),
        *("--preset", preset, "--network", network, "--seed", str(args.seed)),
        *(text for name, value in schedule.items() for text in (f"--{name.replace('_', '-')}", str(value))),
        *("--device", args.device, "--num-workers", str(args.num_workers), "--output", str(folder), "--continue"),
        *options,
        *further,
    ]  # fmt: skip


def finish(arguments: Sequence[str], folder: Path) -> None:
    """Start or continue a run unless it is finished; the seconds of every attempt are kept.

    Raises:
        SystemExit: If the folder holds a run with other options, or the run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "attempts.json"
    attempts = json.loads(record.read_text()) if record.is_file() else []
    if attempts and attempts[0]["arguments"] != list(arguments):
        raise SystemExit(
            f"{folder} holds a run with other options: {' '.join(attempts[0]['arguments'])}\n"
            f"now: {' '.join(arguments)}\nChoose another --work, or delete that folder."
        )
    if (folder / FINAL).is_file():
        return
    LOGGER.info("kaf-pretrain %s", " ".join(arguments))
    attempt: dict[str, Any] = {"arguments": list(arguments), "seconds": None}
    attempts.append(attempt)
    # Before the run, so that an attempt that is killed is not forgotten: its seconds stay unknown.
    write_json(attempts, record)
    start = time.perf_counter()
    try:
        code = pretrain(arguments, folder / "output.log")
    finally:
        attempt["seconds"] = round(time.perf_counter() - start, 1)
        write_json(attempts, record)
    if code != 0 or not (folder / FINAL).is_file():
        raise SystemExit(f"kaf-pretrain ended with code {code} and is not finished; see {folder / 'output.log'}")


def pretrain(arguments: Sequence[str], log: Path) -> int:
    """Run kaf-pretrain; its output is added to a file."""
    with log.open("a") as file:
        program = [sys.executable, "-m", "pretraining", *arguments]
        return subprocess.run(program, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def report(folder: Path) -> dict[str, Any]:
    """What a finished run learned."""
    pretraining = read_checkpoint(folder / FINAL)["pretraining"]
    history, config = pretraining["history"], pretraining["config"]
    epochs = [entry for entry in history if entry["epoch"] > 0]
    attempts = json.loads((folder / "attempts.json").read_text())
    seconds = [attempt["seconds"] for attempt in attempts]
    return {
        **{name: config[name] for name in ("epochs", "iterations", "learning_rate")},
        "batch_size": pretraining["batch_size"],
        "training_images": len(pretraining["cases"]),
        "loss": {
            name: {"first_epoch": epochs[0][name], "last_epoch": epochs[-1][name]}
            for name in ("total", *COMPONENTS)
            if name in epochs[0]
        },
        "matched": epochs[-1].get("matched"),
        "metrics": {
            name: {"before": history[0].get(name, math.nan), "after": history[-1].get(name, math.nan)}
            for name in MONITORED
        },
        "attempts": len(attempts),
        "seconds": None if None in seconds else round(sum(seconds), 1),
    }


def table(document: Mapping[str, Any]) -> str:
    """Markdown table of the results; numbers change from the first epoch, or from before training, to the end."""
    header = [
        "configuration",
        "arm",
        "network",
        "loss",
        "recall at 1 (%)",
        "recall at 5 (%)",
        "alignment",
        "uniformity",
        "effective rank",
    ]
    rows = []
    for one in document["runs"]:
        metrics = one["metrics"]
        rows.append(
            [
                *(f"`{one[name]}`" for name in ("configuration", "arm", "network")),
                "<br>".join(
                    f"{name} {change(values, '.3f')}" for name, values in one["loss"].items() if name != "total"
                ),
                *(change(metrics[name], ".1f", 100) for name in ("recall_at_1", "recall_at_5")),
                *(change(metrics[name], ".3f") for name in ("alignment", "uniformity")),
                change(metrics["effective_rank"], ".1f"),
            ]
        )
    return markdown(header, rows)


def change(values: Mapping[str, float | None], style: str, factor: float = 1.0) -> str:
    """Write the first and the second value of a record."""
    first, second = values.values()
    return f"{number(first, style, factor)} to {number(second, style, factor)}"


def number(value: float | None, style: str, factor: float = 1.0) -> str:
    """Write a number, or that there is none."""
    return "n/a" if value is None else format(factor * value, style)


if __name__ == "__main__":
    main()
