"""``edgeadapt device personalize``: makes the private adapter of a bundle from the global one and own examples."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from client.cli import options
from client.cli.learn import change
from commandline import FiniteRange

if TYPE_CHECKING:  # slow to import, and not needed for --help
    from client.learning import LanguagePersonalized, Personalized

METHODS = ("fine-tune", "ridge", "ensemble", "interpolate")  # of client.training.personal.PersonalMethod


@click.command()
@options.bundle
@click.option("--adapter", "name", metavar="NAME", help="The global adapter to start from, if there are several.")
@options.trust
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    show_default=True,
    help="Train all parts; fit a classifier's head by a regression alone; both; or go halfway.",
)
@click.option("--epochs", type=click.IntRange(1, 100), default=3, show_default=True, help="Passes over the examples.")
@click.option(
    "--learning-rate",
    type=FiniteRange(0, 1, min_open=True),
    metavar="RATE",
    help="Of AdamW. Default: 0.001, and 0.1 of virtual tokens.",
)
@click.option(
    "--scale",
    type=FiniteRange(0, 1000, min_open=True),
    default=16.0,
    show_default=True,
    help="With ridge or ensemble: the federation's analytic.scale.",
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="End after N epochs without a lower loss on the held-out examples, with the best adapter; 0: never.",
)
@click.option(
    "--seconds",
    type=FiniteRange(0, min_open=True),
    metavar="S",
    help="End after S, with what is learned by then.",
)
@click.option(
    "--duty-cycle",
    type=FiniteRange(0.01, 1),
    default=1.0,
    metavar="SHARE",
    help="Compute for this share of the time, and pause after each step, to save a battery.",
)
@options.as_json
@click.argument("file", type=options.FILE, metavar="EXAMPLES")
def personalize(
    bundle: Path,
    name: str | None,
    trust: Path | None,
    method: str,
    epochs: int,
    learning_rate: float | None,
    scale: float,
    patience: int,
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
      edgeadapt device personalize --bundle phone/bundle --method ridge examples.jsonl
      edgeadapt device personalize --bundle phone/bundle --epochs 20 --patience 2 --duty-cycle 0.3 examples.jsonl
    """
    import math

    from client.learning import Learner, personalize_language_model
    from client.training.control import TrainingControl
    from client.training.personal import PersonalMethod, PersonalStep

    how = PersonalStep(epochs, scale, PersonalMethod(method), patience=patience)
    control = TrainingControl(seconds or math.inf, duty_cycle)
    with Learner.open(bundle, trust, name, task=None) as learner:
        if learner.library.manifest.task == "text-generation":
            written = personalize_language_model(learner, file, how, learning_rate, control)
            row, lines = asdict(written), _language_lines(written)
        else:
            found = learner.personalize(file, how, learning_rate, control)
            row, lines = asdict(found), _lines(found)
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else "\n".join(lines))


def _outcome(found: "Personalized | LanguagePersonalized", better: str) -> str:
    state = "is in use" if found.made else f"stays in use: it {better}"
    return f"{found.adapter} version {found.version} {state}; {found.trained} examples"


def _language_lines(found: "LanguagePersonalized") -> list[str]:
    lines = [_outcome(found, "predicts the held-out examples better")]
    if found.held_out:
        bits = ", ".join(f"{name} {value:.3f}" for name, value in found.bits.items())
        lines.append(f"bits per byte of {found.held_out} held-out examples: {bits}")
    return lines


def _lines(found: "Personalized") -> list[str]:
    better = "answers more of the held-out examples" if "personal" in found.right else "forgets fewer public phrases"
    lines = [_outcome(found, better)]
    if found.held_out:
        right = ", ".join(f"{name} {count}" for name, count in found.right.items())
        lines.append(f"right of {found.held_out} held-out examples: {right}")
    if found.tested:
        lines.append(f"{len(found.changed)} of {found.tested} known phrases are answered otherwise")
    return lines + [change(one) for one in found.changed]
