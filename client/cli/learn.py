"""``edgeadapt device learn`` and ``personalize``: the private adapter of a bundle learns from a person."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from client.cli import options
from client.cli.options import printable
from client.learning import Answers, Correction, Learned, Learner, Personalized, TextBits
from client.learning.learner import Learnt, bits
from client.training.control import TrainingControl
from client.training.examples import read_examples
from client.training.personal import FINE_TUNE, PersonalStep
from edgeadapt import commandline
from edgeadapt.bases.media import MAX_VARIANTS
from edgeadapt.bases.readers import as_texts
from edgeadapt.commandline import FiniteRange, option
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.manifest import Task
from edgeadapt.formats.phrases import read_phrases


@click.command()
@commandline.bundle()
@commandline.adapter("name", "The adapter that learns. Default: the one in use.")
@options.trust
@click.option("--undo", is_flag=True, help="Go back to the adapter before the last lesson.")
@option("--compare EXAMPLES", "Of a language model: show these texts' bits.", type=commandline.FILE)
@commandline.as_json
@click.argument("file", required=False, type=commandline.FILE, metavar="[FILE]")
def learn(
    bundle: Path,
    name: str | None,
    trust: Path | None,
    undo: bool,
    compare: Path | None,
    as_json: bool,
    file: Path | None,
) -> None:
    """Learn the corrections in FILE, lines of a label, a tab and a phrase or the file of a picture: the private adapter
    of the bundle is tuned on this device, and is in use at once. For a language model, lines of an answer, a tab and
    the prompt.

    A bundle without a private adapter gets one, made from the adapter in use. What is learned stays on this device, in
    the folder 'learned' next to the bundle. The base must have a training graph (`edgeadapt bundle make --training`).

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
        teach(bundle, trust, name, [Correction(text, label) for label, text in read_phrases(file)], as_json, compare)
        return
    with Learner.open(bundle, trust, name) as learner:
        undone = learner.undo()
    if as_json:
        click.echo(json.dumps(asdict(undone), ensure_ascii=False))
    else:
        what = "what was learned last:" if undone.corrections else "the last personal step"
        click.echo(f"{undone.adapter} version {undone.version} is in use, without {what}")
        for correction in undone.corrections:
            click.echo(f"{_one_line(correction.label)}  {_one_line(correction.text)}")


def teach(
    bundle: Path,
    trust: Path | None,
    name: str | None,
    corrections: list[Correction],
    as_json: bool,
    compare: Path | None = None,
    task: Task | None = None,
) -> None:
    """Learn corrections, and print what that did. Raises as ``Learner.open`` and ``Learner.teach``."""
    with Learner.open(bundle, trust, name, task=task) as learner:
        labels = learner.adapter.manifest.labels
        meant = {options.words(label): label for label in labels} | {label: label for label in labels}
        compared = () if compare is None else read_examples(compare, 0)
        texts = as_texts(learner.library.base.files[TOKENIZER], [one.text for one in corrections])
        pairs = zip(texts, corrections, strict=True)
        taught = [replace(one, text=text, label=meant.get(one.label, one.label)) for text, one in pairs]
        learned = learner.teach(taught, compared)
    if as_json:
        click.echo(json.dumps(_row(learned), ensure_ascii=False))
        return
    for one in learned.taught:
        if isinstance(one, Answers):
            options.warn_of_unread(one.text, one.unread)
    click.echo("\n".join(lines(learned)))


def lines(learned: Learned) -> list[str]:
    count = sum(one.known for one in learned.taught)
    head = (
        f"{learned.adapter} version {learned.version}: {count} of {len(learned.taught)} learned, {learned.steps} steps"
    )
    if isinstance(learned.taught[0], TextBits):
        taught, others = ([f"{_line(one)}" for one in texts] for texts in (learned.taught, learned.others))
        return [
            f"{head}; bits per byte before → after:",
            *(f"taught  {line}" for line in taught),
            *(f"other  {line}" for line in others),
        ]
    changed = _changed(learned.others)
    tested = f"{len(changed)} of {len(learned.others)} other known phrases are answered otherwise"
    wrong = ("" if one.known else f"  forgotten: {options.words(one.label)}" for one in changed)
    notes = [f"{_line(one)}{note}" for one, note in zip(changed, wrong, strict=True)]
    if not learned.others:
        tested = "no other known phrase shows what else changed: 'bundle make --phrases' puts such into a bundle"
    return [head, *map(_line, learned.taught), tested, *notes]


def _row(learned: Learned) -> dict[str, Any]:
    row = asdict(learned) | {"seconds": round(learned.seconds, 3)}
    if isinstance(learned.taught[0], Answers):
        del row["others"]
        row |= {"taught": list(map(_rounded, learned.taught)), **_tested(learned.others)}
    return row


def _tested(others: Sequence[Learnt]) -> dict[str, Any]:
    return {"changed": list(map(_rounded, _changed(others))), "tested": len(others)}


def _changed(others: Sequence[Learnt]) -> list[Answers]:
    return [one for one in others if isinstance(one, Answers) and one.changed]


