"""Which part of a KAF network takes which share of a training step, from torch's profiler.

Modules of the KAF layers are labelled while they run forward. Every node of the backward pass carries the number of the
forward operator that made it, so its time goes to the label of that operator. This holds for parts whose input needs no
gradient too, where hooks on the modules' backward pass would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from nnunetv2_kaf.fusion import KAFLayer
from nnunetv2_kaf.keypoints import KeypointDetector

DEFINITION = (
    "shares of a profiled, uncompiled training step, forward and backward. detection: the keypoint detector. "
    "attention: projection, position encoding, blocks and norm. fusion: the rest of the KAF layers (gather, scatter, "
    "diffusion, add or concat). backbone: all the rest, in it the decoder (whose convolutions are wider with concat), "
    "the loss and the optimiser ('other'). On a CPU of the time that passes, on CUDA of the time that kernels run."
)
PARTS = ("detection", "attention", "fusion")
_PREFIX = "benchmark::"
_STEP, _FORWARD, _LABELS = f"{_PREFIX}step", f"{_PREFIX}forward", {f"{_PREFIX}{part}": part for part in PARTS}
_BACKWARD = "autograd::engine::evaluate_function"
_ATTENTION = ("project", "position", "blocks", "norm")


def shares(step: Callable[[], object], network: nn.Module, device: torch.device, steps: int) -> dict[str, Any]:
    """Profile some training steps after one that is not counted.

    Args:
        step: Runs `network` forward and backward, uncompiled.
        network: Network whose modules are labelled meanwhile.
        device: Device that runs it.
        steps: How many are profiled.

    Returns:
        By part the shares of the step in `forward` and `backward`, and `other` of the backbone (they sum to 1), and
        `profiled_step_seconds`: the mean step, slowed by the profiler.
    """
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with labelled(network):
        step()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda]) as profile:
            for _ in range(steps):
                with record_function(_STEP):
                    step()
                if cuda:
                    torch.cuda.synchronize(device)
    found, total = attribute(profile.events(), bool(cuda))
    out: dict[str, Any] = {
        part: {kind: round(value / total, 5) for kind, value in kinds.items()} for part, kinds in found.items()
    }
    return {**out, "profiled_step_seconds": round(total / steps / 1e6, 5)}


def attribute(events: Any, cuda: bool) -> tuple[dict[str, dict[str, float]], float]:
    """Sum up the microseconds of a profile by part.

    Returns:
        By part the microseconds forward and backward, and of everything.
    """
    host = [event for event in events if event.device_type.name == "CPU"]

    def cost(event: Any) -> float:
        return float(event.device_time_total if cuda else event.time_range.elapsed_us())

    found = {part: {"forward": 0.0, "backward": 0.0} for part in PARTS}
    # attention lies inside a KAF layer, whose label stands for fusion
    spans = [event for event in host if event.name in _LABELS and not _inside_backward(event)]
    for event in spans:
        found[_LABELS[event.name]]["forward"] += cost(event)
        outer = _label(event.cpu_parent)
        if outer is not None:
            found[outer]["forward"] -= cost(event)
    origin = _labels_by_number(host)
    backward = 0.0
    for event in host:
        if event.name.startswith(_BACKWARD) and not _inside_backward(event.cpu_parent):
            backward += cost(event)
            label = origin.get(event.sequence_nr)
            if label is not None:
                found[label]["backward"] += cost(event)
    forward = sum(cost(event) for event in host if event.name == _FORWARD)
    # The backward pass runs in the calling thread on a CPU, in one of its own on CUDA.
    total = sum(cost(event) for event in host if event.name == _STEP) + (backward if cuda else 0.0)
    found["backbone"] = {
        "forward": forward - sum(found[part]["forward"] for part in PARTS),
        "backward": backward - sum(found[part]["backward"] for part in PARTS),
        "other": total - forward - backward,
    }
    return found, total


def _labels_by_number(host: list[Any]) -> Mapping[int, str | None]:
    """The label of the operator that made each numbered node of the backward pass.

    An operator shows the number that the next node gets, so of several with one number the last to start made the node.
    """
    forward = [
        event
        for event in host
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and not _inside_backward(event)
    ]
    forward.sort(key=lambda event: event.time_range.start)
    return {event.sequence_nr: _label(event) for event in forward}


def _label(event: Any) -> str | None:
    """The innermost label that an operator runs under."""
    while event is not None:
        if event.name in _LABELS:
            return _LABELS[event.name]
        event = event.cpu_parent
    return None


def _inside_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(_BACKWARD):
            return True
        event = event.cpu_parent
    return False


@contextmanager
def labelled(network: nn.Module) -> Iterator[None]:
    """Let the parts of a network show up in profiles for the duration."""
    open_labels: list[Any] = []

    def start(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_labels.append(record_function(name))
            open_labels[-1].__enter__()

        return hook

    # Always called: a block that is computed again for the backward pass is left by an exception, once it has what it
    # needs.
    def stop(*_: object) -> None:
        open_labels.pop().__exit__(None, None, None)

    handles = []
    for module, name in _parts(network):
        handles += [module.register_forward_pre_hook(start(name)), module.register_forward_hook(stop, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules to label; outer ones first."""
    yield network, _FORWARD
    for module in network.modules():
        if isinstance(module, KeypointDetector):
            yield module, f"{_PREFIX}detection"
        if isinstance(module, KAFLayer):
            yield module, f"{_PREFIX}fusion"
            for name in _ATTENTION:
                part = getattr(module, name)
                for one in part if isinstance(part, nn.ModuleList) else [part]:
                    yield one, f"{_PREFIX}attention"
