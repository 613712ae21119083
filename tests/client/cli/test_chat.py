"""``edgeadapt device chat`` answers a prompt or a conversation, and goes on after an error or Ctrl-C."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.errors import EdgeAdaptError
from client.cli import chat as command
from client.cli import device
from client.cli.options import printable
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.guide import Guide, GuideKind
from client.inference.text import SamplingParams

SHORT = SamplingParams(max_tokens=10)
Done = subprocess.CompletedProcess[str]


def chat(*arguments: str | Path, stdin: str = "") -> Done:
    """The command in a process of its own."""
    whole = [sys.executable, "-m", "edgeadapt", "device", "chat", *map(str, arguments)]
    return subprocess.run(whole, input=stdin, capture_output=True, text=True, check=False)


def test_a_prompt_is_answered_with_the_personal_adapter(lm_bundle: Path, generator: Generator) -> None:
    expected = "".join(Conversation(generator, SHORT, "be kind", "anna").ask("hello"))
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


def test_a_conversation_runs_commands_and_goes_on_after_errors(lm_bundle: Path) -> None:
    lines = ["hello", "/adapters", "/adapter global", "hello", "/adapter nobody", "hello", "/adapter global:0.5+anna"]
    lines += ["", "/adapter", "/nonsense", "hi <|im_end|>", "/reset", "/help", "/quit", "never read"]
    done = chat("--bundle", lm_bundle, "--max-tokens", "10", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    for shown in ("anna\nglobal\n", "adapter global, version 3, rank 4", "adapter anna+global:0.5, version 3, rank 10"):
        assert shown in done.stdout
    for shown in ("no adapter: the bare base", "unknown command /nonsense", "conversation dropped", command.HELP):
        assert shown in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert "'nobody'" in errors[0]
    assert "'<|im_end|>'" in errors[1]


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--prompt", "", "--max-tokens", "10"], "text"),
        (["--prompt", "x", "--adapter", "global:x"], "composition.weight"),
        (["--prompt", "x", "--max-tokens", "256"], "max_tokens"),
        (["--prompt", "x", "--beams", "2", "--temperature", "1"], "beams"),
        (["--prompt", "x", "--max-tokens", "9", "--regex", "(("], "guide"),
        (["--prompt", "x", "--regex", "a", "--beams", "2"], "guide"),
        (["--prompt", "x", "--regex", "a", "--stop", "b"], "guide"),
        (["--prompt", "x", "--regex", "a", "--grammar", "grammar.lark"], "guide"),
        (["--prompt", "x", "--json-schema", "missing.json"], "missing.json"),
        (["--prompt", "x", "--json-schema", "/dev/zero"], "zero"),
        (["--prompt", "x", "--max-tokens", "5", "--regex", "a{9}"], "answer"),
    ],
)
def test_wrong_input_is_refused(lm_bundle: Path, arguments: list[str], about: str) -> None:
    result = CliRunner().invoke(device, ["chat", "--bundle", str(lm_bundle), *arguments])
    assert isinstance(result.exception, EdgeAdaptError), result.output
    assert result.exception.about == about


@pytest.mark.parametrize("name", ["nobody", ""])
def test_an_unknown_adapter_is_one_line_and_a_failure(lm_bundle: Path, name: str) -> None:
    done = chat("--bundle", lm_bundle, "--prompt", "x", "--adapter", name)
    assert done.returncode != 0
    assert repr(name) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_line_that_is_not_text_is_refused_and_the_next_one_answered(lm_bundle: Path) -> None:
    whole = [sys.executable, "-m", "edgeadapt", "device", "chat", "--bundle", str(lm_bundle), "--max-tokens", "4"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(whole, input=b"hi \xff\nhello\n", capture_output=True, check=False, env=strict)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert done.stderr == b"edgeadapt: the text is not valid Unicode; give it in UTF-8\n"


@pytest.mark.parametrize("command", [["chat"], ["infer", "-"]], ids=["chat", "infer"])
def test_a_closed_standard_input_is_refused_in_a_line(lm_bundle: Path, command: list[str]) -> None:
    whole = [sys.executable, "-m", "edgeadapt", "device", *command, "--bundle", str(lm_bundle), "--max-tokens", "4"]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *whole], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "standard input is closed" in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--json"], "--prompt"), (["--adapter", "anna", "--base-only", "--prompt", "x"], "--base-only")],
    ids=["json without a prompt", "adapter and base only"],
)
def test_options_that_exclude_each_other_are_refused(lm_bundle: Path, options: list[str], named: str) -> None:
    result = CliRunner().invoke(device, ["chat", "--bundle", str(lm_bundle), *options])
    assert result.exit_code == 2
    assert named in result.output


def test_infer_continues_a_text_with_each_adapter(lm_bundle: Path, generator: Generator) -> None:
    expected = "".join(generator.complete("turn on", SHORT, "global"))
    infer = ["infer", "--bundle", str(lm_bundle), "--max-tokens", "10"]
    assert CliRunner().invoke(device, [*infer, "--adapter", "global", "turn on"]).output == f"turn on{expected}\n"
    (result,) = json.loads(CliRunner().invoke(device, [*infer, "--json", "turn on"]).stdout)["adapters"]
    assert result["adapter"] == "anna"
    assert result["answers"][0]["continuation"] not in ("", expected)


def test_a_prompt_is_answered_by_a_schema_and_an_answer_that_was_cut_is_an_error(
    lm_bundle: Path, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["on", "off"], "x-guidance": {"whitespace_flexible": false}}')
    arguments: list[str | Path] = ["--bundle", lm_bundle, "--json-schema", schema, "--prompt", "hello", "--json"]
    whole = chat(*arguments, "--max-tokens", "10")
    assert whole.returncode == 0, whole.stderr
    row = json.loads(whole.stdout)
    assert json.loads(row["answer"]) in ("on", "off")
    assert (row["finish"], row["valid"]) == ("end", True)
    cut = json.loads(chat(*arguments, "--max-tokens", "2").stdout)
    assert (cut["finish"], cut["valid"]) == ("length", False)
    shown = chat(*arguments[:-1], "--max-tokens", "2")
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (5, f"{cut['answer']}\n", 1)
    assert "was cut after 2 tokens; raise --max-tokens" in shown.stderr


def test_a_conversation_with_a_guide_goes_on_after_an_answer_that_was_cut(lm_bundle: Path) -> None:
    done = chat("--bundle", lm_bundle, "--max-tokens", "3", "--regex", "no|yes+!", stdin="hello\nhello\n")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    assert all("raise --max-tokens" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "params",
    [SHORT, replace(SHORT, repetition_penalty=1.5), replace(SHORT, guide=Guide(GuideKind.REGEX, "[a-z]{9}"))],
    ids=["plain", "penalty", "guide"],
)
def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    generator: Generator,
    engine: GenerationEngine,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation, draw, drawn = Conversation(generator, params), engine.draw, []

    def interrupted() -> Iterator[int]:
        drawn.append(True)
        for count, token in enumerate(draw()):
            if len(drawn) == 1 and count == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(engine, "draw", interrupted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\nhello\n")))
    command.converse(conversation, generator)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" …")
    assert second == conversation.messages[-1].content.strip("\n")
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2


def test_ctrl_c_ends_a_command_that_answers_one_prompt(
    generator: Generator, engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[int]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(engine, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.answer(Conversation(generator, SHORT), generator, "hello", as_json=False)


def test_ctrl_c_at_the_prompt_discards_the_line_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[Any] = [KeyboardInterrupt, "hello", EOFError]

    def typed(_prompt: str) -> str:
        given = answers.pop(0)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", typed)
    assert command.read_line("> ") == "hello"
    assert "/quit quits" in capsys.readouterr().out
    assert command.read_line("> ") is None


def test_control_characters_are_not_printed() -> None:
    assert printable("\x1b[31mred\x07\x9b2J\n\tnaïve 👩‍🚀") == "[31mred2J\n\tnaïve 👩‍🚀"
