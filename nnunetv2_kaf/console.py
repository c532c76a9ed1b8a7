"""What all commands have in common: streams that may be closed, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from nnunetv2_kaf.errors import KAFError, one_line


def prepare_streams() -> None:
    """Make stdout and stderr usable, whatever the caller has done to them.

    A closed stream (`>&-`) is None in Python, and libraries write to it without asking; one without Unicode
    (`LC_ALL=C`) cannot take every path.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Write a result to stdout."""
    _write(sys.stdout, text)


def complain(text: str) -> None:
    """Write a message to stderr."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    """Write a line; a reader that is gone (`| head`) is no error, neither now nor when Python ends."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            return


def run(program: str, action: Callable[[], None], interrupted: str) -> int:
    """Run a command, and say in one line what went wrong.

    Args:
        program: Its name.
        action: The command.
        interrupted: What Ctrl-C leaves.

    Returns:
        The exit code: 0 done, 2 bad input or a broken environment, 130 interrupted.
    """
    try:
        action()
    except KAFError as error:
        complain(f"{program}: error: {error}")
        return 2
    except OSError as error:  # a file that vanished between check and use, a folder that became read-only, ...
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        complain(
            f"{program}: error: {name}found {error.strerror or one_line(error)}; expected a file or folder that can be "
            "read and written. Check path, permissions and free space, and run the command again."
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch has its own errors for memory, one with a class and one without
        if isinstance(error, RuntimeError) and not ("out of memory" in str(error) or "allocate memory" in str(error)):
            raise
        details = one_line(error)[:200] or "no details"
        complain(f"{program}: error: found too little memory ({details}), expected enough. Use smaller batches.")
        return 2
    except KeyboardInterrupt:
        complain(f"{program}: interrupted; {interrupted}")
        return 130
    return 0


def path(text: str) -> Path:
    """An option that is a path: an empty one (of an unset variable in a script) is no folder to write to.

    Raises:
        argparse.ArgumentTypeError: It is empty, or holds a NUL character.
    """
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a path")
    return Path(text)
