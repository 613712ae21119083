"""``edgeadapt device chat``: a conversation with the language model of a bundle."""

import json
import sys
from collections.abc import Callable, Iterator
from collections.abc import Generator as Closable
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from client.cli import learn, options
from client.cli.options import printable
from client.cli.sources import Finder, named
from client.inference.generate import Conversation, Generator
from client.inference.guide import Guide, GuideKind
from client.inference.library import Library
from client.inference.text import Answer, Finish, SamplingParams
from client.learning import Correction, Learner
from client.training.trainer import MAX_STEPS
from edgeadapt import commandline
from edgeadapt.commandline import option
from edgeadapt.formats.storage import read

HELP = """\
/adapter NAME   use this adapter, or several, as in /adapter global:0.5+anna; without NAME: the bare base
/adapters       list the adapters
/teach ANSWER   learn on this device that ANSWER is right to your last message
/undo           go back to the adapter before the last lesson
/reset          drop the conversation
/help           show this help
/quit           quit, as Ctrl-D does; Ctrl-C ends an answer or a lesson"""

MAX_GUIDE_FILE = 2**18  # bytes; UTF-8 has up to four for a character
F = TypeVar("F", bound=Callable[..., Any])


def sampling(command: F) -> F:
    """Add an option for each field of ``client.inference.SamplingParams``; ``params_of`` reads them."""
    for add in (
        click.option("--grammar", type=commandline.FILE, metavar="FILE", help="Answer by this Lark grammar."),
        click.option("--regex", metavar="PATTERN", help="Answer with a text that matches PATTERN as a whole."),
        option("--json-schema FILE", "Answer with JSON that matches this schema.", type=commandline.FILE),
        option(
            "--beams N",
            "Search for the most likely answer with N at once; it is shown when it is complete.",
            type=int,
            default=1,
        ),
        option("--repetition-penalty X", "Above 1: avoid words that occurred.", type=float, default=1.0),
        click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before TEXT; may be repeated."),
        click.option("--seed", type=int, metavar="N", help="Equal seeds give equal answers."),
        click.option("--top-k", type=int, default=0, metavar="K", help="Sample from the K most likely tokens; 0: all."),
        option("--top-p P", "Sample from the fewest tokens of probability P.", type=float, default=1.0),
        click.option("--temperature", type=float, default=0.0, metavar="T", help="0: always the most likely token."),
        click.option("--max-tokens", type=int, default=256, metavar="N", help="Limit of an answer.", show_default=True),
    ):
        command = add(command)
    return command


def params_of(json_schema: Path | None, regex: str | None, grammar: Path | None, **sampling: Any) -> SamplingParams:
    """Read the options of ``sampling``. Raises ConfigError: a value is out of range, there is more than one guide, or
    its file is missing; DataError: the file is too large or is not UTF-8."""
    candidates: list[tuple[GuideKind, Path | str | None]] = [
        (GuideKind.JSON_SCHEMA, json_schema),
        (GuideKind.REGEX, regex),
        (GuideKind.GRAMMAR, grammar),
    ]
    guides = [(kind, value) for kind, value in candidates if value is not None]
    if len(guides) > 1:
        raise ConfigError("an answer has one form: give one of --json-schema, --regex and --grammar", about="guide")
    sources = [Guide(kind, _text(value) if isinstance(value, Path) else value) for kind, value in guides]
    return SamplingParams(guide=sources[0] if sources else None, **sampling)


def _text(path: Path) -> str:
    try:
        return read(path, MAX_GUIDE_FILE).decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", about=path.name) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", about=path.name) from error


