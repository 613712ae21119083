"""From settings and a seed to a population.

The label set is the intents that every requested language (public ones included) can deal out: at least one
template to train, one to test and, in a public language, one for public phrases. Of the package's 42 intents
these are 29 with the default languages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError
from simulations.data.households.draws import pick, stream
from simulations.data.households.settings import PopulationSettings
from simulations.data.households.speech import Voice
from simulations.data.households.templates import Language, Split, Template, deal, load_language
from simulations.data.households.values import Example, Household, Population, spoken
from simulations.data.households.words import furnish

_FEWEST_LABELS = 5
# Draws in a row that bring nothing new, before someone is given up as having no more to say.
_PATIENCE = 300

# Whether a text may stand for a label.
_Accept = Callable[[str, int], bool]


class _Stream(IntEnum):
    """Names of streams under one seed, so that one more household leaves the others' draws as they were."""

    PUBLIC = 1
    HOUSEHOLD = 2


@dataclass(frozen=True, slots=True)
class _Phrasebook:
    """A language with the split of each label, in the order of the labels."""

    language: Language
    splits: Sequence[Split]

    def voice(self, rng: np.random.Generator) -> Voice:
        return Voice(self.language, furnish(self.language.words, rng), rng)


@dataclass(slots=True)
class _Heard:
    """All that was said so far: what each text means, and the texts that someone learns from."""

    labels: dict[str, int] = field(default_factory=dict)
    learnt: set[str] = field(default_factory=set)

    def plain(self, text: str, label: int) -> bool:
        """Whether the text means this intent and no other; the first to say it decides."""
        return self.labels.setdefault(text, label) == label

    def new(self, text: str, label: int) -> bool:
        """Whether the text is plain and nobody learns from it."""
        return text not in self.learnt and self.plain(text, label)


@dataclass(frozen=True, slots=True)
class _Speaker:
    """A household that talks. ``cumulated``: shape ``(labels,)``, its mix of intents summed up, rising to 1."""

    name: str
    code: str
    voice: Voice
    splits: Sequence[Split]
    cumulated: NDArray[np.float64]

    def topic(self) -> int:
        """A label drawn from its mix."""
        found = int(np.searchsorted(self.cumulated, self.voice.rng.random(), side="right"))
        return min(found, len(self.splits) - 1)


def sample_population(settings: PopulationSettings, seed: int) -> Population:
    """Sample a population.

    Args:
        settings: Its size, languages and habits.
        seed: Not negative; the same settings and seed give the same ``digest`` on any machine.

    Raises:
        ConfigError: A package is missing, a language does not exist, the languages share too few intents, or a
            household has too little to say for the utterances asked of it.
    """
    labels, books = _phrasebooks(settings, seed)
    heard = _Heard()
    public = tuple(
        example
        for number, code in enumerate(settings.public_languages)
        for example in _public(books[code], settings.public_phrases, heard, stream(seed, _Stream.PUBLIC, number))
    )
    speakers = [_speaker(number, settings, books, seed) for number in range(settings.households)]
    said = [_say(speaker, settings, heard) for speaker in speakers]
    heard.learnt.update(spoken(example.text) for examples in [public, *said] for example in examples)
    seen = settings.households - settings.unseen_count
    return Population(
        labels=labels,
        public=public,
        households=tuple(
            _household(speaker, own, settings, heard, unseen=number >= seen)
            for number, (speaker, own) in enumerate(zip(speakers, said, strict=True))
        ),
    )


def _phrasebooks(settings: PopulationSettings, seed: int) -> tuple[tuple[str, ...], dict[str, _Phrasebook]]:
    """The labels, and a phrasebook for each language."""
    codes = sorted({*settings.languages, *settings.public_languages})
    languages = {code: load_language(code) for code in codes}
    splits = {code: _usable(code, languages[code], seed, public=code in settings.public_languages) for code in codes}
    labels = tuple(sorted(set.intersection(*(set(usable) for usable in splits.values()))))
    if len(labels) < _FEWEST_LABELS:
        counts = ", ".join(f"{code} {len(usable)}" for code, usable in splits.items())
        raise ConfigError(
            f"the languages share {len(labels)} intents with enough templates, {_FEWEST_LABELS} are needed; "
            f"leave out the poorest of: {counts}"
        )
    books = {code: _Phrasebook(languages[code], [splits[code][label] for label in labels]) for code in codes}
    return labels, books


