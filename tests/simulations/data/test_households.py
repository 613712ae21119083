"""The population that the arms are compared on: what a household says, and what no household learns from."""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from itertools import chain
from unicodedata import combining, normalize

import numpy as np
import pydantic
import pytest

from aggregation.errors import ConfigError
from simulations.data.households import PopulationSettings, plain_phrases, released_phrases, sample_population
from simulations.data.households.sampling import spoken
from simulations.data.households.speech import (
    Expander,
    Template,
    Voice,
    draw_names,
    hassil_module,
    load_language,
    load_words,
    parse,
    split_templates,
    stream,
)
from simulations.data.population import Client, LabelledText, Population
from simulations.engine.provision import released_texts
from tests.support import refused

SMALL = PopulationSettings(households=4, utterances_min=20, utterances_max=30, test_utterances=10)


@pytest.fixture(scope="module")
def population() -> Population:
    return sample_population(PopulationSettings(), seed=0)


@pytest.fixture(scope="module")
def small() -> Population:
    """With seed 3."""
    return sample_population(SMALL, 3)


def _learned(household: Client) -> tuple[LabelledText, ...]:
    return household.train + household.validation


def _templates(examples: tuple[LabelledText, ...]) -> set[str]:
    return {example.group for example in examples}


def _texts(examples: tuple[LabelledText, ...]) -> set[str]:
    return {spoken(example.text) for example in examples}


def test_default_population_is_what_the_scenario_asks_for(population: Population) -> None:
    assert len(population.clients) == 15
    assert Counter(h.language for h in population.clients) == {"en": 5, "de": 5, "fr": 5}
    assert len(population.labels) == 29
    assert list(population.labels) == sorted(population.labels)
    for household in population.clients:
        assert 60 <= len(_learned(household)) <= 100
        assert len(household.test) == 40
        assert len(household.validation) == round(0.2 * len(_learned(household)))
    assert len({len(_learned(household)) for household in population.clients}) > 5


def test_no_household_learns_from_a_test_template_of_any_household(population: Population) -> None:
    learned = set(chain.from_iterable(_templates(_learned(h)) for h in population.clients))
    tested = set(chain.from_iterable(_templates(h.test) for h in population.clients))
    public = _templates(population.public)
    assert not learned & tested
    assert not public & (learned | tested)


def test_no_household_learns_from_a_test_sentence_of_any_household(population: Population) -> None:
    learned = set(chain.from_iterable(_texts(_learned(h)) for h in population.clients))
    learned |= _texts(population.public)
    for household in population.clients:
        assert not _texts(household.test) & learned


def test_a_household_never_says_the_same_sentence_twice(population: Population) -> None:
    for household in population.clients:
        assert len(_texts(_learned(household))) == len(_learned(household))
        assert len(_texts(household.test)) == len(household.test)


def test_no_sentence_has_two_meanings(population: Population) -> None:
    meant: dict[str, int] = {}
    for example in population.public + tuple(chain.from_iterable(_learned(h) + h.test for h in population.clients)):
        assert meant.setdefault(spoken(example.text), example.label) == example.label


def test_every_label_has_public_phrases_in_the_public_language_only(population: Population) -> None:
    counts = Counter(example.label for example in population.public)
    assert set(counts) == set(range(len(population.labels)))
    assert max(counts.values()) == 6
    assert all(example.group.startswith("en/") for example in population.public)


def test_the_template_of_an_utterance_has_its_language_and_intent(population: Population) -> None:
    for household in population.clients:
        for example in _learned(household) + household.test:
            language, intent, digest = example.group.split("/")
            assert (language, intent) == (household.language, population.labels[example.label])
            assert len(digest) == 8


def test_no_template_mark_is_left_in_a_sentence(population: Population) -> None:
    for household in population.clients:
        for example in _learned(household) + household.test:
            assert not set("{}[]<>|;") & set(example.text)
            assert example.text == " ".join(example.text.split()) != ""


def _mix(examples: tuple[LabelledText, ...], labels: int) -> np.ndarray:
    return np.bincount([example.label for example in examples], minlength=labels) / len(examples)


