"""Self-supervised pretraining of the encoder.

    from pretraining import DataOptions, PretrainConfig, RunOptions, pretrain, resolve_task

    task = resolve_task("123", "3d_fullres", "nnUNetKAFPlans")
    options = RunOptions(device=torch.device("cuda"), data=DataOptions(fold="all"))
    checkpoint = pretrain(task, PretrainConfig(epochs=100), options)

These names are imported when they are asked for: importing this package imports neither torch nor nnunetv2.

A scan passes through the rooms in this order, and a room imports only from rooms before it:

- `data`: which scans, without which patients, and their voxels.
- `pairs`: two views of a patch or slice, their keypoints, which keypoints match; batches.
- `objectives`: batch to embeddings to loss.
- `monitoring`: does it learn.
- `exchange`: weights from and for other tools.

The files beside them hold one run together. `config` (options), `task` (dataset and plans), `distributed` and `signals`
are used by all rooms; then `loop` (step and epoch), `checkpoint`, `prepare` (everything before the first step),
`recorder` (what is written), `run` (from start to checkpoint) and `cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretraining.config import PretrainConfig
    from pretraining.prepare import DataOptions
    from pretraining.run import RunOptions, pretrain
    from pretraining.task import resolve_task

__all__ = ["DataOptions", "PretrainConfig", "RunOptions", "pretrain", "resolve_task"]
_HOMES = {
    "DataOptions": "prepare",
    "PretrainConfig": "config",
    "RunOptions": "run",
    "pretrain": "run",
    "resolve_task": "task",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
