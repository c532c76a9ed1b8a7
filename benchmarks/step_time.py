"""Time and memory of a training step with KAF layers against plain nnU-Net, on nnU-Net's own plans.

    python benchmarks/step_time.py --device cpu
    python benchmarks/step_time.py --device cuda
    python benchmarks/step_time.py --device cpu --cases "Hippocampus 3d_fullres" --arms kaf paper_sparse
    python benchmarks/step_time.py --table

Needs no dataset. The step is nnU-Net's: forward with deep supervision, Dice and cross-entropy, backward, clipping, SGD;
on CUDA in mixed precision and compiled. All networks of a case take their steps in alternation in one process. Ratios
are medians of the ratios within a round, because the speed of a machine drifts. On a CPU the batches are smaller than
planned unless `--planned-batch` is given.

The results are written after each case. Cases that are not measured this time stay in the file, if machine, versions,
source and setting are the same as now; otherwise a copy of the file is kept and the table begins anew.

On Linux, memory that the C library hands back to the system between steps costs every network time on a CPU. It is kept
with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 in front of the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, load_average, machine, ratios, stopwatch, write_json
from memory import DEFINITION as MEMORY
from memory import peak_bytes
from networks import ARMS, CASES, Case, TrainingStep, build, make_batch, make_loss
from shares import DEFINITION as SHARES
from shares import shares
from step_table import table

import nnunetv2_kaf
from nnunetv2_kaf.files import versions

LOGGER = logging.getLogger("step_time")
RESULT = Path(__file__).parent / "results" / "step_time.json"
NOT_MEASURED = "not measured"
_ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or show its results."""
    args = parser().parse_args(arguments)
    if not args.table:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run(args)
    sys.stdout.write(table(json.loads(args.out.read_text())) + ("\n" if args.table else f"\n{args.out}\n"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=str([*CASES])
    )
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help="default: depends on the case; plain is always in"
    )
    parser.add_argument("--planned-batch", action="store_true", help="nnU-Net's batch size on a CPU, too")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of every network")
    parser.add_argument("--warmup", type=int, help="steps before them (default: 2, on CUDA 5)")
    parser.add_argument("--profiled", type=int, default=3, help="steps that the shares come from")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's choice)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA only, as nnU-Net"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    return parser


def run(args: argparse.Namespace, cases: Mapping[str, Case] = CASES) -> None:
    """Measure the chosen cases; the file of results is complete after each."""
    device = torch.device(args.device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here. Use --device cpu, or a machine with a GPU.")
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    document = read_document(args.out)
    section = section_of(document, identity(device, compiled), args.out)
    for name in args.cases:
        case = cases[name]
        size = case.batch_size(device, args.planned_batch)
        section["cases"][name] = NOT_MEASURED if size is None else measure(case, size, device, compiled, args)
        section["cases"] = {one: section["cases"][one] for one in cases if one in section["cases"]}
        write_json(document, args.out)
        LOGGER.info("%s is measured", name)


def identity(device: torch.device, compiled: bool) -> dict[str, Any]:
    """What all numbers of a table must have in common."""
    source = hashlib.sha256()
    for file in sorted(Path(nnunetv2_kaf.__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    return {
        "machine": machine(device),
        "versions": {**versions(), "source": source.hexdigest()[:16]},
        "setting": {
            "torch_threads": torch.get_num_threads(),
            "compiled": compiled,
            "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        },
    }


def read_document(path: Path) -> dict[str, Any]:
    """The results so far, or an empty document."""
    if path.is_file():
        document: dict[str, Any] = json.loads(path.read_text())
        return document
    what = "time and peak memory of a training step with KAF layers against plain nnU-Net, medians"
    return {"what": what, "memory": MEMORY, "shares": SHARES, "devices": {"cpu": NOT_MEASURED, "cuda": NOT_MEASURED}}


def section_of(document: dict[str, Any], own: dict[str, Any], path: Path) -> dict[str, Any]:
    """The part of a document that holds the device's results; it is made if there is none.

    Numbers of different conditions do not go into one table: if the part holds such, a copy of the file is kept, and
    the part begins anew.
    """
    device = own["machine"]["device"]
    section: Any = document["devices"][device]
    differing = [] if section == NOT_MEASURED else [key for key in own if section[key] != own[key]]
    if differing:
        kept = next(k for i in count(1) if not (k := path.with_name(f"{path.stem}.earlier{i}.json")).exists())
        shutil.copyfile(path, kept)
        LOGGER.warning("%s holds results with another %s; they are kept in %s", path, ", ".join(differing), kept)
    if differing or section == NOT_MEASURED:
        section = document["devices"][device] = {**own, "cases": {}}
    found: dict[str, Any] = section
    return found


def measure(case: Case, size: int, device: torch.device, compiled: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case: time in alternation, then memory and shares of each network."""
    if compiled:
        torch.compiler.reset()  # or the networks of earlier cases use up the number of compilations
    before = load_average()
    names = ["plain", *(name for name in args.arms or case.arms if name != "plain")]
    batch, loss = make_batch(case, size, args.seed, device), make_loss(case, compiled)
    steps = {name: TrainingStep(build(case, name, args.seed, device), loss, batch, compiled) for name in names}
    warmup = args.warmup if args.warmup is not None else 5 if device.type == "cuda" else 2
    prepared = {name: partial(_always, step) for name, step in steps.items()}
    seconds = alternate(prepared, stopwatch(device), args.rounds, warmup)
    arms = {name: describe(step, device, args.profiled) for name, step in steps.items()}
    to_plain = ratios(seconds, "plain")
    for name, arm in arms.items():
        arm.update(summarise(seconds[name]), step_ratio=to_plain[name])
        arm["memory_ratio"] = round(arm["peak_bytes"] / arms["plain"]["peak_bytes"], 4)
    both = {"paper_sparse", "paper_dense"} <= set(arms)
    return {
        "patch_size": list(case.layout.patch_size),
        "spacing": case.layout.plan()["spacing"],
        "batch_size": size,
        "planned_batch_size": case.layout.batch_size,
        "seed": args.seed,
        "rounds": args.rounds,
        "warmup": warmup,
        "load_average": {"start": before, "end": load_average()},
        "arms": arms,
        **({"sparse_to_dense": ratios(seconds, "paper_dense")["paper_sparse"]} if both else {}),
    }


def _always(step: TrainingStep, _: int) -> TrainingStep:
    return step


def describe(step: TrainingStep, device: torch.device, profiled: int) -> dict[str, Any]:
    """Size, keypoints, peak memory and shares of a network that has taken its steps."""
    detector: Any = getattr(step.eager.encoder, "detector", None)
    keypoints = {}
    if detector is not None:
        valid = detector(step.batch.data).valid.sum(1).float()
        keypoints = {"keypoints_at_most": detector.num_keypoints, "valid_keypoints": round(float(valid.mean()), 1)}
    # a step begins by freeing the gradients of the one before
    step.optimizer.zero_grad(set_to_none=True)
    return {
        "parameters": sum(parameter.numel() for parameter in step.eager.parameters()),
        **keypoints,
        "peak_bytes": peak_bytes(step, step.alive(), device),
        "shares": shares(lambda: step.step(step.eager), step.eager, device, profiled),
    }


def summarise(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median and quartiles of the wall seconds, and the median of the processor's."""
    wall, processor = np.array(times).T
    return {
        "step_seconds": round(float(np.median(wall)), 5),
        "step_seconds_quartiles": [round(float(q), 5) for q in np.percentile(wall, [25, 75])],
        "processor_seconds": round(float(np.median(processor)), 5),
    }


if __name__ == "__main__":
    main()
