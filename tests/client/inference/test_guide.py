"""A guided answer has the form that its guide describes, and a guide that cannot be followed is refused before it."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from client.inference.generate import Conversation, Generator
from client.inference.guide import MAX_GUIDE, Guide, GuideFollower, GuideKind
from client.inference.text import Answer, Detokenizer, Finish, SamplingParams, TextDecoder
from tests.support import refused
from tests.support.tokenizers import TOKENIZERS, WRITERS

PROMPT = "turn on the light"
ROOMS = ("kitchen", "hall")
SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["on", "off"]},
        "room": {"enum": list(ROOMS)},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["intent", "room"],
    "additionalProperties": False,
}
# Without white space, of which a model that was never trained would write much.
FORM = json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}})


def guided(kind: GuideKind, source: str, max_tokens: int = 80, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, guide=Guide(kind, source), **params)


def written(generator: Generator, params: SamplingParams, adapter: str | None = None) -> tuple[str, Answer]:
    text = "".join(generator.complete(PROMPT, params, adapter))
    assert generator.last is not None
    return text, generator.last


@pytest.mark.parametrize("adapter", ["global", "anna", "anna+global:0.5", None])
def test_an_answer_matches_its_schema_with_each_adapter(generator: Generator, adapter: str | None) -> None:
    found = set()
    for sampling in ({}, {"temperature": 2.0, "seed": 1}, {"temperature": 2.0, "seed": 2}):
        text, last = written(generator, guided(GuideKind.JSON_SCHEMA, FORM, **sampling), adapter)
        answer = json.loads(text)
        assert (last.finish, last.valid) == (Finish.END, True)
        assert answer["intent"] in ("on", "off")
        assert answer["room"] in ROOMS
        assert type(answer.get("minutes", 1)) is int
        assert set(answer) <= {"intent", "room", "minutes"}
        found.add(text)
    assert len(found) > 1


@pytest.mark.parametrize(
    ("kind", "source", "matches"),
    [
        (GuideKind.REGEX, "(yes|no), [0-9]{2}", "(yes|no), [0-9]{2}"),
        (GuideKind.REGEX, "(a+)+b", "a+b"),
        (GuideKind.GRAMMAR, 'start: greeting " " name\ngreeting: "hi" | "bye"\nname: /[A-Z]{3}/', "(hi|bye) [A-Z]{3}"),
    ],
)
def test_an_answer_matches_its_expression_or_grammar(
    generator: Generator, kind: GuideKind, source: str, matches: str
) -> None:
    text, last = written(generator, guided(kind, source, temperature=1.0, seed=1))
    assert re.fullmatch(matches, text)
    assert last.valid


def test_the_same_question_has_another_answer_without_a_guide(generator: Generator) -> None:
    plain, last = written(generator, SamplingParams(max_tokens=8))
    assert last.valid
    assert plain != written(generator, guided(GuideKind.REGEX, "[a-z ]{8}"))[0]
    assert written(generator, SamplingParams(max_tokens=8))[0] == plain


@pytest.mark.parametrize("source", [FORM, '{"type": "integer", "minimum": 100000}'])
def test_an_answer_that_was_cut_does_not_match(generator: Generator, source: str) -> None:
    _, last = written(generator, guided(GuideKind.JSON_SCHEMA, source, 4))
    assert (last.finish, last.valid) == (Finish.LENGTH, False)


def test_an_answer_that_is_not_json_does_not_match_a_schema() -> None:
    guide = Guide(GuideKind.JSON_SCHEMA, "{}")
    for text, valid in (('{"a": 1}', True), ('{"a": 1', False), ("NaN", False), ("", False), ("[" * 100_000, False)):
        assert Answer(text, Finish.END, 1, 1, 0, guide).valid is valid


def test_an_interrupted_answer_leaves_the_next_one_whole(generator: Generator) -> None:
    params = guided(GuideKind.JSON_SCHEMA, FORM)
    before, _ = written(generator, params)
    pieces: Any = generator.complete(PROMPT, params)
    assert before.startswith(next(pieces) + next(pieces) + next(pieces))
    pieces.close()
    assert written(generator, params)[0] == before


def test_a_conversation_is_guided_turn_by_turn(generator: Generator) -> None:
    conversation = Conversation(generator, guided(GuideKind.REGEX, "(yes|no)!", 20), adapter="anna")
    for count in (2, 4):
        assert "".join(conversation.ask("hello")) in ("yes!", "no!")
        assert len(conversation.messages) == count
    assert generator.last is not None
    assert generator.last.reused_tokens > 0


ANYTHING = {
    "emoji with the same first bytes": (GuideKind.REGEX, "(🙂|🙁)", "🙂|🙁"),
    "letters with the same first byte": (GuideKind.REGEX, "T(ü|ö)r/(はい|いいえ)", "T(ü|ö)r/(はい|いいえ)"),
    "range": (GuideKind.REGEX, "[あ-ん]{4}", "[あ-ん]{4}"),
    "joined emoji": (GuideKind.REGEX, "👨\u200d👩\u200d(👧|👦)", "👨\u200d👩\u200d(👧|👦)"),
    "digits": (GuideKind.REGEX, r"\d{3}[\d.]", "[0-9]{3}[0-9.]"),
    "words": (GuideKind.REGEX, r"\w{8}", "[^\ufffd]{8}"),  # Python and Rust differ in what a word is
    "escaped slash": (GuideKind.REGEX, r"a\/ü/\\", r"a/ü/\\"),
    "enum": (GuideKind.JSON_SCHEMA, '{"enum": ["🙂", "🙁", "はい", "いいえ"]}', '"(🙂|🙁|はい|いいえ)"'),
    "escaped enum": (GuideKind.JSON_SCHEMA, '{"enum": ["\\ud83d\\ude42", "\\ud83d\\ude41"]}', '"(🙂|🙁)"'),
    "text": (GuideKind.JSON_SCHEMA, '{"type": "string", "maxLength": 4}', '".*"'),
    "grammar": (GuideKind.GRAMMAR, 'start: face " " face\nface: "🙂" | "🙁"', "[🙂🙁] [🙂🙁]"),
}


@pytest.mark.parametrize("name", ANYTHING)
@pytest.mark.parametrize("writer", WRITERS)
def test_whichever_allowed_tokens_are_taken_the_text_has_the_form_to_the_last_byte(writer: str, name: str) -> None:
    kind, source, matches = ANYTHING[name]
    tokenizer = WRITERS[writer]()
    end, size = tokenizer.token_to_id("</s>"), tokenizer.get_vocab_size()
    guide, follower = Guide(kind, source), GuideFollower(tokenizer.to_str().encode(), size, [end])
    rng, texts = np.random.default_rng(1), set()
    for _ in range(20):
        answer, decoder, text = follower.begin(guide), TextDecoder(Detokenizer(tokenizer.to_str().encode())), ""
        while (token := int(rng.choice(answer.allowed().nonzero()[0]))) != end:
            answer.append(token)
            text += decoder.decode(token)
        assert re.fullmatch(matches, text), text
        assert guide.holds(text)
        texts.add(text)
    assert len(texts) > 1 or name == "escaped slash"


def test_a_tokenizer_that_does_not_state_the_bytes_of_its_tokens_is_refused() -> None:
    with refused(ConfigError, "guide"):
        GuideFollower(TOKENIZERS["unigram"]().to_str().encode(), 30, [2])


def test_without_llguidance_the_error_names_the_extra(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refused(ConfigError, "llguidance") as caught:
        generator.check(guided(GuideKind.REGEX, "a"))
    assert "pip install 'edgeadapt[generate]'" in str(caught.value)


BAD = {
    "type of no JSON": (GuideKind.JSON_SCHEMA, '{"type": "objekt"}'),
    "minimum above maximum": (GuideKind.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 2}'),
    "keyword that is not known": (GuideKind.JSON_SCHEMA, '{"not": {"type": "string"}}'),
    "reference to the net": (GuideKind.JSON_SCHEMA, '{"$ref": "https://example.com/schema"}'),
    "list": (GuideKind.JSON_SCHEMA, "[]"),
    "false": (GuideKind.JSON_SCHEMA, "false"),
    "too deep": (GuideKind.JSON_SCHEMA, '{"items": ' * 200 + "{}" + "}" * 200),
    "open group": (GuideKind.REGEX, "(("),
    "look-ahead": (GuideKind.REGEX, "(?=x)a"),
    "letter that no token has": (GuideKind.REGEX, "ü"),
    "such a letter later on": (GuideKind.REGEX, "aü"),
    "such a letter in JSON": (GuideKind.JSON_SCHEMA, r'{"enum": ["k\u00fcche"]}'),
    "unknown rule": (GuideKind.GRAMMAR, 'start: "a" | b'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_guide_that_cannot_be_followed_is_refused_in_a_line_before_the_first_question(
    generator: Generator, name: str
) -> None:
    params = guided(*BAD[name])
    with refused(ConfigError, "guide") as caught:
        Conversation(generator, params)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320
    with refused(ConfigError, "guide"):
        written(generator, params)
    assert written(generator, SamplingParams(max_tokens=4))[0]


def test_a_guide_that_the_model_cannot_go_on_by_ends_the_answer_in_a_line(generator: Generator) -> None:
    pieces = generator.complete(PROMPT, guided(GuideKind.REGEX, r"a\x{fc}"))
    assert next(pieces) == "a"
    with refused(DataError, "guide"):
        next(pieces)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GuideKind.JSON_SCHEMA, ""),
        (GuideKind.JSON_SCHEMA, "not JSON"),
        (GuideKind.JSON_SCHEMA, '{"const": NaN}'),
        (GuideKind.JSON_SCHEMA, "[" * 50_000),
        (GuideKind.REGEX, ""),
        (GuideKind.REGEX, "a\0b"),
        (GuideKind.REGEX, "\ud800"),
        (GuideKind.REGEX, "\\"),
        (GuideKind.REGEX, "a\\\\\\"),
        (GuideKind.GRAMMAR, " " * (MAX_GUIDE + 1)),
    ],
    ids=["empty", "not JSON", "NaN", "open", "empty expression", "NUL", "surrogate", "one backslash", "three", "long"],
)
def test_a_source_that_is_no_text_or_no_json_is_refused(kind: GuideKind, source: str) -> None:
    with refused(ConfigError, "guide"):
        Guide(kind, source)


@pytest.fixture(autouse=True)
def closed(generator: Generator) -> Iterator[None]:
    """Every test leaves a generator that can answer."""
    yield
    assert written(generator, SamplingParams(max_tokens=2))[1].tokens
