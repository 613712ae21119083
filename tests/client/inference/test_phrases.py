"""Which phrases say something to a classifier."""

import pytest

from aggregation.errors import DataError
from client.inference.phrases import PhraseReader
from tests.support import refused
from tests.support.tokenizers import TOKENIZERS


def reader(kind: str) -> PhraseReader:
    return PhraseReader.of(TOKENIZERS[kind]().to_str().encode())


@pytest.mark.parametrize(
    ("kind", "text", "share"),
    [
        ("wordpiece", "turn on", 0),
        ("wordpiece", "🎵 turn on", 1 / 3),
        ("wordpiece", "１２３", 1),
        ("wordpiece", "\u200b", 1),
        ("wordpiece", "[SEP] [MASK]", 1),
        ("wordpiece", "[UNK] turn", 1 / 2),
        ("unigram", "𒀀 turn", 1 / 2),
        ("unigram", "𒀀 🎵", 1),
        ("unigram", "▁ ▁", 1),
        ("unigram", "<s> </s>", 1),
        ("unigram", "<s> turn", 0),
        ("byte-level", "turn", 0),
        ("byte-level", "🎵", 1),
        ("byte-level", "Ġ <s>", 1),
    ],
)
def test_special_tokens_and_white_space_do_not_count_as_known(kind: str, text: str, share: float) -> None:
    assert reader(kind).unknown_share(text) == pytest.approx(share)
    if share == 1:
        with refused(DataError, "text.tokens", value=text):
            reader(kind).tokens(text)
    else:
        assert reader(kind).tokens(text)
