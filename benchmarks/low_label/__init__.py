"""Segmentation with few labelled patients: arms x labelled patients x draws, through nnU-Net's stock commands.

- `config`, `schema`: the study as one JSON file. `splits`: who is labelled, validates, tests.
- `layout`: where everything is. `raw`, `plans`, `trainers`: the study's own nnU-Net dataset, plans, trainers.
- `commands`: the stock commands of every run. `worker`: runs them in a process of their own, each step once.
- `grid`: what there is to do, several at once. `measure`: Dice and Hausdorff distance per case.
- `stats`, `report`, `figures`, `told`, `in_short`, `evidence`: from the results to intervals, tables, figures, README's
  table and `docs/evidence.md`.
"""

import sys
from pathlib import Path

# `python -m benchmarks.low_label` puts the repository on the path, `common.py` lies in its folder `benchmarks`.
if (_BENCHMARKS := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(_BENCHMARKS)
