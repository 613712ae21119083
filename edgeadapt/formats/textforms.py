"""Forms of Unicode texts, in time linear in the text, which may be a stranger's."""

import unicodedata
from collections.abc import Iterator

MARKS = 30  # in a row: Unicode's stream-safe form (UAX 15, 13) has no more either
_HALF_WIDTH = "\uff9e\uff9f"  # become marks in NFKC, and are none


def nfkc(text: str) -> str:
    """Return NFKC, without the marks of a letter beyond ``MARKS``. Python and JavaScript sort the marks of a letter in
    time quadratic in their number; no writing system has so many.

    >>> nfkc("ﬁne"), len(nfkc("a" + "\\u0316\\u0301" * 10**5))
    ('fine', 30)
    """
    return unicodedata.normalize("NFKC", text if text.isascii() else "".join(_few_marks(text)))


def _few_marks(text: str) -> Iterator[str]:
    run = 0
    for char in text:
        run = run + 1 if unicodedata.category(char)[0] == "M" or char in _HALF_WIDTH else 0
        if run <= MARKS:
            yield char