def _rounded(one: Learnt) -> dict[str, Any]:
    row = asdict(one)
    for when in ("before", "after"):
        row[when]["probability"] = round(row[when]["probability"], 6)
    return row


def _line(one: Learnt) -> str:
    if isinstance(one, TextBits):
        return f"{one.before:.3f} → {one.after:.3f}  {_one_line(one.text)[:60]}"
    before, after = (f"{options.words(answer.label)} {answer.probability:.1%}" for answer in (one.before, one.after))
    return f"{before} → {after}  {_one_line(one.text)}"


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


@click.command()
@commandline.bundle()
@commandline.adapter("name", "The global adapter to start from, if there are several.")
@options.trust
@option(
    "--method NAME",
    "fine-tune: train all parts; of a classifier ridge: fit its head by a regression alone; ensemble: both; "
    "interpolate: go halfway; or one that an installed package adds.",
    default=FINE_TUNE,
    show_default=True,
)
@click.option("--epochs", type=click.IntRange(1, 100), default=3, show_default=True, help="Passes over the examples.")
@option(
    "--learning-rate RATE",
    "Of AdamW. Default: 0.001, and 0.1 of virtual tokens.",
    type=FiniteRange(0, 1, min_open=True),
)
@option(
    "--scale",
    "With ridge or ensemble: the federation's analytic.scale.",
    type=FiniteRange(0, 1000, min_open=True),
    default=16.0,
    show_default=True,
)
@option(
    "--patience N",
    "End after N epochs without a lower loss on the held-out examples, with the best adapter; 0: never.",
    type=click.IntRange(0),
    default=0,
)
@option(
    "--variants N",
    "Of each picture or sound, learned as well: moved, lighter or with noise.",
    type=click.IntRange(0, MAX_VARIANTS),
    default=0,
)
@option("--seconds S", "End after S, with what is learned by then.", type=FiniteRange(0, min_open=True))
@option(
    "--duty-cycle SHARE",
    "Compute for this share of the time, and pause after each step, to save a battery.",
    type=FiniteRange(0.01, 1),
    default=1.0,
)
@commandline.as_json
@click.argument("file", type=commandline.FILE, metavar="EXAMPLES")
def personalize(
    bundle: Path,
    name: str | None,
    trust: Path | None,
    method: str,
    epochs: int,
    learning_rate: float | None,
    scale: float,
    patience: int,
    variants: int,
    seconds: float | None,
    duty_cycle: float,
    as_json: bool,
    file: Path,
) -> None:
    """Make a private adapter from the newest global adapter of the bundle and the examples in EXAMPLES, a device's
    examples.jsonl, and put it into use if it answers at least as many of the held-out examples, or of a language model
    predicts them at least as well.

    What was taught with `edgeadapt device learn` is trained as well. Nothing leaves the device. After a kill, the same
    command goes on where it was. `edgeadapt device learn --undo` takes the adapter back.

    Printed are the right answers to the held-out examples, and what is answered otherwise than before.

    \b
    Examples:
      edgeadapt device personalize --bundle phone/bundle examples.jsonl
      edgeadapt device personalize --bundle phone/bundle --method ridge --variants 4 examples.jsonl
      edgeadapt device personalize --bundle phone/bundle --epochs 20 --patience 2 --duty-cycle 0.3 examples.jsonl
    """
    how = PersonalStep(epochs, scale, method, patience=patience)
    with Learner.open(bundle, trust, name) as learner:
        control = TrainingControl(seconds or math.inf, duty_cycle)
        outcome = learner.personalize(file, how, learning_rate, control, variants)
        counts = {name: int(score.correct) for name, score in outcome.scores.items()}
        costs = {name: bits(score) for name, score in outcome.scores.items() if score.count}
        scores = {"right": counts} if learner.adapter.manifest.labels else {"bits": costs}
    if as_json:
        row = asdict(replace(outcome, scores={}, others=()))
        del row["scores"], row["others"]
        row |= scores | (_tested(outcome.others) if "right" in scores else {})
        click.echo(json.dumps(row, ensure_ascii=False))
    else:
        click.echo("\n".join(_personal_lines(outcome, scores)))


def _personal_lines(found: Personalized, scores: dict[str, dict[str, Any]]) -> list[str]:
    ((kind, values),) = scores.items()
    if kind == "bits":
        better = "predicts the held-out examples better"
        title, shown = f"bits per byte of {found.held_out}", [f"{name} {value:.3f}" for name, value in values.items()]
    else:
        better = "answers more of the held-out examples" if "personal" in values else "forgets fewer public phrases"
        title, shown = f"right of {found.held_out}", [f"{name} {value}" for name, value in values.items()]
    state = "is in use" if found.made else f"stays in use: it {better}"
    text = [f"{found.adapter} version {found.version} {state}; {found.trained} examples"]
    if found.held_out:
        text.append(f"{title} held-out examples: {', '.join(shown)}")
    if found.others:
        text.append(f"{len(_changed(found.others))} of {len(found.others)} known phrases are answered otherwise")
    return text + list(map(_line, _changed(found.others)))
