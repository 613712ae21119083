"""What ``[data]`` of ``device.toml`` keeps out of training: personal data, secrets, duplicates, broken and old texts. A
line that is set aside becomes a blank one, so that the numbers of the others stay. It is named by its number and a
reason, and never quoted. Patterns take linear time: a file may be hostile."""

import json
import logging
import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from aggregation.errors import DataError
from client.training.examples import MAX_FILE, longest, read_file
from edgeadapt.bases.markedwords import BEGIN, unmarked
from edgeadapt.bases.media import is_medium
from edgeadapt.formats.settings import Settings
from edgeadapt.formats.textforms import nfkc

DAY = 86_400  # seconds
RANDOM = 3  # changes between letters and digits: 99% of 40 random ones have more, names have fewer
Removed = Literal["personal", "secrets", "broken", "duplicates"]
log = logging.getLogger("edgeadapt.device")
_EMAIL = re.compile(r"[^\s@]@[\w-]+\.\w")
_DATE = re.compile(r"(?<!\d)(?:\d{1,4}([./-])\d{1,2}\1\d{1,4}|\d{1,2}:\d\d)(?!\d)")  # or a time
_NUMBER = re.compile(r"(?<!\w)[+(]{0,2}\d(?:[ ()./-]{0,3}\d){6,33}+")
_PLAIN = re.compile(r"(?<!\w)[A-Za-z\d]{8,34}(?!\w)")
_IBAN = re.compile(r"(?<!\w)[A-Za-z]{2}\d\d(?: ?[A-Za-z\d]){11,30}")
# Without a check digit: the United States, Britain and Germany. With one: modules of stdnum.
_NATIONAL = re.compile(
    r"(?<![\w-])(?:\d{3}-\d\d-\d{4}|[A-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-Z]|\d\d ?\d{6} ?[A-Z] ?\d{3})(?![\w-])"
)
_CHECKED = ("de.idnr", "es.nie", "es.nif", "fr.nir", "gb.nhs", "it.codicefiscale", "nl.bsn", "pl.pesel", "pt.nif")
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY|(?<![\w-])(?:(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|sk[-_]|AKIA|ASIA|AIza|"
    r"hf_|npm_|pypi-|ya29\.)[\w-]{16}|eyJ[\w-]{8,}\.[\w-]{4})"
)
# In code and settings: a quoted value whose name says so, an unquoted one of an environment variable, a header, and the
# password of a URL. Nothing secret is in what is filled in later, such as {password} or $TOKEN.
_WRITTEN = re.compile(
    r"""(?i:passw(?:or)?d|passphrase|(?<![a-z])pass|pwd|secret|token|(?:api|access|secret|private|signing)[_-]?key)\d?"""
    r"""["']?(?:[ ]?:[ ]?[\w.\[\]| ]{1,40})?[ ]{0,40}(?::=|=>|=(?!=)|:)[ ]{0,8}(?i:[bruf]{0,2})["']"""
    r"""(?![{%<$*\[|,;)])[^\s"'][^\n"']{3}"""
    r"""|(?<!\w)[A-Z\d_]{0,40}(?:PASS|PASSWORD|PASSWD|PWD|SECRET|TOKEN|_KEY)=(?![={%<$("'])\S{4}"""
    r"""|(?i:authorization)["' :=,\]]{1,8}(?i:bearer|basic|token) (?![{%<$])\S{4}"""
    r"""|(?<![a-z])[a-z][a-z+]{1,15}://[^\s:/@]{0,64}:(?![{%<$*])[^\s/@]{1,128}@[\w\[]"""
)
_LONG = re.compile(r"[\w+=-]{20,}", re.ASCII)
_CHANGE = re.compile(r"[A-Za-z](?=\d)|\d(?=[A-Za-z])")


class HygieneSettings(Settings):
    """``[data]``. Without the table, a device trains on all its examples; an empty one switches these on."""

    remove: tuple[Removed, ...] = get_args(Removed)
    """which texts are set aside: with an e-mail address, phone number, IBAN, payment card or national number; with a
    private key, an access token, a password in code or a URL, or a long random word; with control characters or decoded
    wrongly; with the words and the label of another one, whatever the case and punctuation"""
    countries: tuple[str, ...] = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "PT")
    """ISO codes of the countries whose phone numbers are known without a country code"""
    days: int = Field(default=0, ge=0)
    """set texts aside that are older than this; 0: none"""
    most: int = Field(default=0, ge=0)
    """use this many of the texts that have a time, the newest; 0: all"""
    corrections: str = ""
    """bundle next to which a person taught the device: rounds train on these corrections too, each in place of
    examples of the same text; empty: none"""

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        needed = ["phonenumbers", "stdnum"] * ("personal" in self.remove) + ["ftfy"] * ("broken" in self.remove)
        if missing := [package for package in needed if find_spec(package) is None]:
            raise ValueError(f"it needs {missing[0]}, which is not installed: pip install 'edgeadapt[data]'")
        known = import_module("phonenumbers").SUPPORTED_REGIONS if "phonenumbers" in needed else self.countries
        if unknown := set(self.countries).difference(known):
            raise ValueError(f"countries has {min(unknown)!r}: use codes of ISO 3166, such as DE")
        return self


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The content of a file. ``aside``: number of a line that is now blank → reason. ``lines``: examples before.
    ``untimed``: those without a time, which ``days`` and ``most`` keep."""

    raw: bytes = field(repr=False)
    aside: Mapping[int, str]
    lines: int
    untimed: int = 0

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(self.aside.values()).items()))
        return f"{len(self.aside)} of {self.lines} examples are set aside" + (f": {reasons}" if reasons else "")


def read_clean(path: Path, settings: HygieneSettings | None, taught: bytes = b"") -> bytes:
    """Read an examples file and what was ``taught``, without what the settings set aside, which is counted in the log.
    Raises DataError as ``read_file``; or a library failed at a text."""
    raw = with_taught(read_file(path), taught)
    if len(raw) > MAX_FILE:
        raise DataError(f"with corrections, {path} has more than {MAX_FILE} bytes: shorten it", about="examples")
    if settings is None:
        return raw
    try:
        cleaned = clean(raw, settings, time.time())
    except Exception as error:  # its message may quote the text
        reason = error if isinstance(error, DataError) else type(error).__name__
        raise DataError(f"cannot clean {path}: {reason}", about="examples") from None
    log.info("%s", cleaned)
    return cleaned.raw


def clean(raw: bytes, settings: HygieneSettings | None, now: float) -> Cleaned:
    """Set aside what shall not be trained. ``settings``: None for the defaults; ``now``: seconds since 1970. A line
    that is not valid stays as it is: ``parse_examples`` refuses it. Raises DataError: it is not UTF-8."""
    settings = settings or HygieneSettings.parse({}, "[data]")
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError("the examples are not UTF-8; convert them", about="examples") from None
    rows = {number: row for number, line in enumerate(lines, 1) if (row := _row(line))}
    times = {number: _time(row["time"]) for number, row in rows.items() if "time" in row}
    aside, seen = dict[int, str](), set[str]()
    for number in sorted(rows, key=lambda number: -times.get(number, math.inf)):  # of duplicates the newest is kept
        row = rows[number]
        if reason := next(reasons(unmarked(row["text"]), row.get("prompt") or "", settings), ""):
            aside[number] = reason
        elif settings.days and now - times.get(number, now) > settings.days * DAY:
            aside[number] = "old"
        elif "duplicates" in settings.remove:
            key = json.dumps([*map(_asked, (row["text"], row.get("prompt") or "")), row.get("label")])
            aside |= {number: "duplicate"} if key in seen else {}
            seen.add(key)
    if settings.most:
        newest = sorted(times.keys() - aside.keys(), key=lambda number: (times[number], number))
        aside |= dict.fromkeys(newest[: -settings.most], "surplus")
    kept = "\n".join("" if number in aside else line for number, line in enumerate(lines, 1))
    return Cleaned(kept.encode(), dict(sorted(aside.items())), len(rows), len(rows) - len(times))


def with_taught(raw: bytes, taught: bytes) -> bytes:
    """Append lines to an examples file, where a line of the same words, or prompt, becomes a blank one."""

    def asked(line: bytes) -> str:
        row = _row(line) or {"text": ""}
        return _asked(row.get("prompt") or row["text"])

    known = {*map(asked, taught.splitlines())} - {""}
    kept = (b"" if asked(line) in known else line for line in raw.split(b"\n"))
    return b"\n".join([*kept, taught]) if taught else raw


def without(raw: bytes, erased: Callable[[str], bool]) -> tuple[bytes, int]:
    """Remove the lines in which ``erased`` recognises a text, also what is no example, and count them."""
    lines = raw.split(b"\n")
    kept = [line for line in lines if not any(map(erased, _texts(line.decode(errors="replace"))))]
    return b"\n".join(kept), len(lines) - len(kept)


def _texts(line: str) -> list[str]:
    try:
        return [value for value in json.loads(line).values() if isinstance(value, str)]
    except (ValueError, AttributeError, RecursionError):
        return [line] if line.strip() else []


def _row(line: str | bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if isinstance(row["text"], str) and isinstance(row.get("prompt", ""), str) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def words(text: str) -> str:
    """Reduce a text to its words, in which neither case nor punctuation counts; a picture or sound stays."""
    if is_medium(text):
        return text
    return " ".join(re.sub(r"[\W_]+", " ", nfkc(text).casefold()).split())


def _asked(text: str) -> str:
    """Return what equal examples share: their words, and which of them is marked."""
    before, mark, _ = text.partition(BEGIN)
    return words(text) + (f"{BEGIN}{len(words(before).split())}" if mark else "")


def _time(value: Any) -> float:
    """Read seconds since 1970, or an ISO date, which may be in local time. What cannot be read is older than all."""
    try:
        seconds = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else float(value)
        return seconds if math.isfinite(seconds) else -math.inf
    except (TypeError, ValueError, OverflowError):
        return -math.inf


def reasons(text: str, prompt: str, settings: HygieneSettings) -> Iterator[str]:
    """Yield why a text with its prompt is set aside whatever else is there, if it is."""
    if len(text) > longest(text) or len(prompt) > longest(prompt):
        yield "long"
        return
    if is_medium(text):
        return
    text = f"{prompt}\n{text}"
    if "broken" in settings.remove:
        controls = any(unicodedata.category(char) in ("Cc", "Cs", "Co") for char in text if char not in "\n\r\t")
        if controls or "\ufffd" in text or import_module("ftfy.badness").is_bad(text):
            yield "broken"
    if "secrets" in settings.remove:
        random = any(len(_CHANGE.findall(word)) >= RANDOM for word in _LONG.findall(text))
        if random or _SECRET.search(text) or _WRITTEN.search(text):
            yield "secret"
    if "personal" in settings.remove:
        yield from identifiers(text, settings.countries)


def identifiers(text: str, countries: Sequence[str]) -> Iterator[str]:
    """Yield the kinds of personal identifiers in a text, which may repeat."""
    if _EMAIL.search(text):
        yield "email"
    if sum(map(str.isdigit, text)) < 6:
        return
    iban, luhn, *checked = (import_module(f"stdnum.{name}") for name in ("iban", "luhn", *_CHECKED))
    for found in _IBAN.findall(text):
        compact = found.replace(" ", "")
        if any(iban.is_valid(compact[:size], check_country=False) for size in range(15, len(compact) + 1)):
            yield "iban"
    numbers = _NUMBER.findall(_DATE.sub(";", text))
    digits = (re.sub(r"\D", "", number) for number in numbers)
    plain = {*_PLAIN.findall(text), *(one for one in digits if len(one) > 10)}
    if any(12 <= len(one) <= 19 and luhn.is_valid(one) for one in plain):
        yield "card"
    if _NATIONAL.search(text) or any(module.is_valid(one) for module in checked for one in plain):
        yield "national number"
    parts = {part for number in numbers for part in (number, number.rpartition(" ")[0])}  # what follows may be a number
    if any(_is_phone(part, country) for part in parts for country in countries):
        yield "phone"


def _is_phone(number: str, country: str) -> bool:
    """Whether a number is a phone number of a country: a valid one or, with enough digits, one that could be."""
    phones, digits, dialled = import_module("phonenumbers"), sum(map(str.isdigit, number)), number[:1] in tuple("+(0")
    if digits < 9 and not dialled:
        return False
    try:
        parsed = phones.parse(number, country)
    except phones.NumberParseException:
        return False
    return bool(phones.is_possible_number(parsed) if digits + dialled > 9 else phones.is_valid_number(parsed))
