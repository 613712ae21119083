"""Texts of which one word is marked: the label of a word, such as a slot of an intent, is learned and asked with them.

``wake me at⟦ nine⟧ am`` asks what "nine" is. The marks are tokens of a base that was made for it
(``export.features.with_marked_words``): its model reads the text without them, and a head gets the mean of the states
of the marked word alone. So a word is a text with a label like any other. People write labels as
``wake me at [nine](hour) am``; a word without one has the label ``OUTSIDE``.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby

from aggregation.errors import ConfigError, DataError

MARKED = "marked_words"  # key of config.json: the numbers of the two marks
BEGIN, END = MARKS = ("⟦", "⟧")
OUTSIDE = "O"
MAX_WORDS = 64  # of a text: a base reads 128 tokens
_LABELLED = re.compile(r"\[([^\[\]]+)\]\((\w[\w.-]*)\)")


def require_marks(tokenizer: bytes, about: str) -> None:
    """Raise ConfigError if a tokenizer.json is not of a base that was made for marks."""
    added = json.loads(tokenizer).get("added_tokens") or []
    if not {*MARKS} <= {token.get("content") for token in added}:
        raise ConfigError("the base does not read single words: make one with 'base change --mark'", about=about)


def marked_word(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def marked(text: str) -> list[str]:
    """Return the text once for each word, which is marked with the space before it, as tokenizers read it. Raises
    DataError: it has no word, more than ``MAX_WORDS``, or marks already."""
    if BEGIN in text or END in text:
        raise DataError(f"a text whose words are asked has {BEGIN} or {END}: leave them out", about="text")
    spans = [(start - text[:start].endswith(" "), end) for start, end in _spans(text)]
    if not 0 < len(spans) <= MAX_WORDS:
        count = len(spans) or "no"
        raise DataError(f"a text whose words are asked has {count} words: give 1 to {MAX_WORDS}", about="text")
    return [f"{text[:start]}{BEGIN}{text[start:end]}{END}{text[end:]}" for start, end in spans]


def labelled(text: str) -> list[tuple[str, str]]:
    """Return the marked texts of one with labels, and the label of each. Raises DataError as ``marked``.

    >>> labelled("wake me at [nine](hour)")
    [('⟦wake⟧ me at nine', 'O'), ('wake⟦ me⟧ at nine', 'O'), ('wake me⟦ at⟧ nine', 'O'), ('wake me at⟦ nine⟧', 'hour')]
    """
    plain, ranges, end = "", list[tuple[int, int, str]](), 0
    for found in _LABELLED.finditer(text):
        plain += text[end : found.start()]
        ranges.append((len(plain), len(plain) + len(found[1]), found[2]))
        plain, end = plain + found[1], found.end()
    plain += text[end:]
    starts = [start for start, _ in _spans(plain)]
    labels = dict.fromkeys(starts, OUTSIDE)
    for first, after, label in ranges:
        within = [start for start in starts if first <= start < after]
        if not within:
            raise DataError(f"the label {label!r} is of no word: put it on whole words", about="text")
        labels |= dict.fromkeys(within, label)
    return list(zip(marked(plain), labels.values(), strict=True))


def without_labels(text: str) -> str:
    return _LABELLED.sub(r"\1", text)


def with_labels(text: str, labels: Sequence[str]) -> str:
    """Write the labels of the words of a text, in order; neighbours of one label are written together.

    >>> with_labels("turn it to twenty two degrees", ["O", "O", "O", "number", "number", "O"])
    'turn it to [twenty two](number) degrees'
    """
    written, end = "", 0
    for label, group in groupby(zip(_spans(text), labels, strict=True), key=lambda pair: pair[1]):
        spans = [span for span, _ in group]
        start, after = spans[0][0], spans[-1][1]
        said = text[start:after]
        written += text[end:start] + (said if label == OUTSIDE else f"[{said}]({label})")
        end = after
    return written + text[end:]


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each word: what white space holds apart, without punctuation and symbols around it."""
    for found in re.finditer(r"\S+", text):
        start, end = found.span()
        while start < end and unicodedata.category(text[start])[0] in "PSC":
            start += 1
        while start < end and unicodedata.category(text[end - 1])[0] in "PSC":
            end -= 1
        if start < end:
            yield start, end
