"""Reads phrases as the tokens of a classifier, and refuses those that say nothing to it."""

import json
import math
from typing import Any

from tokenizers import Encoding

from aggregation.errors import DataError
from client.inference.text import checked
from edgeadapt.bases.media import MediaReader
from edgeadapt.bases.readers import normalized, open_reader
from edgeadapt.bases.states import Tokens

WHITE_SPACE = ("▁", "Ġ")  # tokens that SentencePiece and byte-level BPE write for it


class PhraseReader:
    def __init__(self, tokenizer: Any, unknown: int | None, special: frozenset[int]) -> None:
        self._tokenizer, self._unknown, self._special = tokenizer, unknown, special

    @staticmethod
    def of(tokenizer: bytes) -> "PhraseReader":
        """Read a tokenizer.json. Raises as ``open_reader``."""
        stated, reader = json.loads(tokenizer), open_reader(tokenizer)
        if isinstance(reader, MediaReader):
            return _FileReader(reader, None, frozenset())
        unknown = _unknown_token(stated["model"])
        special = {int(token["id"]) for token in stated.get("added_tokens", []) if token.get("special")}
        return PhraseReader(reader, unknown, frozenset(special - {unknown}))

    def tokens(self, text: str, virtual_tokens: int = 0) -> Tokens:
        """Tokenize a text, with the special tokens that the model expects, truncated at the model's limit.

        ``virtual_tokens``: of the adapter that reads it; they count towards the limit. Raises DataError: the text is
        not valid (``text.checked``), or has no known token (``unknown_share``); or the virtual tokens leave no room for
        it."""
        encoding = self._tokenizer.encode(checked(text))
        if self._share(encoding) == 1:
            reason = f"the text {text[:40]!r} contains no known token; give a phrase in a language of the model"
            raise DataError(reason, about="text.tokens")
        return self._fitted(encoding, virtual_tokens) if virtual_tokens else list(encoding.ids)

    def _fitted(self, encoding: Encoding, virtual_tokens: int) -> list[int]:
        ids, text = list(encoding.ids), [at for at, added in enumerate(encoding.special_tokens_mask) if not added]
        limit = int((self._tokenizer.truncation or {})["max_length"])  # the exporter states it
        surplus = max(0, len(ids) + virtual_tokens - limit)
        if surplus >= len(text):
            reason = f"the adapter's {virtual_tokens} virtual tokens leave no room for a text: the model's limit is"
            raise DataError(f"{reason} {limit}; use another adapter", about="adapter")
        end = text[-1] + 1
        return ids[: end - surplus] + ids[end:]

    def unread(self, text: str, virtual_tokens: int = 0, most: float = math.inf) -> int:
        """Count the tokens at the end of a text that are beyond the model's limit, or ``most``, as in training. Raises
        DataError if the text is not valid (``text.checked``)."""
        encoding = self._tokenizer.encode(checked(text))
        size = len(encoding.ids) + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
        limit = (self._tokenizer.truncation or {}).get("max_length", math.inf)
        return int(max(0, size + virtual_tokens - min(limit, most)))

    def unknown_share(self, text: str) -> float:
        """Measure the share of a text's tokens that the tokenizer does not know, 0 to 1; 1 without any token. Special
        tokens, also those that the text spells out, and marks of white space do not count. A text of share 1, such as
        an emoji, says nothing to the model. Raises DataError if the text is not valid (``text.checked``)."""
        return self._share(self._tokenizer.encode(checked(text)))

    def readings(self, text: str) -> tuple[str, ...]:
        """Return a text, and what the tokenizer makes of it: a policy judges both."""
        return text, normalized(self._tokenizer, text)

    def known(self, text: str) -> tuple[int, int]:
        """Count the tokens of a text that the tokenizer knows, and all of them, as ``unknown_share`` counts."""
        counted = self._counted(self._tokenizer.encode(checked(text)))
        return sum(token != self._unknown for token in counted), len(counted)

    def _counted(self, encoding: Encoding) -> list[int]:
        read = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, strict=True)
        return [token for token, piece, added in read if not (added or token in self._special or piece in WHITE_SPACE)]

    def _share(self, encoding: Encoding) -> float:
        counted = self._counted(encoding)
        return sum(token == self._unknown for token in counted) / len(counted) if counted else 1.0


class _FileReader(PhraseReader):
    """Reads pictures or sounds: each is read whole, and says something."""

    def tokens(self, text: str, virtual_tokens: int = 0) -> Tokens:
        numbers: Tokens = self._tokenizer.encode(text).ids
        return numbers

    def unread(self, text: str, virtual_tokens: int = 0, most: float = math.inf) -> int:
        return 0

    def unknown_share(self, text: str) -> float:
        return 0.0

    def readings(self, text: str) -> tuple[str, ...]:
        return (text,)

    def known(self, text: str) -> tuple[int, int]:
        return self._tokenizer.cost, self._tokenizer.cost


def _unknown_token(model: dict[str, object]) -> int | None:
    """Find the token for what a tokenizer does not know, as tokenizer.json states it; None if it knows every text."""
    name, number, vocabulary = model.get("unk_token"), model.get("unk_id"), model["vocab"]  # an id in a Unigram model
    token = vocabulary.get(name) if isinstance(vocabulary, dict) and name is not None else number
    return token if isinstance(token, int) else None
