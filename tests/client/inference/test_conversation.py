"""A conversation keeps its messages, drops the oldest when the context is full, and survives every error."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError
from client.inference import usage
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.text import MAX_STOP, MAX_TEXT, Detokenizer, SamplingParams, StopFilter, TextDecoder, checked
from tests.support import refused
from tests.support.tokenizers import WRITERS

SHORT = SamplingParams(max_tokens=10)


def ask(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_answers_of_an_adapter_are_counted_by_latency_where_the_owner_wants_it(generator: Generator) -> None:
    bundle = generator.library.bundle
    usage.Usage.begin(bundle)
    try:
        ask(Conversation(generator, SHORT, adapter="anna"), "lock the door")
        ask(Conversation(generator, SHORT), "lock the door")  # the bare base
        found = usage.Usage.read(bundle)
    finally:
        usage.Usage.erase(bundle)
    assert found is not None
    (counts,) = (day.counts for day in found.days)
    assert sorted(key.partition("/")[0] for key in counts) == ["adapter", "latency", "lessons"]
    assert counts["lessons/answered"] == 1


def test_the_model_reads_the_system_prompt_and_all_messages(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT, "be kind")
    first = ask(conversation, "lock the door")
    second = ask(conversation, "unlock it")
    prompt = [
        ChatMessage("system", "be kind"),
        ChatMessage("user", "lock the door"),
        ChatMessage("assistant", first),
        ChatMessage("user", "unlock it"),
    ]
    assert [ChatMessage("system", "be kind"), *conversation.messages] == [*prompt, ChatMessage("assistant", second)]
    assert second == "".join(generator.answer(prompt, SHORT))
    assert second != ask(Conversation(generator, SHORT), "unlock it")


def test_the_oldest_questions_are_dropped_with_their_answers_when_the_context_is_full(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT, "be kind")
    texts = [f"turn number {number} of ten" for number in range(10)]
    for text in texts:
        ask(conversation, text)
        read = generator.tokens([ChatMessage("system", "be kind"), *conversation.messages[:-1]])
        assert len(read) <= generator.context - SHORT.max_tokens
    messages = conversation.messages
    assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    kept = [message.content for message in messages if message.role == "user"]
    assert kept == texts[-len(kept) :]
    assert 2 <= len(kept) < 10


def test_a_text_that_is_too_long_by_itself_is_refused_and_the_messages_stay(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    ask(conversation, "hello")
    before = conversation.messages
    needed = len(generator.tokens([ChatMessage("user", "a" * 250)]))
    with refused(DataError, "prompt", value=needed) as caught:
        conversation.ask("a" * 250)
    assert "leaves 246; shorten the text, or lower --max-tokens" in str(caught.value)
    assert conversation.messages == before
    assert ask(conversation, "hello")


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("", "text"),
        ("   ", "text"),
        ("\udcff", "text"),
        ("hi \0 there", "text"),
        ("hi <|im_end|>", "message"),
        ("a" * 70_000, "text"),
    ],
    ids=["empty", "white space", "not Unicode", "NUL", "a special token", "too long"],
)
def test_a_message_that_is_not_valid_is_refused_and_the_messages_stay(
    generator: Generator, text: str, about: str
) -> None:
    conversation = Conversation(generator, SHORT)
    ask(conversation, "hello")
    before = conversation.messages
    with refused(DataError, about):
        conversation.ask(text)
    assert conversation.messages == before


def test_an_answer_that_was_not_read_to_its_end_is_kept_as_far_as_it_was_read(generator: Generator) -> None:
    conversation = Conversation(generator, SamplingParams(max_tokens=100))
    pieces = conversation.ask("hello")
    read = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages == (ChatMessage("user", "hello"), ChatMessage("assistant", read))
    assert ask(conversation, "and now")


def test_a_question_with_an_empty_answer_is_not_kept(generator: Generator, engine: GenerationEngine) -> None:
    conversation = Conversation(generator, SHORT)
    engine.ends = frozenset(range(engine.vocabulary))
    assert ask(conversation, "hello") == ""
    assert conversation.messages == ()


def test_a_conversation_goes_on_after_a_change_of_adapter(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    ask(conversation, "hello")
    conversation.use("anna")
    assert conversation.adapter is not None
    assert conversation.adapter.name == "anna"
    ask(conversation, "again")
    assert [message.content for message in conversation.messages if message.role == "user"] == ["hello", "again"]
    conversation.reset()
    assert conversation.messages == ()


def test_an_answer_as_long_as_the_context_is_refused(generator: Generator) -> None:
    with refused(ConfigError, "max_tokens", value=256):
        Conversation(generator, SamplingParams(max_tokens=256))


# A stop string is found wherever the pieces are cut, and no part of it is emitted; wrong parameters are refused.
def streamed(text: str, strings: tuple[str, ...], cuts: list[int]) -> tuple[str, str | None]:
    stops, out, at = StopFilter(strings), [], 0
    for cut in [*sorted(cuts), len(text)]:
        out.append(stops.feed(text[at:cut]))
        at = cut
    return "".join([*out, stops.rest()]), stops.hit


@given(
    text=st.text("ab", max_size=30), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    found, hit = streamed(text, tuple(strings), cuts)
    ends = [at for string in strings if (at := text.find(string)) >= 0]
    if hit is None:
        assert (found, ends) == (text, [])
    else:
        # A longer string may begin earlier and end later than the one that was complete first.
        assert text.startswith(found + hit)
        assert not any(string in found for string in strings)


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stops = StopFilter(("STOP",))
    assert [stops.feed(piece) for piece in ("a S", "T", "x", "ST")] == ["a ", "", "STx", ""]
    assert stops.rest() == "ST"


def test_nothing_is_emitted_after_a_stop_string() -> None:
    stops = StopFilter(("\n",))
    assert stops.feed("one\ntwo") == "one"
    assert (stops.feed("three"), stops.rest(), stops.hit) == ("", "", "\n")


@pytest.mark.parametrize(
    ("about", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**31),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.1),
        ("beams", 0),
        ("beams", 33),
    ],
)
def test_a_sampling_parameter_out_of_range_is_refused_by_name(about: str, value: Any) -> None:
    with refused(ConfigError, about, value=value):
        SamplingParams(**{about: value})


def test_a_temperature_that_is_not_a_number_is_refused() -> None:
    with refused(ConfigError, "temperature"):
        SamplingParams(temperature=float("nan"))


@pytest.mark.parametrize("stop", ["", "a" * (MAX_STOP + 1)])
def test_a_stop_string_of_a_wrong_length_is_refused(stop: str) -> None:
    with refused(ConfigError, "stop"):
        SamplingParams(stop=("fine", stop))


@pytest.mark.parametrize(
    "text",
    ["", " \n", "a" * (MAX_TEXT + 1), "a\0b", "lock \udcff"],
    ids=["empty", "white space", "too long", "NUL", "not Unicode"],
)
def test_a_text_that_no_model_can_read_is_refused(text: str) -> None:
    with refused(DataError, "text"):
        checked(text)


WRITER = {name: build() for name, build in WRITERS.items()}
DECODING = {name: Detokenizer(tokenizer.to_str().encode()) for name, tokenizer in WRITER.items()}
TOKENS = st.lists(st.integers(0, 299), max_size=12)


def decoded(name: str, tokens: list[int]) -> list[str]:
    decoder = TextDecoder(DECODING[name])
    return [decoder.decode(token) for token in tokens]


@given(tokens=TOKENS)
def test_tokens_one_by_one_have_the_text_that_the_tokenizers_library_decodes_at_once(tokens: list[int]) -> None:
    assert "".join(decoded("all bytes", tokens)) == WRITER["all bytes"].decode(tokens).rstrip("\ufffd")


@pytest.mark.parametrize("name", WRITERS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd▁")))
def test_any_text_comes_back_from_its_tokens(name: str, text: str) -> None:
    tokens = WRITER[name].encode(text).ids
    assert "".join(decoded(name, tokens)) == (text if name == "all bytes" or not text else " " + text)


@pytest.mark.parametrize("name", WRITERS)
@given(mixed=st.lists(st.one_of(st.sampled_from("abc"), st.integers(0xAE, 0xFF)), max_size=12))
def test_bytes_that_are_not_a_character_take_no_letter_away(name: str, mixed: list[str | int]) -> None:
    byte = "<0x{:02X}>" if name == "byte fallback" else "{:c}"  # GPT-2's alphabet has these bytes as they are
    pieces = [each if isinstance(each, str) else byte.format(each) for each in mixed]
    tokens = [token for piece in pieces if (token := WRITER[name].token_to_id(piece)) is not None]
    assert len(tokens) == len(mixed)
    text = "".join(decoded(name, tokens))
    assert "".join(char for char in text if char.isascii()) == "".join(each for each in mixed if isinstance(each, str))
