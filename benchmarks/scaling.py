"""Time and memory of the parts of a KAF network against the number of keypoints and the size of the patch.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --cost-grid
    python benchmarks/scaling.py --table

Every part runs at full resolution (32 channels, batch 1, float32): keypoint detection (forward), one KAF layer, the
paper's layer evaluated around the keypoints and densely, and for comparison one stage of plain nnU-Net (forward and
backward). Beside each time stands the floor that follows from the machine's memory bandwidth and arithmetic, measured
in the same run, before and after (`limits`, `kaf_parts`). `--cost-grid` also times both evaluations of the fusion on
a grid of sizes and says what the rule that chooses between them loses. Sizes that were left out read "not measured".
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, load_average, machine, markdown, stopwatch, write_json
from cost_grid import grid_table, measure_grid, summarise_grid
from kaf_parts import PARTS, Inputs, build
from limits import Work, best_limits, machine_limits
from memory import DEFINITION, peak_bytes

from nnunetv2_kaf.files import versions

LOGGER = logging.getLogger("scaling")
RESULT = Path(__file__).parent / "results" / "scaling.json"
KEYPOINTS = (64, 128, 256, 512, 1024, 2048, 4096)
EDGES = (32, 48, 64, 96, 128, 160)
SWEEPS = {"K": "keypoints", "V": "voxels"}
NOT_MEASURED = "not measured"


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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--keypoints", type=int, nargs="+", default=KEYPOINTS, help="of the sweep over K")
    parser.add_argument("--edges", type=int, nargs="+", default=EDGES, help="of the cubes of the sweep over V")
    parser.add_argument("--fixed-edge", type=int, default=64, help="of the cube in the sweep over K")
    parser.add_argument("--fixed-keypoints", type=int, default=256, help="in the sweep over V")
    parser.add_argument("--max-edge", type=int, help="larger cubes are not measured (default: 128, on CUDA 160)")
    parser.add_argument("--max-dense-edge", type=int, help="the same for the dense layer (default: 64, on CUDA 160)")
    parser.add_argument("--cost-grid", action="store_true", help="also time both evaluations of the fusion on a grid")
    parser.add_argument("--grid-dims", type=int, nargs="+", choices=[2, 3], default=[2, 3])
    parser.add_argument("--grid-gflop", type=float, help="largest dense point of the grid (default: 50, on CUDA 2000)")
    parser.add_argument("--rounds", type=int, default=10, help="all parts are timed in each")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the tables of --out")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; the document is written after each size, so that an interruption loses one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    device = torch.device(args.device)
    try:
        document: dict[str, Any] = {
            "what": "seconds (medians) and peak tensor memory of one step of a part, batch 1, float32",
            "memory": DEFINITION[device.type],
            "seed": args.seed,
            "rounds": args.rounds,
            "warmup": args.warmup,
            "torch_threads": torch.get_num_threads(),
            "machine": machine(device),
            "versions": versions(),
            "limits": machine_limits(device),
            "load_average": {"start": load_average()},
            "rows": [],
        }
        for sweep, edge, keypoints in sizes(args):
            document["rows"] += measure(sweep, edge, keypoints, args)
            add_floors(document["rows"], document["limits"])
            document["exponents"] = exponents(document["rows"])
            document["load_average"]["end"] = load_average()
            write_json(document, args.out)
        document["limits"] = best_limits(document["limits"], machine_limits(device))
        add_floors(document["rows"], document["limits"])
        if args.cost_grid:
            document["cost_grid"] = cost_grid(args, device)
            document["load_average"]["end"] = load_average()
        write_json(document, args.out)
    finally:
        torch.set_num_threads(threads)
    return document


def sizes(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Sweep, edge of the cube and number of keypoints of every size.

    Raises:
        ValueError: A cube has fewer voxels than keypoints.
    """
    over_keypoints = [("K", args.fixed_edge, keypoints) for keypoints in sorted(args.keypoints)]
    over_voxels = [("V", edge, args.fixed_keypoints) for edge in sorted(args.edges)]
    found = [size for size in over_keypoints + over_voxels if size[0] in args.sweeps]
    for _, edge, keypoints in found:
        if keypoints > edge**3:
            raise ValueError(f"a cube of edge {edge} has fewer voxels than {keypoints} keypoints: choose larger edges")
    return found


def largest_edge(part: str, args: argparse.Namespace) -> int:
    """Edge of the largest cube that a part is measured on."""
    cuda = args.device == "cuda"
    largest: int = args.max_edge or (160 if cuda else 128)
    return min(largest, args.max_dense_edge or (160 if cuda else 64)) if part == "paper_dense" else largest


