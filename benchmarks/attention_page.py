"""docs/attention.md from the results of `attention`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attention_views import KINDS, TRANSFORMS
from common import markdown
from low_label import stats

PAGE = Path(__file__).resolve().parents[1] / "docs" / "attention.md"
NAMES = {
    "random": "random weights",
    "scratch": "trained from scratch",
    "pretrained": "pretrained",
    "trained": "pretrained, then trained",
}
COMPARISONS = (("pretrained", "random"), ("trained", "scratch"), ("trained", "pretrained"))
COMPARED = {
    "consistency": "consistency",
    "stays_gain": "stays within 10 mm, more than another keypoint's",
    "own_gain": "own structure, more than equal attention",
}
"""Differences of two measures where one alone says little: of equal attention nearly all stays within 10 mm."""
HEADER = """# Is attention among keypoints more robust after pretraining?

Written by `python benchmarks/attention.py --page` from `benchmarks/results/attention_*.json`, which hold every case of
every network. How it was measured, and the command that repeats it: the head of `benchmarks/attention.py`.

- Every case is seen untransformed, with noise, with other intensities, rotated, and elastically deformed. Keypoints are
  detected in each view, as in prediction; those of two views that lie within two finest voxels correspond.
- **JS distance**: Jensen-Shannon distance between the attention of a keypoint and that of its partner, over the
  keypoints that both views have; 0 = equal, 1 = nothing in common. Mean over levels, blocks and heads.
- **Consistency**: 1 - (JS distance) / (JS distance to the attention of *another* keypoint of the other view). Attention
  that is equal everywhere has a small distance and no consistency; 1 = the same in both views, 0 = as if it belonged to
  any keypoint.
- **Stays within 10 mm**: largest share of the attention (head mean of the last block) that becomes the attention of the
  partner if none of it moves by more than 10 mm; in brackets for the attention of another keypoint.
- **Own structure**: share of the attention of keypoints on a labelled structure that goes to other keypoints on the
  same structure; in brackets what attention that is equal everywhere would give. **Near**: share that goes to keypoints
  within 10 mm. **Spread**: exp(entropy) / number of keypoints; 1 = equal everywhere.
- Means over cases, patients and the networks of a kind; intervals are 95 % bootstrap intervals over patients.
  Differences are paired by patient; p is that of a Wilcoxon signed-rank test, not corrected for the number of
  comparisons. "Higher" and "lower" need an interval without 0 and p below 0.05. Pretraining itself shows
  the network views with such transformations, of other patients.
"""

SUMMARY = """## Is attention more robust after pretraining?

