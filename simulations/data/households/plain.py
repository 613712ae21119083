"""Plain phrases, which anybody would try first, written by hand and not sampled."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def plain_phrases() -> dict[str, dict[str, str]]:
    """Language → intent → phrase, to look at single answers. Only some languages have them."""
    found: dict[str, dict[str, str]] = _read("plain.toml")
    return found


@cache
def released_phrases() -> dict[str, dict[str, list[str]]]:
    """Language → intent → phrases that a release carries for the personal step. Only some languages have them."""
    found: dict[str, dict[str, list[str]]] = _read("released.toml")
    return found


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("simulations.data.households") / name).read_text(encoding="utf-8"))
