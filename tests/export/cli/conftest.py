"""``edgeadapt bundle`` in this process, and the error with which a command ended."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from edgeadapt import program


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    error: EdgeAdaptError | None

    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: int, about: str) -> None:
        """The command printed nothing but one line, of an error about ``about``."""
        assert (self.code, self.out) == (code, ""), self.err
        assert self.error is not None
        assert self.error.about == about, f"about {self.error.about!r}: {self.err}"
        assert self.err == f"edgeadapt: {self.error}\n"


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    cli = program.cli

    def run(*arguments: str | Path) -> Done:
        errors: list[EdgeAdaptError] = []

        def recorded(**settings: Any) -> Any:
            try:
                return cli(**settings)
            except EdgeAdaptError as error:
                errors.append(error)
                raise

        monkeypatch.setattr(sys, "argv", ["edgeadapt", "bundle", *map(str, arguments)])
        monkeypatch.setattr(program, "cli", recorded)
        with pytest.raises(SystemExit) as caught:
            program.main()
        code = caught.value.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr(), errors[0] if errors else None)

    return run


@pytest.fixture
def key(export: Callable[..., Done], tmp_path: Path) -> Path:
    assert export("key", tmp_path / "key.pem").code == 0
    (tmp_path / "key.pub.pem").rename(tmp_path / "trust.pem")
    return tmp_path / "key.pem"
