"""A conversation keeps its messages, drops the oldest when the context is full, and survives every error."""

import pytest

from aggregation.errors import ConfigError, DataError
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.text import SamplingParams
from tests.support import refused

SHORT = SamplingParams(max_tokens=10)


def ask(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


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
