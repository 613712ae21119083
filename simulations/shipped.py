"""The scenarios and suites that come with the package."""

import re
from pathlib import Path

from aggregation.errors import ConfigError

SCENARIOS = Path(__file__).parent / "scenarios"
SUITES = Path(__file__).parent / "suites"


def find(path: Path, folder: Path) -> Path:
    """Return ``path``, or if nothing is there the file of this name in ``folder``. Raises ConfigError: neither is."""
    for file in (path, folder / path.name):
        if file.exists():
            return file
    names = ", ".join(file.name for file in sorted(folder.glob("*.toml")))
    raise ConfigError(f"there is no file {path}; the {folder.name} that are shipped: {names}", about=path.name)


def described(folder: Path) -> dict[str, str]:
    return {path.name: _sentence(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))}


def _sentence(text: str) -> str:
    """Join the lines of the comment at the start of a file, up to the first full stop or colon.

    >>> _sentence("# Runs a.toml,\\n# twice. Every key: b.md\\nseed = 1")
    'Runs a.toml, twice'
    """
    comment = re.match(r"(?:#.*\n)*", text)
    joined = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
    return re.split(r"[.:](?:\s|$)", joined)[0]
