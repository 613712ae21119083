"""What the devices' logs say about refusals."""

import logging
from collections.abc import Iterator

import pytest


class Refusals(logging.Handler):
    """Collects what each refusal of a device is about."""

    def __init__(self) -> None:
        super().__init__()
        self.abouts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "about"):
            self.abouts.append(record.about)


@pytest.fixture
def refusals() -> Iterator[list[str]]:
    """What each refusal is about, in order."""
    handler, logger = Refusals(), logging.getLogger("edgeadapt.device")
    logger.addHandler(handler)
    yield handler.abouts
    logger.removeHandler(handler)
