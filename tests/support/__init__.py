"""What tests of several packages share. Fixtures are in the ``conftest.py`` files.

Errors are matched by what they are about, never by their sentences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from aggregation.errors import EdgeAdaptError

Error = TypeVar("Error", bound=EdgeAdaptError)
FleetOf = Callable[..., Any]  # makes a fleet of so many devices; keywords are its settings
Outcome = tuple[int, str, str]  # of a command: exit code, standard output, standard error
Run = Callable[..., Outcome]


def bits_flipped(raw: bytes) -> Iterator[bytes]:
    """``raw`` with one bit flipped, each in turn."""
    for place in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


@contextmanager
def refused(
    kind: type[Error], about: str, value: object = "", **fields: object
) -> Iterator[pytest.ExceptionInfo[Error]]:
    """The block raises exactly ``kind``, about ``about`` and with these ``fields``, in one line that has ``value``."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind
    assert error.about == about, f"about {error.about!r}: {error}"
    assert value is None or str(value) in str(error), f"{value!r} is not in: {error}"
    assert {name: getattr(error, name) for name in fields} == fields
    assert "\n" not in str(error)
