"""Pages of the reference that are generated while the site is built, so that they cannot fall behind the code.

``mkdocs.yml`` names this file. A page asks for a text with a comment, such as ``<!-- generated: keys -->``. Each
command of the top level gets a page of its own, with its members.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_RANGE = re.compile(r"\[([^\[\]]*)\]$")  # click's [default: 3; 1<=x<=9] at the end of a help text
MARK = re.compile(r"^<!-- generated: ([a-z]+)(?: (\w+))? -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """List the pages of commands in the navigation, below that of the command line."""
    reference = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    (entry,) = [entry for entry in reference if "Command line" in entry]
    entry["Command line"] = [entry["Command line"], *({name: _page(name)} for name in top())]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each command of the top level."""
    for name in top():
        files.append(File.generated(config, _page(name), content=commands(name)))


def _page(name: str) -> str:
    return f"reference/commands/{name}.md"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark of a page by the text that it asks for."""
    makers = {
        "commands": lambda _: index(),
        "keys": lambda _: keys(),
        "federation": lambda _: federation(),
        "services": lambda _: services(),
        "registry": lambda _: registry(),
        "policy": lambda _: policy(),
        "eligibility": lambda _: eligibility(),
        "data": lambda _: data(),
        "api": api,
    }
    return MARK.sub(lambda mark: makers[mark[1]](mark[2]), markdown)


def top() -> dict[str, click.Command]:
    """The commands of the top level, by name."""
    return {path.split()[1]: command for path, command in walk() if path.count(" ") == 1}


def index() -> str:
    """A row for each command of the top level, with a link to its page."""
    rows = [f"| [{name}](commands/{name}.md) | {command.get_short_help_str(300)} |" for name, command in top().items()]
    return "\n".join(["| command | what it does |", "| --- | --- |", *rows])


def commands(name: str) -> str:
    """A command of the top level and its members: what each does, its arguments, its options and its examples."""
    return "\n\n".join(
        text for path, command in walk() if path.split()[1:2] == [name] for text in _command(path, command)
    )


def walk() -> Iterator[tuple[str, click.Command]]:
    """The program and each of its commands, a group before its members, with the words that call it."""
    _importable()
    from edgeadapt import program

    pending: list[tuple[str, click.Command]] = [("edgeadapt", program.cli)]
    while pending:
        path, command = pending.pop(0)
        yield path, command
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=path)
            members = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
            pending[:0] = [(f"{path} {name}", member) for name, member in members if member is not None]


def _command(path: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    yield f"{'#' * path.count(' ')} {path.removeprefix('edgeadapt ')}"
    text, _, examples = cleandoc(command.help or "").replace("\b\n", "").partition("\nExample")
    yield re.sub(r"(?<!`)(--[a-z-]+)(?!`)", r"`\1`", text.strip())
    if isinstance(command, click.Group):
        return
    usage = " ".join(command.collect_usage_pieces(context))
    shown = re.sub(r"^s?:\n", "", examples)
    yield f"```console\n$ {path} {usage}\n```" + (
        f"\n\nExamples:\n\n```console\n{cleandoc(shown)}\n```" if shown else ""
    )
    rows = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    lines = [f"| {_code(name)} | {re.sub(_RANGE, lambda found: _code(found[1]), help)} |" for name, help in rows]
    yield "\n".join(["| option | meaning |", "| --- | --- |", *lines])


def _code(text: str) -> str:
    """As code in a cell of a table, where a bar would end the cell."""
    return f"`{' '.join(text.split())}`".replace("|", r"\|")


def keys() -> str:
    """Every key of a scenario, as ``edgeadapt simulate run --keys`` prints it."""
    run = next(command for path, command in walk() if path == "edgeadapt simulate run")
    printed = CliRunner().invoke(run, ["--keys"]).output.strip()
    rows = re.findall(r"^(\S+) = (.*?)  # (.*)$", printed, re.MULTILINE)
    if len(rows) != printed.count("\n") + 1:
        raise ValueError("a line of `edgeadapt simulate run --keys` is not KEY = DEFAULT  # MEANING")
    return _table(rows)


def federation() -> str:
    """Every key of a federation's settings."""
    _importable()
    from coordinator.settings import FederationSettings

    return _settings(FederationSettings)


def services() -> str:
    """Every key of what a coordinator's machine runs."""
    _importable()
    from coordinator.settings import ServiceSettings

    return _settings(ServiceSettings)


def registry() -> str:
    """Every key of where a registry is kept."""
    _importable()
    from edgeadapt.formats.registryfiles import RegistrySettings

    return _settings(RegistrySettings)


def policy() -> str:
    """Every limit of a device."""
    _importable()
    from client.node.policy import PolicySettings

    return _settings(PolicySettings)


def eligibility() -> str:
    """Every condition under which a device takes part."""
    _importable()
    from client.node.policy import EligibilitySettings

    return _settings(EligibilitySettings)


def data() -> str:
    """What keeps an example of a device out of training."""
    _importable()
    from client.training.hygiene import HygieneSettings

    return _settings(HygieneSettings)


def _settings(kind: Any) -> str:
    rows = [
        (key, json.dumps(info.get_default(call_default_factory=True)), info.description) for key, info in kind.fields()
    ]
    return _table(rows)


def _table(rows: Iterable[tuple[str, str, str | None]]) -> str:
    lines = [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in rows]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *lines])


def _importable() -> None:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def api(part: str) -> str:
    """What a top-level package and the packages in it export; their command lines have a page of their own."""
    packages = sorted(
        file.parent.relative_to(ROOT).as_posix().replace("/", ".") for file in (ROOT / part).rglob("__init__.py")
    )
    return "\n\n".join(f"::: {name}" for name in packages if "cli" not in name.split("."))
