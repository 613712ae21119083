"""The sentence templates of a language, and which of them may be used for training, for tests and in public.

A test phrase measures something only if its template was never trained on. So the templates of each intent are split
into three parts (public, train, test) before any sentence is sampled. The split depends on the seed, the language and
the intent alone: another language or household in the population does not change it.
"""

import difflib
import hashlib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from aggregation.errors import ConfigError
from simulations.data.households.draws import stream
from simulations.data.households.words import Words, load_words

# Each template of this intent is a question of its own ("who made you", "hello"): some teach nothing about the others.
_CHITCHAT = frozenset({"HassRespond"})
# Spellings that a speech recognizer gets wrong and nobody says.
_MISHEARD = re.compile(r"\|\s*<(\w+_dirty|stt_fix_\w+)>")
# The endings that Swedish allows after any name; our names include theirs.
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
    """Templates by intent, expansion rules and lists of the package for one language, and our words for it."""

    templates: Mapping[str, tuple[Template, ...]]
    rules: Mapping[str, str]
    lists: Mapping[str, Any]
    words: Words


@dataclass(frozen=True, slots=True)
class TemplateSplit:
    """The templates of one intent in one language, in disjoint parts."""

    public: tuple[Template, ...]
    train: tuple[Template, ...]
    test: tuple[Template, ...]


def load_language(code: str) -> Language:
    """Read a language from the package.

    Raises:
        ConfigError: The package is not installed or does not know the language.
    """
    data = _intents(code)
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


def split_templates(templates: tuple[Template, ...], key: str, seed: int, *, public: bool) -> TemplateSplit | None:
    """Split the templates of one intent in one language.

    Args:
        templates: All of them.
        key: Names the language and the intent.
        seed: Of the population.
        public: Whether public phrases are wanted in this language.

    Returns:
        About a fifth public (if wanted), three tenths of the rest test, the remainder train; each part has at least one
        template. None if there are too few templates for that.
    """
    if len(templates) < 2 + public:
        return None
    order = stream(seed, int(_hex(key), 16)).permutation(len(templates))
    shuffled = [templates[i] for i in order]
    first = max(1, round(_PUBLIC_SHARE * len(templates))) if public else 0
    second = first + max(1, round(_TEST_SHARE * (len(templates) - first)))
    return TemplateSplit(tuple(shuffled[:first]), tuple(shuffled[second:]), tuple(shuffled[first:second]))


@cache
def hassil_module(name: str) -> Any:
    """The module ``hassil.<name>``, imported when a population is sampled and not before.

    Raises:
        ConfigError: hassil is not installed.
    """
    return _import(f"hassil.{name}")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module} ({error}): install it with pip install 'edgeadapt[simulations]'",
            about="edgeadapt[simulations]",
            value=module,
        ) from error


def _intents(language: str) -> dict[str, Any]:
    """Intents, lists and expansion rules of the package for a language."""
    package = _import("home_assistant_intents")
    known = sorted(package.get_languages())
    found: dict[str, Any] | None = package.get_intents(language) if language in known else None
    if found is None:
        close = difflib.get_close_matches(language, known, n=5, cutoff=0.3) or known
        raise ConfigError(
            f"home-assistant-intents has no language {language!r}; the closest are: {', '.join(close)}",
            about="population.languages",
            value=language,
        )
    return found


def _templates(prefix: str, blocks: list[dict[str, Any]]) -> tuple[Template, ...]:
    """A text in several blocks is one template: its sentences are the same."""
    domains: dict[str, dict[str, None]] = {}
    for block in blocks:
        named = block.get("requires_context", {}).get("domain", [])
        for text in block["sentences"]:
            domains.setdefault(_cleaned(text), {}).update(dict.fromkeys(named))
    found = (Template(f"{prefix}/{_hex(text)}", text, tuple(named)) for text, named in domains.items())
    return tuple(sorted(found, key=lambda template: template.id))


def _cleaned(template: str) -> str:
    return _ENDINGS.sub("", _MISHEARD.sub("", template))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
