"""The tables of `step_time.py`: what was measured, and whether it meets the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common import markdown

TARGETS = {
    "cpu": {"step 3d": 1.25, "step 2d": 1.35, "memory": 1.20, "paper sparse/dense 64^3": 0.35, "detection": 0.03},
    "cuda": {"step 3d": 1.15, "step 2d": 1.20, "memory": 1.15, "paper sparse/dense 128^3": 0.20, "detection": 0.02},
}
"""At most, by device. step, memory: of `kaf` in multiples of plain. detection: share of the step of `kaf`."""
NOT_MEASURED = "not measured"
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def table(document: Mapping[str, Any]) -> str:
    """Write both tables as Markdown."""
    return f"{_measured(document)}\n\n{_targets(document)}"


def _measured(document: Mapping[str, Any]) -> str:
    header = ["device", "case", "batch (planned)", "network", "keypoints", "step (ms)", "of plain"]
    header += ["peak memory (MiB)", "of plain", "detection", "attention", "fusion", "rest"]
    rows = []
    for device, title in _DEVICES.items():
        cases = _cases(document, device)
        if not cases:
            rows.append([title, NOT_MEASURED, *["" for _ in header[2:]]])
        for name, case in cases.items():
            if case == NOT_MEASURED:
                rows.append([title, name, NOT_MEASURED, *["" for _ in header[3:]]])
                continue
            batch = f"{case['batch_size']} ({case['planned_batch_size']})"
            rows += [[title, name, batch, *_arm(arm, one)] for arm, one in case["arms"].items()]
    return markdown(header, rows)


def _arm(name: str, arm: Mapping[str, Any]) -> list[str]:
    """The cells of one network."""
    parts = {part: sum(kinds.values()) for part, kinds in arm["shares"].items() if isinstance(kinds, Mapping)}
    keypoints = f"{arm['valid_keypoints']:.0f} of {arm['keypoints_at_most']}" if "valid_keypoints" in arm else ""
    shares = [f"{parts[part]:.1%}" for part in ("detection", "attention", "fusion", "backbone")]
    return [
        f"`{name}`",
        keypoints,
        f"{1000 * arm['step_seconds']:.0f}" if arm["step_seconds"] >= 0.1 else f"{1000 * arm['step_seconds']:.1f}",
        f"{arm['step_ratio']['median']:.2f}",
        f"{arm['peak_bytes'] / 2**20:.0f}",
        f"{arm['memory_ratio']:.2f}",
        *(shares if keypoints else [""] * len(shares)),
    ]


def _targets(document: Mapping[str, Any]) -> str:
    header = ["device", "target", "at most", "case", "measured", ""]
    rows = []
    for device, title in _DEVICES.items():
        for target, limit in TARGETS[device].items():
            found = list(findings(target, _cases(document, device)))
            if not found:
                rows.append([title, target, f"{limit:.2f}", "", NOT_MEASURED, ""])
            for case, value in found:
                rows.append(
                    [title, target, f"{limit:.2f}", case, f"{value:.3f}", "met" if value <= limit else "not met"]
                )
    return markdown(header, rows)


def findings(target: str, cases: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the cases that a target is about, and what was measured."""
    for name, case in cases.items():
        if case == NOT_MEASURED:
            continue
        kaf = case["arms"].get("kaf")
        if target.startswith("paper") and target.endswith(f" {name}") and "sparse_to_dense" in case:
            yield name, case["sparse_to_dense"]["median"]
        elif target == f"step {len(case['patch_size'])}d" and kaf:
            yield name, kaf["step_ratio"]["median"]
        elif target == "memory" and kaf:
            yield name, kaf["memory_ratio"]
        elif target == "detection" and kaf:
            yield name, sum(kaf["shares"]["detection"].values())


def _cases(document: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    section = document["devices"][device]
    cases: Mapping[str, Any] = {} if section == NOT_MEASURED else section["cases"]
    return cases
