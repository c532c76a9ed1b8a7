"""The start-up module, in subprocesses without site (-S -E): nothing that is installed here can help or mask it."""

from __future__ import annotations

import pkgutil
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTUP = ROOT / "startup"
TRAINER_HOST = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
PLANNER_HOST = "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"


def write_module(root: Path, name: str, source: str) -> None:
    """Write a module with the packages above it."""
    *packages, leaf = name.split(".")
    folder = root
    for package in packages:
        folder = folder / package
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{leaf}.py").write_text(source)


def run(source: str, *paths: Path, flags: tuple[str, ...] = ("-S", "-E")) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys\nsys.path[:0] = {[str(path) for path in paths]!r}\n"
    return subprocess.run(
        [sys.executable, *flags, "-c", prelude + source], capture_output=True, text=True, check=False, timeout=600
    )


@dataclass
class Sandbox:
    """A stand-in for nnunetv2 and for our trainer and planner; the start-up module and __init__ are the real ones."""

    root: Path

    def module(self, name: str, source: str) -> None:
        write_module(self.root, name, source)

    def run(self, source: str, *, install: bool = True) -> str:
        prelude = "import nnunetv2_kaf_startup\nnnunetv2_kaf_startup.install()\n" if install else ""
        prelude += f"from importlib import import_module\nTRAINER, PLANNER = {TRAINER_HOST!r}, {PLANNER_HOST!r}\n"
        done = run(prelude + source, self.root, STARTUP)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    box = Sandbox(tmp_path / "lib")
    box.module(TRAINER_HOST, "class nnUNetTrainer: pass\n")
    box.module(PLANNER_HOST, "class ExperimentPlanner: pass\n")
    box.module(
        "nnunetv2_kaf.trainer",
        f"from {TRAINER_HOST} import nnUNetTrainer\n"
        "class nnUNetTrainerKAF(nnUNetTrainer): pass\n"
        "class nnUNetTrainerKAF_5epochs(nnUNetTrainerKAF): pass\n",
    )
    box.module(
        "nnunetv2_kaf.planner",
        f"from {PLANNER_HOST} import ExperimentPlanner\nclass nnUNetPlannerKAF(ExperimentPlanner): pass\n",
    )
    box.module(
        "semisupervised.trainer",
        f"from {TRAINER_HOST} import nnUNetTrainer\n"
        "class nnUNetTrainerSemi_5epochs(nnUNetTrainer): pass\n"
        "class nnUNetTrainerKAFSemi(nnUNetTrainer): pass\n",
    )
    for file in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "nnunetv2_kaf" / file, box.root / "nnunetv2_kaf" / file)
    return box


def test_classes_and_variants_are_found_and_unknown_names_are_not(sandbox: Sandbox) -> None:
    sandbox.run(
        "t, p = import_module(TRAINER), import_module(PLANNER)\n"
        "assert not [m for m in sys.modules if m.startswith('nnunetv2_kaf.')], 'imported before it was asked for'\n"
        "assert not hasattr(t, 'nnUNetTrainerFoo') and 'semisupervised' not in sys.modules\n"
        "for name in ('nnUNetTrainerKAF', 'nnUNetTrainerKAF_5epochs', 'nnUNetTrainerKAFSemi',\n"
        "             'nnUNetTrainerSemi_5epochs'):\n"
        "    assert issubclass(getattr(t, name), t.nnUNetTrainer)\n"
        "assert p.nnUNetPlannerKAF.__module__ == 'nnunetv2_kaf.planner'\n"
        "for module, name in ((t, 'nnUNetTrainerKAFNoSuch'), (t, 'nnUNetTrainerFoo'), (t, 'nnUNetPlannerKAF'),\n"
        "                     (t, 'nnUNetTrainerKAFSemiNoSuch'), (t, 'nnUNetTrainerSemiNoSuch'),\n"
        "                     (p, 'nnUNetTrainerKAF'), (p, 'nnUNetPlannerKAFNoSuch'), (p, '__path__')):\n"
        "    assert not hasattr(module, name), name\n"
        "try:\n    t.nnUNetTrainerFoo\n"
        "except AttributeError as e:\n    assert 'nnUNetTrainerFoo' in str(e) and TRAINER in str(e)\n"
    )


