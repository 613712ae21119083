"""Sample a population from settings and a seed. The label set is the intents for which every requested language (public
ones included) has enough templates: at least one to train, one to test and, in a public language, one for public
phrases. With the default languages these are 29 of the package's 42 intents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aggregation.errors import ConfigError
from edgeadapt.formats.settings import Settings
from simulations.data.households import speech
from simulations.data.population import Client, LabelledText, Population

OF_HOUSEHOLDS = ("population",)  # as the names of languages: those of the households


class PopulationSettings(Settings):
    """The size, the languages and the habits of a population."""

    households: int = Field(default=15, ge=3, le=10_000)
    """number of households, unseen ones included"""
    languages: tuple[str, ...] = Field(default=("en", "de", "fr"), min_length=1)
    """languages of the households, in turn; codes of the package home-assistant-intents, or all: the nine that have
    names and words here"""
    unseen: float = Field(default=0.2, gt=0, lt=1)
    """share of households that take no part in training; rounded, at least one"""
    utterances_min: int = Field(default=60, ge=4)
    """fewest utterances of a household, training and validation together"""
    utterances_max: int = Field(default=100, le=100_000)
    """most utterances of a household, training and validation together"""
    test_utterances: int = Field(default=40, ge=1, le=100_000)
    """test utterances of each household"""
    validation_fraction: float = Field(default=0.2, gt=0, le=0.5)
    """share of a household's utterances kept for its own validation"""
    validation_templates: Literal["train", "own"] = "train"
    """train: a household validates on sentence templates that it also trains on; own: on others, as in the test, so
    that a suite's search does not favour what only remembers"""
    concentration: float = Field(default=0.5, gt=0)
    """Dirichlet concentration of a household's mix of intents: small is one-sided, large is even"""
    public_phrases: int = Field(default=6, ge=1, le=1000)
    """public phrases for each intent and public language"""
    public_languages: tuple[str, ...] = Field(default=("en",), min_length=1)
    """languages of the public phrases; a household need not speak them; population: those of the households"""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for key, codes in (("languages", self.languages), ("public_languages", self.public_languages)):
            if len(set(codes)) < len(codes):
                raise ValueError(f"{key} names a language twice: {', '.join(codes)}")
        if self.utterances_min > self.utterances_max:
            raise ValueError(f"utterances_min {self.utterances_min} is above utterances_max {self.utterances_max}")
        if self.households < len(self.spoken):
            raise ValueError(f"{self.households} households cannot speak {len(self.spoken)} languages")
        if self.unseen_count > self.households - 2:
            raise ValueError(f"unseen {self.unseen} leaves fewer than 2 of {self.households} households to train")
        return self

    @property
    def spoken(self) -> tuple[str, ...]:
        return speech.known_languages() if self.languages == ("all",) else self.languages

    @property
    def published(self) -> tuple[str, ...]:
        return self.spoken if self.public_languages == OF_HOUSEHOLDS else self.public_languages

    @property
    def unseen_count(self) -> int:
        return max(1, round(self.unseen * self.households))


_FEWEST_LABELS = 5
_PATIENCE = 300  # draws in a row without a new utterance, after which there is nothing left to say

_Said = tuple[LabelledText, ...]
_Accept = Callable[[str, int], bool]  # whether a text may be used for a label


class _Stream(IntEnum):
    """Names random streams under one seed, so that one more household leaves the draws of the others unchanged."""

    PUBLIC = 1
    HOUSEHOLD = 2


@dataclass(frozen=True, slots=True)
class _Phrasebook:
    language: speech.Language
    splits: Sequence[speech.TemplateSplit]

    def voice(self, rng: np.random.Generator) -> speech.Voice:
        return speech.Voice(self.language, speech.draw_names(self.language.words, rng), rng)


@dataclass(slots=True)
class _UsedTexts:
    """Holds all texts so far: the label of each, and those that some household trains or validates on."""

    labels: dict[str, int] = field(default_factory=dict)
    learned: set[str] = field(default_factory=set)

    def has_label(self, text: str, label: int) -> bool:
        """Check whether the text has this label and no other; its first use decides."""
        return self.labels.setdefault(text, label) == label

    def fits_test(self, text: str, label: int) -> bool:
        """Check whether the text has this label and no household learns from it."""
        return text not in self.learned and self.has_label(text, label)


@dataclass(frozen=True, slots=True)
class _Speaker:
    name: str
    language: str
    voice: speech.Voice
    splits: Sequence[speech.TemplateSplit]
    cumulated: NDArray[np.float64]  # shape ``(labels,)``: the cumulative sum of its mix of intents, rising to 1

    def draw_label(self) -> int:
        label = int(np.searchsorted(self.cumulated, self.voice.rng.random(), side="right"))
        return min(label, len(self.splits) - 1)


def sample_population(settings: PopulationSettings, seed: int) -> Population:
    """Sample a population; the same settings and seed give the same ``digest`` on any machine. Raises ConfigError: a
    package or a language is missing, the languages share too few intents, or a household has fewer different utterances
    than the settings ask for."""
    labels, books = _phrasebooks(settings, seed)
    used = _UsedTexts()
    public = tuple(
        phrase
        for number, code in enumerate(settings.published)
        for phrase in _public(books[code], settings.public_phrases, used, speech.stream(seed, _Stream.PUBLIC, number))
    )
    speakers = [_speaker(number, settings, books, seed) for number in range(settings.households)]
    said = [_say(speaker, settings, used) for speaker in speakers]
    learned = chain(public, *chain.from_iterable(said))
    used.learned.update(spoken(utterance.text) for utterance in learned)
    seen = settings.households - settings.unseen_count
    return Population(
        labels=labels,
        public=public,
        clients=tuple(
            _household(speaker, own, settings, used, unseen=number >= seen)
            for number, (speaker, own) in enumerate(zip(speakers, said, strict=True))
        ),
    )


