"""How a household speaks: the templates of its language, its own names for things, and everyday numbers.

A test phrase measures something only if its template was never trained on. So the templates of each intent are split
into three parts (public, train, test) before any sentence is sampled, by the seed, the language and the intent alone.
hassil's own sampler lists every sentence of a template, maybe millions; ``Expander`` takes one branch at each
alternative.

The package leaves names open: rooms, devices, people, songs, shopping. Nine languages have a file in ``words``;
a regional code uses the file of its language, any other language the English words. The package's templates allow
sentences that nobody says ("le cuisine", "2 minute"), so a file also lists the articles that fit each gender, and
patterns of unnatural speech; a sentence that matches no pattern is preferred."""

import difflib
import hashlib
import importlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

import numpy as np

from aggregation.errors import ConfigError
from edgeadapt.bases.markedwords import without_labels

T = TypeVar("T")
# Kinds of device that have the names of another kind.
_NAMED_LIKE = {"input_boolean": "switch", "script": "scene", "input_button": "button"}
# The number of names of each kind in a household.
_LIGHTS, _AREAS, _FLOORS, _PEOPLE, _OTHERS = 5, 6, 2, 3, 3
# Each template of this intent is a question of its own ("who made you", "hello"): some teach nothing about the others.
_CHITCHAT = frozenset({"HassRespond"})
# Spellings that a speech recognizer gets wrong and nobody says.
_MISHEARD = re.compile(r"\|\s*<(\w+_dirty|stt_fix_\w+)>")
# The endings that Swedish allows after any name; our names include theirs.
_ENDINGS = re.compile(r"(?<=\})\[e\|me\]\[t\|n\]\[s\]")
_PUBLIC_SHARE = 0.2
_TEST_SHARE = 0.3
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
def plain_phrases() -> dict[str, dict[str, str]]:
    """Map language → intent → phrase, to check single answers. Only some languages have them."""
    phrases: dict[str, dict[str, str]] = _read("plain.toml")
    return phrases


@cache
def released_phrases() -> dict[str, dict[str, list[str]]]:
    """Map language → intent → phrases that a release carries for the personal step. Only some languages have them."""
    phrases: dict[str, dict[str, list[str]]] = _read("released.toml")
    return phrases


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("simulations.data.households") / name).read_text(encoding="utf-8"))


def stream(*key: int) -> np.random.Generator:
    """Return the generator named ``key``: the same on any machine, and independent of those with other names."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one of ``items`` (at least one), each with the same probability."""
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True, slots=True)
class Words:
    """A name may hold ``{person}``."""

    people: tuple[str, ...]  # first names
    areas: tuple[str, ...]  # rooms
    floors: tuple[str, ...]  # names of floors
    devices: Mapping[str, tuple[str, ...]]  # names by kind of device (a Home Assistant domain)
    phrases: Mapping[str, tuple[str, ...]]  # free texts, by the name of the list that they fill
    unnatural: tuple[re.Pattern[str], ...]  # patterns that match sentences nobody says, in lower case

    def flaws(self, sentence: str, enough: int) -> int:
        """Count the patterns of unnatural speech that the sentence matches, up to ``enough``."""
        matches, heard = 0, sentence.lower()
        for pattern in self.unnatural:
            if matches >= enough:
                break
            matches += pattern.search(heard) is not None
        return matches


@dataclass(frozen=True, slots=True)
class HouseholdNames:
    areas: tuple[str, ...]
    floors: tuple[str, ...]
    devices: Mapping[str, tuple[str, ...]]

    def of_kind(self, domain: str) -> tuple[str, ...]:
        """Return the devices of a Home Assistant domain; the lights for an unknown domain."""
        return self.devices.get(_NAMED_LIKE.get(domain, domain), self.devices["light"])


def draw_names(words: Words, rng: np.random.Generator) -> HouseholdNames:
    people = _some(words.people, _PEOPLE, rng)

    def named(names: tuple[str, ...], count: int) -> tuple[str, ...]:
        return tuple(name.replace("{person}", pick(rng, people)) for name in _some(names, count, rng))

    devices = {
        domain: named(names, _LIGHTS if domain == "light" else _OTHERS) for domain, names in words.devices.items()
    }
    return HouseholdNames(named(words.areas, _AREAS), named(words.floors, _FLOORS), devices)