def test_without_install_nothing_is_found(sandbox: Sandbox) -> None:
    """The control: the sandbox itself does not make the names resolve."""
    sandbox.run("assert not hasattr(import_module(TRAINER), 'nnUNetTrainerKAF')", install=False)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import os\nos.no_such_attribute\n", "ImportError", "no_such_attribute"),
        ("import no_such_package\n", "ModuleNotFoundError", "no_such_package"),
        ("raise RuntimeError('driver too old')\n", "RuntimeError", "driver too old"),
        ("def f(:\n", "SyntaxError", "invalid syntax"),
    ],
)
def test_broken_trainer_module_shows_its_own_error_only_when_asked_for(
    sandbox: Sandbox, source: str, error: str, message: str
) -> None:
    sandbox.module("nnunetv2_kaf.trainer", source)
    sandbox.run(
        "t = import_module(TRAINER)\n"
        "assert t.nnUNetTrainer.__name__ == 'nnUNetTrainer' and not hasattr(t, 'nnUNetTrainer_5epochs')\n"
        "for _ in range(2):\n"
        "    try:\n        hasattr(t, 'nnUNetTrainerKAF')\n"
        f"    except Exception as e:\n        assert type(e).__name__ == {error!r} and {message!r} in str(e), repr(e)\n"
        "    else:\n        raise SystemExit('the error was swallowed')\n"
        "assert import_module(PLANNER).nnUNetPlannerKAF\n"
    )


def test_existing_getattr_is_chained(sandbox: Sandbox) -> None:
    sandbox.module(
        TRAINER_HOST,
        "class nnUNetTrainer: pass\n"
        "def __getattr__(name):\n"
        "    if name in ('old_name', 'nnUNetTrainerKAFByOthers'): return 42\n"
        "    raise AttributeError(name)\n",
    )
    sandbox.run(
        "t = import_module(TRAINER)\n"
        "assert t.old_name == 42 and t.nnUNetTrainerKAFByOthers == 42\n"
        "assert t.nnUNetTrainerKAF.__name__ == 'nnUNetTrainerKAF' and not hasattr(t, 'other')\n"
        "import importlib\nimportlib.reload(t)\n"
        "assert t.old_name == 42 and issubclass(t.nnUNetTrainerKAF, object)\n"
    )


def editable_finder(source_tree: Path, position: str, *, delegates: bool) -> str:
    ask = "for f in sys.meta_path:\n            if f is not self and f.find_spec(name, path, target): break\n        "
    return (
        "from importlib.machinery import PathFinder\n"
        "class Editable:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] != 'nnunetv2': return None\n"
        f"        {ask if delegates else ''}return PathFinder.find_spec(name, path or [{str(source_tree)!r}])\n"
        f"sys.meta_path.insert({position}, Editable())\n"
    )


@pytest.fixture
def checkout(sandbox: Sandbox, tmp_path: Path) -> Path:
    """A source tree of nnunetv2 that only a custom finder can find."""
    tree = tmp_path / "checkout"
    tree.mkdir()
    return (sandbox.root / "nnunetv2").rename(tree / "nnunetv2").parent


@pytest.mark.parametrize("position", ["1", "len(sys.meta_path)"])
@pytest.mark.parametrize("delegates", [False, True])
def test_custom_finder_of_an_editable_nnunet(sandbox: Sandbox, checkout: Path, position: str, delegates: bool) -> None:
    """A finder that asks all others back, ours included, must not end in a recursion."""
    sandbox.run(
        editable_finder(checkout, position, delegates=delegates)
        + f"t = import_module(TRAINER)\nassert t.nnUNetTrainerKAF and t.__file__.startswith({str(checkout)!r})\n"
    )


def test_custom_finder_in_front_of_ours_is_covered_by_activate(sandbox: Sandbox, checkout: Path) -> None:
    sandbox.run(
        editable_finder(checkout, "0", delegates=True)
        + "t = import_module(TRAINER)\nassert t.nnUNetTrainer and not hasattr(t, 'nnUNetTrainerKAF')\n"
        "import nnunetv2_kaf\nnnunetv2_kaf.activate()\nassert t.nnUNetTrainerKAF\n"
    )


