"""The two packages that the population comes from, imported only when a population is asked for."""

import difflib
import importlib
from functools import cache
from typing import Any

from aggregation.errors import ConfigError


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module} ({error}): install it with pip install 'edgeadapt[simulations]'"
        ) from error


@cache
def hassil_module(name: str) -> Any:
    """The module ``hassil.<name>``.

    Raises:
        ConfigError: hassil is not installed.
    """
    return _need(f"hassil.{name}")


def intents_of(language: str) -> dict[str, Any]:
    """The package's intents, lists and expansion rules for a language.

    Raises:
        ConfigError: home-assistant-intents is not installed, or does not know the language.
    """
    package = _need("home_assistant_intents")
    known = sorted(package.get_languages())
    found: dict[str, Any] | None = package.get_intents(language) if language in known else None
    if found is None:
        close = difflib.get_close_matches(language, known, n=5, cutoff=0.3) or known
        raise ConfigError(f"there is no language {language!r}; close to it are: {', '.join(close)}")
    return found
