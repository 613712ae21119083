"""The sentence templates of a language, and which of them may be used for what.

A test phrase says something only if its template was never trained on: the templates of each intent are dealt
out to three parts (public, train, test) before any sentence is sampled. The deal depends on the seed, the language
and the intent alone, so another language or household beside them changes nothing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulations.data.households.draws import stream
from simulations.data.households.packages import intents_of
from simulations.data.households.words import Words, load_words

# Each of its templates is another question ("who made you", "hello"): training on some teaches nothing on the rest.
_CHITCHAT = frozenset({"HassRespond"})
# Spellings that a speech recognizer gets wrong; nobody says them.
_MISHEARD = re.compile(r"\|\s*<(\w+_dirty|stt_fix_\w+)>")
# The endings that Swedish allows after any name; our names come with theirs.
_ENDINGS = re.compile(r"(?<=\})\[e\|me\]\[t\|n\]\[s\]")
_PUBLIC_SHARE = 0.2
_TEST_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Template:
    """A sentence template. ``domains`` are the kinds of device that its ``{name}`` may be."""

    id: str
    text: str
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Language:
    """What the package knows of a language (templates by intent, rules, lists), and our words for it."""

    templates: Mapping[str, tuple[Template, ...]]
    rules: Mapping[str, str]
    lists: Mapping[str, Any]
    words: Words


@dataclass(frozen=True, slots=True)
class Split:
    """The templates of one intent in one language, dealt out; no template is in two parts."""

    public: tuple[Template, ...]
    train: tuple[Template, ...]
    test: tuple[Template, ...]


def load_language(code: str) -> Language:
    """Read a language from the package.

    Raises:
        ConfigError: The package is missing or does not know the language.
    """
    data = intents_of(code)
    return Language(
        templates={
            intent: _templates(f"{code}/{intent}", body["data"])
            for intent, body in sorted(data["intents"].items())
            if intent not in _CHITCHAT
        },
        rules={name: _cleaned(body) for name, body in data["expansion_rules"].items()},
        lists=data["lists"],
        words=load_words(code),
    )


def _templates(prefix: str, blocks: list[dict[str, Any]]) -> tuple[Template, ...]:
    """A text that stands in several blocks is one template: its sentences are the same."""
    domains: dict[str, dict[str, None]] = {}
    for block in blocks:
        named = block.get("requires_context", {}).get("domain", [])
        for text in block["sentences"]:
            domains.setdefault(_cleaned(text), {}).update(dict.fromkeys(named))
    made = (Template(f"{prefix}/{_hex(text)}", text, tuple(named)) for text, named in domains.items())
    return tuple(sorted(made, key=lambda template: template.id))


def _cleaned(template: str) -> str:
    return _ENDINGS.sub("", _MISHEARD.sub("", template))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def deal(templates: tuple[Template, ...], key: str, seed: int, *, public: bool) -> Split | None:
    """Deal out the templates of one intent in one language.

    Args:
        templates: All of them.
        key: Names the language and the intent.
        seed: The population's.
        public: Whether public phrases are wanted in this language.

    Returns:
        About a fifth public (if wanted), three tenths test, the rest train, each at least one; None if there are
        too few templates for that.
    """
    if len(templates) < 2 + public:
        return None
    order = stream(seed, int(_hex(key), 16)).permutation(len(templates))
    shuffled = [templates[i] for i in order]
    first = max(1, round(_PUBLIC_SHARE * len(templates))) if public else 0
    second = first + max(1, round(_TEST_SHARE * (len(templates) - first)))
    return Split(tuple(shuffled[:first]), tuple(shuffled[second:]), tuple(shuffled[first:second]))
