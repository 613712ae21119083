"""The parts of a population: random expansion, the split of the templates, words and naturalness."""

from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from aggregation.errors import ConfigError
from simulations.data.households.speech import (
    Expander,
    Template,
    Voice,
    draw_names,
    load_language,
    load_words,
    split_templates,
    stream,
)
from tests.support import refused

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
