"""How a household says a template: a random expansion with the household's own names and everyday numbers.

hassil's own sampler lists every sentence of a template, and one template can have millions. ``Expander`` walks the
parsed expression once and takes one branch at each alternative.
"""

import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from aggregation.errors import ConfigError
from simulations.data.households.words import HouseholdNames, Words, load_words, pick, stream

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
    """Read a language from the package. Raises ConfigError if one of them is missing."""
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
    """Split the templates of one intent in one language, which ``key`` names.

    About a fifth is public (if wanted), three tenths of the rest test, the remainder train; each part has at least one
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
    """The module ``hassil.<name>``, imported when a population is sampled and not before. Raises ConfigError."""
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


# The package allows 0-100 °C or 100 hours; these are the values that people say. By the list's name or its type.
_EVERYDAY = {
    "percentage": range(5, 101, 5),
    "temperature": range(17, 25),  # °C
    "color_temperature": range(2200, 6501, 100),  # K
    "timer_hours": range(1, 9),
    "timer_minutes": range(1, 61),
    "timer_seconds": range(5, 60, 5),
}
_ATTEMPTS = 120


@cache
def parse(template: str) -> Any:
    """The parsed expression of a hassil template."""
    return hassil_module("parse_expression").parse_sentence(template).expression


@dataclass(frozen=True, slots=True)
class Expander:
    """Expands the templates of one language."""

    rules: Mapping[str, str]  # bodies of the ``<rules>`` that a template may refer to
    slot: Callable[[str], str]  # gives a text for a ``{list}`` of a template, from the list's name
    rng: np.random.Generator  # takes the branches

    def sentence(self, template: str) -> str:
        """A random sentence of ``template``, single-spaced; each branch of an alternative has the same probability."""
        return " ".join(self._walk(parse(template)).split())

    def _walk(self, node: Any) -> str:
        kinds = hassil_module("expression")
        if isinstance(node, kinds.TextChunk):
            return str(node.original_text)
        if isinstance(node, kinds.ListReference):
            return self.slot(node.list_name)
        if isinstance(node, kinds.RuleReference):
            return self._walk(parse(self.rules[node.rule_name]))
        if isinstance(node, kinds.Alternative):
            return self._walk(pick(self.rng, node.items))
        items = node.items
        if isinstance(node, kinds.Permutation):
            items = [items[i] for i in self.rng.permutation(len(items))]
        return "".join(self._walk(item) for item in items)


@dataclass(frozen=True, slots=True)
class Voice:
    """A household's way of speaking: a language, its own names for things, and its own randomness."""

    language: Language
    names: HouseholdNames
    rng: np.random.Generator

    def speak(self, template: Template) -> str:
        """A sentence of the template: the first of 120 attempts without a flaw, or the one with the fewest flaws."""
        expander = Expander(self.language.rules, lambda name: self._slot(name, template.domains), self.rng)
        best, fewest = "", len(self.language.words.unnatural) + 1
        tried: set[str] = set()
        for _ in range(_ATTEMPTS):
            sentence = expander.sentence(template.text)
            if sentence in tried:
                continue
            tried.add(sentence)
            flaws = self.language.words.flaws(sentence, enough=fewest)
            if flaws < fewest:
                best, fewest = sentence, flaws
            if not flaws:
                break
        return best

    def _slot(self, name: str, domains: tuple[str, ...]) -> str:
        if name == "area":
            return pick(self.rng, self.names.areas)
        if name == "floor":
            return pick(self.rng, self.names.floors)
        if name == "name":
            return pick(self.rng, self.names.of_kind(pick(self.rng, domains or ("light",))))
        if name not in self.language.lists:
            raise ConfigError(
                f"a sentence template uses the list {{{name}}}, which home-assistant-intents does not define; "
                "install the version that edgeadapt[simulations] names",
                about="home-assistant-intents",
                value=name,
            )
        return self._listed(name, self.language.lists[name], domains)

    def _listed(self, name: str, entries: Mapping[str, Any], domains: tuple[str, ...]) -> str:
        if "values" in entries:
            value = pick(self.rng, entries["values"])
            text = value if isinstance(value, str) else value["in"]
            return Expander(self.language.rules, lambda inner: self._slot(inner, domains), self.rng).sentence(text)
        if "range" in entries:
            return str(pick(self.rng, _numbers(name, entries["range"])))
        return pick(self.rng, self.language.words.phrases[name])


def _numbers(name: str, allowed: Mapping[str, Any]) -> range | list[int]:
    everyday = _EVERYDAY.get(name, _EVERYDAY.get(allowed.get("type", ""), range(0)))
    usual = [number for number in everyday if allowed["from"] <= number <= allowed["to"]]
    return usual or range(allowed["from"], allowed["to"] + 1, allowed.get("step", 1))