def measure(sweep: str, edge: int, keypoints: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all parts of one size in alternation; the sweep over K leaves out the stage, which has no keypoints."""
    device = torch.device(args.device)
    names = [name for name in args.parts if sweep == "V" or name != "stage"]
    size = {"sweep": sweep, "edge": edge, "voxels": edge**3, "keypoints": keypoints}
    measured = [name for name in names if edge <= largest_edge(name, args)]
    found: dict[str, dict[str, Any]] = {}
    if measured:
        inputs = Inputs((edge,) * 3, keypoints, args.seed, device)
        parts = {name: build(name, inputs) for name in measured}
        arms = {name: lambda _, step=part.step: step for name, part in parts.items()}
        times = alternate(arms, stopwatch(device), args.rounds, args.warmup)
        for name, part in parts.items():
            found[name] = {
                "seconds": float(np.median([wall for wall, _ in times[name]])),
                "peak_bytes": peak_bytes(part.step, part.alive, device),
                "work": asdict(part.work),
            }
    LOGGER.info("%s %s", size, {name: round(row["seconds"], 4) for name, row in found.items()})
    left_out = {"seconds": NOT_MEASURED, "peak_bytes": NOT_MEASURED}
    return [{**size, "part": name, **found.get(name, left_out)} for name in names]


def add_floors(rows: Sequence[dict[str, Any]], limits: Mapping[str, Any]) -> None:
    """Write into every measured row the floor of its time, and how many times that it took."""
    for row in rows:
        if "work" in row:
            row["floor_seconds"] = Work(**row["work"]).floor_seconds(limits)
            row["times_floor"] = row["seconds"] / row["floor_seconds"]


def exponents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fitted exponents of time and memory of each part in each sweep."""
    out = []
    for sweep, variable in SWEEPS.items():
        for part in PARTS:
            found = [r for r in rows if (r["sweep"], r["part"]) == (sweep, part) and r["seconds"] != NOT_MEASURED]
            if len(found) < 2:
                continue
            x = [row[variable] for row in found]
            fits = {name: fit(x, [row[key] for row in found]) for name, key in QUANTITIES.items()}
            out.append({"sweep": sweep, "part": part, "range": [min(x), max(x)], "last_step": x[-2:], **fits})
    return out


QUANTITIES = {"time": "seconds", "memory": "peak_bytes"}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Exponent of a power law: least squares of the logarithms over all points, and between the last two."""
    log_x, log_y = np.log(x), np.log(y)
    slope = float(np.polyfit(log_x, log_y, 1)[0])
    last = float((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2]))
    return {"exponent": slope, "exponent_of_last_step": last}


def cost_grid(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the grid of both evaluations of the fusion."""
    limit = args.grid_gflop or (2000.0 if device.type == "cuda" else 50.0)
    rows = measure_grid(args.grid_dims, args.rounds, args.warmup, limit, args.seed, device)
    summary = summarise_grid(rows)
    LOGGER.info("cost grid: %s", summary)
    return {"dense_points_up_to_gflop": limit, "summary": summary, "rows": rows}


def table(document: Mapping[str, Any]) -> str:
    """Markdown tables: the machine's limits, every sweep, the exponents, the grid."""
    limits = document["limits"]
    blocks = [
        f"Limits: {limits['bytes_per_second'] / 1e9:.1f} GB/s, {limits['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({limits['how']}), {document['torch_threads']} thread(s)."
    ]
    blocks += [sweep_table(document["rows"], sweep) for sweep in SWEEPS if _has(document["rows"], sweep)]
    if document.get("exponents"):
        blocks.append(exponent_table(document["exponents"]))
    if "cost_grid" in document:
        summary = document["cost_grid"]["summary"]
        blocks.append(
            f"{summary['points']} points: auto takes {summary['worst_loss']:.2f} times the best at worst, "
            f"{summary['mean_loss']:.2f} times on average. Where it loses most:"
        )
        blocks.append(grid_table(document["cost_grid"]))
    return "\n\n".join(blocks)


def _has(rows: Sequence[Mapping[str, Any]], sweep: str) -> bool:
    return any(row["sweep"] == sweep for row in rows)


def sweep_table(rows: Sequence[Mapping[str, Any]], sweep: str) -> str:
    """One row per size, one column per part: milliseconds, times its floor, peak memory."""
    cells = {(row["edge"], row["keypoints"], row["part"]): _cell(row) for row in rows if row["sweep"] == sweep}
    parts = [part for part in PARTS if any(key[2] == part for key in cells)]
    header = ["patch", "K", *(f"{PARTS[part]}: ms (x floor), MiB" for part in parts)]
    lines = []
    for edge, keypoints in dict.fromkeys(key[:2] for key in cells):
        lines.append([f"{edge}^3", str(keypoints), *(cells.get((edge, keypoints, part), "") for part in parts)])
    return markdown(header, lines)


def _cell(row: Mapping[str, Any]) -> str:
    if row["seconds"] == NOT_MEASURED:
        return NOT_MEASURED
    return f"{1000 * row['seconds']:.1f} ({row['times_floor']:.1f}), {row['peak_bytes'] / 2**20:.0f}"


def exponent_table(found: Sequence[Mapping[str, Any]]) -> str:
    """One row per part and sweep."""
    header = ["part", "against", "range", "time", "memory", "last step", "time there", "memory there"]
    lines = []
    for one in found:
        ranges = [f"{low} to {high}" for low, high in (one["range"], one["last_step"])]
        fits = [[f"{one[q][key]:.2f}" for q in QUANTITIES] for key in ("exponent", "exponent_of_last_step")]
        lines.append([PARTS[one["part"]], SWEEPS[one["sweep"]], ranges[0], *fits[0], ranges[1], *fits[1]])
    return markdown(header, lines)


if __name__ == "__main__":
    main()
