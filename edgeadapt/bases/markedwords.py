"""Texts of which one word is marked: the label of a word, such as a slot of an intent, is learned and asked with them.

``wake me at⟦ nine⟧ am`` asks what "nine" is. The marks are tokens of a base that was made for it
(``export.features.with_marked_words``): its model reads the text without them, and a head gets the mean of the states
of the marked word alone. So a word is a text with a label like any other. People write labels as
``wake me at [nine](hour) am``; a word without one has the label ``OUTSIDE``.
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby

from aggregation.errors import DataError

MARKED = "marked_words"  # key of config.json: the numbers of the two marks
BEGIN, END = MARKS = ("⟦", "⟧")
OUTSIDE = "O"
_WORD = re.compile(r"\w+(?:[^\w\s]\w+)*")
_LABELLED = re.compile(r"\[([^\[\]]+)\]\((\w[\w.-]*)\)")


def is_marked(text: str) -> bool:
    return BEGIN in text


def knows_marks(tokenizer: bytes) -> bool:
    """Check whether a tokenizer.json is of a base that was made for marks."""
    added = json.loads(tokenizer).get("added_tokens") or []
    return {*MARKS} <= {token.get("content") for token in added}


def marked_word(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def marked(text: str) -> list[str]:
    """Return the text once for each word, which is marked with the space before it, as tokenizers read it. Raises
    DataError: it has no word, or marks already."""
    if BEGIN in text or END in text:
        raise DataError(f"a text whose words are asked has {BEGIN} or {END}: leave them out", about="text")
    spans = [(word.start() - text[: word.start()].endswith(" "), word.end()) for word in _WORD.finditer(text)]
    if not spans:
        raise DataError("a text whose words are asked has no word", about="text")
    return [f"{text[:start]}{BEGIN}{text[start:end]}{END}{text[end:]}" for start, end in spans]


def labelled(text: str) -> list[tuple[str, str]]:
    """Return the marked texts of one with labels, and the label of each. Raises DataError as ``marked``.

    >>> labelled("wake me at [nine](hour)")
    [('⟦wake⟧ me at nine', 'O'), ('wake⟦ me⟧ at nine', 'O'), ('wake me⟦ at⟧ nine', 'O'), ('wake me at⟦ nine⟧', 'hour')]
    """
    plain, labels, end = "", list[str](), 0
    for found in _LABELLED.finditer(text):
        before = text[end : found.start()]
        labels += [OUTSIDE] * len(before) + [found[2]] * len(found[1])
        plain, end = plain + before + found[1], found.end()
    plain, labels = plain + text[end:], labels + [OUTSIDE] * (len(text) - end)
    starts = [word.start() for word in _WORD.finditer(plain)]
    return [(one, labels[start]) for one, start in zip(marked(plain), starts, strict=True)]


def without_labels(text: str) -> str:
    return _LABELLED.sub(r"\1", text)


def with_labels(text: str, labels: Sequence[str]) -> str:
    """Write the labels of the words of a text, in order; neighbours of one label are written together.

    >>> with_labels("turn it to twenty two degrees", ["O", "O", "O", "number", "number", "O"])
    'turn it to [twenty two](number) degrees'
    """
    words, written, end = list(zip(_WORD.finditer(text), labels, strict=True)), "", 0
    for label, group in groupby(words, key=lambda pair: pair[1]):
        spans = [word.span() for word, _ in group]
        start, after = spans[0][0], spans[-1][1]
        said = text[start:after]
        written += text[end:start] + (said if label == OUTSIDE else f"[{said}]({label})")
        end = after
    return written + text[end:]
