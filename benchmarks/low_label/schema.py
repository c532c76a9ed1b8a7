"""Checks of a JSON object: known keys, types, ranges; every mistake is reported with its key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2_kaf.errors import KAFError

REQUIRED = object()


@dataclass(frozen=True)
class Rule:
    """What a key of the file may hold.

    Attributes:
        kinds: Accepted types.
        expected: What is expected, in words.
        ok: Further condition.
        default: Value if the key is absent.
    """

    kinds: tuple[type, ...]
    expected: str
    ok: Callable[[Any], bool] = lambda value: True
    default: Any = REQUIRED


def whole(low: int, default: Any = REQUIRED) -> Rule:
    """The rule of a whole number."""
    return Rule((int,), f"a whole number of at least {low}", lambda value: value >= low, default)


def read_block(block: Any, rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    """Check the keys and values of an object.

    Args:
        block: The object.
        rules: Rules by key.
        where: Path of the object, for messages.

    Returns:
        It, with the defaults filled in.

    Raises:
        KAFError: Naming the key, what was found and what is expected.
    """
    if not isinstance(block, dict):
        raise KAFError(f"{where.rstrip('.') or 'the file'}: found {block!r}, expected an object.")
    for key in block:
        if key not in rules:
            raise KAFError(f"{where}{key}: unknown key; known are {', '.join(rules)}. Correct the spelling.")
    out = {}
    for key, rule in rules.items():
        value = block.get(key, rule.default)
        if value is REQUIRED:
            raise KAFError(f"{where}{key}: missing, expected {rule.expected}.")
        right = isinstance(value, rule.kinds) and (bool in rule.kinds or not isinstance(value, bool))
        try:
            right = right and rule.ok(value)
        except re.error:
            right = False
        if not right:
            raise KAFError(f"{where}{key}: found {value!r}, expected {rule.expected}.")
        out[key] = value
    return out
