"""Errors that name arguments of Python, where the parts below name options of the command line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from aggregation.errors import EdgeAdaptError

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
    "set": "a setting",
}


@contextmanager
def in_python() -> Iterator[None]:
    """Let errors of the block name ``out=`` and ``resume=True``, not ``--out`` and ``--resume``."""
    try:
        yield
    except EdgeAdaptError as error:
        error.args = (python_names(str(error)),)
        error.about = error.about.removeprefix("--").replace("-", "_") if error.about.startswith("--") else error.about
        raise


def python_names(message: str) -> str:
    """Name arguments in place of options.

    >>> python_names("choose another --out, or give --max-rank N; see 'edgeadapt demo --out'")
    "choose another out=, or give max_rank=; see 'edgeadapt demo --out'"
    """
    return OPTION.sub(lambda found: _argument(found[1]) if found[1] else found[0], message)


def _argument(option: str) -> str:
    return ARGUMENTS.get(option, f"{option.replace('-', '_')}=")
