"""A scan passes through the rooms of `pretraining` in one direction: no file imports from a later room."""

import ast
from pathlib import Path

import pytest

import pretraining

ROOT = Path(pretraining.__file__).parent
ROOMS = ["data", "pairs", "objectives", "monitoring", "exchange"]
ORDER = ["base", *ROOMS, "loop", "checkpoint", "prepare", "recorder", "run", "cli"]
BASE = {"config", "task", "distributed", "signals"}
ENTRANCES = {"__init__", "__main__"}


def floor(parts: tuple[str, ...]) -> int:
    """The place in `ORDER` of a module, given by the parts of its name below `pretraining`."""
    name = "base" if parts[0] in BASE else "cli" if parts[0] in ENTRANCES else parts[0]
    return ORDER.index(name)


def imported(path: Path) -> list[tuple[str, ...]]:
    """The modules of `pretraining` that a file imports, at its top or within functions, below `pretraining`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = node.module == "pretraining"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if deeper else [node.module]
        else:
            continue
        found += [tuple(name.split(".")[1:]) for name in names if name.startswith("pretraining.")]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_from_a_later_room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    later = [".".join(target) for target in imported(path) if floor(target) > floor(parts)]
    assert not later, f"{path.relative_to(ROOT)} imports {later} from a later room"


def test_each_room_says_what_it_holds():
    rooms = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py")))
    assert rooms == sorted(ROOMS)
    for room in rooms:
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())), room


def test_the_test_of_a_file_lies_where_the_file_lies():
    tests = Path(__file__).parent
    files = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    for path in tests.rglob("test_*.py"):
        mirrored = path.relative_to(tests).with_name(path.name.removeprefix("test_"))
        whole = path.name in ("test_rooms.py", "test_learning.py") or path.parent.name == "trust"  # of several files
        assert mirrored in files or whole, f"{path} tests no file of that name"
