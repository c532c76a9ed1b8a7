"""Mixed precision: the one place where autocast is switched on or off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: str, dtype: torch.dtype | None = None) -> AbstractContextManager[object]:
    """Run the block in a lower precision, or in the precision of its tensors.

    Args:
        device: Type of the device, such as `"cuda"`. On other types than CPU and CUDA nothing is switched: naming them
            is an error in some versions of torch.
        dtype: `torch.bfloat16` or `torch.float16` for the operations that allow it; `None` switches autocast off, also
            inside a block that switched it on.
    """
    if device not in ("cpu", "cuda"):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)
