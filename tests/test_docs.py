"""The documentation agrees with the program: flags, defaults, commands, links and tables."""

import ast
import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from kaf_report import cli as report_cli
from nnunetv2_kaf import doctor
from nnunetv2_kaf.config import KAFConfig
from pretraining import cli
from pretraining.config import COMPONENTS, PRESETS, PretrainConfig, flag
from pretraining.exchange import export_cli
from semisupervised import cli as unlabelled_cli
from semisupervised.options import check_options
from semisupervised.strong import StrongAugmentation
from semisupervised.trainer import nnUNetTrainerSemi

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "pretraining.md"
OPTIONS = ROOT / "docs" / "pretraining-options.md"
FEW_LABELS = ROOT / "docs" / "few-labels.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "kaf-pretrain": cli.build_parser,
    "kaf-doctor": doctor.build_parser,
    "kaf-export": export_cli.build_parser,
    "kaf-report": report_cli.build_parser,
    "kaf-unlabelled": unlabelled_cli.build_parser,
}

FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
OF_OTHERS = {
    "nnunetv2": {"--c", "--val", "--val_best", "--npz", "--disable_ensembling", "--verify_dataset_integrity"},
    "torchrun": {"--standalone", "--nnodes", "--nproc-per-node", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint"},
    "slurm": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--cpus-per-task", "--time"}
    | {"--signal", "--requeue", "--open-mode"},
    "pip": {"--target"},
    "tensorboard": {"--logdir"},
    "benchmarks": {
        "--arms",
        "--config",
        "--cost-grid",
        "--data",
        "--device",
        "--jobs",
        "--on",
        "--out",
        "--page",
        "--report",
        "--work",
    },
}


def known_flags() -> set[str]:
    ours = {option for build in PROGRAMS.values() for option in build()._option_string_actions}
    return ours.union(*OF_OTHERS.values())


def blocks(text: str) -> list[str]:
    """Bash blocks with continued lines joined."""
    return [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Program and arguments of every command of ours in the bash blocks, also under torchrun and srun."""
    found = []
    for line in (line for block in blocks(path.read_text()) for line in block.splitlines()):
        line = re.sub(r"^.* -m pretraining ", "kaf-pretrain ", line)
        line = re.sub(r"^srun .* exec (.*)' \|\| exit 1$", r"\1", line)
        words = shlex.split(line, comments=True)
        if words and words[0] in PROGRAMS:
            found.append((words[0], words[1:]))
    return found


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(path: Path) -> None:
    assert set(FLAG.findall(path.read_text())) <= known_flags()


def test_pages_with_commands_have_some() -> None:
    counts = {path.name: len(commands(path)) for path in DOCUMENTS}
    assert counts["README.md"] >= 2
    assert counts["pretraining.md"] >= 6
    assert counts["interoperability.md"] >= 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_accepted(path: Path) -> None:
    for program, arguments in commands(path):
        parsed = PROGRAMS[program]().parse_args(arguments)
        if program == "kaf-pretrain":
            cli._config(parsed)


def test_commands_under_launchers_are_among_those_tested() -> None:
    found = [arguments for path in (GUIDE, OPTIONS) for _, arguments in commands(path)]
    batch_sizes = [arguments[arguments.index("--batch-size") + 1] for arguments in found if "--batch-size" in arguments]
    assert batch_sizes.count("64") == 2  # torchrun on two nodes, srun
    assert batch_sizes.count("32") == 1  # torchrun on one node


def test_defaults_in_parentheses_are_those_of_the_program() -> None:
    defaults = {flag(item.name): item.default for item in fields(PretrainConfig)}
    text = GUIDE.read_text() + OPTIONS.read_text()
    stated = re.findall(r"`(--[a-z-]+)`\s+\((\d[\d.]*)\)", text)
    assert len(stated) > 8
    assert {name: float(value) for name, value in stated} == {name: float(defaults[name]) for name, _ in stated}


def test_every_loss_preset_and_weight_is_explained() -> None:
    text = OPTIONS.read_text()
    for name in COMPONENTS:
        assert f"| `{name}` | `{flag('weight_' + name)}` | {getattr(PretrainConfig(), 'weight_' + name):g} |" in text
    assert all(f"`{preset}`" in text for preset in PRESETS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


TABLES = {
    "pretrain_throughput": GUIDE,
    "step_time": PERFORMANCE,
    "predict_time": PERFORMANCE,
    "scaling": PERFORMANCE,
    "semi_step_time": FEW_LABELS,
    "pretrain_learning": OPTIONS,
}


@pytest.mark.parametrize("name", list(TABLES))
def test_table_is_the_one_of_the_committed_results(name: str) -> None:
    marker = f"<!-- table: {name} -->"
    text = TABLES[name].read_text()
    assert text.count(marker) == 1
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not results.is_file():
        pytest.skip(f"{results.relative_to(ROOT)} is not there: nothing has been measured yet")
    table = importlib.import_module(name).table(json.loads(results.read_text()))
    below = text.partition(marker)[2].lstrip("\n")
    assert below.startswith(table.strip() + "\n\n")


def test_the_compiled_step_is_that_of_the_committed_results() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "step_time_compiled.json").read_text())
    section = document["devices"]["cuda"]
    assert section["setting"]["compiled"]
    plain, kaf = (section["cases"]["Hippocampus 3d_fullres"]["arms"][name] for name in ("plain", "kaf"))
    milliseconds = f"{1000 * kaf['step_seconds']:.1f} ms instead of {1000 * plain['step_seconds']:.1f}"
    told = f"{kaf['step_ratio']['median']:.2f} times for Hippocampus ({milliseconds};"
    assert told in PERFORMANCE.read_text().replace("\n", " ")


def test_the_readme_is_short_and_in_order() -> None:
    text = README.read_text()
    assert len(text.split()) <= 900
    parts = ["# nnunetv2-kaf", "img.shields.io", "docs/assets/kaf.png", "<!-- results -->", "## Install", "make demo",
             "## Quick start", "## When not to use it", "## Documentation", "## Citation"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert [page for page in pages if not re.search(rf": {re.escape(page)}$", navigation, re.MULTILINE)] == []


def test_every_parameter_of_the_layers_is_explained_with_its_default() -> None:
    section = (ROOT / "docs" / "network.md").read_text().partition("## Parameters")[2].partition("\n## ")[0]
    stated = dict(re.findall(r"^\| `([a-z_]+)` \| (.+?) \|", section, re.MULTILINE))
    defaults = {name: json.dumps(value) for name, value in KAFConfig().to_dict().items()}
    defaults |= {"levels": "planned", "detection_channels": "all images"}  # planned for each dataset
    assert {name: text.strip("`") for name, text in stated.items()} == defaults


def test_every_option_of_the_semi_supervised_trainers_is_explained_with_its_default() -> None:
    text = FEW_LABELS.read_text().partition("## Change the method")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE))
    documented = re.findall(
        r"^        (\w+): ", (nnUNetTrainerSemi.__doc__ or "").partition("Attributes:")[2], re.MULTILINE
    )
    assert list(rows) == documented
    assert rows.pop("strong_augmentation") == "StrongAugmentation()"
    assert nnUNetTrainerSemi.strong_augmentation == StrongAugmentation()
    assert {name: ast.literal_eval(value) for name, value in rows.items()} == {
        name: getattr(nnUNetTrainerSemi, name) for name in rows
    }


def test_the_trainer_of_your_own_has_options_that_are_accepted() -> None:
    (block,) = re.findall(r"```python\n(.+?)```", FEW_LABELS.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "my_trainers"}
    exec(block, namespace)
    check_options(namespace["SemiTeacher"])
    assert namespace["SemiTeacher"].predict_with == "teacher"