@click.command()
@commandline.bundle()
@commandline.adapter("adapter", "One, or NAME:WEIGHT+NAME for several as one. Default: personal, else global.")
@click.option("--base-only", is_flag=True, help="Use no adapter.")
@options.trust
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--sources", type=commandline.FOLDER, metavar="DIR", help="Answer from what is indexed for this bundle.")
@sampling
@click.option("--prompt", metavar="TEXT", help="Answer TEXT and quit.")
@click.option("--teach", metavar="ANSWER", help="ANSWER is right to --prompt: learn that on this device.")
@commandline.as_json
def chat(
    bundle: Path,
    adapter: str | None,
    base_only: bool,
    trust: Path | None,
    system: str | None,
    sources: Path | None,
    prompt: str | None,
    teach: str | None,
    as_json: bool,
    **params: Any,
) -> None:
    """Chat with the language model of a bundle.

    Ctrl-C ends an answer, not the conversation; with --prompt it ends the command. When the conversation exceeds the
    model's context, the oldest messages are dropped.

    With --json-schema, --regex or --grammar the model can only write what has this form; whether it is right is another
    matter. An answer that --max-tokens cut before its end is an error; --json says "valid": false instead.

    With --teach, the private adapter learns the right answer to --prompt at once (`edgeadapt device learn`).

    \b
    Examples:
      edgeadapt device chat --bundle bundle
      edgeadapt device chat --bundle bundle --adapter global:0.5+anna --system "Answer in one sentence."
      edgeadapt device chat --bundle bundle --prompt "Good morning" --temperature 0.7 --seed 1
      edgeadapt device chat --bundle bundle --prompt "Where is the key?" --teach "Under the mat."
      edgeadapt device chat --bundle bundle --sources encoder/bundle --prompt "When is the boiler serviced?"
      edgeadapt device chat --bundle bundle --repetition-penalty 1.2 --beams 4 --max-tokens 60
      edgeadapt device chat --bundle bundle --json-schema intents.json --prompt "Turn on the kitchen lights"
      edgeadapt device chat --bundle bundle --regex "[0-9]{1,3} minutes" --prompt "How long do eggs boil?"
    """
    if teach is not None:
        if prompt is None or base_only or system is not None:
            raise click.UsageError("--teach needs --prompt, and excludes --base-only and --system")
        learn.teach(bundle, trust, adapter, [Correction(prompt, teach)], as_json)
        return
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    if adapter is not None and base_only:
        raise click.UsageError("--adapter and --base-only exclude each other")
    settings = params_of(**params)
    generator = Generator.of(Library.open(bundle, trust, "text-generation", update=options.update))
    if not base_only and adapter is None and generator.library.names():
        adapter = generator.library.default()
    find = Finder(sources, trust).find if sources else None
    conversation = Conversation(generator, settings, system, adapter, find)
    if prompt is None:
        converse(conversation, generator, trust)
    else:
        answer(conversation, generator, prompt, as_json)


def answer(conversation: Conversation, generator: Generator, prompt: str, as_json: bool) -> None:
    """Answer one prompt. Raises DataError: the answer does not have the form of its guide, which JSON states instead.
    It was shown all the same."""
    if not as_json:
        _show(conversation, prompt, generator)
        return
    text = "".join(conversation.ask(prompt))
    last = generator.last
    assert last is not None  # noqa: S101  # an answer was just read to its end
    adapter = conversation.adapter.name if conversation.adapter else None
    counts: dict[str, Any] = {"sources": [named(one) for one in conversation.quoted]} if conversation.quoted else {}
    counts |= {"tokens": last.tokens, "prompt_tokens": last.prompt_tokens, "finish": last.finish.value}
    if last.guide is not None:
        counts["valid"] = last.valid
    click.echo(json.dumps({"adapter": adapter, "prompt": prompt, "answer": text, **counts}, ensure_ascii=False))


def converse(conversation: Conversation, generator: Generator, trust: Path | None = None) -> None:
    """Answer standard input line by line. After an error the conversation goes on with the next line. ``trust``: the
    pinned public keys, as ``Generator.open`` takes them."""
    interactive = options.standard_input().isatty()
    if interactive:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives `input` a history and line editing
        click.echo(f"{_in_use(conversation)}; /help shows the commands")
    while (line := read_line("> " if interactive else "")) is not None:
        try:
            if line.startswith("/"):
                if not _command(line, conversation, generator, trust):
                    return
            elif line.strip():
                _show(conversation, line, generator)
        except EdgeAdaptError as error:
            click.echo(f"edgeadapt: {error}", err=True)
        except KeyboardInterrupt:
            click.echo(" …")