Attention among the keypoints of a view and of the same view with noise, other intensities, rotated or deformed.
Consistency: 1 = the same in both views, 0 = as if it belonged to any keypoint. What the columns mean, and the results
by transformation: [attention.md](attention.md).
"""


def write_page(results: Path, page: Path = PAGE) -> Path:
    """Write the page from all results of a folder; returns its path."""
    documents = [json.loads(file.read_text()) for file in sorted(results.glob("attention_*.json"))]
    sections = [section(document) for document in documents] or ["Not measured yet.\n"]
    page.write_text("\n".join([HEADER, *sections]))
    return page


def summary(results: Path) -> str:
    """What docs/evidence.md says of attention: the main table and the comparisons of every dataset.

    Args:
        results: Folder of the results.

    Returns:
        Nothing if it was not measured.
    """
    documents = [json.loads(file.read_text()) for file in sorted(results.glob("attention_*.json"))]
    if not documents:
        return ""
    parts = [SUMMARY]
    for document in documents:
        patients = len(set(document["patient_of"].values()))
        parts += [f"**{document['name']}**, `{document['configuration']}`, {patients} patients:", ""]
        parts += [table(document), "", *(f"- {verdict}" for verdict in verdicts(document)), ""]
    return "\n".join(parts)


def section(document: Mapping[str, Any]) -> str:
    """One dataset: what was measured, the tables, the verdicts."""
    patients, cases = len(set(document["patient_of"].values())), len(document["patient_of"])
    counts = {kind: sum(n["kind"] == kind for n in document["networks"]) for kind in kinds(document)}
    versions = ", ".join(f"{name} {document['versions'].get(name)}" for name in ("torch", "nnunetv2", "nnunetv2-kaf"))
    device = document["machine"].get("accelerator", document["machine"]["processor"])
    networks = ", ".join(f"{count} {NAMES[kind]}" for kind, count in counts.items())
    return "\n".join(
        [
            f"## {document['name']}",
            "",
            f"`{document['configuration']}`, plans `{document['plans']}`; {patients} patients ({cases} cases); "
            f"networks: {networks}; seed {document['seed']}; {device}; {versions}.",
            "",
            table(document),
            "",
            "Consistency by transformation:",
            "",
            transform_table(document),
            "",
            *(f"- {verdict}" for verdict in verdicts(document)),
            "",
        ]
    )


def kinds(document: Mapping[str, Any]) -> list[str]:
    """Kinds of network that were measured, in their order."""
    return [kind for kind in KINDS if any(n["kind"] == kind for n in document["networks"])]


def by_patient(document: Mapping[str, Any], kind: str, measure: str) -> dict[str, float]:
    """A measure by patient: mean over the networks of a kind, the cases, and the transformations where it has any."""
    found: dict[str, list[float]] = {}
    for network in document["networks"]:
        if network["kind"] != kind:
            continue
        for case, values in network["cases"].items():
            parts = [value for value in map(_reader(values), _names(measure)) if value is not None]
            if parts:
                found.setdefault(document["patient_of"][case], []).append(float(np.mean(parts)))
    return {patient: float(np.mean(values)) for patient, values in sorted(found.items())}


def _names(measure: str) -> list[str]:
    """`js` stands for noise/js, intensity/js, ...; measures of one view for themselves."""
    one_view = measure in ("near", "effective", "own", "own_uniform", "own_gain") or "/" in measure
    return [measure] if one_view else [f"{name}/{measure}" for name in TRANSFORMS]


def _reader(values: Mapping[str, float | None]) -> Callable[[str], float | None]:
    """Read a measure of one case, also those that are made of two others."""

    def read(name: str) -> float | None:
        if name.endswith("consistency"):
            stem = name.removesuffix("consistency")
            js, other = values.get(f"{stem}js"), values.get(f"{stem}js_other")
            return None if js is None or other is None or other < 1e-6 else 1 - js / other
        if name.endswith("_gain"):
            stem = name.removesuffix("_gain")
            one, reference = values.get(stem), values.get(f"{stem}_{'uniform' if stem == 'own' else 'other'}")
            return None if one is None or reference is None else one - reference
        return values.get(name)

    return read


def table(document: Mapping[str, Any]) -> str:
    """Markdown table of all kinds, means over the transformations."""
    header = ["network", "JS distance", "consistency", "stays within 10 mm", "own structure", "near", "spread"]
    rows = []
    for kind in kinds(document):
        cells = [NAMES[kind]]
        for measure, reference in (
            ("js", None), ("consistency", None), ("stays", "stays_other"), ("own", "own_uniform"), ("near", None),
            ("effective", None),
        ):  # fmt: skip
            cells.append(_cell(document, kind, measure, reference))
        rows.append(cells)
    return markdown(header, rows)


def transform_table(document: Mapping[str, Any]) -> str:
    """Markdown table of the consistency under every transformation."""
    rows = [
        [NAMES[kind], *(_cell(document, kind, f"{name}/consistency", None) for name in TRANSFORMS)]
        for kind in kinds(document)
    ]
    return markdown(["network", *TRANSFORMS], rows)


def _cell(document: Mapping[str, Any], kind: str, measure: str, reference: str | None) -> str:
    values = by_patient(document, kind, measure)
    if not values:
        return "-"
    mean = stats.mean(_values(values).array, np.random.default_rng(0))
    text = f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})"
    if reference is not None:
        text += f" [{np.mean(list(by_patient(document, kind, reference).values())):.3f}]"
    return text


def _values(by_patient: Mapping[str, float]) -> stats.Values:
    """Values by patient as those of a single draw."""
    return stats.Values((0,), tuple(by_patient), np.array([list(by_patient.values())]))


def verdicts(document: Mapping[str, Any]) -> list[str]:
    """One sentence a comparison: more consistent, less, or no clear difference."""
    out = []
    present = kinds(document)
    for ours, theirs in COMPARISONS:
        if ours not in present or theirs not in present:
            continue
        for measure, name in COMPARED.items():
            out.append(verdict(document, ours, theirs, measure, name))
    return out


def verdict(document: Mapping[str, Any], ours: str, theirs: str, measure: str, name: str) -> str:
    """Compare two kinds of network in one measure; words of a difference need its interval and the p value."""
    values: Sequence[dict[str, float]] = [by_patient(document, kind, measure) for kind in (ours, theirs)]
    difference = stats.difference(_values(values[0]), _values(values[1]), np.random.default_rng(0))
    if difference is None:
        return f"{NAMES[ours]} against {NAMES[theirs]}, {name}: not measured on the same patients"
    mean = difference.mean
    words = "no clear difference"
    if difference.p < 0.05 and not mean.low <= 0 <= mean.high:
        words = "higher" if mean.value > 0 else "**lower**"
    return (
        f"{NAMES[ours]} against {NAMES[theirs]}, {name}: {words} ({mean.value:+.3f}, {mean.low:+.3f} to "
        f"{mean.high:+.3f}, p = {difference.p:.2g})"
    )