def test_the_test_part_follows_the_mix_of_its_own_household(population: Population) -> None:
    """The total variation to its own training part is smaller than to any other's, in nearly every household."""
    learned = [_mix(_learned(h), len(population.labels)) for h in population.clients]
    own_is_nearest = [
        int(np.argmin([np.abs(_mix(h.test, len(population.labels)) - other).sum() for other in learned])) == number
        for number, h in enumerate(population.clients)
    ]
    assert sum(own_is_nearest) >= 13


def test_small_concentration_makes_households_one_sided() -> None:
    def topics(concentration: float) -> float:
        settings = SMALL.model_copy(update={"concentration": concentration, "public_phrases": 1})
        return float(np.mean([len({e.label for e in _learned(h)}) for h in sample_population(settings, 1).clients]))

    assert topics(0.3) + 4 < topics(5.0)


def test_the_digest_is_the_same_on_every_machine() -> None:
    """A known answer: it changes only with the words, the sampling, or the version of home-assistant-intents."""
    assert sample_population(SMALL, 0).digest == "0fdfa57b214eb54d05fc049ef78c1e0f3098b51d5b8cd24c34fb1887c7f35892"


def test_the_digest_does_not_depend_on_the_hash_seed_of_the_process(small: Population) -> None:
    program = (
        "from simulations.data.households import *;"
        f"print(sample_population(PopulationSettings.model_validate_json('{SMALL.model_dump_json()}'), 3).digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == small.digest


def test_one_more_household_leaves_the_sentences_of_the_others_unchanged(small: Population) -> None:
    more = sample_population(SMALL.model_copy(update={"households": 5, "unseen": 0.2}), 3)
    assert [h.train for h in small.clients] == [h.train for h in more.clients[:4]]
    assert small.public == more.public


def test_a_second_language_leaves_the_template_split_of_the_first_unchanged() -> None:
    one = sample_population(SMALL.model_copy(update={"languages": ("en",), "public_phrases": 1}), 3)
    two = sample_population(SMALL.model_copy(update={"languages": ("en", "de"), "public_phrases": 1}), 3)
    tested = set(chain.from_iterable(_templates(h.test) for h in one.clients))
    learned = set(chain.from_iterable(_templates(_learned(h)) for h in two.clients))
    assert not tested & learned


@pytest.mark.parametrize("language", ["pt-BR", "zh-CN"])
def test_other_languages_of_the_package_work(language: str) -> None:
    settings = SMALL.model_copy(update={"languages": (language,), "public_languages": ("en", language)})
    population = sample_population(settings, 0)
    assert len(population.labels) >= 10
    assert {example.group.split("/")[0] for example in population.public} == {"en", language}


def test_an_unknown_language_is_refused_with_the_closest_ones() -> None:
    with refused(ConfigError, "population.languages", value="deu") as error:
        sample_population(SMALL.model_copy(update={"languages": ("deu",)}), 0)
    assert {"'deu';", "de,"} <= set(str(error.value).split())


def test_languages_that_share_too_few_intents_are_refused_with_their_counts() -> None:
    with refused(ConfigError, "population.languages") as error:
        sample_population(SMALL.model_copy(update={"languages": ("en", "ja")}), 0)
    assert re.search(r"\ben \d+, ja \d$", str(error.value))


def test_a_household_with_too_few_different_utterances_is_named() -> None:
    """Seed 6 gives the first household a mix of nearly one intent, which has a few dozen sentences."""
    one_sided = PopulationSettings(
        households=3, languages=("en",), utterances_min=400, utterances_max=400, concentration=1e-3
    )
    with refused(ConfigError, "population.concentration", value="en-01"):
        sample_population(one_sided, 6)


@pytest.mark.parametrize("package", ["hassil.parse_expression", "home_assistant_intents"])
def test_a_missing_package_is_refused_with_the_extra_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hassil_module.cache_clear()
    parse.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with refused(ConfigError, "edgeadapt[simulations]", value=package):
        sample_population(SMALL, 0)


@pytest.mark.parametrize(
    ("wrong", "key", "kind"),
    [
        ({"utterances_min": 90, "utterances_max": 80}, "utterances_min", "value_error"),
        ({"households": 3, "languages": ("en", "de", "fr", "es")}, "languages", "value_error"),
        ({"languages": ("en", "en")}, "languages", "value_error"),
        ({"households": 3, "unseen": 0.9}, "unseen", "value_error"),
        ({"concentration": float("nan")}, "concentration", "finite_number"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(wrong: dict[str, object], key: str, kind: str) -> None:
    with pytest.raises(pydantic.ValidationError) as refusal:
        PopulationSettings.model_validate(wrong)
    (error,) = refusal.value.errors()
    assert error["type"] == kind
    assert key in error["loc"] or key in error["msg"]


def test_a_release_has_three_plain_phrases_of_each_label_in_each_language_apart_from_those_that_measure() -> None:
    population, released = sample_population(PopulationSettings(), 0), released_phrases()
    assert released.keys() == plain_phrases().keys() == {client.language for client in population.clients}
    measured = {spoken(text) for phrases in plain_phrases().values() for text in phrases.values()}
    for by_intent in released.values():
        assert by_intent.keys() == set(population.labels)
        texts = [spoken(text) for texts in by_intent.values() for text in texts]
        assert len(texts) == len({*texts} - measured) == 3 * len(population.labels)


def test_a_release_carries_the_plain_phrases_of_the_languages_and_labels_of_its_population() -> None:
    population = sample_population(PopulationSettings(households=4, languages=("fr", "es"), unseen=0.3), 0)
    texts = released_texts(population)
    assert texts[: len(population.public)] == [*population.public]
    added = {(population.labels[text.label], text.text) for text in texts[len(population.public) :]}
    french = released_phrases()["fr"]
    assert added == {(label, text) for label in population.labels if label in french for text in french[label]}


@pytest.mark.parametrize(("language", "letters"), [("de", "äöü"), ("fr", "àéèê")])
def test_released_phrases_have_accents_and_no_word_stands_with_them_and_without(language: str, letters: str) -> None:
    words = {word for texts in released_phrases()[language].values() for text in texts for word in spoken(text).split()}
    assert set(letters) <= set("".join(words))
    bare = {word: "".join(c for c in normalize("NFD", word) if not combining(c)) for word in words}
    assert not words & {plain for word, plain in bare.items() if word != plain}


def test_validation_can_have_templates_of_its_own_as_the_test_has() -> None:
    population = sample_population(PopulationSettings(validation_templates="own"), 3)
    trained = set(chain.from_iterable(_templates(household.train) for household in population.clients))
    validated = [phrase for household in population.clients for phrase in household.validation]
    assert sum(phrase.group in trained for phrase in validated) < 0.25 * len(validated)  # of intents with few templates
    for household in population.clients:
        assert len(household.validation) == round(0.2 * len(_learned(household)))
        assert not _texts(household.train) & _texts(household.validation)


# The parts of a population: random expansion, the split of the templates, words and naturalness.
CODES = sorted(path.name[:-5] for path in (files("simulations.data.households") / "words").iterdir())
DOMAINS = {
    "binary_sensor", "button", "climate", "cover", "fan", "lawn_mower", "light", "lock", "media_player", "person",
    "scene", "sensor", "switch", "todo", "vacuum", "valve",
    "weather",  # a domain of Hass intents
}  # fmt: skip


def _sentences(template: str, rules: dict[str, str] | None = None, draws: int = 400) -> Counter[str]:
    expander = Expander(rules or {}, lambda name: f"<{name}>", stream(0))
    return Counter(expander.sentence(template) for _ in range(draws))


@pytest.mark.parametrize(
    ("template", "sentences"),
    [
        ("turn on [the] light", {"turn on light", "turn on the light"}),
        ("(open|close|shut) it", {"open it", "close it", "shut it"}),
        ("light[s]", {"light", "lights"}),
        ("(up;now)", {"up now", "now up"}),
        ("<turn> {name:x}", {"turn <name>", "switch <name>"}),
        ("a [b [c]] d", {"a d", "a b d", "a b c d"}),
    ],
)
def test_every_sentence_of_a_template_is_found_and_no_other(template: str, sentences: set[str]) -> None:
    assert set(_sentences(template, {"turn": "(turn|switch)"})) == sentences


def test_the_branches_of_an_alternative_are_equally_likely() -> None:
    """Four standard deviations of a fair draw; a branch taken 3/2 or 2/3 as often lies outside."""
    counts = _sentences("(a|b|c|d)", draws=4000)
    assert all(abs(count - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75) for count in counts.values())


def _made(count: int) -> tuple[Template, ...]:
    return tuple(Template(f"t{number}", f"text {number}", ()) for number in range(count))


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("count", [3, 4, 7, 100])
def test_the_split_uses_every_template_once_and_leaves_no_part_empty(count: int, public: bool) -> None:
    split = split_templates(_made(count), "en/X", 0, public=public)
    assert split is not None
    assert sorted(split.public + split.train + split.test, key=str) == sorted(_made(count), key=str)
    assert split.train
    assert split.test
    assert bool(split.public) == public


@pytest.mark.parametrize(("count", "public"), [(0, False), (1, False), (2, True)])
def test_too_few_templates_have_no_split(count: int, public: bool) -> None:
    assert split_templates(_made(count), "en/X", 0, public=public) is None


def test_templates_of_an_intent_have_different_texts_and_ids() -> None:
    for code in ("en", "de", "fr"):
        for templates in load_language(code).templates.values():
            assert len({t.text for t in templates}) == len({t.id for t in templates}) == len(templates)


@pytest.mark.parametrize("code", CODES)
def test_each_word_file_has_names_for_every_domain(code: str) -> None:
    words = load_words(code)
    assert set(words.devices) == DOMAINS
    assert set(words.phrases) == set(load_words("en").phrases)
    assert all(words.devices.values())
    assert all(words.phrases.values())
    assert min(len(words.people), len(words.areas), len(words.floors)) >= 3


def test_a_region_uses_the_words_of_its_language_and_an_unknown_language_the_english_ones() -> None:
    assert load_words("pt-BR") == load_words("pt")
    assert load_words("fi") == load_words("en")


def test_households_have_names_of_their_own_without_open_marks() -> None:
    drawn = [draw_names(load_words("de"), stream(0, number)) for number in range(20)]
    assert len({names.devices["light"] for names in drawn}) == 20
    assert not any("{" in name for names in drawn for kind in names.devices.values() for name in kind)
    assert drawn[0].of_kind("input_boolean") == drawn[0].of_kind("switch")


@pytest.mark.parametrize(
    ("code", "natural", "unnatural"),
    [
        ("en", "set a timer for 2 minutes", "set a timer for 2 minute"),
        ("en", "turn on Emma's lamp", "turn on the Emma's lamp"),
        ("de", "mach das Licht in der Küche an", "mach das Licht in das Küche an"),
        ("de", "Licht in Omas Zimmer an", "Licht in der Omas Zimmer an"),
        ("fr", "allume la lampe de chevet", "allume le lampe de chevet"),
        ("fr", "allume la lumière de l'entrée", "allume la lumière de la entrée"),
        ("es", "abre la persiana de la cocina", "abre la persiana de el cocina"),
        ("it", "accendi la luce in cucina", "accendi lo luce in cucina"),
    ],
)
def test_the_more_natural_of_two_sentences_has_fewer_flaws(code: str, natural: str, unnatural: str) -> None:
    words = load_words(code)
    assert words.flaws(natural, 9) < words.flaws(unnatural, 9)


def _voice(code: str) -> Voice:
    language = load_language(code)
    return Voice(language, draw_names(language.words, stream(1)), stream(2))


def test_a_name_is_of_a_domain_that_the_template_allows() -> None:
    voice = _voice("en")
    spoken = {voice.speak(Template("t", "{name}", ("vacuum", "lock"))) for _ in range(60)}
    assert spoken == {*voice.names.of_kind("vacuum"), *voice.names.of_kind("lock")}


def test_numbers_are_ones_that_people_say() -> None:
    voice = _voice("de")
    degrees = {int(voice.speak(Template("t", "{temperature}", ()))) for _ in range(100)}
    assert degrees == set(range(17, 25))
    assert all(int(voice.speak(Template("t", "{brightness}", ()))) % 5 == 0 for _ in range(20))


def test_a_list_that_the_package_does_not_define_is_named() -> None:
    with refused(ConfigError, "home-assistant-intents", value="moon"):
        _voice("en").speak(Template("t", "to the {moon}", ()))
