"""``edgeadapt device index`` and ``ask``: passages of one's own files and of the bundle that answer a question, and the
questions that a device has for its owner."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from aggregation.errors import ConfigError, TrustError
from client.cli import options
from client.cli.learn import teach
from client.cli.options import printable
from client.inference.passages import PASSAGES, PassageIndex, folder_of
from client.inference.session import ClassificationSession
from client.learning import Correction
from client.learning.questions import AskedTexts, questions
from client.training.corrections import MAX_AT_ONCE
from edgeadapt import commandline
from edgeadapt.formats.bundle import KNOWLEDGE, TRAINING
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
@click.argument("question", required=False, metavar="[QUESTION]")
@commandline.bundle()
@commandline.adapter("name", "With --next: the adapter that is unsure and learns. Default: the one in use.")
@options.trust
@click.option("--sources", type=click.IntRange(1, 100), default=3, show_default=True, metavar="N", help="So many.")
@click.option("--next", "count", type=click.IntRange(1, MAX_AT_ONCE), metavar="N", help="Ask about N texts instead.")
@commandline.as_json
def ask(
    question: str | None,
    bundle: Path,
    name: str | None,
    trust: Path | None,
    sources: int,
    count: int | None,
    as_json: bool,
) -> None:
    """Show the passages of the indexed files, and of the bundle's own knowledge, that say most about QUESTION, by its
    words and its meaning.

    With --next, show the texts that the device was asked whose labels would teach it most: those it is unsure of, that
    are like many others and like none that was taught (`edgeadapt device usage --on --texts` keeps what is asked). On a
    terminal it asks for the label of each, and learns them at once as `edgeadapt device learn` does; Ctrl-C leaves all
    as it was. A text that is taught or skipped is not asked about again.

    \b
    Examples:
      edgeadapt device ask "when is the boiler serviced" --bundle phone/bundle
      edgeadapt device ask "Wann kommt der Schornsteinfeger?" --bundle phone/bundle --sources 5 --json
      edgeadapt device ask --next 3 --bundle phone/bundle
    """
    if (question is None) == (count is None):
        raise click.UsageError("give a QUESTION to your files, or --next N alone")
    if count is not None:
        _ask_person(bundle, trust, name, count, as_json)
        return
    found = Finder(bundle, trust).find(str(question), sources)
    if as_json:
        click.echo(json.dumps({"question": question, "sources": [asdict(one) for one in found]}, ensure_ascii=False))
        return
    for number, one in enumerate(found, 1):
        click.echo(f"[{number}] {printable(named(one))}\n    {printable(one.text)}")


def _ask_person(bundle: Path, trust: Path | None, name: str | None, count: int, as_json: bool) -> None:
    """Show texts that are worth a label, and learn the labels that a person gives on a terminal. Raises ConfigError: no
    texts are kept, or the bundle cannot learn on a terminal."""
    if (kept := AskedTexts.read(bundle)) is None:
        reason = f"no texts are kept: edgeadapt device usage --on --texts --bundle {bundle}"
        raise ConfigError(reason, about="--next")
    session = ClassificationSession.open(bundle, trust)
    adapter = session.load(name or session.library.default())
    with commandline.status("read texts") as report:
        asked = questions(session, adapter.name, kept.texts, count, report)
    if as_json:
        click.echo(json.dumps({"questions": [asdict(one) for one in asked]}, ensure_ascii=False))
        return
    meant = {options.words(label): label for label in adapter.labels} | {label: label for label in adapter.labels}
    asks, answers = bool(asked) and options.standard_input().isatty(), dict[str, str | None]()
    if asks and TRAINING not in session.library.manifest.files:  # before a label is typed in vain
        reason = f"{bundle} has no training graph, by which labels are learned: make it with 'bundle make --training'"
        raise ConfigError(f"{reason}, or list the texts with --json", about=TRAINING)
    for one in asked:
        click.echo(" ".join(printable(one.text).split()))
        for number, guess in enumerate(one.guesses, 1):
            click.echo(f"  {number} {options.words(guess.label)} {guess.probability:.1%}")
        if asks:
            numbered = {str(number): guess.label for number, guess in enumerate(one.guesses, 1)}
            answers[one.text] = _label(numbered | meant)
    if not asked:
        click.echo("nothing that was asked is left to ask about")
    if corrections := [Correction(text, label) for text, label in answers.items() if label]:
        teach(bundle, trust, adapter.name, corrections, as_json)
    if answers:
        AskedTexts.change(bundle, lambda found: found.settling([*answers]))


def _label(meant: Mapping[str, str]) -> str | None:
    while typed := str(click.prompt("its label (number or name; empty: skip)", "", show_default=False)).strip():
        if typed in meant:
            return meant[typed]
        click.echo(f"{printable(typed)!r} is not a label of the adapter: {', '.join([*meant][:40])}")
    return None


def named(passage: Passage) -> str:
    source = f"vendor's {passage.source}" if passage.vendor else passage.source
    return f"{source}: {passage.heading}" if passage.heading else source
