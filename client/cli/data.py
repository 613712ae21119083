"""``edgeadapt device data``: what a device trains on."""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError, DataError
from client.cli import options
from client.cli.node import confirmed
from client.inference.passages import PassageIndex
from client.inference.usage import Usage
from client.training.examples import MAX_FILE, parse_examples, read_file
from client.training.hygiene import Cleaned, clean, with_taught, without, words
from client.updates.channel import PRIVATE, UPDATES
from edgeadapt import commandline
from edgeadapt.bases.markedwords import labelled
from edgeadapt.bases.tasks import CLASSES, WORDS
from edgeadapt.commandline import option
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE_MANIFEST, adapter_names
from edgeadapt.formats.phrases import read_phrases


@click.group(cls=commandline.HelpfulGroup)
def data() -> None:
    """Check, import or erase the examples of a device, which never leave it."""


@data.command(short_help="Name the lines that training leaves out.")
@options.state_dir
@commandline.as_json
def check(state_dir: Path, as_json: bool) -> None:
    """Name the lines of the examples file that [data] in device.toml sets aside before training, each with the reason:
    personal data, a secret, a duplicate, a broken, long or old text. No text is printed.

    Without [data], the device trains on every line; this says what an empty table would set aside.

    \b
    Example:
      edgeadapt device data check --state kitchen
    """
    from client.node.statedir import DeviceStateDir

    opened = DeviceStateDir.open(state_dir)
    taught = opened.corrections()
    cleaned = clean(with_taught(read_file(opened.examples), taught), opened.settings.data, time.time())
    if len(cleaned.aside) < cleaned.lines or not cleaned.lines:
        parse_examples(cleaned.raw, opened.examples, 0)
    row = {"applied": opened.settings.data is not None, "untimed": cleaned.untimed, "corrections": taught.count(b"\n")}
    off = "" if row["applied"] else "\nnothing is set aside in training: device.toml does not have the table [data]"
    _print(row, cleaned, f"{cleaned}; {cleaned.untimed} have no time{off}", as_json)


@data.command("import", short_help="Append examples that are clean.")
@options.state_dir
@commandline.as_json
@click.argument("file", type=commandline.FILE)
def import_(state_dir: Path, as_json: bool, file: Path) -> None:
    """Append the examples in FILE to those of the device, without what [data] in device.toml sets aside or, if that
    table is missing, an empty one.

    FILE has JSON lines like examples.jsonl, or, under another name than .jsonl, lines of a label, a tab and a text. A
    label is a number, or one of the labels of the device's bundle. Where the task is words, the lines are texts such as
    `wake me at [nine](hour)`.

    \b
    Examples:
      edgeadapt device data import --state kitchen more.jsonl
      edgeadapt device data import --state kitchen phrases.tsv
    """
    from client.node.statedir import DeviceStateDir
    from client.node.tasklabels import signed_labels

    opened = DeviceStateDir.open(state_dir)
    has_bundle = (Path(opened.settings.base) / BASE_MANIFEST).is_file()
    names = next(iter(signed_labels(opened.base())), ()) if has_bundle else ()
    pairs = _by_word if opened.settings.task == WORDS else read_phrases
    raw = read_file(file) if file.suffix == ".jsonl" else _labelled(pairs(file), names)
    with opened.locked():
        old = read_file(opened.examples) if opened.examples.exists() else b""
        old += b"\n" if old and not old.endswith(b"\n") else b""
        cleaned = clean(old + raw.removeprefix(b"\xef\xbb\xbf"), opened.settings.data, time.time())
        known = old.count(b"\n")
        aside = {number - known: reason for number, reason in cleaned.aside.items() if number > known}
        new = [line.strip() for line in cleaned.raw.split(b"\n")[known:]]
        if count := sum(map(bool, new)):
            labels = len(names) or (None if b'"label"' in raw else 0)
            parse_examples(b"\n".join(new), file, labels if opened.settings.task in CLASSES else 0)
            content = old + b"".join(line + b"\n" for line in new if line)
            if len(content) > MAX_FILE:
                reason = f"with {file}, {opened.examples} would have more than {MAX_FILE} bytes: import less"
                raise DataError(reason, about="examples")
            storage.replace(opened.examples, content)
    cleaned = Cleaned(b"", aside, count + len(aside))
    _print({"imported": count}, cleaned, f"{count} imported; {cleaned}", as_json)


