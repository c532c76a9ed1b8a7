"""Time of nnUNetv2_predict on whole cases, plain nnU-Net and KAF, in alternation.

    python benchmarks/predict_time.py --data <nnU-Net raw dataset folder> ... --work <scratch folder>
    python benchmarks/predict_time.py --table

Plans each dataset with nnU-Net's own commands and writes a model folder per arm. The models are not trained: the
weights' values do not change what is computed. Three times are compared:

- in process: `nnUNetPredictor.predict_from_files_sequential`, which reads, preprocesses, predicts, resamples and writes
  every case in this process. The headline.
- network: the part of it that predicts the preprocessed image (sliding window, mirroring, loading the weights).
- command: the stock command, with the start of Python, imports and worker processes, which are the same for both arms
  and make the ratio look better than what the network costs.

Ratios are medians of the ratios within a round, because the machine's speed drifts between rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, load_average, machine, markdown, ratios, stopwatch, write_json
from predictions import command, draw_cases, in_process, plan
from untrained import TRAINERS, write_model

from nnunetv2_kaf.files import versions

LOGGER = logging.getLogger("predict_time")
RESULT = Path(__file__).parent / "results" / "predict_time.json"
KINDS = {"in_process": "in process", "network": "network", "command": "command"}
NOT_MEASURED = "not measured"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or show its results."""
    args = parser().parse_args(arguments)
    if not args.table:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        if not args.data or args.work is None:
            parser().error("--data and --work are needed to measure; --table shows the results in --out")
        run(args)
    sys.stdout.write(table(json.loads(args.out.read_text())) + ("\n" if args.table else f"\n{args.out}\n"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="nnU-Net raw dataset folders")
    parser.add_argument("--work", type=Path, help="scratch folder; kept, plans in it are used again")
    parser.add_argument("-c", "--configurations", nargs="+", default=["2d", "3d_fullres"])
    parser.add_argument("--cases", type=int, default=2, help="of each dataset, drawn with the seed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--disable-tta", action="store_true", help="no mirroring")
    parser.add_argument("--rounds", type=int, default=10, help="in process; both arms are timed in each")
    parser.add_argument("--command-rounds", type=int, default=10, help="of the whole command; 0 = not measured")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--threads", type=int, help="of torch in process (default: as the command sets them)")
    parser.add_argument("--workers", type=int, default=1, help="the command's -npp and -nps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; the document is written after each configuration, so that an interruption loses one."""
    threads = args.threads or (os.cpu_count() if args.device == "cpu" else 1) or 1
    document: dict[str, Any] = {
        "what": "seconds of predicting whole cases, medians; ratios are medians of the ratios within a round",
        "mirroring": not args.disable_tta,
        "seed": args.seed,
        "torch_threads": threads,
        "command_workers": args.workers,
        "machine": machine(torch.device(args.device)),
        "versions": versions(),
        "results": [],
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for data in args.data:
            images, cases = draw_cases(data, args)
            plans = plan(data, args)
            for configuration in args.configurations:
                result = measure(data, plans, configuration, images, cases, args)
                document["results"].append({"data": data.name, "cases": cases, **result})
                write_json(document, args.out)
    finally:
        torch.set_num_threads(before)
    return document


def measure(
    data: Path,
    plans: Mapping[str, Any],
    configuration: str,
    images: Path,
    cases: Sequence[str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Measure both arms with one configuration."""
    dataset_json = json.loads((data / "dataset.json").read_text())
    models = {a: write_model(a, plans, dataset_json, configuration, args.work, args.seed) for a in TRAINERS}
    expected = [f"{case}{dataset_json['file_ending']}" for case in cases]
    outputs = {a: args.work / "predictions" / a for a in TRAINERS}
    network: dict[str, list[float]] = {a: [] for a in TRAINERS}
    inside = {a: in_process(models[a], images, outputs[a], expected, network[a], args) for a in TRAINERS}
    outside = {a: command(a, data.name, configuration, images, outputs[a], expected, args) for a in TRAINERS}
    start = load_average()
    clock = stopwatch(torch.device(args.device))
    seconds = {"in_process": alternate(inside, clock, args.rounds, args.warmup)}
    per_round = {a: np.array(times).reshape(-1, len(cases)).sum(1)[args.warmup :] for a, times in network.items()}
    seconds["network"] = {a: [(float(wall), 0.0) for wall in times] for a, times in per_round.items()}
    if args.command_rounds:
        seconds["command"] = alternate(outside, clock, args.command_rounds, args.warmup)
    found = {kind: summarise(times) for kind, times in seconds.items()}
    LOGGER.info("%s %s: %s", data.name, configuration, {kind: one["ratio"]["median"] for kind, one in found.items()})
    return {
        "configuration": configuration,
        "patch_size": plans["configurations"][configuration]["patch_size"],
        "kaf": kaf_block(models["kaf"], configuration),
        "warmup": args.warmup,
        "load_average": {"start": start, "end": load_average()},
        **{kind: found.get(kind, NOT_MEASURED) for kind in KINDS},
    }


def kaf_block(model: Path, configuration: str) -> dict[str, Any]:
    """The layers that a model's plans name."""
    plan = json.loads((model / "plans.json").read_text())["configurations"][configuration]
    block: dict[str, Any] = plan["architecture"]["arch_kwargs"]["kaf"]
    return block


def summarise(seconds: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Medians and quartiles of the wall seconds, and the ratio to plain nnU-Net."""
    out: dict[str, Any] = {"rounds": len(seconds["plain"])}
    for arm, times in seconds.items():
        low, middle, high = np.percentile([wall for wall, _ in times], [25, 50, 75])
        out[arm] = {"seconds": round(float(middle), 4), "quartiles": [round(float(low), 4), round(float(high), 4)]}
    return {**out, "ratio": ratios(seconds, "plain")["kaf"]}


def table(document: Mapping[str, Any]) -> str:
    """Markdown table: seconds and ratio of each kind of time."""
    header = ["data", "configuration", "cases", *(f"{title}: plain, KAF, ratio" for title in KINDS.values())]
    rows = []
    for result in document["results"]:
        row = [result["data"], f"`{result['configuration']}`", str(len(result["cases"]))]
        for kind in KINDS:
            found = result[kind]
            if isinstance(found, str):
                row.append(found)
                continue
            plain, kaf = found["plain"]["seconds"], found["kaf"]["seconds"]
            row.append(f"{plain:.2f} s, {kaf:.2f} s, **{found['ratio']['median']:.2f}**")
        rows.append(row)
    return markdown(header, rows)


if __name__ == "__main__":
    main()
