"""JSON with one meaning: written deterministically, and read strictly. Two readers of one text must never see two
values, so what JSON leaves open is refused: a key that occurs twice, NaN and infinity, half of a surrogate pair,
another encoding than UTF-8, and nesting that a reader may not be able to follow."""

import json
import math
import re
from collections.abc import Hashable
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a pair
T = TypeVar("T")
MAX_DEPTH = 16  # objects and arrays within each other; our documents have five


def encode(value: object) -> bytes:
    """Write ``value`` as JSON in UTF-8, with sorted keys and without white space. Equal values give equal bytes. Raises
    TypeError: JSON has no form for it; ValueError: a number is NaN or infinite, or a text is not Unicode.

    >>> encode({"b": [1, None], "a": "ü"})
    b'{"a":"\\xc3\\xbc","b":[1,null]}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def decode(raw: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError: not JSON in UTF-8, or something that this module refuses.

    >>> decode(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' occurs twice
    """
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
        check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return value


class Exact:
    """Base of dataclasses of which ``decode_as`` refuses unknown fields."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


def decode_as(kind: type[T], raw: bytes | str) -> T:
    """Return a JSON text as a dataclass, whose annotations say what is allowed; nothing is converted. A key that occurs
    twice is not refused, unlike by ``decode``. Raises pydantic.ValidationError."""
    return cast(T, _reader(cast(Hashable, kind)).validate_json(raw, strict=True))


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """Return a dataclass's reader, which takes two milliseconds to make and some microseconds to use."""
    return TypeAdapter(kind)


def timestamp(seconds: float) -> str:
    """Write a time in UTC, given in seconds since 1970, as our documents have it.

    >>> timestamp(1_796_133_731)
    '2026-12-01T14:02:11Z'
    """
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def optional_timestamp(seconds: float | None) -> str | None:
    return None if seconds is None else timestamp(seconds)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {key[:40]!r} occurs twice")
        members[key] = value
    return members


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def check_depth(value: object, left: int = MAX_DEPTH) -> None:
    """Check that tables and lists of ``value`` are nested at most ``left`` levels deep. Raises ValueError."""
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        for inner in value.values() if isinstance(value, dict) else value:
            check_depth(inner, left - 1)
