"""``edgeadapt device infer``: classifies phrases, or continues texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError, DataError
from client.cli import options
from client.cli.options import printable
from client.inference.generate import Generator
from client.inference.library import Library
from client.inference.session import AUTO, ROUTER, ClassificationSession, words_to_json
from client.inference.text import SamplingParams
from edgeadapt import commandline
from edgeadapt.bases.readers import as_texts
from edgeadapt.formats.bundle import TOKENIZER


@click.command()
@commandline.bundle()
@commandline.adapter(
    "names",
    "One, NAME:WEIGHT+NAME for several as one, or auto for the one that the bundle's router chooses; may be repeated. "
    "Default: the personal adapter, else the global one.",
    multiple=True,
)
@options.trust
@click.option("--top", default=1, type=click.IntRange(1, 1000), metavar="N", help="Show the N most likely intents.")
@click.option("--words", "by_word", is_flag=True, help="Print the label of each word, as in `[nine](hour)`.")
@click.option("--max-tokens", default=64, metavar="N", help="Limit of a continuation.", show_default=True)
@click.option("--teach", "label", metavar="LABEL", help="LABEL is right: learn that on this device.")
@commandline.as_json
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
def infer(
    bundle: Path,
    names: tuple[str, ...],
    trust: Path | None,
    top: int,
    by_word: bool,
    max_tokens: int,
    label: str | None,
    as_json: bool,
    texts: tuple[str, ...],
) -> None:
    """Print the intent of each TEXT and its probability; '-' reads standard input, one phrase a line. With a base of
    pictures, a TEXT is a file: PNG, JPEG or WebP.

    A TEXT that is empty or of which the model knows no part, such as an emoji, has no intent: "unknown text".

    The end of a TEXT that is longer than the model reads is left out: a line on standard error says so, and "unread" in
    JSON how many tokens.

    Probabilities are calibrated if the adapter was exported with --calibrate; --json states its temperature, which is 1
    if it was not.

    What the bundle's policy withholds is answered with the policy's words, "says" in JSON; "outcome" is answered,
    confirm (ask the person first), unsure or blocked.

    With --teach, the private adapter learns the right intent of each TEXT at once (`edgeadapt device learn`).

    With --words and a base that reads single words, print each TEXT with the labels of its words.

    With a language model, continue each TEXT instead; `edgeadapt device chat` chats with it.

    \b
    Examples:
      edgeadapt device infer --bundle runs/demo/bundle "turn on the kitchen lights"
      edgeadapt device infer --bundle runs/demo/bundle --top 3 "is the door locked" "make it warmer"
      edgeadapt device infer --bundle runs/demo/devices/en-01/bundle --adapter global --adapter personal "movie night"
      edgeadapt device infer --bundle runs/demo/devices/en-01/bundle --adapter global:0.5+personal "movie night"
      edgeadapt device infer --bundle runs/demo/bundle --json - < phrases.txt
      edgeadapt device infer --bundle camera/bundle cup.jpg
      edgeadapt device infer --bundle clock/bundle --words "wake me at nine"
      edgeadapt device infer --bundle phone/bundle --teach HassTurnOn "make it bright in here"
    """
    phrases = _phrases(texts)
    if label is not None:
        _teach(bundle, names, trust, phrases, label, as_json)
        return
    library = Library.open(bundle, trust, update=options.update)
    if library.manifest.task == "text-generation":
        answers, lines = _continue(library, names, phrases, max_tokens), _continuations
    elif by_word:
        answers, lines = _label_words(library, names, phrases), _labelled
    else:
        answers, lines = _classify(library, names, phrases, top), _table
        if not as_json:
            unread = {answer["text"]: answer["unread"] for result in answers for answer in result["answers"]}
            for text, count in unread.items():
                options.warn_of_unread(text, count)
    click.echo(json.dumps({"adapters": answers}, ensure_ascii=False) if as_json else "\n".join(lines(answers)))
    library.bank.wait()


def _teach(
    bundle: Path, names: tuple[str, ...], trust: Path | None, phrases: list[str], label: str, as_json: bool
) -> None:
    from client.cli.learn import teach  # a phrase is answered sooner without what learns
    from client.learning import Correction

    if len(names) > 1 or "+" in "".join(names):
        raise ConfigError("one adapter learns at a time: name it with --adapter", about="--teach")
    corrections = [Correction(text, label) for text in phrases]
    teach(bundle, trust, names[0] if names else None, corrections, as_json, task="text-classification")


def _phrases(texts: Sequence[str]) -> list[str]:
    phrases = []
    for text in texts:
        lines = (line.strip() for line in options.standard_input()) if text == "-" else [text]
        phrases += [line for line in lines if line or text != "-"]
    if not phrases:
        raise DataError("standard input contains no phrase; write one a line", about="stdin")
    if not any(phrase.strip() for phrase in phrases):
        raise DataError("the text is empty; give a phrase", about="text")
    return phrases


def _classify(library: Library, names: Sequence[str], phrases: list[str], top: int) -> list[dict[str, Any]]:
    from client.inference import usage  # an answer waits for nothing that it does not need

    session = ClassificationSession.of(library)
    names = names or (library.default(),)
    # One text by all adapters, then the next: what is below the adapters reads it once.
    given = as_texts(library.base.files[TOKENIZER], phrases)
    asked = [[session.answer(text, name, top) for name in names] for text in given]
    if len(names) == 1:
        usage.count_answers(library.bundle, [one for (one,) in asked])
        if usage.is_kept(library.bundle, usage.ASKED):
            from client.learning.questions import remember

            remember(library.bundle, [(text, one[1]) for text, (one,) in zip(given, asked, strict=True)])
    results = []
    for number, name in enumerate(names):
        one = session.load(ROUTER if name == AUTO else name)
        answers = [{"text": text, **row[number][1].to_json()} for text, row in zip(phrases, asked, strict=True)]
        if name == AUTO:
            answers = [{**answer, "adapter": row[number][0].name} for answer, row in zip(answers, asked, strict=True)]
        stated = {"adapter": name if name == AUTO else one.name, "version": one.version, "temperature": one.temperature}
        results.append({**stated, "answers": answers})
    return results


def _label_words(library: Library, names: Sequence[str], phrases: list[str]) -> list[dict[str, Any]]:
    session, results = ClassificationSession.of(library), []
    for name in names or (library.default(),):
        adapter = session.load(name)
        answers = [words_to_json(text, session.words(text, name)) for text in phrases]
        results.append({"adapter": adapter.name, "version": adapter.version, "answers": answers})
    return results


def _labelled(adapters: list[dict[str, Any]]) -> list[str]:
    return [
        printable((f"[{result['adapter']}] " if len(adapters) > 1 else "") + answer["labelled"])
        for result in adapters
        for answer in result["answers"]
    ]


def _continue(library: Library, names: Sequence[str], texts: list[str], tokens: int) -> list[dict[str, Any]]:
    generator, params, results = Generator.of(library), SamplingParams(max_tokens=tokens), []
    default = library.default() if library.names() and not names else None
    for name in names or (default,):
        adapter = generator.load(name) if name else None
        answers = [{"text": text, "continuation": "".join(generator.complete(text, params, name))} for text in texts]
        used = {"adapter": adapter.name, "version": adapter.version} if adapter else {"adapter": None}
        results.append({**used, "answers": answers})
    return results


def _continuations(adapters: list[dict[str, Any]]) -> list[str]:
    return [
        printable((f"[{result['adapter']}] " if len(adapters) > 1 else "") + answer["text"] + answer["continuation"])
        for result in adapters
        for answer in result["answers"]
    ]


def _table(adapters: list[dict[str, Any]]) -> list[str]:
    cells = [
        (
            options.words(intent["intent"]) if intent else printable(answer["says"]) or "unknown text",
            f"{intent['probability']:6.1%}" if intent else "",
            "confirm" if answer["outcome"] == "confirm" else "",
            f"({answer['unknown']:.0%} unknown)" if intent and answer["unknown"] else "",
            answer.get("adapter", result["adapter"] if len(adapters) > 1 else ""),
            " ".join(printable(answer["text"]).split()),
        )
        for result in adapters
        for answer in result["answers"]
        for intent in answer["intents"] or [None]
    ]
    if len({text for *_, text in cells}) == 1:
        cells = [(*cell[:-1], "") for cell in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    kept = [number for number, width in enumerate(widths) if width]
    lines = ("  ".join(cell[number].ljust(widths[number]) for number in kept) for cell in cells)
    return [line.rstrip() for line in lines]
