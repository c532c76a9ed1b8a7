"""Pairs per second of the input pipeline of pretraining on one core, and its parts; on a GPU, how busy it is kept.

    python benchmarks/pretrain_throughput.py
    python benchmarks/pretrain_throughput.py --dataset 27 -c 2d
    python benchmarks/pretrain_throughput.py --table

Measures `PairLoader`: augmented pairs with their keypoints and correspondences, by default of a synthetic dataset in a
temporary folder. Cached keypoints are compared with keypoints that are detected anew for every image that is drawn, in
alternation in one run. Writes one JSON; `--table` shows an existing one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, environment, load_average, machine, markdown, one_core, write_json
from gpu_busy import SHARE, train
from synthetic import DATASET, Layout, write_dataset

from nnunetv2_kaf.files import versions
from pretraining.config import PretrainConfig
from pretraining.data.images import PreprocessedImages
from pretraining.pairs.batch import Batch
from pretraining.pairs.keypoint_cache import KeypointCache, SourceKeypoints
from pretraining.pairs.loader import PairLoader
from pretraining.pairs.pairs import Pair
from pretraining.pairs.render import Recipe, render
from pretraining.pairs.splines import control_points
from pretraining.pairs.views import draw_view
from pretraining.prepare import DataOptions, prepare
from pretraining.task import Task, resolve_task

LOGGER = logging.getLogger("pretrain_throughput")
RESULT = Path(__file__).parent / "results" / "pretrain_throughput.json"
PATIENTS = 4
LAYOUTS = {
    "2d": Layout(
        (10, 256, 216), (10.0, 1.5625, 1.5625), (256, 224), 56, (32, 64, 128, 256, 512, 512), ((1, 1), *[(2, 2)] * 5)
    ),
    "3d_thick_slices": Layout(
        (10, 256, 216), (10.0, 1.5625, 1.5625), (10, 256, 224), 7, (32, 64, 128, 256, 320, 320),
        ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
    ),
    "3d_isotropic": Layout(
        (48, 64, 48), (1.0, 1.0, 1.0), (40, 56, 40), 7, (32, 64, 128, 256), ((1, 1, 1), *[(2, 2, 2)] * 3)
    ),
}  # fmt: skip
"""Volumes and plans like those of a heart (2D, 3D) and of a small organ."""
ARMS = {
    "cached": "cached keypoints",
    "detected_anew": "detected anew",
    "rendering": "rendering alone",
    "keypoints_and_matching": "keypoints and matching alone",
}


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
    parser.add_argument("--dataset", help="number or name of a preprocessed dataset (default: a synthetic one)")
    parser.add_argument("-c", "--configurations", nargs="+", help="default: 2d, or all of the synthetic dataset")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--repetitions", type=int, default=15, help="of every arm, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs=2, default=(16, 4), help="per repetition, in 2D and in 3D")
    parser.add_argument("--rounds", type=int, default=1, help="runs of the whole alternation; the fastest is reported")
    parser.add_argument("--core", type=int, help="core to stay on (default: the last one)")
    parser.add_argument("--steps", type=int, default=50, help="training steps on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    return parser


def run(args: argparse.Namespace, layouts: Mapping[str, Layout] = LAYOUTS) -> dict[str, Any]:
    """Measure everything and return the document of results."""
    config = PretrainConfig(seed=args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = args.configurations or (["2d"] if args.dataset else list(layouts))
    with ExitStack() as stack:
        if args.dataset is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_dataset(root, {name: layouts[name] for name in names}, PATIENTS, args.seed)
            stack.enter_context(environment(nnUNet_preprocessed=str(root)))
        tasks = [resolve_task(args.dataset or DATASET, name, args.plans) for name in names]
        with one_core(args.core) as setting:
            pipeline = {task.configuration: fastest_round(task, config, args) for task in tasks}
        training = {
            task.configuration: train(task, config, args.steps, device) if device.type == "cuda" else "not measured"
            for task in tasks
        }
        dataset = tasks[0].dataset_name
    return {
        "what": "pairs per second of the input pipeline of pretraining on one core, medians",
        "data": dataset if args.dataset else f"synthetic, {PATIENTS} patients with two images each",
        "seed": args.seed,
        "setting": setting,
        "machine": machine(device),
        "versions": versions(),
        "pipeline": pipeline,
        "share_of_time_that_the_gpu_is_busy": {"definition": SHARE, "results": training},
    }


def fastest_round(task: Task, config: PretrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the pipeline of a task as often as asked for and return the fastest round.

    Others' load on the machine only ever slows: the fastest round is the least disturbed one.
    """
    options = DataOptions(fold="all")
    pairs = args.pairs[len(task.patch_size) - 2]
    loader = replace(prepare(task, config, options, torch.device("cpu"), pairs).loader, num_workers=0)
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        before = load_average()
        arms = summarise(alternate(arms_of(loader), clock, args.repetitions, args.warmup), pairs)
        rounds.append({"arms": arms, "load_average": {"start": before, "end": load_average()}})
        LOGGER.info("%s: %s", task.configuration, {name: arm["pairs_per_second"] for name, arm in arms.items()})
    steps = range(args.warmup, args.warmup + args.repetitions)
    return {
        "patch_size": list(task.patch_size),
        "first_volume": list(loader.images.shape(loader.images.identifiers[0])),
        **density([loader.batch(step) for step in steps]),
        "pairs_per_repetition": pairs,
        "repetitions": args.repetitions,
        "rounds": [{"pairs_per_second": r["arms"]["cached"]["pairs_per_second"], **r["load_average"]} for r in rounds],
        **max(rounds, key=lambda r: float(r["arms"]["cached"]["pairs_per_second"])),
    }