@data.command(short_help="Erase examples, and what was learned of them.")
@options.state_dir
@option("--bundle DIR", "Default, by device.toml: [data] corrections, else base.", type=commandline.FOLDER)
@click.option("--text", default="", metavar="TEXT", help="Erase what has the words of TEXT.")
@click.option("--containing", default="", metavar="WORD", help="Erase what contains WORD, such as a name.")
@click.option("--all", "everything", is_flag=True, help="Erase everything.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@commandline.as_json
def erase(
    state_dir: Path, bundle: Path | None, text: str, containing: str, everything: bool, yes: bool, as_json: bool
) -> None:
    """Erase examples, corrections and texts that were asked, and what this device counted, computed and learned of
    them, and the index of 'device index' if it has the text; the files stay. It leaves the session that is under way.

    The private adapter is made again from the global one: lessons of what remains are repeated, and personal steps are
    with their default settings. No sum of the past can be taken back.

    \b
    Examples:
      edgeadapt device data erase --state kitchen --containing Anna
      edgeadapt device data erase --state kitchen --bundle phone/bundle --text "call the office" --yes
      edgeadapt device data erase --state kitchen --all
    """
    from client.learning import Correction, Learner, questions
    from client.node.privacyledger import PrivacyLedger
    from client.node.statedir import DeviceStateDir

    wanted = words(text or containing)
    if bool(text) + bool(containing) + everything != 1 or not (wanted or everything):
        raise ConfigError("name what to erase: --text with words, --containing a word, or --all", about="--text")

    def erased(value: str) -> bool:
        return everything or (wanted == words(value) if text else wanted in words(value))

    def gone(one: Correction) -> bool:
        names = learner.adapter.manifest.labels if learner else ()  # which are not texts
        return erased(one.text) or (one.label not in names and erased(one.label))

    opened = DeviceStateDir.open(state_dir)
    if not yes and not confirmed("What is erased cannot be brought back, and lessons of before are undone no more."):
        raise ConfigError("nothing was erased: the answer was no", about="--yes")
    place = bundle or Path((opened.settings.data and opened.settings.data.corrections) or opened.settings.base)
    is_bundle = bundle or ((place / BASE_MANIFEST).is_file() and adapter_names(place))
    with Learner.open(place) if is_bundle else nullcontext() as learner:
        with opened.locked():
            kept, examples = without(read_file(opened.examples) if opened.examples.exists() else b"", erased)
            corrections = sum(map(gone, learner.history.corrections)) if learner else 0
            # Also a private adapter of no lesson that is known, as after a kill.
            unknown = learner and learner.adapter.manifest.parent and not learner.history.lessons
            asked = questions.forget(place, erased) if learner else 0
            if not (examples or corrections or asked or everything or unknown):
                raise DataError("nothing has this text, and nothing was erased: see --containing", about="--text")
            if learner:
                learner.forget(gone)
            storage.replace(opened.examples, kept)
            opened.forget_examples()
        if learner:
            shutil.rmtree(storage.real(place).parent / UPDATES / PRIVATE, ignore_errors=True)
            learner.relearn(opened.examples)
            PassageIndex.forget(place, learner.adapter.manifest.base_digest, lambda text: wanted in words(text))
            if Usage.is_on(place):
                Usage.erase(place)
                Usage.begin(place)
    ledger = opened.load(PrivacyLedger) or PrivacyLedger()
    epsilon = ledger.spent.epsilon(opened.settings.policy.delta)
    sums = f"{ledger.noisy} with noise, epsilon {epsilon:.2f}, and {ledger.bare} without"
    used = learner.adapter.manifest.name if learner else ""
    line = f"{examples} examples and {corrections} corrections are erased; in use is {used or 'the bundle as it was'}\n"
    line += f"contributions to sums of the past, which cannot be taken back: {sums}"
    row = {"examples": examples, "corrections": corrections, "adapter": used, "sums": sums}
    commandline.print_result(row, line, as_json)


def _print(row: dict[str, Any], cleaned: Cleaned, line: str, as_json: bool) -> None:
    aside = [{"line": number, "reason": reason} for number, reason in cleaned.aside.items()]
    lines = [*(f"line {number}: {reason}" for number, reason in cleaned.aside.items()), line]
    commandline.print_result(row | {"examples": cleaned.lines, "aside": aside}, "\n".join(lines), as_json)


def _by_word(file: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(storage.read_lines(file, "text"), 1):
        try:
            pairs += [(label, text) for text, label in labelled(line)]
        except DataError as error:
            raise DataError(f"text {number} of {file}: {error}", about=file.name) from None
    return pairs


def _labelled(pairs: Iterable[tuple[str, str]], names: Sequence[str]) -> bytes:
    """Make JSON lines of labels and texts; ``parse_examples`` refuses a label that is not known."""
    numbers: dict[str, int | str] = {name: number for number, name in enumerate(names)}
    rows = []
    for label, text in pairs:
        number = int(label) if label.isdecimal() else label
        rows.append(json.dumps({"text": text, "label": numbers.get(label, number)}))
    return "\n".join(rows).encode()
