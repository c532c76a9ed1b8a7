"""Is self-attention among keypoints more robust after pretraining? Measured on views that keep the anatomy.

    python benchmarks/attention.py --name ACDC --images RAW/imagesTs --labels RAW/labelsTs \
        --network random=MODEL/fold_0 --network scratch=SCRATCH/fold_0 \
        --network pretrained=PRETRAINING/checkpoint_final.pth --network trained=MODEL/fold_0
    python benchmarks/attention.py --page

Every case is seen untransformed and with noise, changed intensities, rotated, and elastically deformed; keypoints are
detected in each view as in prediction, and matched by the known transformation. Several networks of a kind (draws,
seeds) are averaged; all must have the same plans. The cases must be such that no network was trained on their labels.
With a study of benchmarks/low_label: RAW is its nnUNet_raw/Dataset950_TASK, a fold of a model is a run of it. Writes
one JSON a dataset to benchmarks/results; `--page` writes docs/attention.md from them.
"""

from __future__ import annotations

import argparse
import glob
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attention_measures as measures
import numpy as np
import torch
from attention_page import write_page
from attention_views import KINDS, TRANSFORMS, Network, Patch, Seen, case_files, check_alike, draw, look, open_network
from attention_views import patches as patches_of
from common import load_average, machine, write_json

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import versions
from nnunetv2_kaf.inspect import TrainedModel, layer_spacing
from pretraining.config import PretrainConfig
from pretraining.pairs.correspondences import match_by_transform

LOGGER = logging.getLogger("attention")
RESULTS = Path(__file__).parent / "results"
RADIUS_MM = 10.0
MATCH_VOXELS = 2.0
"""Keypoints of two views correspond if they are closer than this, in finest voxels, in the source image."""
FEWEST_MATCHES = 8
FLOW_QUERIES = 32
"""Keypoints per view whose transport is computed: a maximum flow each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results, or write the page; returns the exit code."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if args.page:
            LOGGER.info("%s", write_page(args.results))
            return 0
        needed = {"--name": args.name, "--images": args.images, "--network": args.network}
        missing = [option for option, value in needed.items() if not value]
        if missing:
            raise KAFError(f"{', '.join(missing)} is missing: needed to measure (--page writes the page alone).")
        out = args.results / f"attention_{args.name}.json"
        write_json(run(args), out)
        LOGGER.info("%s", out)
    except KAFError as error:
        sys.stderr.write(f"attention: error: {error}\n")
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", help="of the dataset, for the file of results and the page")
    parser.add_argument("--images", type=Path, help="folder of images in nnU-Net's naming; no labelled training cases")
    parser.add_argument("--labels", type=Path, help="folder of their labels, for the structures")
    parser.add_argument("--cases", nargs="+", help="use only these (default: all)")
    parser.add_argument(
        "--network", action="append", default=[], metavar="KIND=PATH",
        help="random=, scratch= or trained= and the fold_N folder of a model, pretrained= and a checkpoint_final.pth; "
        "may be repeated, and PATH may be a pattern (fold_[012])",
    )  # fmt: skip
    parser.add_argument("--slices", type=int, default=3, help="per case, in 2D (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patient-pattern", default=PretrainConfig().patient_pattern)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="only write docs/attention.md")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all networks on all cases; the document of results."""
    before, start = load_average(), time.perf_counter()
    networks, model = open_networks(args)
    device = torch.device(args.device)
    ending, names = model.dataset_json["file_ending"], model.dataset_json["channel_names"]
    cases = list(case_files(args.images, args.labels, ending, len(names)))
    cases = [case for case in cases if args.cases is None or case[0] in args.cases]
    if not cases:
        raise KAFError(f"--images {args.images}: found no *_0000{ending} (with a label, if --labels is given).")
    found: list[dict[str, Any]] = [{"kind": n.kind, "path": n.path, "sha256": n.sha256, "cases": {}} for n in networks]
    for number, (case, files, label) in enumerate(cases):
        LOGGER.info("%d/%d %s", number + 1, len(cases), case)
        places = patches_of(model, files, label, args.slices)
        for network, entry in zip(networks, found, strict=True):
            network.encoder.to(device)
            per_patch = [
                measure(network, place, model, [args.seed, number, index], device) for index, place in enumerate(places)
            ]
            entry["cases"][case] = average(per_patch)
            network.encoder.cpu()
    pattern = re.compile(args.patient_pattern)
    matched = {case: pattern.fullmatch(case) for case, _, _ in cases}
    return {
        "what": "consistency of attention among keypoints between an untransformed view and a transformed one",
        "name": args.name,
        "configuration": model.configuration,
        "plans": model.plans["plans_name"],
        "spacing_mm": list(layer_spacing(networks[0].encoder)),
        "layers": networks[0].encoder.config.to_dict(),
        "levels": list(networks[0].encoder.kaf_levels),
        "radius_mm": RADIUS_MM,
        "transforms": {**TRANSFORMS, "noise": {"noise": 0.3}},
        "seed": args.seed,
        "slices": args.slices,
        "patient_of": {case: found[1] if found else case for case, found in matched.items()},
        "networks": found,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(device),
        "load_average": {"start": before, "end": load_average()},
        "versions": versions(),
    }


