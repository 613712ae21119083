"""A conversation keeps its turns, forgets the oldest when there is no room, and survives whatever goes wrong."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError, DataError
from client.cli import chat as command
from client.inference.conversation import Conversation
from client.inference.generate import ChatMessage, Generator
from client.inference.options import Options
from client.inference.text import printable

SHORT = Options(max_tokens=10)
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def generator(lm_bundle: Path) -> Generator:
    return Generator.open(lm_bundle, threads=1)


def said(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_the_model_reads_all_turns_and_the_systems_text(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT, "be kind")
    first = said(conversation, "lock the door")
    second = said(conversation, "unlock it")
    whole = [
        ChatMessage("system", "be kind"),
        ChatMessage("user", "lock the door"),
        ChatMessage("assistant", first),
        ChatMessage("user", "unlock it"),
    ]
    assert [ChatMessage("system", "be kind"), *conversation.turns] == [*whole, ChatMessage("assistant", second)]
    assert second == "".join(generator.answer(whole, SHORT))
    assert second != said(Conversation(generator, SHORT), "unlock it")


def test_the_oldest_turns_are_forgotten_in_pairs_when_there_is_no_room(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT, "be kind")
    texts = [f"turn number {number} of ten" for number in range(10)]
    for text in texts:
        said(conversation, text)
        read = generator.tokens([ChatMessage("system", "be kind"), *conversation.turns[:-1]])
        assert len(read) <= generator.context - SHORT.max_tokens
    turns = conversation.turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    kept = [turn.content for turn in turns if turn.role == "user"]
    assert kept == texts[-len(kept) :]
    assert 2 <= len(kept) < 10


def test_what_is_too_long_by_itself_is_refused_and_the_turns_stay(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    said(conversation, "hello")
    before = conversation.turns
    with pytest.raises(DataError, match=r"the text needs 2[0-9]+ tokens, and 246 are free beside an answer of 10"):
        conversation.ask("a" * 250)
    assert conversation.turns == before
    assert said(conversation, "hello")


@pytest.mark.parametrize("text", ["", "   ", "\udcff", "hi \0 there", "hi <|im_end|>", "a" * 70_000])
def test_a_bad_message_is_refused_in_a_line_and_the_turns_stay(generator: Generator, text: str) -> None:
    conversation = Conversation(generator, SHORT)
    said(conversation, "hello")
    before = conversation.turns
    with pytest.raises(DataError) as caught:
        conversation.ask(text)
    assert "\n" not in str(caught.value)
    assert conversation.turns == before


def test_an_answer_that_was_cut_short_counts_as_far_as_it_was_read(generator: Generator) -> None:
    conversation = Conversation(generator, Options(max_tokens=100))
    pieces = conversation.ask("hello")
    read = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.turns == (ChatMessage("user", "hello"), ChatMessage("assistant", read))
    assert said(conversation, "and now")


def test_a_question_that_got_no_answer_is_no_turn(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    generator._engine.ends = frozenset(range(generator._engine.vocabulary))
    assert said(conversation, "hello") == ""
    assert conversation.turns == ()


def test_a_conversation_outlives_a_change_of_adapter(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    said(conversation, "hello")
    generator.use("anna")
    said(conversation, "again")
    assert [turn.content for turn in conversation.turns if turn.role == "user"] == ["hello", "again"]
    conversation.reset()
    assert conversation.turns == ()


def test_an_answer_longer_than_the_context_is_refused_at_once(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="an answer of 256 tokens fills the model's 256"):
        Conversation(generator, Options(max_tokens=256))
    with pytest.raises(DataError, match="empty"):
        Conversation(generator, SHORT, "")


# The command


def chat(*arguments: str | Path, stdin: str = "") -> Done:
    whole = [sys.executable, "-m", "edgeadapt", "device", "chat", *map(str, arguments)]
    return subprocess.run(whole, input=stdin, capture_output=True, text=True, check=False)


def test_one_prompt_gets_one_answer_with_the_private_adapter(lm_bundle: Path, generator: Generator) -> None:
    generator.use("anna")
    expected = said(Conversation(generator, SHORT, "be kind"), "hello")
    done = chat("--bundle", lm_bundle, "--max-tokens", "10", "--system", "be kind", "--prompt", "hello", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "adapter": "anna",
        "prompt": "hello",
        "answer": expected,
        "tokens": 10,
        "prompt_tokens": len(generator.tokens([ChatMessage("system", "be kind"), ChatMessage("user", "hello")])),
        "finish": "length",
    }


def test_a_session_switches_lists_forgets_and_goes_on_after_what_goes_wrong(lm_bundle: Path) -> None:
    lines = ["hello", "/adapters", "/adapter global", "hello", "/adapter nobody", "hello", "/adapter global:0.5+anna"]
    lines += ["", "/adapter", "/nonsense", "hi <|im_end|>", "/reset", "/help", "/quit", "never read"]
    done = chat("--bundle", lm_bundle, "--max-tokens", "10", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    for shown in ("anna\nglobal\n", "adapter global, version 3, rank 4", "adapter anna+global:0.5, version 3, rank 10"):
        assert shown in done.stdout
    for shown in ("no adapter: the bare base", "there is no command /nonsense", "forgotten", "/quit           leave"):
        assert shown in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert "no sidecar for an adapter 'nobody'" in errors[0]
    assert "the model's own mark" in errors[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "", "--max-tokens", "10"], "an empty text has no answer"),
        (["--prompt", "x", "--adapter", "nobody"], "it has: anna, global"),
        (["--prompt", "x", "--adapter", ""], "adapter name ''"),
        (["--prompt", "x", "--max-tokens", "256"], "fills the model's 256"),
        (["--prompt", "x", "--temperature", "99"], "temperature"),
        (["--prompt", "x", "--stop", ""], "stop string"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(lm_bundle: Path, arguments: list[str], message: str) -> None:
    done = chat("--bundle", lm_bundle, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bytes_that_are_no_text_cost_their_line_only(lm_bundle: Path) -> None:
    whole = [sys.executable, "-m", "edgeadapt", "device", "chat", "--bundle", str(lm_bundle), "--max-tokens", "4"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(whole, input=b"hi \xff\nhello\n", capture_output=True, check=False, env=strict)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert done.stderr == b"edgeadapt: a text is not valid Unicode; give it in UTF-8\n"


@pytest.mark.parametrize("command", [["chat"], ["infer", "-"]])
def test_a_closed_standard_input_is_refused_in_a_line(lm_bundle: Path, command: list[str]) -> None:
    whole = [sys.executable, "-m", "edgeadapt", "device", *command, "--bundle", str(lm_bundle), "--max-tokens", "4"]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *whole], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "standard input is closed" in done.stderr


def test_options_that_exclude_each_other_are_refused(lm_bundle: Path) -> None:
    assert "--json goes with --prompt" in chat("--bundle", lm_bundle, "--json").stderr
    both = chat("--bundle", lm_bundle, "--adapter", "anna", "--base-only", "--prompt", "x")
    assert "exclude each other" in both.stderr


def test_infer_continues_a_text_with_each_adapter(lm_bundle: Path, generator: Generator) -> None:
    generator.use("global")
    expected = "".join(generator.complete("turn on", SHORT))
    whole = [sys.executable, "-m", "edgeadapt", "device", "infer", "--bundle", str(lm_bundle), "--max-tokens", "10"]
    done = subprocess.run([*whole, "--adapter", "global", "turn on"], capture_output=True, text=True, check=True)
    assert done.stdout == f"turn on{expected}\n"
    done = subprocess.run([*whole, "--json", "turn on"], capture_output=True, text=True, check=True)
    (result,) = json.loads(done.stdout)["adapters"]
    assert result["adapter"] == "anna"
    assert result["answers"][0]["continuation"] not in ("", expected)


def test_control_c_ends_the_answer_and_not_the_conversation(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, draw, drawn = Conversation(generator, SHORT), generator._engine.draw, []

    def interrupted() -> Iterator[int]:
        drawn.append(True)
        for count, token in enumerate(draw()):
            if len(drawn) == 1 and count == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(generator._engine, "draw", interrupted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\nhello\n")))
    command._talk(conversation, generator)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" …")
    assert second == conversation.turns[-1].content.strip("\n")
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2


def test_control_c_ends_a_command_that_answers_one_prompt(generator: Generator) -> None:
    def interrupted() -> Iterator[int]:
        raise KeyboardInterrupt
        yield

    generator._engine.draw = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        command._once(Conversation(generator, SHORT), generator, "hello", as_json=False)


def test_control_c_at_the_prompt_gives_up_the_line_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[Any] = [KeyboardInterrupt, "hello", EOFError]

    def typed(_prompt: str) -> str:
        given = answers.pop(0)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", typed)
    assert command._line("> ") == "hello"
    assert "/quit leaves" in capsys.readouterr().out
    assert command._line("> ") is None


def test_what_steers_a_terminal_is_not_printed() -> None:
    assert printable("\x1b[31mred\x07\x9b2J\n\tnaïve 👩‍🚀") == "[31mred2J\n\tnaïve 👩‍🚀"
