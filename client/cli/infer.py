"""``edgeadapt device infer``: phrases in, intents and their probabilities out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import DataError
from client.cli import options
from client.inference.text import printable

if TYPE_CHECKING:  # importing these takes most of a start, and `--help` needs none of it
    from client.inference.library import Library
    from client.inference.session import ClassificationSession


@click.command()
@options.bundle
@click.option(
    "--adapter",
    "names",
    multiple=True,
    metavar="NAME",
    help="May be repeated. Default: the private one, else the shared.",
)
@click.option("--compose", metavar="PARTS", help="Several adapters as one: NAME:WEIGHT+NAME:WEIGHT.")
@options.trust
@click.option("--top", default=1, type=click.IntRange(1, 1000), metavar="N", help="Show the N most likely intents.")
@click.option("--max-tokens", default=64, metavar="N", help="Of a language model's continuation.", show_default=True)
@options.as_json
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
def infer(
    bundle: Path,
    names: tuple[str, ...],
    compose: str | None,
    trust: Path | None,
    top: int,
    max_tokens: int,
    as_json: bool,
    texts: tuple[str, ...],
) -> None:
    """Print the intent of each TEXT and its probability; '-' reads one phrase a line from standard input.

    A bundle with a language model continues each TEXT instead; `edgeadapt device chat` talks to it.

    \b
    Examples:
      edgeadapt device infer --bundle runs/demo/bundle "turn on the kitchen lights"
      edgeadapt device infer --bundle runs/demo/bundle --top 3 "is the door locked" "make it warmer"
      edgeadapt device infer --bundle runs/demo/devices/en-01/bundle --adapter global --adapter personal "movie night"
      edgeadapt device infer --bundle runs/demo/devices/en-01/bundle --compose global:0.5+personal "movie night"
      edgeadapt device infer --bundle runs/demo/bundle --json - < phrases.txt
    """
    from client.inference.library import Library

    phrases = _phrases(texts)
    library = Library.open(bundle, trust)
    chosen = (*names, *(() if compose is None else (compose,)))
    if library.card.task == "text-generation":
        answers, rows = _continued(library, chosen, phrases, max_tokens), _texts
    else:
        answers, rows = _classified(library, chosen, phrases, top), _rows
    click.echo(json.dumps({"adapters": answers}, ensure_ascii=False) if as_json else "\n".join(rows(answers)))


def _classified(library: "Library", names: Sequence[str], phrases: list[str], top: int) -> list[dict[str, Any]]:
    from client.inference.session import ClassificationSession

    session = ClassificationSession.of(library)
    return [_answers(session, name, phrases, top) for name in names or (session.default(),)]


def _continued(library: "Library", names: Sequence[str], texts: list[str], tokens: int) -> list[dict[str, Any]]:
    from client.inference.generate import Generator
    from client.inference.options import Options

    generator, allowed, results = Generator.of(library), Options(max_tokens=tokens), []
    default = library.default() if library.names() and not names else None
    for name in names or (default,):
        adapter = generator.use(name) if name else None
        answers = [{"text": text, "continuation": "".join(generator.complete(text, allowed))} for text in texts]
        used = {"adapter": adapter.name, "version": adapter.version} if adapter else {"adapter": None}
        results.append({**used, "answers": answers})
    return results


def _texts(adapters: list[dict[str, Any]]) -> list[str]:
    """Each text with its continuation; a line with the adapter's name before it where there are several."""
    told = [
        (f"[{result['adapter']}] " if len(adapters) > 1 else "") + answer["text"] + answer["continuation"]
        for result in adapters
        for answer in result["answers"]
    ]
    return [printable(text) for text in told]


def _phrases(texts: Sequence[str]) -> list[str]:
    phrases = [phrase for text in texts for phrase in (_lines() if text == "-" else [text])]
    if not phrases:
        raise DataError("standard input held no phrase; give one a line")
    return phrases


def _lines() -> list[str]:
    return [line.strip() for line in options.standard_input() if line.strip()]


def _answers(session: "ClassificationSession", name: str, phrases: list[str], top: int) -> dict[str, Any]:
    adapter = session.use(name)
    ranked = zip(phrases, session.rank(phrases, top), strict=True)
    answers = [
        {"text": text, "intents": [{"intent": p.label, "probability": round(p.probability, 6)} for p in best]}
        for text, best in ranked
    ]
    return {"adapter": adapter.name, "version": adapter.version, "answers": answers}


def _rows(adapters: list[dict[str, Any]]) -> list[str]:
    """One line an answer: the intent, its probability, then whatever tells this line from its neighbours."""
    cells = [
        (
            intent["intent"],
            f"{intent['probability']:6.1%}",
            result["adapter"] if len(adapters) > 1 else "",
            " ".join(printable(answer["text"]).split()),
        )
        for result in adapters
        for answer in result["answers"]
        for intent in answer["intents"]
    ]
    if len({text for *_, text in cells}) == 1:
        cells = [(*cell[:3], "") for cell in cells]
    widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(cell, (*widths, 0), strict=True)) for cell in cells)
    return [line.rstrip() for line in lines]