def read_line(prompt: str) -> str | None:
    """Read a line of standard input, or None at its end. Ctrl-C discards what was typed."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                click.echo()
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            click.echo("  (Ctrl-D or /quit quits)")


def _show(conversation: Conversation, prompt: str, generator: Generator) -> None:
    """Print an answer as it is written, and the sources that were quoted. Raises as ``answer``."""
    with closing(cast(Closable[str, None, None], conversation.ask(prompt))) as pieces:
        for piece in pieces:
            click.echo(printable(piece), nl=False)
    click.echo()
    for number, one in enumerate(conversation.quoted, 1):
        click.echo(f"[{number}] {printable(named(one))}")
    if generator.last is not None and generator.last.finish is not Finish.BLOCKED:
        _check(generator.last)


def _check(last: Answer) -> None:
    if not last.valid:
        why = f"was cut after {last.tokens} tokens; raise --max-tokens" if last.finish == "length" else "is not JSON"
        raise DataError(f"the answer is not what the {last.guide} describes: it {why}", about="answer")


def _command(line: str, conversation: Conversation, generator: Generator, trust: Path | None) -> bool:
    word, _, rest = line.strip().partition(" ")
    commands: dict[str, Callable[[], str]] = {
        "/adapter": lambda: _switch(rest.strip(), conversation),
        "/adapters": lambda: "\n".join(generator.library.names()) or "the bundle has no adapter",
        "/teach": lambda: _teach(rest.strip(), conversation, generator, trust),
        "/undo": lambda: _undo(conversation, generator, trust),
        "/reset": lambda: _reset(conversation),
        "/help": lambda: HELP,
    }
    if word == "/quit":
        return False
    command = commands.get(word, lambda: f"unknown command {word}; /help lists the commands")
    click.echo(command())
    return True


def _switch(names: str, conversation: Conversation) -> str:
    conversation.use(names or None)
    return _in_use(conversation)


def _teach(answer: str, conversation: Conversation, generator: Generator, trust: Path | None) -> str:
    """Teach the adapter in use the right answer to the last message; the one that was in use stays after any error."""
    if conversation.asked is None or not answer:
        what = "nothing was asked yet: write a message" if answer else "write the right answer: /teach ANSWER"
        raise DataError(what, about="/teach")
    if conversation.system is not None:
        reason = "an answer is learned without the system prompt, and would not be seen here: start without --system"
        raise ConfigError(reason, about="/teach")
    corrections = [Correction(conversation.asked, answer)]
    with _lesson(conversation, generator, trust) as learner, _steps() as report:
        learned = learner.teach(corrections, report=report)
    conversation.use(learned.adapter)
    return "\n".join([*learn.lines(learned), "in use from now on; /reset drops the old answers"])


def _undo(conversation: Conversation, generator: Generator, trust: Path | None) -> str:
    with _lesson(conversation, generator, trust) as learner:
        undone = learner.undo()
    conversation.use(undone.adapter)
    forgotten = ", ".join(f"{one.text!r}" for one in undone.corrections)
    what = f"what was learned last: {printable(forgotten)}" if forgotten else "the last personal step"
    return f"{_in_use(conversation)}, without {what}"


@contextmanager
def _lesson(conversation: Conversation, generator: Generator, trust: Path | None) -> Iterator[Learner]:
    """Open the learner of the adapter in use. Raises TrustError, DataError, ConfigError: as ``Learner.open`` and
    ``_single``; or the disk is full, for example."""
    name = _single(conversation)
    try:
        with Learner.open(generator.library.bundle, trust, name, task="text-generation") as learner:
            yield learner
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        raise DataError(reason, about="bundle") from error


def _single(conversation: Conversation) -> str:
    """Name the adapter in use. Raises ConfigError if that is not one adapter of weight 1."""
    if conversation.adapter is None or len(parts := conversation.adapter.composition.parts) > 1 or parts[0].weight != 1:
        raise ConfigError("one adapter learns, of weight 1: choose it with /adapter NAME", about="/adapter")
    return parts[0].name


@contextmanager
def _steps() -> Iterator[Callable[[int], object]]:
    """Show the steps of a lesson on standard error, if that is a terminal, in a line that goes away at its end."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        yield lambda number: click.echo(f"\rlearning, step {number} of at most {MAX_STEPS}", nl=False, err=True)
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


def _reset(conversation: Conversation) -> str:
    conversation.reset()
    return "conversation dropped"


def _in_use(conversation: Conversation) -> str:
    if (adapter := conversation.adapter) is None:
        return "no adapter: the bare base"
    return f"adapter {adapter.name}, version {adapter.version}, rank {adapter.rank}"
