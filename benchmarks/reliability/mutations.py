"""Random wrong content, reproducible from a `random.Random`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch

TEXTS = (
    "", " ", "..", "../x", "/", "a\nb", "\u00b2", "\u2603", "x" * 300, "os.system", "torch.nn.ReLU", "2d", "all",
    "0", "nan",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e30, math.nan, math.inf, -math.inf, True, False)


def value(rng: random.Random, depth: int = 0) -> Any:
    """A random value of JSON's types, sometimes a tensor."""
    kind = rng.random()
    if kind < 0.15:
        return None
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.65:
        return rng.randint(-(2**40), 2**40)
    if depth > 2 or kind < 0.75:
        return rng.choice(([], {}, "", 0))
    if kind < 0.88:
        return [value(rng, depth + 1) for _ in range(rng.randint(1, 4))]
    return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randint(1, 3))}


def tensor(rng: random.Random) -> Any:
    """A random tensor that a file of torch can hold, usually a wrong one."""
    shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 5))]
    types = (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    found = torch.zeros(shape, dtype=rng.choice(types))
    kind = rng.random()
    if kind < 0.3 and found.is_floating_point():
        found = found + rng.choice((math.nan, math.inf, 1e30))
    elif kind < 0.4 and found.ndim == 2:
        found = found.to_sparse()
    elif kind < 0.5:
        found = torch.zeros(1).expand(10**6)
    return found


def mutated(content: Any, rng: random.Random, tensors: bool = False) -> Any:
    """A copy of a nested content in which one to three entries are removed, replaced, added or exchanged."""
    found = _copied(content)
    for _ in range(rng.randint(1, 3)):
        found = _mutated_once(found, rng, tensors)
    return found


def _mutated_once(content: Any, rng: random.Random, tensors: bool) -> Any:
    new = tensor(rng) if tensors and rng.random() < 0.4 else value(rng)
    places = list(_places(content))
    if not places or rng.random() < 0.02:
        return new
    container, key = rng.choice(places)
    action = rng.random()
    if action < 0.25:
        del container[key]
    elif action < 0.75:
        container[key] = new
    elif action < 0.85 and isinstance(container, dict):
        container[rng.choice(TEXTS)] = new
    else:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            container[key] = _copied(other[name])
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every entry of a nested content: its container and its key."""
    found = []
    todo = [content]
    while todo:
        container = todo.pop()
        if not isinstance(container, (dict, list)):
            continue
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            todo.append(container[key])
    return found


def _copied(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _copied(item) for key, item in content.items()}
    return [_copied(item) for item in content] if isinstance(content, list) else content


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, changed or longer than they were."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        action, place = rng.random(), rng.randrange(len(found) + 1)
        if action < 0.25:
            del found[place:]
        elif action < 0.6 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif action < 0.8:
            del found[place : place + rng.randint(1, 64)]
        else:
            found[place:place] = rng.randbytes(rng.randint(1, 64))
    return bytes(found)