def _usable(code: str, language: Language, seed: int, *, public: bool) -> dict[str, Split]:
    dealt = {
        intent: deal(templates, f"{code}/{intent}", seed, public=public)
        for intent, templates in language.templates.items()
    }
    return {intent: split for intent, split in dealt.items() if split is not None}


def _public(book: _Phrasebook, count: int, heard: _Heard, rng: np.random.Generator) -> list[Example]:
    """Up to ``count`` distinct phrases a label (some intents have fewer), each from a home of its own."""
    found: list[Example] = []
    for label, split in enumerate(book.splits):
        phrases = _distinct(partial(_from_a_new_home, book, split.public, label, rng), count, heard.plain)
        if not phrases:
            raise ConfigError(
                f"no public phrase of template {split.public[0].id} means one intent only: take another seed"
            )
        found.extend(phrases)
    return found


def _from_a_new_home(book: _Phrasebook, templates: Sequence[Template], label: int, rng: np.random.Generator) -> Example:
    return _utter(book.voice(rng), templates, label)


def _utter(voice: Voice, templates: Sequence[Template], label: int) -> Example:
    template = pick(voice.rng, templates)
    return Example(voice.say(template), label, template.id)


def _speaker(number: int, settings: PopulationSettings, books: Mapping[str, _Phrasebook], seed: int) -> _Speaker:
    """Households speak the languages by turns, so the unseen ones, the last, are spread over them."""
    code = settings.languages[number % len(settings.languages)]
    rng = stream(seed, _Stream.HOUSEHOLD, number)
    mix = rng.dirichlet(np.full(len(books[code].splits), settings.concentration))
    name = f"{code}-{number + 1:02d}"
    return _Speaker(name, code, books[code].voice(rng), books[code].splits, np.cumsum(mix))


def _say(speaker: _Speaker, settings: PopulationSettings, heard: _Heard) -> tuple[Example, ...]:
    """What the household has said: its training and validation utterances, in random order."""
    count = int(speaker.voice.rng.integers(settings.utterances_min, settings.utterances_max + 1))
    return _talk(speaker, [split.train for split in speaker.splits], count, heard.plain)


def _household(
    speaker: _Speaker, said: tuple[Example, ...], settings: PopulationSettings, heard: _Heard, *, unseen: bool
) -> Household:
    held_out = max(1, round(settings.validation_fraction * len(said)))
    test = _talk(speaker, [split.test for split in speaker.splits], settings.test_utterances, heard.new)
    return Household(speaker.name, speaker.code, unseen, said[held_out:], said[:held_out], test)


def _talk(
    speaker: _Speaker, templates: Sequence[Sequence[Template]], count: int, accept: _Accept
) -> tuple[Example, ...]:
    """``count`` different utterances in the household's mix of intents."""

    def draw() -> Example:
        label = speaker.topic()
        return _utter(speaker.voice, templates[label], label)

    said = _distinct(draw, count, accept)
    if len(said) < count:
        raise ConfigError(
            f"household {speaker.name} has only {len(said)} of {count} different utterances to say: "
            "ask for fewer or raise concentration"
        )
    return tuple(said)


def _distinct(draw: Callable[[], Example], count: int, accept: _Accept) -> list[Example]:
    """``count`` accepted utterances with different texts; fewer once drawing brings nothing new."""
    said: dict[str, Example] = {}
    fruitless = 0
    while len(said) < count and fruitless < _PATIENCE:
        example = draw()
        text = spoken(example.text)
        if text not in said and accept(text, example.label):
            said[text] = example
            fruitless = 0
        else:
            fruitless += 1
    return list(said.values())
