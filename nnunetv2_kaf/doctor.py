"""kaf-doctor: says whether the plugin works in this environment and, where it does not, what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.model_needs import Needs, needs_of
from nnunetv2_kaf.probes import COMPILE, TORCH, Probe, discovery_of, run_probe

MINIMUM_NNUNET, MINIMUM_TORCH = "2.7", "2.6"
PATH_VARIABLES = {
    "nnUNet_raw": "the datasets as you provide them",
    "nnUNet_preprocessed": "preprocessed data and plans",
    "nnUNet_results": "pretrained and trained models",
}
LITTLE_SPACE_GB = 10.0
NO_SPACE_GB = 1.0
_NO_TORCH = "torch cannot be imported: pip install --force-reinstall torch torchvision"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: Ok; warn (works, with a limit worth knowing); fail (something that users need is broken).
        found: What was found.
        fix: What to do about it; empty if the status is ok.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def check_python() -> Check:
    """Python is one of the tested versions."""
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", found)
    return Check("python", "warn", found, "tested with 3.10 to 3.13; use one of these if something fails")


def check_package(name: str, minimum: str = "0", fix: str = "") -> Check:
    """A distribution is installed and not older than a version.

    Args:
        name: Distribution name.
        minimum: Oldest version that works, such as `2.7`.
        fix: What to do otherwise.
    """
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "fail", "not installed in this environment", fix)
    too_old = _release(found) < _release(minimum)
    return Check(name, "fail" if too_old else "ok", f"{found}, needed: {minimum} or later" if too_old else found, fix)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", text)[0]))


def check_discovery(probe: Probe, name: str) -> Check:
    """NnU-Net finds a class of ours by name, in an interpreter that was started the normal way.

    Args:
        probe: Answer of the discovery probe.
        name: Name as given to `-tr` or `-pl`.
    """
    title = f"nnU-Net finds {name}"
    if probe.error:
        return Check(title, "fail", probe.error, probe.fix("nnU-Net's own search fails; correct this error first"))
    result = probe.answer[name]
    if "error" in result:
        return Check(title, "fail", result["error"], "the class was found but its import fails; correct this error")
    if str(result["module"]).startswith(("nnunetv2_kaf.", "semisupervised.")):
        return Check(title, "ok", f"in {result['module']}")
    if result["module"] is not None:
        fix = f"another package defines this name: rename or remove {result['module']}"
        return Check(title, "fail", f"in {result['module']}", fix)
    return Check(title, "fail", *_why_not_found(probe.answer))


def _why_not_found(answer: dict[str, Any]) -> tuple[str, str]:
    if not answer["startup"]:
        return "not found: nnunetv2_kaf_startup is not installed", f"{sys.executable} -m pip install nnunetv2-kaf"
    if not answer["finder"]:
        return (
            "not found: the start-up file nnunetv2_kaf_startup.pth was not read at interpreter start",
            "install with plain pip into this environment; or, after `pip install --target` and under `python -S`, "
            "call nnunetv2_kaf.activate() before nnU-Net's functions",
        )
    return (
        "not found, although the start-up module is active",
        "pip install --force-reinstall --no-deps nnunetv2-kaf (in a source checkout: pip install -e .)",
    )


def check_torchvision(probe: Probe) -> Check:
    """Torchvision fits torch; nnU-Net imports it through timm, so a misfit breaks its search for trainers."""
    fix = (
        "torch and torchvision do not come from the same build"
        + (" (torch is a CPU-only build)" if probe.answer.get("cpu_build") else "")
        + ": pip uninstall -y torch torchvision, then pip install torch torchvision from the same index"
    )
    if probe.error:
        return Check("torchvision", "fail", probe.error, probe.fix(_NO_TORCH))
    if "torchvision" in probe.answer:
        return Check("torchvision", "ok", probe.answer["torchvision"])
    return Check("torchvision", "fail", probe.answer["torchvision_error"], fix)


def check_device(probe: Probe) -> Check:
    """Which device nnU-Net can use."""
    if probe.error:
        return Check("device", "fail", probe.error, probe.fix(_NO_TORCH))
    if "cuda_error" in probe.answer:
        fix = "torch sees a GPU and cannot use it: look at nvidia-smi, and at the driver's version"
        return Check("device", "fail", probe.answer["cuda_error"], fix)
    if probe.answer["cuda"]:
        return Check("device", "ok", "cuda: " + ", ".join(probe.answer["cuda"]))
    if probe.answer["mps"]:
        return Check("device", "ok", f"mps: {platform.processor()}; pass -device mps (nnU-Net) or --device mps")
    found = f"cpu only, {os.cpu_count()} cores; pass -device cpu (nnU-Net) or --device cpu (kaf-pretrain)"
    if shutil.which("nvidia-smi"):
        return Check("device", "warn", found, "a GPU driver is present but torch sees no GPU: see https://pytorch.org")
    return Check("device", "ok", found)


def check_compile(probe: Probe, torch: Probe) -> Check:
    """`torch.compile` works; nnU-Net compiles when it trains on CUDA, not on Windows, and not if it is switched off.

    Args:
        probe: Answer of the question about torch.compile; its child may have died before it could say on which device.
        torch: Answer of the question about torch.
    """
    if not probe.error:
        return Check("torch.compile", "ok", f"works on {probe.answer['device']}")
    on_cuda = bool(torch.answer.get("cuda")) if torch.answer else shutil.which("nvidia-smi") is not None
    if os.environ.get("nnUNet_compile", "t").lower() not in ("true", "1", "t"):  # noqa: SIM112 (nnU-Net's spelling)
        return Check("torch.compile", "warn", f"{probe.error}; not needed, nnUNet_compile switches it off")
    if not on_cuda or os.name == "nt":
        return Check("torch.compile", "warn", f"{probe.error}; not needed here, where nnU-Net does not compile")
    fix = "install a C++ compiler (such as gcc), or switch it off: export nnUNet_compile=f"
    return Check("torch.compile", "fail", probe.error, probe.fix(fix))


def check_path_variable(name: str) -> Check:
    """One of nnU-Net's three path variables is set to a folder that exists and takes files."""
    value = os.environ.get(name)
    if not value:
        return Check(name, "fail", "not set", f"export {name}=<folder for {PATH_VARIABLES[name]}>")
    if not os.path.isdir(value):  # unlike Path.is_dir, no error in a folder that may not be entered
        return Check(
            name,
            "fail",
            f"{value} is not a folder that can be entered",
            f"mkdir -p {shlex.quote(value)}, or correct the variable",
        )
    try:
        with tempfile.TemporaryFile(dir=value):
            pass
    except OSError as error:
        # nnU-Net only reads raw data, so a shared read-only folder is fine there.
        status: Literal["warn", "fail"] = "warn" if name == "nnUNet_raw" else "fail"
        return Check(
            name, status, f"{value}: no file can be written ({error.strerror})", f"chmod u+w {shlex.quote(value)}"
        )
    return Check(name, "ok", value)


