"""Questions that only a fresh interpreter can answer: is a class found after a normal start, does torch work at all.

Each question is source code that fills the dictionary `answer`. An import that crashes or hangs ends the child only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_ANSWER = "kaf-doctor-answer:"

# The empty entry that -c puts on sys.path is removed: nnU-Net's console commands do not have it either, and a source
# folder as the working directory must not hide that the package is not installed.
_PRELUDE = "import json, sys\nsys.path[:] = [p for p in sys.path if p]\nanswer = {}\n"
DISCOVERY = """
from importlib.util import find_spec
from os.path import join
answer["finder"] = any(type(f).__name__ == "KAFFinder" for f in sys.meta_path)
answer["startup"] = find_spec("nnunetv2_kaf_startup") is not None
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
try:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find_trainer
except ImportError:  # before 2.8, which also looks in nnUNet_extTrainer
    find_trainer = None
trainers = ("training", "nnUNetTrainer")
places = {"nnUNetTrainerKAF": trainers, "nnUNetTrainerKAFSemi": trainers, "nnUNetPlannerKAF": ("experiment_planning",)}
for name, folders in places.items():
    try:
        found = find(join(nnunetv2.__path__[0], *folders), name, ".".join(("nnunetv2", *folders)))
        if found is None and folders == trainers and find_trainer is not None:
            try:
                found = find_trainer(name)
            except RuntimeError as error:
                if "Could not find" not in str(error):
                    raise
        answer[name] = {"module": found.__module__ if found else None}
    except Exception as error:
        answer[name] = {"error": f"{type(error).__name__}: {error}"}
"""


def discovery_of(trainers: Sequence[str]) -> str:
    """The question whether nnU-Net finds these trainers too: identifiers."""
    more = {name: ("training", "nnUNetTrainer") for name in trainers}
    return DISCOVERY.replace("for name, folders in places", f"places.update({more!r})\nfor name, folders in places")


TORCH = """
import torch
try:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    answer["cuda"] = [torch.cuda.get_device_name(i) for i in range(gpus)]
except Exception as error:
    answer["cuda_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
answer["mps"] = torch.backends.mps.is_available()
answer["cpu_build"] = torch.version.cuda is None and torch.version.hip is None
try:
    import torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
    answer["torchvision"] = torchvision.__version__
except Exception as error:
    answer["torchvision_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
"""
COMPILE = """
import torch
answer["device"] = "cuda" if torch.cuda.is_available() else "cpu"
torch.compile(lambda x: torch.nn.functional.gelu(x) + 1)(torch.ones(8, device=answer["device"]))
"""


@dataclass(frozen=True)
class Probe:
    """What a fresh interpreter answered: JSON types, or nothing and the reason why.

    Attributes:
        answer: The dictionary.
        error: Empty if there is an answer.
        timed_out: Whether it was ended because it took too long.
    """

    answer: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    timed_out: bool = False

    def fix(self, otherwise: str) -> str:
        """What to do about the error: a slow disk is no broken package."""
        return "give it more time: kaf-doctor --timeout 1000" if self.timed_out else otherwise


def run_probe(code: str, timeout_s: float) -> Probe:
    """Run code that fills the dictionary `answer` in a fresh process of this interpreter.

    Args:
        code: Python source. It may print anything, as nnU-Net does.
        timeout_s: Seconds after which the process is ended.
    """
    source = f"{_PRELUDE}{code}\nprint({_ANSWER!r} + json.dumps(answer))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"no answer within {timeout_s:g} s", timed_out=True)
    for line in done.stdout.splitlines():
        if line.startswith(_ANSWER):
            return Probe(answer=json.loads(line.removeprefix(_ANSWER)))
    # Explanations of nnU-Net and torch follow the error, so the last line that looks like one is taken.
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return Probe(error=(errors or lines or [f"exit status {done.returncode} without a message"])[-1])