def test_loader_shared_by_all_modules_of_a_zip(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.module(TRAINER_HOST.removesuffix("nnUNetTrainer") + "sibling", "x = 1\n")
    archive = tmp_path / "nnunet.zip"
    with zipfile.ZipFile(archive, "w") as handle:
        for file in sorted((sandbox.root / "nnunetv2").rglob("*.py")):
            handle.write(file, file.relative_to(sandbox.root))
    shutil.rmtree(sandbox.root / "nnunetv2")
    sandbox.run(
        f"sys.path.append({str(archive)!r})\n"
        "assert import_module(TRAINER).nnUNetTrainerKAF and import_module(PLANNER).nnUNetPlannerKAF\n"
        "assert not hasattr(import_module('nnunetv2.training.nnUNetTrainer.sibling'), '__getattr__')\n"
    )


def test_loader_that_takes_no_attributes_leaves_nnunet_working(sandbox: Sandbox) -> None:
    sandbox.run(
        "class Frozen:\n"
        "    __slots__ = ()\n"
        "    def create_module(self, spec): return None\n"
        "    def exec_module(self, module): module.nnUNetTrainer = int\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return ModuleSpec(name, Frozen()) if name == TRAINER else None\n"
        "sys.meta_path.insert(1, Finder())\n"
        "import nnunetv2_kaf\n"
        "t = import_module(TRAINER)\nassert t.nnUNetTrainer is int\n"
        "assert not hasattr(t, 'nnUNetTrainerKAF')\n"
        "nnunetv2_kaf.activate()\nassert '__getattr__' in vars(t)\n"
    )


def test_activate_extends_modules_that_are_already_imported_and_later_ones(sandbox: Sandbox) -> None:
    sandbox.run(
        "t = import_module(TRAINER)\nassert not hasattr(t, 'nnUNetTrainerKAF')\n"
        "import nnunetv2_kaf\nnnunetv2_kaf.activate()\nfirst = vars(t)['__getattr__']\nnnunetv2_kaf.activate()\n"
        "assert vars(t)['__getattr__'] is first\n"
        "assert sum(type(f).__name__ == 'KAFFinder' for f in sys.meta_path) == 1\n"
        "assert t.nnUNetTrainerKAF and import_module(PLANNER).nnUNetPlannerKAF\n",
        install=False,
    )


def test_activate_without_the_startup_module_names_the_fix() -> None:
    done = run("import nnunetv2_kaf\nnnunetv2_kaf.activate()", ROOT)
    assert done.returncode == 1
    assert "KAFError" in done.stderr
    assert "pip install" in done.stderr


def test_install_twice_and_from_two_copies_adds_one_finder(sandbox: Sandbox) -> None:
    sandbox.run(
        "nnunetv2_kaf_startup.install()\ndel sys.modules['nnunetv2_kaf_startup']\n"
        "import_module('nnunetv2_kaf_startup').install()\n"
        "assert sum(type(f).__name__ == 'KAFFinder' for f in sys.meta_path) == 1\n"
    )


def test_parallel_imports(sandbox: Sandbox) -> None:
    sandbox.module(TRAINER_HOST, "import time\ntime.sleep(0.2)\nclass nnUNetTrainer: pass\n")
    sandbox.run(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    found = list(pool.map(lambda _: import_module(TRAINER).nnUNetTrainerKAF, range(8)))\n"
        "assert len(set(found)) == 1\n"
    )


def test_class_identity_through_pickle_and_a_spawned_child(sandbox: Sandbox, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(sandbox.root)!r}, {str(STARTUP)!r}]\n"
        "import multiprocessing, pickle\nfrom importlib import import_module\n"
        "import nnunetv2_kaf_startup\nnnunetv2_kaf_startup.install()\n"
        f"host = import_module({TRAINER_HOST!r})\n"
        "def child(cls, queue): queue.put((cls is host.nnUNetTrainerKAF, cls))\n"
        "if __name__ == '__main__':\n"
        "    cls = host.nnUNetTrainerKAF\n"
        "    assert pickle.loads(pickle.dumps(cls)) is cls\n"
        "    context = multiprocessing.get_context('spawn')\n    queue = context.Queue()\n"
        "    process = context.Process(target=child, args=(cls, queue))\n    process.start()\n"
        "    same, back = queue.get(timeout=300)\n    process.join()\n    assert same and back is cls\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(script)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_startup_loads_nothing_but_itself() -> None:
    done = run(
        "before = set(sys.modules)\nimport nnunetv2_kaf_startup\nnnunetv2_kaf_startup.install()\n"
        "print(sorted(set(sys.modules) - before))",
        STARTUP,
    )
    assert done.stdout.strip() == "['nnunetv2_kaf_startup']", done.stdout + done.stderr