def check_disk_space(name: str) -> Check:
    """Free space on the disk of a path variable."""
    title = f"disk of {name}"
    value = os.environ.get(name)
    if not value or not os.path.isdir(value):
        return Check(title, "warn", "unknown", f"set {name} first")
    free = shutil.disk_usage(value).free / 1e9
    if free >= LITTLE_SPACE_GB:
        return Check(title, "ok", f"{free:.1f} GB free")
    return Check(title, "warn" if free >= NO_SPACE_GB else "fail", f"{free:.1f} GB free", f"free some space: {value}")


def check_checkpoints() -> list[Check]:
    """Every pretraining checkpoint at its standard place, and whether it can be read."""
    results = os.environ.get("nnUNet_results", "")  # noqa: SIM112 (nnU-Net's spelling)
    pattern = "Dataset*/KAFPretraining__*__*/fold_*/checkpoint_final.pth"
    files = sorted(Path(results).glob(pattern)) if results and os.path.isdir(results) else []
    if not files:
        return [Check("pretraining", "ok", "no finished checkpoint; nnUNetTrainerKAF starts from random weights")]
    return [_check_checkpoint(file, file.relative_to(results)) for file in files]


def _check_checkpoint(file: Path, shown: Path) -> Check:
    try:
        # Here and not at the top: it imports torch, and the doctor has to run where that fails.
        from nnunetv2_kaf.weights import read_checkpoint

        read_checkpoint(file)
    except Exception as error:
        text = str(error) or type(error).__name__
        fix = "resume it with kaf-pretrain --continue, or run kaf-pretrain again"
        return Check("pretraining", "fail", f"{shown}: {text}", fix)
    return Check("pretraining", "ok", f"{shown}, {file.stat().st_size / 1e6:.0f} MB, readable")


def check_models(needs: Sequence[Needs], probe: Probe) -> list[Check]:
    """What models lack here, and what they need elsewhere.

    Args:
        needs: Of the models that were asked about.
        probe: Answer of the discovery probe, which was asked for their trainers.
    """
    return [_check_model(needed, probe) for needed in needs]