def _phrasebooks(settings: PopulationSettings, seed: int) -> tuple[tuple[str, ...], dict[str, _Phrasebook]]:
    codes = sorted({*settings.spoken, *settings.published})
    languages = {code: speech.load_language(code) for code in codes}
    splits = {code: _splits(code, languages[code], seed, public=code in settings.published) for code in codes}
    labels = tuple(sorted(set.intersection(*(set(usable) for usable in splits.values()))))
    if len(labels) < _FEWEST_LABELS:
        counts = ", ".join(f"{code} {len(usable)}" for code, usable in splits.items())
        reason = f"the languages share {len(labels)} intents with enough templates, {_FEWEST_LABELS} are needed; "
        reason += f"remove the languages with the fewest intents: {counts}"
        raise ConfigError(reason, about="population.languages")
    books = {code: _Phrasebook(languages[code], [splits[code][label] for label in labels]) for code in codes}
    return labels, books


def _splits(code: str, language: speech.Language, seed: int, *, public: bool) -> dict[str, speech.TemplateSplit]:
    splits = {
        intent: speech.split_templates(templates, f"{code}/{intent}", seed, public=public)
        for intent, templates in language.templates.items()
    }
    return {intent: split for intent, split in splits.items() if split is not None}


def _public(book: _Phrasebook, count: int, used: _UsedTexts, rng: np.random.Generator) -> list[LabelledText]:
    """Say up to ``count`` different phrases a label (some intents have fewer), each with names of its own."""
    texts: list[LabelledText] = []
    for label, split in enumerate(book.splits):

        def draw(split: speech.TemplateSplit = split, label: int = label) -> LabelledText:
            return _utter(book.voice(rng), split.public, label)

        phrases = _distinct(draw, count, used.has_label)
        if not phrases:
            raise ConfigError(
                f"template {split.public[0].id} gives no public phrase that has one intent only: choose another seed",
                about="seed",
            )
        texts.extend(phrases)
    return texts


def _utter(voice: speech.Voice, templates: Sequence[speech.Template], label: int) -> LabelledText:
    template = speech.pick(voice.rng, templates)
    return LabelledText(voice.speak(template), label, template.id)


def _speaker(number: int, settings: PopulationSettings, books: Mapping[str, _Phrasebook], seed: int) -> _Speaker:
    """Make a household. Languages take turns, so the unseen ones, which are the last, are spread over them."""
    code = settings.spoken[number % len(settings.spoken)]
    rng = speech.stream(seed, _Stream.HOUSEHOLD, number)
    mix = rng.dirichlet(np.full(len(books[code].splits), settings.concentration))
    name = f"{code}-{number + 1:02d}"
    return _Speaker(name, code, books[code].voice(rng), books[code].splits, np.cumsum(mix))


def _say(speaker: _Speaker, settings: PopulationSettings, used: _UsedTexts) -> tuple[_Said, _Said]:
    """Say the household's training and validation utterances, in random order."""
    count = int(speaker.voice.rng.integers(settings.utterances_min, settings.utterances_max + 1))
    held_out = max(1, round(settings.validation_fraction * count))
    templates = [split.train for split in speaker.splits]
    if settings.validation_templates == "train":
        said = _utterances(speaker, templates, count, used.has_label)
        return said[held_out:], said[:held_out]
    own = [some[: round(settings.validation_fraction * len(some))] for some in templates]
    rest = [some[len(kept) :] for some, kept in zip(templates, own, strict=True)]
    train = _utterances(speaker, rest, count - held_out, used.has_label)
    heard = {spoken(utterance.text) for utterance in train}
    # An intent with few templates has none to spare.
    asked = [kept or some for some, kept in zip(templates, own, strict=True)]
    return train, _utterances(
        speaker, asked, held_out, lambda text, label: used.has_label(text, label) and text not in heard
    )


def _household(
    speaker: _Speaker, said: tuple[_Said, _Said], settings: PopulationSettings, used: _UsedTexts, *, unseen: bool
) -> Client:
    train, validation = said
    test = _utterances(speaker, [split.test for split in speaker.splits], settings.test_utterances, used.fits_test)
    return Client(speaker.name, speaker.language, unseen, train, validation, test)


def _utterances(
    speaker: _Speaker, templates: Sequence[Sequence[speech.Template]], count: int, accept: _Accept
) -> tuple[LabelledText, ...]:
    """Say ``count`` different utterances in the household's mix of intents."""

    def draw() -> LabelledText:
        label = speaker.draw_label()
        return _utter(speaker.voice, templates[label], label)

    said = _distinct(draw, count, accept)
    if len(said) < count:
        reason = f"household {speaker.name} has only {len(said)} of {count} different utterances: "
        reason += "ask for fewer utterances or raise population.concentration"
        raise ConfigError(reason, about="population.concentration")
    return tuple(said)


def _distinct(draw: Callable[[], LabelledText], count: int, accept: _Accept) -> list[LabelledText]:
    """Return ``count`` accepted utterances with different texts; fewer after ``_PATIENCE`` draws without a new one."""
    said: dict[str, LabelledText] = {}
    fruitless = 0
    while len(said) < count and fruitless < _PATIENCE:
        utterance = draw()
        text = spoken(utterance.text)
        if text not in said and accept(text, utterance.label):
            said[text] = utterance
            fruitless = 0
        else:
            fruitless += 1
    return list(said.values())


def spoken(text: str) -> str:
    """Drop what is not heard: letter case and white space."""
    return " ".join(text.casefold().split())
