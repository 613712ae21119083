"""Names of Python for what the parts below know as options of the command line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from aggregation.errors import ConfigError, EdgeAdaptError
from edgeadapt.formats.settings import toml_value

# A command in quotes is left as it is.
OPTION = re.compile(r"'edgeadapt [^']*'|--([a-z]+(?:-[a-z]+)*)(?: (?:[A-Z]+(?:[=:][A-Z]+)*)\b)?")
ARGUMENTS = {
    "adapter": "adapter=",
    "engine": "engine=",
    "form": "format=",
    "name": "adapter=",
    "peft": "source=",
    "registry": "source=",
    "resume": "resume=True",
    "set": "settings",
    "token-file": "token=",
}


@contextmanager
def in_python() -> Iterator[None]:
    """Let errors of the block name ``out=`` and ``resume=True``, not ``--out`` and ``--resume``."""
    try:
        yield
    except EdgeAdaptError as error:
        error.args = (python_names(str(error)),)
        if error.about.startswith("--"):
            error.about = _argument(error.about[2:]).partition("=")[0]
        raise


def python_names(message: str) -> str:
    """Name arguments in place of options.

    >>> python_names("choose another --out, or give --max-rank N; see 'edgeadapt demo --out'")
    "choose another out=, or give max_rank=; see 'edgeadapt demo --out'"
    """
    return OPTION.sub(lambda found: _argument(found[1]) if found[1] else found[0], message)


def _argument(option: str) -> str:
    return ARGUMENTS.get(option, f"{option.replace('-', '_')}=")


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Write keywords as ``KEY=VALUE``.

    >>> overrides({"federation__rounds": 20})
    ['federation.rounds=20']
    """
    return [f"{name.replace('__', '.')}={toml_value(value)}" for name, value in settings.items()]


def check_texts(argument: str, texts: Sequence[str]) -> None:
    """Check that an argument is not one string, whose letters would be texts. Raises ConfigError."""
    if isinstance(texts, str):
        raise ConfigError(f"{argument} is one string: give a list, as in [{texts!r}]", about=argument)


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Check that an argument is one of some values. Raises ConfigError."""
    if value not in choices:
        raise ConfigError(f"{argument} is {value!r}: choose one of {', '.join(choices)}", about=argument)