def _check_model(needed: Needs, probe: Probe) -> Check:
    title = f"model {needed.name}"
    cure = f"pip install 'nnunetv2-kaf>={version('nnunetv2-kaf')}'" if _installed() else "pip install nnunetv2-kaf"
    elsewhere = f"; where it predicts: {cure}" if needed.package else "; it needs nnU-Net alone"
    if probe.error:
        return Check(title, "fail", probe.error, probe.fix("nnU-Net's own search fails; correct this error first"))
    result = probe.answer.get(needed.trainer, {"module": None})
    if "error" in result:
        return Check(title, "fail", f"its trainer {needed.trainer} cannot be imported: {result['error']}", cure)
    if result["module"] is None:
        found = f"nnU-Net will say: Could not find requested nnunet trainer {needed.trainer}"
        own = "copy the trainer's file, and name its folder in nnUNet_extTrainer (nnunetv2 2.8 or later)"
        ours = cure if needed.own_trainer or not _installed() else ""
        fixes = [ours if needed.package else "", "" if needed.own_trainer else own]
        return Check(title, "fail", found, "; ".join(filter(None, fixes)))
    return Check(title, "ok", f"trainer {needed.trainer} in {result['module']}{elsewhere}")


def _installed() -> bool:
    try:
        version("nnunetv2-kaf")
    except PackageNotFoundError:
        return False
    return True


def run_checks(timeout_s: float, with_compile: bool, models: Sequence[Needs] = ()) -> list[Check]:
    """Run all checks.

    Args:
        timeout_s: Seconds that each of the fresh interpreters may take; most of it is the import of torch.
        with_compile: Also compile a small function with `torch.compile`.
        models: What is to predict here.
    """
    codes = [discovery_of([needed.trainer for needed in models]), TORCH, *([COMPILE] if with_compile else [])]
    with ThreadPoolExecutor() as pool:
        discovery, torch, *compiled = pool.map(lambda code: run_probe(code, timeout_s), codes)
    return [
        check_discovery(discovery, "nnUNetTrainerKAF"),
        check_discovery(discovery, "nnUNetTrainerKAFSemi"),
        check_discovery(discovery, "nnUNetPlannerKAF"),
        check_python(),
        check_package("nnunetv2-kaf", fix="pip install nnunetv2-kaf (in a source checkout: pip install -e .)"),
        check_package("nnunetv2", MINIMUM_NNUNET, f"pip install 'nnunetv2>={MINIMUM_NNUNET}'"),
        check_package("torch", MINIMUM_TORCH, f"pip install 'torch>={MINIMUM_TORCH}' torchvision"),
        check_torchvision(torch),
        check_device(torch),
        *(check_compile(probe, torch) for probe in compiled),
        *(check_path_variable(name) for name in PATH_VARIABLES),
        *check_checkpoints(),
        *check_models(models, discovery),
        *(check_disk_space(name) for name in ("nnUNet_preprocessed", "nnUNet_results")),
    ]


def format_table(checks: Sequence[Check]) -> str:
    """Plain-text table, one line per check and one more, with the fix, for each that is not ok."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status.upper():<4}  {check.name:<{width}}  {check.found}".rstrip())
        if check.status != "ok" and check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.fix}")
    broken = sum(check.status == "fail" for check in checks)
    lines.append(f"\n{broken} of {len(checks)} checks failed." if broken else "\nEverything that is needed works.")
    return "\n".join(lines)


def format_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON object: the version of this package, how many checks failed, and every check."""
    try:
        own = version("nnunetv2-kaf")
    except PackageNotFoundError:
        own = None
    broken = sum(check.status == "fail" for check in checks)
    return json.dumps({"nnunetv2-kaf": own, "failed": broken, "checks": [asdict(check) for check in checks]}, indent=2)


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="kaf-doctor",
        description="Check whether nnU-Net finds the KAF trainers and planners here, which versions and devices there "
        "are, whether torch.compile works, nnU-Net's three path variables, the pretraining checkpoints and the free "
        "disk space. Prints a table, with a fix for everything that is wrong.",
        epilog="Exit status: 0 if everything that is needed works (warnings included), 1 if something is broken, 2 for "
        "a --model that cannot be read.",
    )
    parser.add_argument("--no-compile", action="store_true", help="skip the test of torch.compile, the slowest check")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that a check may take before it fails (default: 300)"
    )
    parser.add_argument("--json", action="store_true", help="write the checks as JSON instead of a table")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        type=console.path,
        metavar="PATH",
        help="also say what this model folder, or zip of nnUNetv2_export_model_to_zip, needs where it predicts",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line.

    Returns:
        1 if something is broken, 2 for a model that cannot be read, else 0.
    """
    console.prepare_streams()
    options = build_parser().parse_args(argv)
    try:
        models = [needed for path in options.model for needed in needs_of(path)]
    except KAFError as error:
        console.complain(f"kaf-doctor: error: {error}")
        return 2
    console.complain("Checking; the import of torch can take a minute.")
    checks = run_checks(options.timeout, not options.no_compile, models)
    console.say(format_json(checks) if options.json else format_table(checks))
    return int(any(check.status == "fail" for check in checks))