def _some(items: tuple[str, ...], count: int, rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(items[i] for i in rng.permutation(len(items))[:count])


def known_languages() -> tuple[str, ...]:
    return tuple(sorted(file.name.removesuffix(".toml") for file in _words().iterdir()))


def _words() -> Traversable:
    return files("simulations.data.households") / "words"


@cache
def load_words(language: str) -> Words:
    """English ones for a language without a file."""
    folder = _words()
    codes = (language, language.split("-")[0], "en")
    path = next(path for code in codes if (path := folder / f"{code}.toml").is_file())
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return Words(
        people=tuple(raw["people"]),
        areas=_flat(raw["areas"]),
        floors=_flat(raw["floors"]),
        devices={domain: _flat(names) for domain, names in sorted(raw["devices"].items())},
        phrases={name: tuple(texts) for name, texts in raw["phrases"].items()},
        unnatural=tuple(_patterns(raw)),
    )


def _flat(by_gender: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(name for names in by_gender.values() for name in names)


def _patterns(raw: Mapping[str, Any]) -> Iterable[re.Pattern[str]]:
    """Yield the listed patterns with their name lists filled in, and those that follow from the genders of nouns."""
    own = [raw["areas"], raw["floors"], *raw["devices"].values()]
    lists = {
        "{noun}": _gendered([raw["nouns"], *own]),
        "{area}": _flat(raw["areas"]),
        "{floor}": _flat(raw["floors"]),
        "{device}": [name for table in raw["devices"].values() for name in _flat(table)],
        "{person}": raw["people"],
    }
    alternations = {mark: _any_of(names, raw["people"]) for mark, names in lists.items()}
    for pattern in raw["unnatural"]:
        for mark, names in alternations.items():
            pattern = pattern.replace(mark, names)
        yield _lower(pattern)
    articles = sorted({article for fitting in raw["articles"].values() for article in fitting})
    if raw.get("needs_article", False):
        yield _without_article(articles, _any_of(_gendered(own), raw["people"]))
    for gender, fitting in raw["articles"].items():
        nouns = [noun for table in [raw["nouns"], *own] for noun in table.get(gender, [])]
        clashing = [article for article in articles if article not in fitting]
        if nouns and clashing:
            yield _clash(clashing, _any_of(nouns, raw["people"]))


def _gendered(tables: Iterable[Mapping[str, list[str]]]) -> list[str]:
    return [noun for table in tables for gender, nouns in table.items() if gender != "bare" for noun in nouns]


def _without_article(articles: list[str], nouns: str) -> re.Pattern[str]:
    return _lower(rf"(^|\s)(?!({_any_of(articles)})\s)\S+\s({nouns})\b")


def _clash(articles: list[str], nouns: str) -> re.Pattern[str]:
    """Match a noun after an article that does not fit it; one that ends in an apostrophe may touch it."""
    spaced = [rf"{re.escape(article)}\s+" for article in articles if not article.endswith("'")]
    elided = [rf"{re.escape(article)}\s*" for article in articles if article.endswith("'")]
    return _lower(rf"\b({'|'.join(spaced + elided)})({nouns})\b")


def _any_of(names: Iterable[str], people: Iterable[str] = ()) -> str:
    """Build an alternation, longest first; ``{person}`` within a name stands for any of the people."""
    anyone = f"(?:{'|'.join(map(re.escape, people))})"
    ordered = sorted(set(names), key=lambda name: (-len(name), name))
    return "|".join(re.escape(name).replace(r"\{person\}", anyone) for name in ordered)


def _lower(pattern: str) -> re.Pattern[str]:
    """Compile for a sentence in lower case; ``re.IGNORECASE`` searches hundreds of names several times slower."""
    return re.compile(re.sub(r"\\.|[^\\]+", lambda part: part[0] if part[0][0] == "\\" else part[0].lower(), pattern))


@dataclass(frozen=True, slots=True)
class Template:
    """Is a sentence template. ``domains`` are the kinds of device that its ``{name}`` may be."""

    id: str
    text: str
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Language:
    templates: Mapping[str, tuple[Template, ...]]
    rules: Mapping[str, str]
    lists: Mapping[str, Any]
    words: Words


@dataclass(frozen=True, slots=True)
class TemplateSplit:
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
    """Split the templates of one intent in one language, which ``key`` names. About a fifth is public (if wanted),
    three tenths of the rest test, the remainder train; each part has at least one template. None if there are too few
    templates for that."""
    if len(templates) < 2 + public:
        return None
    shuffled = [templates[i] for i in stream(seed, int(_hex(key), 16)).permutation(len(templates))]
    first = max(1, round(_PUBLIC_SHARE * len(templates))) if public else 0
    second = first + max(1, round(_TEST_SHARE * (len(templates) - first)))
    return TemplateSplit(tuple(shuffled[:first]), tuple(shuffled[second:]), tuple(shuffled[first:second]))


@cache
def hassil_module(name: str) -> Any:
    """Import the module when a population is sampled and not before. Raises ConfigError."""
    return _import(f"hassil.{name}")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"cannot import {module} ({error}): install it with pip install 'edgeadapt[simulations]'"
        raise ConfigError(reason, about="edgeadapt[simulations]") from error


def _intents(language: str) -> dict[str, Any]:
    package = _import("home_assistant_intents")
    languages = sorted(package.get_languages())
    intents: dict[str, Any] | None = package.get_intents(language) if language in languages else None
    if intents is None:
        close = difflib.get_close_matches(language, languages, n=5, cutoff=0.3) or languages
        reason = f"home-assistant-intents has no language {language!r}; the closest are: {', '.join(close)}"
        raise ConfigError(reason, about="population.languages")
    return intents


def _templates(prefix: str, blocks: list[dict[str, Any]]) -> tuple[Template, ...]:
    """Read templates; a text in several blocks is one template, with the same sentences."""
    domains: dict[str, dict[str, None]] = {}
    for block in blocks:
        named = block.get("requires_context", {}).get("domain", [])
        for text in block["sentences"]:
            domains.setdefault(_cleaned(text), {}).update(dict.fromkeys(named))
    templates = (Template(f"{prefix}/{_hex(text)}", text, tuple(named)) for text, named in domains.items())
    return tuple(sorted(templates, key=lambda template: template.id))


def _cleaned(template: str) -> str:
    return _ENDINGS.sub("", _MISHEARD.sub("", template))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def parse(template: str) -> Any:
    return hassil_module("parse_expression").parse_sentence(template).expression


@dataclass(frozen=True, slots=True)
class Expander:
    rules: Mapping[str, str]  # bodies of the ``<rules>`` that a template may refer to
    slot: Callable[[str], str]  # gives a text for a ``{list}`` of a template, from the list's name
    rng: np.random.Generator  # takes the branches

    def sentence(self, template: str) -> str:
        """Draw a sentence of ``template``, single-spaced; each branch of an alternative has the same probability."""
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
    language: Language
    names: HouseholdNames
    rng: np.random.Generator

    def speak(self, template: Template, *, labelled: bool = False) -> str:
        """Say a sentence of the template: the first of 120 attempts without a flaw, or that with the fewest. Labelled,
        what stands for a list has the list's name, as in "turn on [the lamp](name)"."""

        def slot(name: str) -> str:
            said = self._slot(name, template.domains)
            return f"[{said}]({name})" if labelled else said

        expander = Expander(self.language.rules, slot, self.rng)
        best, fewest = "", len(self.language.words.unnatural) + 1
        tried: set[str] = set()
        for _ in range(_ATTEMPTS):
            sentence = expander.sentence(template.text)
            if sentence in tried:
                continue
            tried.add(sentence)
            flaws = self.language.words.flaws(without_labels(sentence), enough=fewest)
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
            reason = f"a sentence template uses the list {{{name}}}, which home-assistant-intents does not define; "
            reason += "install the version that edgeadapt[simulations] names"
            raise ConfigError(reason, about="home-assistant-intents")
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
