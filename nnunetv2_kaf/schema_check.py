"""Check of what is in the files that are read: one wording for what is wrong, and values that several schemas have.

Schemas name what is used and let everything else pass. They are strict: text is no number, and a number that is not
finite is none at all.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from nnunetv2_kaf.errors import KAFError

MAX_DEPTH = 16
"""Levels of nesting; plans have six."""
MAX_NAME = 128
"""Bytes of a name that becomes part of a path."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class Record(BaseModel):
    """Strict, with finite numbers, and silent about entries that it does not name."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, arbitrary_types_allowed=True)


Schema = TypeVar("Schema", bound=BaseModel)


def check(schema: type[Schema], content: object, where: str, fix: str) -> Schema:
    """Check the content of a file.

    Args:
        schema: What is expected.
        content: What was read.
        where: File, and place in it, for the message.
        fix: What to do, a sentence.

    Raises:
        KAFError: The first thing that is wrong: where, what was found, what was expected, the fix.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "no such entry" if first["type"] == "missing" else brief(first["input"])
        expected = "one" if first["type"] == "missing" else _expected(first["msg"])
        # Not chained: the library's own text would be in a traceback what the message says already.
        raise KAFError(f"{where}{f': {place}' if place else ''}: found {found}, expected {expected}. {fix}") from None
    except RecursionError:
        raise KAFError(
            f"{where}: found entries nested too deeply, expected at most {MAX_DEPTH} levels. {fix}"
        ) from None


def brief(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping) and not value:
        return "an empty dict"
    return _REPR.repr(value)


def _expected(message: str) -> str:
    """The wording of the library as "a valid integer"."""
    text = re.sub(r"^(Value error, |Input should be |Dictionary should be )", "", message)
    return re.sub(r" or an instance of .*", "", text).replace("valid dictionary", "dictionary")


def plain(value: Any, depth: int = 0, finite: bool = True) -> Any:
    """Check that a value is made of null, numbers, text, lists and dicts only.

    Args:
        value: Any.
        depth: Levels above it.
        finite: Refuse NaN and infinite numbers, which a record of measurements may have.

    Raises:
        ValueError: It is not.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"at most {MAX_DEPTH} levels of nesting")
    if isinstance(value, (list, tuple)):
        for item in value:
            plain(item, depth + 1, finite)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError("keys that are text")
            plain(item, depth + 1, finite)
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("finite numbers")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError("null, numbers, text, lists and dicts only")
    return value


def _path_name(value: str) -> str:
    """A name that becomes part of a path cannot lead anywhere else."""
    if not re.fullmatch(r"[^\W_][\w.+\- ]*", value) or len(value.encode()) > MAX_NAME:
        raise ValueError(f"a name of letters, digits, _, -, + and ., at most {MAX_NAME} bytes")
    return value


def check_name(value: str, option: str) -> None:
    """Check a name that becomes part of a path.

    Args:
        value: The name.
        option: The option that gives it, for the message.

    Raises:
        KAFError: It could lead elsewhere.
    """
    try:
        _path_name(value)
    except ValueError as error:
        raise KAFError(f"{option} is {value!r}; expected {error}.") from error


def _list(value: object) -> object:
    """Tuples count as lists: both stand for JSON's lists."""
    return list(value) if isinstance(value, tuple) else value


Name = Annotated[str, Field(min_length=1, max_length=200)]
PlainDict = Annotated[dict[str, Any], BeforeValidator(plain)]
Measurements = Annotated[dict[str, Any], BeforeValidator(partial(plain, finite=False))]
PathName = Annotated[str, AfterValidator(_path_name)]
Listed = BeforeValidator(_list)
Strings = Annotated[list[str], Listed]
