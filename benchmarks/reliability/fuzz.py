"""Random wrong files for every reader, for some minutes: nothing may be raised but our error.

Writes how many files of which kind were tried. A failure is written with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import versions
from reliability.readers import Files, Reader

RESULT = Path(__file__).resolve().parents[1] / "results" / "reliability" / "fuzz.json"


def attempt(reader: Reader, seed: int) -> str:
    """Try one wrong file.

    Returns:
        "refused", "accepted" (what was changed does not matter), or the error that should not have been raised.
    """
    try:
        reader.attempt(random.Random(seed))
    except KAFError as error:
        return "refused" if str(error).strip() else "an empty message"
    except Exception as error:  # this is what is looked for
        return f"{type(error).__name__}: {error}"
    return "accepted"


def fuzz(minutes: float, first_seed: int) -> dict[str, Any]:
    """Try all readers in turn until the time is over."""
    counts: dict[str, Counter[str]] = {}
    failures = []
    seed = first_seed
    with tempfile.TemporaryDirectory() as folder:
        readers = Files(Path(folder)).readers()
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            for reader in readers:
                outcome = attempt(reader, seed)
                known = outcome in ("refused", "accepted")
                counts.setdefault(reader.name, Counter())[outcome if known else "failed"] += 1
                if not known:
                    failures.append({"reader": reader.name, "seed": seed, "error": outcome[:500]})
            seed += 1
    return {
        "minutes": minutes,
        "first_seed": first_seed,
        "readers": {name: dict(sorted(found.items())) for name, found in counts.items()},
        "failures": failures,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }


def main() -> int:
    """Run, write the figures, and return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"figures (default: {RESULT.name})")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = fuzz(options.minutes, options.seed)
    write_json(found, options.out)
    total = sum(sum(counts.values()) for counts in found["readers"].values())
    sys.stdout.write(f"{total} wrong files, {len(found['failures'])} failures: {options.out}\n")
    for failure in found["failures"][:20]:
        sys.stdout.write(f"  {failure}\n")
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
