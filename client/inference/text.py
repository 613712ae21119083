"""Texts in and out: what cannot be answered is refused before a model sees it, what cannot be shown is not printed."""

import unicodedata

from aggregation.errors import DataError

MAX_TEXT = 2**16  # characters; what fits a model's limit of tokens is mostly far below


def checked(text: str) -> str:
    """The text, if it can be one.

    Raises:
        DataError: Empty or only white space, above ``MAX_TEXT`` characters, not Unicode, or with a NUL character.
    """
    if not text.strip():
        raise DataError("an empty text has no answer; give a phrase")
    if len(text) > MAX_TEXT:
        raise DataError(f"a text of {len(text)} characters is above the limit of {MAX_TEXT}; shorten it")
    if "\0" in text:
        raise DataError("a text has a NUL character, where libraries take it to end; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("a text is not valid Unicode; give it in UTF-8") from error
    return text


def printable(text: str) -> str:
    """Without the signs that steer a terminal: what a model writes must not move the cursor or set a title."""
    return "".join(sign for sign in text if sign in "\n\t" or unicodedata.category(sign) != "Cc")