def test_importing_the_package_loads_neither_torch_nor_nnunet() -> None:
    source = "import nnunetv2_kaf\nassert not {'torch', 'nnunetv2', 'numpy'} & set(sys.modules)\n"
    done = run(source, ROOT, flags=("-E",))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "startup",
    [
        None,
        "def f(:\n",
        "raise ValueError('broken')\n",
        "import no_such_package\n",
        "def install(): raise OSError\n",
        "raise SystemExit(3)\n",
    ],
)
def test_pth_line_is_silent_when_the_startup_module_is_missing_or_broken(tmp_path: Path, startup: str | None) -> None:
    shutil.copy(STARTUP / "nnunetv2_kaf_startup.pth", tmp_path)
    if startup is not None:
        (tmp_path / "nnunetv2_kaf_startup.py").write_text(startup)
    # Only the .pth is copied: with it, addsitedir does exactly what the start of the interpreter does.
    done = run(f"import site\nsite.addsitedir({str(tmp_path)!r})\nprint('alive')")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "alive", "")


def test_pth_line_installs_the_finder(tmp_path: Path) -> None:
    for file in STARTUP.glob("nnunetv2_kaf_startup.*"):
        shutil.copy(file, tmp_path)
    done = run(f"import site\nsite.addsitedir({str(tmp_path)!r})\nprint(type(sys.meta_path[0]).__name__)")
    assert (done.stdout.strip(), done.stderr) == ("KAFFinder", "")


def test_pth_is_one_import_line_and_start_names_a_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (STARTUP / "nnunetv2_kaf_startup.pth").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")
    monkeypatch.syspath_prepend(str(STARTUP))
    (entry,) = (STARTUP / "nnunetv2_kaf_startup.start").read_text().split()
    assert callable(pkgutil.resolve_name(entry))


@pytest.mark.integration
def test_real_nnunet_with_the_finder_installed_by_activate_under_no_site() -> None:
    """The only help is sys.path: a tree with the start-up module, this source tree, and the packages of this Python."""
    libraries = [Path(path) for path in sys.path if path.endswith("-packages")]
    source = (
        "import nnunetv2_kaf\nnnunetv2_kaf.activate()\nimport nnunetv2\n"
        "from os.path import join\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as trainer\n"
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find\n"
        "cls = trainer('nnUNetTrainerKAF')\n"
        "planner = find(join(nnunetv2.__path__[0], 'experiment_planning'), 'nnUNetPlannerKAF',"
        " 'nnunetv2.experiment_planning')\n"
        "assert cls.__module__ == 'nnunetv2_kaf.trainer' and planner.__module__ == 'nnunetv2_kaf.planner'\n"
        "import pickle\nassert pickle.loads(pickle.dumps(cls)) is cls\n"
        "try:\n    trainer('nnUNetTrainerKAFNoSuch')\n"
        "except RuntimeError as e:\n    assert 'Could not find requested nnunet trainer' in str(e)\n"
        "else:\n    raise SystemExit('an unknown trainer was found')\n"
        "assert trainer('nnUNetTrainer_5epochs').__module__.startswith('nnunetv2.')\n"
    )
    done = run(source, STARTUP, ROOT, *libraries)
    assert done.returncode == 0, done.stderr[-2000:]
