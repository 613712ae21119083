"""``edgeadapt device index`` and ``ask``: passages of one's own files, and of the bundle, that answer a question."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from aggregation.errors import ConfigError, TrustError
from client.cli import options
from client.cli.options import printable
from client.inference.passages import PASSAGES, PassageIndex, folder_of
from client.inference.session import ClassificationSession
from edgeadapt import commandline
from edgeadapt.formats.bundle import KNOWLEDGE
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.passages import Passage, parse_passages, read_folder

AT_ONCE = 64  # passages between two lines of progress


class Finder:
    """Finds passages for questions with the base of a bundle. Raises as ``ClassificationSession.open``, ``PassageIndex.
    read`` and ``updated``."""

    def __init__(self, bundle: Path, trust: Path | None) -> None:
        self._session = ClassificationSession.open(bundle, trust)
        self._index = updated(self._session, None)

    def find(self, question: str, top: int = 3) -> list[Passage]:
        return self._index.search(question, self._session.embed([question])[0], top)


def updated(session: ClassificationSession, own: Sequence[Passage] | None) -> PassageIndex:
    """Bring the index of a bundle to its vendor's passages and to its owner's; None: those that it has. Raises
    ConfigError: there is none; DataError: those of the bundle are damaged; TrustError: the index is."""
    bundle, base = session.library.bundle, session.library.base
    vendor = list[Passage]()
    if KNOWLEDGE in base.manifest.files:
        vendor = parse_passages(base.read(KNOWLEDGE), base.folder / KNOWLEDGE)
    before = None
    with suppress(TrustError) if own else nullcontext():  # a damaged one is replaced
        before = PassageIndex.read(bundle, base.digest)
    if own is None:
        own = [one for one in before.passages if not one.vendor] if before else []
    passages = (*own, *vendor)
    if before and before.passages == passages:
        return before
    if not passages:
        reason = f"no files are indexed for {bundle}: edgeadapt device index DIR --bundle {bundle}"
        raise ConfigError(reason, about="index")
    with commandline.status("read passages") as report:

        def embed(texts: Sequence[str]) -> Floats:
            parts = []
            for first in range(0, len(texts), AT_ONCE):
                parts.append(session.embed(texts[first : first + AT_ONCE]))
                report(f"{min(first + AT_ONCE, len(texts))} of {len(texts)}")
            return np.concatenate(parts)

        index = PassageIndex.of(passages, embed, before)
    index.write(bundle, base.digest)
    return index


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False, metavar="DIR")
@commandline.bundle("A classifier's bundle, whose base reads the files.")
@options.trust
@click.option("--erase", is_flag=True, help="Delete the index.")
@commandline.quiet
@commandline.as_json
def index(folder: Path | None, bundle: Path, trust: Path | None, erase: bool, as_json: bool) -> None:
    """Index the Markdown, HTML and text files of DIR for 'device ask' and 'device chat --sources'.

    The index replaces the one before; passages that it had are not read again. It is encrypted next to the bundle and
    never leaves the device.

    \b
    Examples:
      edgeadapt device index notes --bundle phone/bundle
      edgeadapt device index --bundle phone/bundle --erase
    """
    if (folder is None) != erase:
        raise click.UsageError("name the folder DIR to index, or --erase alone")
    if folder is None:
        (folder_of(bundle) / PASSAGES).unlink(missing_ok=True)
        commandline.print_result({"passages": 0}, "nothing is indexed", as_json)
        return
    begun = time.perf_counter()
    passages, odd = read_folder(folder)
    updated(ClassificationSession.open(bundle, trust), passages)
    files, seconds = len({one.source for one in passages}), time.perf_counter() - begun
    for name, reason in odd.items():
        click.echo(f"edgeadapt: {printable(name)} is left out: {reason}", err=True)
    row = {"passages": len(passages), "files": files, "seconds": seconds, "left_out": odd}
    commandline.print_result(row, f"{len(passages)} passages of {files} files in {seconds:.1f} s", as_json)


@click.command()
@click.argument("question")
@commandline.bundle("The bundle for which files are indexed.")
@options.trust
@click.option("--sources", type=click.IntRange(1, 100), default=3, show_default=True, metavar="N", help="So many.")
@commandline.as_json
def ask(question: str, bundle: Path, trust: Path | None, sources: int, as_json: bool) -> None:
    """Show the passages of the indexed files, and of the bundle's own knowledge, that say most about QUESTION, by its
    words and its meaning.

    \b
    Examples:
      edgeadapt device ask "when is the boiler serviced" --bundle phone/bundle
      edgeadapt device ask "Wann kommt der Schornsteinfeger?" --bundle phone/bundle --sources 5 --json
    """
    found = Finder(bundle, trust).find(question, sources)
    if as_json:
        click.echo(json.dumps({"question": question, "sources": [asdict(one) for one in found]}, ensure_ascii=False))
        return
    for number, one in enumerate(found, 1):
        click.echo(f"[{number}] {printable(named(one))}\n    {printable(one.text)}")


def named(passage: Passage) -> str:
    source = f"vendor's {passage.source}" if passage.vendor else passage.source
    return f"{source}: {passage.heading}" if passage.heading else source