def open_networks(args: argparse.Namespace) -> tuple[list[Network], TrainedModel]:
    """Read what --network names, and the model that tells how images are preprocessed.

    Raises:
        KAFError: A value is of another form, no model is named, or the networks cannot be compared.
    """
    networks, models = [], []
    for index, text in enumerate(args.network):
        kind, _, path = text.partition("=")
        if kind not in KINDS or not path:
            raise KAFError(f"--network is {text!r}; expected KIND=PATH with KIND one of {', '.join(KINDS)}.")
        for found in sorted(glob.glob(path)) or [path]:
            network, model = open_network(kind, Path(found), args.seed + index)
            networks.append(network)
            models += [model] if model is not None else []
    if not models:
        raise KAFError("--network: name at least one model (random=, scratch= or trained=): its plans preprocess.")
    check_alike(networks)
    return networks, models[0]


def measure(
    network: Network, place: Patch, model: TrainedModel, seed: Sequence[int], device: torch.device
) -> dict[str, float]:
    """All measures of one network at one place; the same views for every network."""
    shape = [int(n) for n in model.manager().get_configuration(model.configuration).patch_size]
    spacing = layer_spacing(network.encoder)
    first = look(network, place, draw("none", place, shape, spacing, np.random.default_rng(0)), shape, device)
    values = inside(first, place, spacing)
    for number, name in enumerate(TRANSFORMS):
        generator = np.random.default_rng([*seed, number])
        second = look(network, place, draw(name, place, shape, spacing, generator), shape, device)
        values |= {f"{name}/{key}": value for key, value in compare(first, second, spacing).items()}
    return values


def inside(view: Seen, place: Patch, spacing: Sequence[float]) -> dict[str, float]:
    """Measures of one view: own structure, nearness, concentration; means of the levels, blocks and heads."""
    positions = view.source * np.asarray(spacing)
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    labels = None
    if place.labels is not None:
        voxel = np.clip(np.round(view.source).astype(int), 0, np.array(place.labels.shape) - 1)
        labels = place.labels[tuple(voxel.T)]
    for attention in view.attention.values():
        mean = attention.mean((0, 1))
        add("near", measures.share_near(mean, positions, RADIUS_MM))
        add("effective", measures.effective_share(attention))
        own = None if labels is None else measures.share_on_own_structure(mean, labels)
        if own is not None:
            add("own", own[0])
            add("own_uniform", own[1])
    return {name: float(np.mean(found)) for name, found in values.items()}


def compare(first: Seen, second: Seen, spacing: Sequence[float]) -> dict[str, float]:
    """Measures of two views; empty if too few keypoints correspond.

    Each measure comes with its value for the attention of another keypoint ("_other"): attention that is equal
    everywhere, or the same for every keypoint, is consistent without saying anything.
    """
    matches = match_by_transform(first.source, second.source, spacing, MATCH_VOXELS * min(spacing))
    one = np.flatnonzero(matches >= 0)
    two = matches[one]
    values = {"matched": len(one) / max(1, len(first.source))}
    if len(one) < FEWEST_MATCHES:
        return values
    # Attention to what a view does not show cannot be compared.
    shown = (second.shows(first.source), first.shows(second.source))
    first_mm, second_mm = (view.source[i] * np.asarray(spacing) for view, i in zip((first, second), shown, strict=True))
    chosen = np.linspace(0, len(one) - 1, min(FLOW_QUERIES, len(one))).round().astype(int)
    other = np.roll(np.arange(len(one)), len(one) // 2)
    found: dict[str, list[float]] = {}
    for level, ours in first.attention.items():
        theirs = second.attention[level]
        common = [measures.normalized(a[..., i[:, None], i]) for a, i in ((ours, one), (theirs, two))]
        for name, partner in (("js", np.arange(len(one))), ("js_other", other)):
            distance = measures.jensen_shannon(common[0], common[1][..., partner, :])
            found.setdefault(name, []).append(float(distance.mean()))
        means = [
            measures.normalized(attention[-1].mean(0)[:, i]) for attention, i in zip((ours, theirs), shown, strict=True)
        ]
        for name, partner in (("stays", np.arange(len(one))), ("stays_other", other)):
            shares = [
                measures.share_that_stays(means[0][one[q]], means[1][two[partner[q]]], first_mm, second_mm, RADIUS_MM)
                for q in chosen
            ]
            found.setdefault(name, []).append(float(np.mean(shares)))
    return {**values, **{name: float(np.mean(entry)) for name, entry in found.items()}}


def average(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every measure over the places of a case where it is defined."""
    names = sorted({name for entry in entries for name in entry})
    return {name: float(np.mean([entry[name] for entry in entries if name in entry])) for name in names}


if __name__ == "__main__":
    sys.exit(main())
