"""Real wheels in fresh virtual environments: installed, found by nnU-Net in an empty environment, removed again.

The fresh environments reach torch, nnunetv2 and the rest through links to the packages of the environment that runs the
tests, *without* anything of this package: its start-up files there would otherwise make the tests pass on their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTUP_FILES = {f"nnunetv2_kaf_startup.{suffix}" for suffix in ("py", "pth", "start")}

pytestmark = pytest.mark.integration

# What nnU-Net's own commands do with -tr and -pl, and with the class in a worker that it starts.
FIND = """
import multiprocessing, pickle, sys
from os.path import join

def child(cls, queue):
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host
    queue.put(cls is host.nnUNetTrainerKAF)

if __name__ == "__main__":
    assert not {"torch", "nnunetv2", "nnunetv2_kaf"} & set(sys.modules), "loaded at interpreter start"
    import nnunetv2
    from nnunetv2.run.run_training import recursive_find_trainer_class_by_name as trainer
    from nnunetv2.experiment_planning.plan_and_preprocess_api import recursive_find_python_class as find
    def planner(name):
        return find(join(nnunetv2.__path__[0], "experiment_planning"), name, "nnunetv2.experiment_planning")
    cls = trainer("nnUNetTrainerKAF")
    assert cls.__module__ == "nnunetv2_kaf.trainer" and pickle.loads(pickle.dumps(cls)) is cls
    assert planner("nnUNetPlannerKAF").__module__ == "nnunetv2_kaf.planner"
    assert planner("nnUNetPlannerKAFNoSuch") is None
    try:
        trainer("nnUNetTrainerKAFNoSuch")
    except RuntimeError as error:
        assert "Could not find requested nnunet trainer" in str(error)
    else:
        raise SystemExit("an unknown trainer was found")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(cls, queue))
    process.start()
    assert queue.get(timeout=300)
    process.join()
    print("found in", sys.modules[cls.__module__].__file__)
"""


def run(command: Sequence[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, env=env, cwd=cwd
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip(python: Path | str, *arguments: str | Path) -> str:
    return run([sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: building leaves nothing in the checkout, and an editable install has its own tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("nnunetv2_kaf", "pretraining", "semisupervised", "kaf_report", "startup"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source])
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything that is installed here, except this package and all .pth files."""
    folder = tmp_path_factory.mktemp("dependencies")
    for library in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(library).iterdir():
            if (
                "kaf" not in entry.name.lower()
                and entry.suffix not in (".pth", ".start")
                and entry.name != "__pycache__"
            ):
                (folder / entry.name).symlink_to(entry)
    return folder


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def empty(self) -> dict[str, str]:
        """An environment with nothing but PATH, HOME and the three path variables of nnU-Net."""
        variables = {name: str(self.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in variables.values():
            os.makedirs(folder, exist_ok=True)
        return {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "HOME": str(self.root), **variables}

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for part in ("bin", "lib") for path in (self.root / part).rglob("*")}

    def find(self) -> str:
        script = self.root / "find.py"
        script.write_text(FIND)
        return run([self.python, script], env=self.empty(), cwd=self.root).splitlines()[-1]


@pytest.fixture
def environment(dependencies: Path, tmp_path: Path) -> Environment:
    if os.name == "nt":
        pytest.skip("the layout of the test environment is that of Linux and macOS")
    root = tmp_path / "venv"
    venv.create(root, symlinks=True, with_pip=False)
    (site_packages,) = root.glob("lib/python*/site-packages")
    # A path in a .pth file is added to sys.path; the .pth files in that folder are not read.
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return Environment(root)


def test_record_lists_the_startup_files_and_the_typed_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        files = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
    packages = {
        f"{package}/{file}"
        for package in ("nnunetv2_kaf", "pretraining", "semisupervised", "kaf_report")
        for file in ("__init__.py", "py.typed")
    }
    assert files >= STARTUP_FILES | packages
    top_level = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert top_level == STARTUP_FILES | {"nnunetv2_kaf", "pretraining", "semisupervised", "kaf_report"}


def test_nothing_is_found_before_the_installation(environment: Environment) -> None:
    """The control: the links do not bring this package along."""
    code = "import sys, importlib.util as u; print(u.find_spec('nnunetv2_kaf'), u.find_spec('nnunetv2_kaf_startup'))"
    assert run([environment.python, "-c", code], env=environment.empty(), cwd=environment.root).strip() == "None None"
    with pytest.raises(AssertionError, match="Could not find requested nnunet trainer nnUNetTrainerKAF"):
        environment.find()


def test_wheel_is_found_and_uninstalls_without_a_trace(environment: Environment, wheel: Path) -> None:
    before = environment.files()
    pip(environment.python, "install", "--no-deps", wheel)
    assert "site-packages/nnunetv2_kaf/trainer.py" in environment.find()
    pip(environment.python, "uninstall", "-y", "nnunetv2-kaf")
    assert environment.files() == before
    code = "import sys; print([type(f).__name__ for f in sys.meta_path if not isinstance(f, type)])"
    done = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, env=environment.empty())
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_editable_install_is_found_and_uninstalls_without_a_trace(environment: Environment, source: Path) -> None:
    before = environment.files()
    pip(environment.python, "install", "--no-deps", "--no-build-isolation", "--editable", source)
    assert environment.find() == f"found in {source / 'nnunetv2_kaf' / 'trainer.py'}"
    table = run(
        [environment.root / "bin" / "kaf-doctor", "--no-compile"], env=environment.empty(), cwd=environment.root
    )
    assert "OK    nnU-Net finds nnUNetPlannerKAF" in table
    pip(environment.python, "uninstall", "-y", "nnunetv2-kaf")
    assert environment.files() == before


def test_target_install_is_explained_by_the_doctor_and_works_with_activate(
    environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    pip(environment.python, "install", "--no-deps", "--target", target, wheel)
    env = {**environment.empty(), "PYTHONPATH": str(target)}
    code = (
        "from nnunetv2_kaf.doctor import check_discovery\nfrom nnunetv2_kaf.probes import DISCOVERY, run_probe\n"
        "check = check_discovery(run_probe(DISCOVERY, 300), 'nnUNetTrainerKAF')\n"
        "assert check.status == 'fail' and '.pth was not read' in check.found and 'activate()' in check.fix, check\n"
    )
    run([environment.python, "-c", code], env=env, cwd=tmp_path)
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as trainer\n"
        "import nnunetv2_kaf\nnnunetv2_kaf.activate()\n"
        "assert trainer('nnUNetTrainerKAF').__module__ == 'nnunetv2_kaf.trainer'\n"
    )
    run([environment.python, "-c", code], env=env, cwd=tmp_path)
