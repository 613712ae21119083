"""Tiny tokenizers of the kinds that bases use, and texts that some of them cannot read."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNREADABLE = (
    *(
        "🎵",
        "🎵 play",
        "１２３",
        "ｔｕｒｎ",
        "𒀀 turn",
        "🎵 " * 40 + "turn",
        "[SEP]",
        "[CLS] [SEP]",
        "[UNK]",
        "[MASK] turn",
    ),
    *("<s>", "</s> <s>", "<unk>", "▁", "▁ ▁", "Ġ", "\u200b", "\u00ad", "\ufeff", "\ufffd", "\u0301", "…", "turn " * 20),
    *("", " ", "\u3000", "\t\r\n", "\x1c", "\x85", "\xa0", "\u2028", "\u180e"),
)
"""Emoji, full-width characters, spelled special tokens, marks of white space, what is not visible, and blanks."""


def wordpiece() -> Tokenizer:
    """As BERT's, with its special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "turn", "on", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-RoBERTa's: SentencePiece's marks of white space, and the unknown token given by its number."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*((token, 0.0) for token in special), ("▁", -3.0), ("▁turn", -1.0), *((each, -4.0) for each in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2's, with few of the bytes and no unknown token: it omits what it does not know."""
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "Ġ", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {"wordpiece": wordpiece, "unigram": unigram, "byte-level": byte_level}
