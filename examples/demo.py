"""The whole path on one dataset with nnU-Net's stock commands: `make demo` or `python examples/demo.py --help`.

Each command is printed as typed, runs with its output in a log file, and leaves a marker when it is done. Run again
after an interruption, the demo skips what is done and continues what is not.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import demo_data

from nnunetv2_kaf.errors import KAFError

PLANS, TRAINER, FOLD = "nnUNetKAFPlans", "nnUNetTrainerKAF_1epoch", "0"
POLL_SECONDS, REPORT_SECONDS, LOG_LINES = 0.5, 30.0, 15


@dataclass(frozen=True)
class Settings:
    """Where and on what the demo runs.

    Attributes:
        name: dataset folder name, `DatasetXXX_Name`.
        identifier: Its number.
        configuration: nnU-Net configuration.
        device: `cpu`, `cuda` or `mps`.
        output: Folder of everything that the demo makes.
    """

    name: str
    identifier: str
    configuration: str
    device: str
    output: Path

    @property
    def raw(self) -> Path:
        """The demo's raw dataset."""
        return self.output / "nnUNet_raw" / self.name

    @property
    def results(self) -> Path:
        """The demo's results of this dataset."""
        return self.output / "nnUNet_results" / self.name

    @property
    def run(self) -> Path:
        """Logs, markers, predictions and picture of this dataset and configuration."""
        return self.output / f"{self.name}_{self.configuration}"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.results / f"{TRAINER}__{PLANS}__{self.configuration}"


@dataclass(frozen=True)
class Step:
    """One command of the demo; `resume` returns the extra options that continue an interrupted run."""

    name: str
    command: tuple[str, ...]
    resume: Callable[[], tuple[str, ...]] = tuple


