"""Run installed commands one after the other in this process: importing nnU-Net once instead of once a command.

The argument is a JSON list of command lines; each is resolved to the console script's entry point and sees its own
`sys.argv`. Two words are no commands: `remove PATH...` deletes and `set NAME VALUE` changes the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path


def _run(words: list[str]) -> None:
    if words[0] == "remove":
        for path in map(Path, words[1:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif words[0] == "set":
        os.environ[words[1]] = words[2]
    else:
        (script,) = entry_points(group="console_scripts", name=words[0])
        sys.argv = words
        code = script.load()()
        if code:
            sys.exit(f"{words} exited with {code}")


def main() -> None:
    for words in json.loads(sys.argv[1]):
        sys.stdout.write(f"\n$ {' '.join(words)}\n")
        sys.stdout.flush()
        start = time.monotonic()
        _run(words)
        sys.stdout.write(f"\n# {time.monotonic() - start:.1f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":  # spawned workers import this file
    main()
