"""``edgeadapt device chat``: talk to the language model of a bundle."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from aggregation.errors import EdgeAdaptError
from client.cli import options
from client.inference.text import printable

if TYPE_CHECKING:  # importing these takes most of a start, and `--help` needs none of it
    from collections.abc import Generator as Closable

    from client.inference.conversation import Conversation
    from client.inference.generate import Generator

HELP = """\
/adapter NAME   switch to an adapter, or to several: /adapter global:0.5+anna; without a name: to the bare base
/adapters       list the adapters
/reset          forget the conversation
/help           show this
/quit           leave, as Ctrl-D does; Ctrl-C ends an answer"""


@click.command()
@options.bundle
@click.option("--adapter", metavar="NAME", help="Or a composition, NAME:WEIGHT+NAME. Default: private, else shared.")
@click.option("--base-only", is_flag=True, help="Use no adapter at all.")
@options.trust
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@options.drawing
@click.option("--prompt", metavar="TEXT", help="Answer this one text and leave.")
@options.as_json
def chat(
    bundle: Path,
    adapter: str | None,
    base_only: bool,
    trust: Path | None,
    system: str | None,
    prompt: str | None,
    as_json: bool,
    **drawing: object,
) -> None:
    """Talk to the language model of a bundle.

    Ctrl-C ends an answer, not the conversation; with --prompt it ends the command. The oldest turns are forgotten when
    the model's memory is full.

    \b
    Examples:
      edgeadapt device chat --bundle bundle
      edgeadapt device chat --bundle bundle --adapter global:0.5+anna --system "Answer in one sentence."
      edgeadapt device chat --bundle bundle --prompt "Good morning" --temperature 0.7 --seed 1
    """
    from client.inference.conversation import Conversation
    from client.inference.generate import Generator

    if as_json and prompt is None:
        raise click.UsageError("--json goes with --prompt")
    if adapter is not None and base_only:
        raise click.UsageError("--adapter and --base-only exclude each other")
    generator = Generator.open(bundle, trust)
    if not base_only and (adapter is not None or generator.library.names()):
        generator.use(generator.library.default() if adapter is None else adapter)
    conversation = Conversation(generator, options.drawn(drawing), system)
    if prompt is None:
        _talk(conversation, generator)
    else:
        _once(conversation, generator, prompt, as_json)


def _once(conversation: "Conversation", generator: "Generator", prompt: str, as_json: bool) -> None:
    if not as_json:
        _show(conversation.ask(prompt))
        return
    text = "".join(conversation.ask(prompt))
    ended = generator.last
    assert ended is not None  # noqa: S101  # an answer was just read to its end
    adapter = generator.adapter.name if generator.adapter else None
    counted = {"tokens": ended.tokens, "prompt_tokens": ended.prompt_tokens, "finish": ended.finish.value}
    click.echo(json.dumps({"adapter": adapter, "prompt": prompt, "answer": text, **counted}, ensure_ascii=False))


def _talk(conversation: "Conversation", generator: "Generator") -> None:
    """One line, one answer, until the end of the input. What goes wrong costs that line and nothing else."""
    person = options.standard_input().isatty()
    if person:
        with suppress(ImportError):  # no such thing on Windows; a line can be typed all the same
            import readline  # noqa: F401  # from now on `input` has a history and can be edited
        click.echo(f"{_in_use(generator)}; /help shows the commands")
    while (line := _line("> " if person else "")) is not None:
        try:
            if line.startswith("/"):
                if not _command(line, conversation, generator):
                    return
            elif line.strip():
                _show(conversation.ask(line))
        except EdgeAdaptError as error:
            click.echo(f"edgeadapt: {error}", err=True)
        except KeyboardInterrupt:
            click.echo(" …")


def _line(prompt: str) -> str | None:
    """A line from standard input, or None at its end. Ctrl-C gives up what a person typed."""
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
            click.echo("  (Ctrl-D or /quit leaves)")


def _show(pieces: Iterator[str]) -> None:
    """Print an answer as it is written."""
    with closing(cast("Closable[str, None, None]", pieces)):
        for piece in pieces:
            click.echo(printable(piece), nl=False)
    click.echo()


def _command(line: str, conversation: "Conversation", generator: "Generator") -> bool:
    """Do what a line with a slash says; False to leave."""
    word, _, rest = line.strip().partition(" ")
    commands: dict[str, Callable[[], str]] = {
        "/adapter": lambda: _switched(generator, rest.strip()),
        "/adapters": lambda: "\n".join(generator.library.names()) or "the bundle has no adapter",
        "/reset": lambda: _forgotten(conversation),
        "/help": lambda: HELP,
    }
    if word == "/quit":
        return False
    act = commands.get(word, lambda: f"there is no command {word}; /help lists those there are")
    click.echo(act())
    return True


def _switched(generator: "Generator", names: str) -> str:
    if names:
        generator.use(names)
    else:
        generator.use_base()
    return _in_use(generator)


def _forgotten(conversation: "Conversation") -> str:
    conversation.reset()
    return "forgotten"


def _in_use(generator: "Generator") -> str:
    if (adapter := generator.adapter) is None:
        return "no adapter: the bare base"
    return f"adapter {adapter.name}, version {adapter.version}, rank {adapter.rank}"
