"""The page answers as the native session with an adapter of every method; what an adapter lacks is an empty tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.browser.test_classification import PHRASES, in_page, native, same
from tests.support import methods
from tests.support.recipes import CLI

pytestmark = pytest.mark.slow
globals().update(methods.FIXTURES)


def test_the_page_takes_adapters_of_every_method(
    page: Any, serve: Callable[[Path], str], every_slot: Path, every_method: methods.Trained
) -> None:
    bundle, common = every_slot / "bundle", ["--labels", every_slot / "labels", "--key", every_slot / "key.pem"]
    for name in methods.METHODS:
        made = ["export", "adapter", "--peft", every_method(name)[1], "--bundle", bundle, "--name", name, *common]
        assert CliRunner().invoke(CLI, list(map(str, made)), catch_exceptions=False).exit_code == 0
    page.goto(serve(bundle))
    for name in methods.METHODS:
        same(in_page(page, name, list(PHRASES)), native(bundle, name, list(PHRASES)))