def say(text: str = "", end: str = "\n") -> None:
    """Write to the terminal."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def build_steps(settings: Settings) -> list[Step]:
    """The commands in the order in which they run."""
    dataset, configuration, device = settings.identifier, settings.configuration, settings.device
    predictions = str(settings.run / "predictions")
    model = ("-c", configuration, "-tr", TRAINER, "-p", PLANS)
    pretraining = settings.results / f"KAFPretraining__{PLANS}__{configuration}"
    schedule = ("--epochs", "3", "--iterations", "20", "--seed", "0", "--device", device)

    def continue_pretraining() -> tuple[str, ...]:
        return ("--continue",) if any(pretraining.glob("fold_*/checkpoint_latest.pth")) else ()

    def continue_training() -> tuple[str, ...]:
        return ("--c",) if (settings.model / f"fold_{FOLD}").is_dir() else ()

    plan = ("nnUNetv2_plan_and_preprocess", "-d", dataset, "-pl", "nnUNetPlannerKAF", "-c", configuration)
    pretrain = ("kaf-pretrain", "--dataset", dataset, "-c", configuration, "-p", PLANS, *schedule)
    train = ("nnUNetv2_train", dataset, configuration, FOLD, "-tr", TRAINER, "-p", PLANS, "-device", device)
    predict = ("nnUNetv2_predict", "-i", str(settings.raw / "imagesTs"), "-o", predictions, "-d", dataset, *model)
    # Without a GPU there is nothing to overlap with, and each worker would import nnU-Net again.
    workers = ("-npp", "0", "-nps", "0") if device == "cpu" else ("-npp", "2", "-nps", "2")
    references = ("-djfile", str(settings.model / "dataset.json"), "-pfile", str(settings.model / "plans.json"))
    evaluate = ("nnUNetv2_evaluate_folder", str(settings.raw / "labelsTs"), predictions, *references, "-np", "2")
    images, labels = str(settings.raw / "imagesTs"), str(settings.raw / "labelsTs")
    inside = ("kaf-report", str(settings.model), "-i", images, "-l", labels, "-o", str(settings.run / "report"))
    learned = ("kaf-report", str(pretraining), "-o", str(settings.run / "report_pretraining"))
    return [
        Step("plan", (*plan, "--verify_dataset_integrity", "-npfp", "2", "-np", "2")),
        Step("pretrain", pretrain, continue_pretraining),
        Step("train", train, continue_training),
        Step("predict", (*predict, "-f", FOLD, "-device", device, *workers)),
        Step("evaluate", evaluate),
        Step("report_pretraining", (*learned, "--device", device)),
        Step("report", (*inside, "--device", device)),
    ]


def environment(output: Path) -> dict[str, str]:
    """The environment of the commands: the demo's own nnU-Net folders, none of the user's settings."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("nnUNet_", "KAF_"))}
    workers = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    own |= {name: str(output / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    own |= {"nnUNet_n_proc_DA": workers, "nnUNet_def_n_proc": "2", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    # On the CPU nnU-Net uses a thread per core besides its workers: waiting threads must sleep, not spin.
    own |= {"OMP_WAIT_POLICY": "PASSIVE"}
    return own | {"PATH": sysconfig.get_path("scripts") + os.pathsep + own.get("PATH", "")}


def last_line(log: Path, limit: int = 100) -> str:
    """The last line with text of a log, also of a progress bar that rewrites its line."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:limit] for line in reversed(lines) if line.strip()), "")


def watch(process: subprocess.Popen[bytes], log: Path, start: float) -> int:
    """Show a line of progress until `process` ends; return its exit code."""
    live, reported = sys.stdout.isatty(), start
    while (code := process.poll()) is None:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if live or now - reported >= REPORT_SECONDS:
            reported = now
            progress = f"  {now - start:4.0f} s  {last_line(log)}"
            say(f"\r\033[K{progress}" if live else progress, end="" if live else "\n")
    say("\r\033[K" if live else "", end="")
    return code


def stop(process: subprocess.Popen[bytes]) -> None:
    """End an interrupted command together with the workers that it started."""
    for sign, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_step(number: int, step: Step, settings: Settings) -> None:
    """Run one step unless its marker shows that the same command is done.

    Raises:
        KAFError: The command failed; the message shows the end of its log.
    """
    log = settings.run / f"{number}_{step.name}.log"
    marker, typed = log.with_suffix(".done"), shlex.join(step.command)
    if marker.is_file() and marker.read_text(encoding="utf-8") == typed:
        say(f"$ {typed}\n  done before")
        return
    command = (*step.command, *step.resume())
    say(f"$ {shlex.join(command)}")
    start = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment(settings.output), start_new_session=True
        )
        try:
            code = watch(process, log, start)
        except BaseException:
            stop(process)
            raise
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        end = "\n".join(f"  | {line}" for line in tail)
        raise KAFError(f"step {step.name!r} failed with exit code {code}. The end of its log:\n{end}\nThe log: {log}")
    marker.write_text(typed, encoding="utf-8")
    say(f"  done in {time.monotonic() - start:.0f} s, log: {log}")


def report(settings: Settings) -> None:
    """Print the Dice table, draw the picture and list what was made, the reports to open first."""
    script = Path(__file__).with_name("demo_report.py")
    picture = settings.run / "picture.png"
    folders = (settings.model, settings.raw, settings.run / "predictions", picture)
    subprocess.run([sys.executable, script, *folders], env=environment(settings.output), check=True)
    made = {
        "report": settings.run / "report" / "report.html",
        "": settings.run / "report_pretraining" / "report.html",
        "picture": picture,
        "predictions": settings.run / "predictions",
        "scores": settings.run / "predictions" / "summary.json",
        "model": settings.model,
        "pretraining": settings.results / f"KAFPretraining__{PLANS}__{settings.configuration}",
        "dataset": settings.raw,
        "logs": settings.run,
    }
    say("\n" + "\n".join(f"{name:12} {path}" for name, path in made.items()))


def find_device() -> str:
    """`cuda` where PyTorch finds a GPU, else `cpu`."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return (
        "cpu" if subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode else "cuda"
    )


def run(data: str, configuration: str, device: str, output: Path) -> None:
    """Run the demo.

    Args:
        data: nnU-Net raw dataset folder; empty for the embedded phantoms.
        configuration: nnU-Net configuration.
        device: `auto`, `cpu`, `cuda` or `mps`.
        output: Folder of everything that the demo makes.
    """
    start = time.monotonic()
    output = output.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (output / name).mkdir(parents=True, exist_ok=True)
    if data:
        name = Path(data).expanduser().resolve().name
        identifier = demo_data.prepare_own_data(Path(data), output / "nnUNet_raw", output / "nnUNet_preprocessed")
    else:
        name, identifier = demo_data.PHANTOM_NAME, demo_data.prepare_phantoms(output / "nnUNet_raw")
    device = find_device() if device == "auto" else device
    settings = Settings(name, identifier, configuration, device, output)
    settings.run.mkdir(parents=True, exist_ok=True)
    say(f"{name}, {configuration}, {device}; nnU-Net's folders are in {output}\n")
    for number, step in enumerate(build_steps(settings), start=1):
        run_step(number, step, settings)
    report(settings)
    say(f"\nfinished in {time.monotonic() - start:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Plan, pretrain, train, predict, evaluate and look inside, on one dataset."
    )
    parser.add_argument("--data", default="", help="nnU-Net raw dataset folder (default: embedded phantoms)")
    parser.add_argument("--configuration", default="3d_fullres", help="2d or 3d_fullres (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="default: ./%(default)s")
    options = parser.parse_args(argv)
    try:
        run(options.data, options.configuration, options.device, options.output)
    except KeyboardInterrupt:
        say("\ninterrupted; the same command continues here")
        return 130
    except (KAFError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"\ndemo: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
