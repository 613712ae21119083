"""``edgeadapt device learn``: teaches the private adapter of a bundle what a person corrects, or takes it back."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import ConfigError
from client.cli import options
from client.cli.options import printable

if TYPE_CHECKING:  # slow to import, and not needed for --help
    from adapters.manifest import Task
    from client.learning import Answers, Correction, LanguageLearned, Learned


@click.command()
@options.bundle
@click.option("--adapter", "name", metavar="NAME", help="The adapter that learns. Default: the one in use.")
@options.trust
@click.option("--undo", is_flag=True, help="Go back to the adapter before the last lesson.")
@click.option("--compare", type=options.FILE, metavar="EXAMPLES", help="Of a language model: show these texts' bits.")
@options.as_json
@click.argument("file", required=False, type=options.FILE, metavar="[FILE]")
def learn(
    bundle: Path,
    name: str | None,
    trust: Path | None,
    undo: bool,
    compare: Path | None,
    as_json: bool,
    file: Path | None,
) -> None:
    """Learn the corrections in FILE, lines of a label, a tab and a phrase: the private adapter of the bundle is tuned
    on this device, and is in use at once. For a language model, lines of an answer, a tab and the prompt.

    A bundle without a private adapter gets one, made from the adapter in use. What is learned stays on this device, in
    the folder 'learned' next to the bundle. The base must have a training graph (`edgeadapt export base --training`).

    Printed are the corrections, and which of the other known phrases are answered otherwise than before. Of a language
    model: bits per byte before and after, of the answers, of earlier ones, and of the texts in EXAMPLES, such as
    a device's examples.jsonl, from which nothing is learned.

    \b
    Examples:
      edgeadapt device learn --bundle phone/bundle corrections.tsv
      edgeadapt device infer --bundle phone/bundle --teach HassTurnOn "make it bright in here"
      edgeadapt device learn --bundle phone/bundle --compare examples.jsonl answers.tsv
      edgeadapt device learn --bundle phone/bundle --undo
    """
    if undo == (file is not None) or (undo and compare is not None):
        raise ConfigError("name a FILE of corrections, or --undo what was learned last", about="--undo")
    if file is not None:
        from adapters.phrases import read_phrases
        from client.learning import Correction

        teach(bundle, trust, name, [Correction(text, label) for label, text in read_phrases(file)], as_json, compare)
        return
    from client.learning import Learner

    with Learner.open(bundle, trust, name, task=None) as learner:
        undone = learner.undo()
    if as_json:
        click.echo(json.dumps(asdict(undone), ensure_ascii=False))
    else:
        what = "what was learned last:" if undone.corrections else "the last personal step"
        click.echo(f"{undone.adapter} version {undone.version} is in use, without {what}")
        for one in undone.corrections:
            click.echo(f"{_line(one.label)}  {_line(one.text)}")


def teach(
    bundle: Path,
    trust: Path | None,
    name: str | None,
    corrections: "list[Correction]",
    as_json: bool,
    compare: Path | None = None,
    task: "Task | None" = None,
) -> None:
    """Learn corrections, and print what that did. Raises as ``Learner.open``, ``Learner.teach`` and
    ``teach_language_model``.
    """
    from client.learning import Learner, teach_language_model
    from client.training.examples import read_examples

    with Learner.open(bundle, trust, name, task=task) as learner:
        if learner.library.manifest.task == "text-generation":
            compared = () if compare is None else read_examples(compare, 0)
            written = teach_language_model(learner, corrections, compared)
            row, lines = asdict(written), language_lines(written)
        elif compare is not None:
            raise ConfigError("--compare is for language models: leave it out", about="--compare")
        else:
            labels = learner.adapter.manifest.labels
            meant = {options.words(label): label for label in labels} | {label: label for label in labels}
            learned = learner.teach([replace(one, label=meant.get(one.label, one.label)) for one in corrections])
            row, lines = _row(learned), _lines(learned)
            for one in () if as_json else learned.taught:
                options.warn_of_unread(one.text, one.unread)
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else "\n".join(lines))


def language_lines(learned: "LanguageLearned") -> list[str]:
    """What a lesson of a language model did, in lines."""
    known = sum(one.known for one in learned.taught)
    lines = [
        f"{learned.adapter} version {learned.version}: {known} of {len(learned.taught)} learned, "
        f"{learned.steps} steps; bits per byte before → after:"
    ]
    for title, texts in (("taught", learned.taught), ("other", learned.others)):
        lines += [f"{title}  {one.before:.3f} → {one.after:.3f}  {_line(one.text)[:60]}" for one in texts]
    return lines


def _row(learned: "Learned") -> dict[str, Any]:
    found = asdict(learned)
    for answers in (*found["taught"], *found["changed"]):
        for when in ("before", "after"):
            answers[when]["probability"] = round(answers[when]["probability"], 6)
    return found | {"seconds": round(learned.seconds, 3)}


def _lines(learned: "Learned") -> list[str]:
    known = sum(one.after.label == one.label for one in learned.taught)
    lines = [
        f"{learned.adapter} version {learned.version}: {known} of {len(learned.taught)} learned, {learned.steps} steps",
        *map(change, learned.taught),
    ]
    if learned.tested:
        lines.append(f"{len(learned.changed)} of {learned.tested} other known phrases are answered otherwise")
    wrong = (
        f"  forgotten: {options.words(one.label)}" if one.after.label != one.label else "" for one in learned.changed
    )
    return lines + [f"{change(one)}{note}" for one, note in zip(learned.changed, wrong, strict=True)]


def change(one: "Answers") -> str:
    """An answer before and after, with its phrase, as one line."""
    before, after = (f"{options.words(answer.label)} {answer.probability:.1%}" for answer in (one.before, one.after))
    return f"{before} → {after}  {_line(one.text)}"


def _line(text: str) -> str:
    return " ".join(printable(text).split())
