"""Tiny tokenizers of the kinds that bases use, and texts that some of them cannot read."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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


ENDS = ["</s>"]
SPOKEN = ("turn on the light", "mach das Licht über der Tür an", "🙂 はい 🙁 いいえ はい はい")


def all_bytes() -> Tokenizer:
    """As GPT-2's, with a token for each byte, and longer ones of which some end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=ENDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SPOKEN, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: letters, and a token for each byte of other ones. Its decoder strips a space at the beginning."""
    pieces = [
        *ENDS,
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *'▁abcdefghijklmnopqrstuvwxyz,.:{}"は',
        "▁o",
        "▁on",
    ]
    merges = [("▁", "o"), ("▁o", "n")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)  # noqa: S106
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([*ENDS, "<unk>"])
    return tokenizer


WRITERS = {"all bytes": all_bytes, "byte fallback": byte_fallback}
"""Of language models that can write any text."""
