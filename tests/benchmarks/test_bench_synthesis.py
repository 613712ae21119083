"""The benchmark of phrases that are made keeps a household's few, and makes none twice and none that is known."""

from benchmarks.synthesis import REAL, few, made
from client.training.hygiene import words
from simulations.data.households.speech import Template, Voice, draw_names, load_language, stream
from simulations.data.population import Client, LabelledText


def test_the_oldest_phrases_of_each_label_are_the_few() -> None:
    texts = tuple(LabelledText(str(number), number % 2, "") for number in range(9))
    found = few(Client("en-01", "en", True, texts, (), ()))
    assert [one.text for one in found] == ["0", "2", "4", "1", "3", "5"]
    assert len(found) == 2 * REAL


def test_phrases_are_made_once_in_the_words_of_the_household_and_none_is_known() -> None:
    english, rng = load_language("en"), stream(1)
    voice = Voice(english, draw_names(english.words, rng), rng)
    templates = english.templates["HassTurnOn"]
    first = made(voice, templates, (), 20)
    assert len({*map(words, first)}) == 20
    again = made(voice, templates, [text.upper() for text in first], 20)
    assert len(again) == 20
    assert not {*map(words, first)} & {*map(words, again)}
    plain = Template("en/HassTurnOn/0", "lights on", ())
    assert made(voice, [plain], (), 20) == [plain.text]
    assert made(voice, [plain], [plain.text], 20) == []