def clock() -> tuple[float, float]:
    """Wall and processor seconds of this thread."""
    return time.perf_counter(), time.thread_time()


def summarise(seconds: Mapping[str, Sequence[tuple[float, float]]], pairs: int) -> dict[str, dict[str, Any]]:
    """Medians and quartiles of every arm."""
    out = {}
    for name, times in seconds.items():
        wall, processor = pairs / np.array(times).T
        out[name] = {
            "pairs_per_second": round(float(np.median(wall)), 1),
            "quartiles": [round(float(q), 1) for q in np.percentile(wall, [25, 75])],
            "pairs_per_processor_second": round(float(np.median(processor)), 1),
            "milliseconds_per_pair": round(1000 / float(np.median(wall)), 3),
        }
    return out


def density(batches: Sequence[Batch]) -> dict[str, Any]:
    """How many keypoints and matches there are."""
    valid = torch.cat([batch.keypoints.valid.sum(1) for batch in batches]).float()
    matched = torch.cat([(batch.matches >= 0).sum(1) for batch in batches]).float()
    return {
        "keypoints_at_most": batches[0].keypoints.valid.shape[1],
        "valid_keypoints_per_view": round(float(valid.mean()), 1),
        "matches_per_pair": round(float(matched.mean()), 1),
    }


class DetectedAnew(KeypointCache):
    """What the cache replaces: the same points, detected and described whenever an image is drawn.

    Args:
        cache: Cache with the options to use.
        images: Images to detect in.
    """

    def __init__(self, cache: KeypointCache, images: PreprocessedImages) -> None:
        super().__init__(cache.folder, cache.config, cache.patch_size, cache.spacing)
        self.images = images

    def read(self, case: str, image_path: Path, slice_index: int | None) -> SourceKeypoints:
        """Detect the points of a slice (2D) or of the volume (`None`, 3D)."""
        if slice_index is None:
            image = torch.from_numpy(self.images.read(case, (slice(None),) * 3))
        else:
            plane = slice(slice_index, slice_index + 1)
            image = torch.from_numpy(self.images.read(case, (plane, slice(None), slice(None)))[:, 0])
        coords = self._detect(image.unsqueeze(0))
        descriptors = self._describe(image.unsqueeze(0), coords)
        return SourceKeypoints(coords.numpy(), descriptors.half().numpy())


def arms_of(loader: PairLoader) -> dict[str, Callable[[int], Callable[[], object]]]:
    """What is compared, all on the same pairs of a step."""
    anew = replace(loader, keypoints=DetectedAnew(loader.keypoints, loader.images))
    later = replace(loader, render_later=True)

    def rendering(step: int) -> Callable[[], object]:
        recipes = [later.sample(step, index).views for index in range(loader.batch_size)]
        return lambda: [render(recipe, loader.patch_size) for recipe in recipes if isinstance(recipe, Recipe)]

    def keypoints(step: int) -> Callable[[], object]:
        drawn = [draw(loader, step, index) for index in range(loader.batch_size)]
        return lambda: [keypoints_and_matches(loader, *one) for one in drawn]

    return {
        "cached": lambda step: lambda: loader.batch(step),
        "detected_anew": lambda step: lambda: anew.batch(step),
        "rendering": rendering,
        "keypoints_and_matching": keypoints,
    }


def draw(loader: PairLoader, step: int, index: int) -> tuple[Pair, list[np.ndarray]]:
    """Draw a pair and its two splines as `PairLoader.sample` does."""
    generator = np.random.default_rng([loader.config.seed, loader.stream, step, index])
    pair = loader._pair(step, index, generator)
    channels = loader.images.shape(pair.first.case)[0]
    views = [
        draw_view(side.centre, loader.patch_size, loader.spacing, channels, loader.config, generator)
        for side in (pair.first, pair.second)
    ]
    return pair, [control_points(view, loader.patch_size, loader.spacing) for view in views]


def keypoints_and_matches(loader: PairLoader, pair: Pair, controls: Sequence[np.ndarray]) -> torch.Tensor:
    """Carry the cached keypoints into both views and match them: (K,) long."""
    first, second = (
        loader._points(side, control)[0]
        for side, control in zip((pair.first, pair.second), controls, strict=True)
    )  # fmt: skip
    return loader._match(pair, first, second)[0]


def table(document: Mapping[str, Any]) -> str:
    """Markdown table of the results: pairs per second, and the share of time that the GPU is busy."""
    header = ["configuration", "view", "keypoints per view", "matches per pair", *ARMS.values(), "GPU busy"]
    rows = []
    for name, result in document["pipeline"].items():
        training = document["share_of_time_that_the_gpu_is_busy"]["results"][name]
        rows.append(
            [
                f"`{name}`",
                " x ".join(map(str, result["patch_size"])),
                f"{result['valid_keypoints_per_view']:.0f}",
                f"{result['matches_per_pair']:.0f}",
                *[f"{result['arms'][arm]['pairs_per_second']:.1f}" for arm in ARMS],
                training if isinstance(training, str) else f"{100 * training['busy']:.0f} %",
            ]
        )
    return markdown(header, rows)


if __name__ == "__main__":
    main()
