"""Plain phrases, which anybody would try first: a look at single answers, where the test phrases give a share."""

import tomllib
from functools import cache
from importlib.resources import files


@cache
def plain_phrases() -> dict[str, dict[str, str]]:
    """Language → intent → phrase. Only some languages have them."""
    raw = (files("simulations.data.households") / "plain.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = tomllib.loads(raw)
    return found
