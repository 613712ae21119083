"""The tiny classifier's exports and bundles, and ``edgeadapt export`` in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import edgeadapt
from tests.support import models

tiny_base, model, source, bundle = models.tiny_base, models.model, models.source, models.bundle
exported, exported_int8 = models.exported, models.exported_int8
vendor, household = models.vendor, models.household


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``edgeadapt export`` with these arguments, in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["edgeadapt", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            edgeadapt.main()
        code = caught.value.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run
