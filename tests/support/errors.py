"""Errors are matched by what they are about, never by their sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from aggregation.errors import EdgeAdaptError

Error = TypeVar("Error", bound=EdgeAdaptError)


@contextmanager
def refused(kind: type[Error], about: str, **fields: object) -> Iterator[pytest.ExceptionInfo[Error]]:
    """The block raises exactly ``kind``, about ``about``, with these ``fields`` (``peer``, ``value``), in one line."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind
    assert error.about == about, f"about {error.about!r}: {error}"
    assert {name: getattr(error, name) for name in fields} == fields
    assert "\n" not in str(error)
