"""Names and phrases that the package leaves open: rooms, devices, people, songs, shopping.

Each of these languages has a file ``words/<code>.toml``: de, en, es, fr, it, nl, pl, pt, sv. A regional code uses the
file of its language (``pt-BR``: ``pt``). Any other language uses the English words within its own sentences, as
households with English device names do.

The package's templates are written to recognize speech, so they allow many sentences that nobody says ("le cuisine",
"2 minute"). A file therefore lists the articles that fit each gender, and patterns of unnatural speech; a sentence that
matches no pattern is preferred. The patterns of English, German and French are the most complete.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
# Kinds of device that have the names of another kind.
_NAMED_LIKE = {"input_boolean": "switch", "script": "scene", "input_button": "button"}
# The number of names of each kind in a household.
_LIGHTS, _AREAS, _FLOORS, _PEOPLE, _OTHERS = 5, 6, 2, 3, 3


@cache
def plain_phrases() -> dict[str, dict[str, str]]:
    """Language → intent → phrase, to look at single answers. Only some languages have them."""
    found: dict[str, dict[str, str]] = _read("plain.toml")
    return found


@cache
def released_phrases() -> dict[str, dict[str, list[str]]]:
    """Language → intent → phrases that a release carries for the personal step. Only some languages have them."""
    found: dict[str, dict[str, list[str]]] = _read("released.toml")
    return found


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("simulations.data.households") / name).read_text(encoding="utf-8"))


def stream(*key: int) -> np.random.Generator:
    """The generator named ``key``: the same on any machine, and independent of generators with other names."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of ``items`` (at least one), each with the same probability."""
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one language; a name may hold ``{person}``."""

    people: tuple[str, ...]  # first names
    areas: tuple[str, ...]  # rooms
    floors: tuple[str, ...]  # names of floors
    devices: Mapping[str, tuple[str, ...]]  # names by kind of device (a Home Assistant domain)
    phrases: Mapping[str, tuple[str, ...]]  # free texts, by the name of the list that they fill
    unnatural: tuple[re.Pattern[str], ...]  # patterns that match sentences nobody says, in lower case

    def flaws(self, sentence: str, enough: int) -> int:
        """How many patterns of unnatural speech the sentence matches; counting stops at ``enough``."""
        found, heard = 0, sentence.lower()
        for pattern in self.unnatural:
            if found >= enough:
                break
            found += pattern.search(heard) is not None
        return found


@dataclass(frozen=True, slots=True)
class HouseholdNames:
    """One household's names for its rooms, its floors and its devices (by kind)."""

    areas: tuple[str, ...]
    floors: tuple[str, ...]
    devices: Mapping[str, tuple[str, ...]]

    def of_kind(self, domain: str) -> tuple[str, ...]:
        """The devices of a Home Assistant domain; the lights for an unknown domain."""
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


@cache
def load_words(language: str) -> Words:
    """The words of a language; the English ones for a language without a file."""
    folder = files("simulations.data.households") / "words"
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
    """The listed patterns with their name lists filled in, and the patterns that follow from the genders of nouns."""
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
    """A noun after a word that is not an article."""
    return _lower(rf"(^|\s)(?!({_any_of(articles)})\s)\S+\s({nouns})\b")


def _clash(articles: list[str], nouns: str) -> re.Pattern[str]:
    """A noun after an article that does not fit it; one that ends in an apostrophe may touch it."""
    spaced = [rf"{re.escape(article)}\s+" for article in articles if not article.endswith("'")]
    elided = [rf"{re.escape(article)}\s*" for article in articles if article.endswith("'")]
    return _lower(rf"\b({'|'.join(spaced + elided)})({nouns})\b")


def _any_of(names: Iterable[str], people: Iterable[str] = ()) -> str:
    """An alternation, longest first; ``{person}`` within a name stands for any of the people."""
    anyone = f"(?:{'|'.join(map(re.escape, people))})"
    ordered = sorted(set(names), key=lambda name: (-len(name), name))
    return "|".join(re.escape(name).replace(r"\{person\}", anyone) for name in ordered)


def _lower(pattern: str) -> re.Pattern[str]:
    """The pattern for a sentence in lower case; ``re.IGNORECASE`` searches hundreds of names several times slower."""
    return re.compile(re.sub(r"\\.|[^\\]+", lambda part: part[0] if part[0][0] == "\\" else part[0].lower(), pattern))
