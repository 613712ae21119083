"""``edgeadapt device chat`` answers a prompt or a conversation, and goes on after an error or Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aggregation.errors import EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.cli import chat as command
from client.cli import device
from client.cli.options import printable
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.guide import Guide, GuideKind
from client.inference.text import SamplingParams
from client.learning import Correction, Learner
from client.training.corrections import LessonHistory
from edgeadapt.formats.bundle import adapter_names
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile

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


# A person corrects a language model in the middle of a conversation, and takes the correction back.
LORA = PeftConfig.lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
SHORT_LESSON = SamplingParams(max_tokens=8)
PATIENCE = 120.0  # seconds, on a machine that has other work


@pytest.fixture(scope="module")
def trainable(lm_base: Any) -> ExportedBase:
    return export_causal(lm_base, LORA.target_modules, Profile.NATIVE_INT8, training=True)


@pytest.fixture
def talker(
    tmp_path: Path, trainable: ExportedBase, lm_source: Callable[..., AdapterSource], vendor: IdentityKey
) -> Path:
    """A bundle of a language model with a training graph and a global adapter of small values."""
    source = lm_source(peft_config=LORA)
    small = replace(source, tensors={name: np.float32(0.2) * value for name, value in source.tensors.items()})
    write_bundle(tmp_path / "bundle", trainable, [small], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def said(
    talker: Path,
    *lines: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    params: SamplingParams = SHORT_LESSON,
    system: str | None = None,
    adapter: str | None = None,
) -> Any:
    """What a conversation of these lines prints on standard output, and the lines of its errors."""
    generator = Generator.open(talker, threads=1)
    conversation = Conversation(generator, params, system, adapter or generator.library.default())
    text = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), errors="surrogateescape"))
    capsys.readouterr()
    command.converse(conversation, generator)
    found = capsys.readouterr()
    return found.out, found.err.splitlines()


@pytest.mark.usefixtures("one_thread")
def test_an_answer_is_taught_used_in_the_next_turn_and_undone(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["is it?", "/teach  yes ", "/reset", "is it?", "/adapters", "or not?", "/teach no", "/reset", "or not?"]
    lines += ["/undo", "/reset", "is it?", "/undo", "/reset", "is it?", "/adapters", "/undo"]
    shown, errors = said(talker, *lines, monkeypatch=monkeypatch, capsys=capsys)
    rows = shown.split("conversation dropped\n")
    first = rows[0].splitlines()[0]
    assert first != "yes"
    assert "personal version 4: 1 of 1 learned, " in rows[0]
    assert re.search(r"taught  \d+\.\d{3} → \d+\.\d{3}  yes", rows[0])
    after, names = rows[1].splitlines()[0], rows[1].splitlines()[1:3]
    assert (after, names) == ("yes", ["global", "personal"])
    assert "personal version 5: 1 of 1 learned, " in rows[1]
    assert rows[2].splitlines() == [
        "no",
        "adapter personal, version 6, rank 4, without what was learned last: 'or not?'",
    ]
    assert rows[3].splitlines()[0] == "yes"
    assert "adapter global, version 3, rank 4, without what was learned last: 'is it?'" in rows[3]
    assert rows[4].splitlines() == [first, "global"]
    assert len(errors) == 1
    assert "undo" in errors[0]


@pytest.mark.usefixtures("one_thread")
def test_what_cannot_be_taught_is_one_line_and_the_conversation_goes_on(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/teach yes", "is it?", "/teach", f"/teach {'b' * 2001}", "/teach <|im_end|>", f"/teach {'Zq%+7 ' * 60}"]
    lines += ["/teach b\0c", "/teach b\udcff"]
    lines += [
        "/adapter global:0.5",
        "/teach yes",
        "/undo",
        "/adapter",
        "/teach yes",
        "/adapter global",
        "/reset",
        "is it?",
    ]
    shown, errors = said(talker, *lines, monkeypatch=monkeypatch, capsys=capsys)
    expected = ["nothing was asked yet", "write the right answer", "2001 characters", "special token", "more tokens"]
    expected += ["NUL", "Unicode"]
    expected += ["choose it with /adapter NAME"] * 3
    assert len(errors) == len(expected)
    for about, error in zip(expected, errors, strict=True):
        assert about in error
    assert shown.splitlines()[0] == shown.splitlines()[-1]  # its answers
    assert adapter_names(talker) == ["global"]


@pytest.mark.usefixtures("one_thread")
def test_a_full_disk_leaves_the_adapter_and_the_conversation(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.learning.learner.Learner._write", full)
    shown, errors = said(talker, "is it?", "/teach yes", "/reset", "is it?", monkeypatch=monkeypatch, capsys=capsys)
    first, dropped, again = shown.splitlines()
    assert (first, dropped) == (again, "conversation dropped")
    assert errors == ["edgeadapt: No space left on device"]


@pytest.mark.usefixtures("one_thread")
def test_output_that_cannot_be_written_ends_the_conversation(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.open(talker, threads=1)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/help\n/help\n")))
    full = Path("/dev/full").open("w")  # noqa: SIM115  # closing it fails as well
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):
        command.converse(Conversation(generator, SHORT_LESSON), generator)
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.usefixtures("one_thread")
def test_the_last_message_is_corrected_also_if_its_answer_was_empty_or_it_was_refused(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, _ = said(talker, "is it?", "or not?", monkeypatch=monkeypatch, capsys=capsys)
    first, second = shown.splitlines()
    stop = next(second[:size] for size in range(1, len(second) + 1) if second[:size] not in first)
    empty = SamplingParams(max_tokens=8, stop=(stop,))
    lines = ["is it?", "or not?", "/teach no", "/undo", "a" * 2500, "/teach no"]
    shown, errors = said(talker, *lines, monkeypatch=monkeypatch, capsys=capsys, params=empty)
    assert "1 of 1 learned, " in shown
    assert shown.endswith("without what was learned last: 'or not?'\n")
    assert len(errors) == 2
    assert "shorten the text" in errors[0]
    assert "the prompt of correction 1 has 2500 characters" in errors[1]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("names", [("global", "kitchen"), ("kitchen", "office")], ids="+".join)
def test_undo_goes_back_to_the_adapter_that_was_taught_and_not_to_another(
    names: tuple[str, str],
    tmp_path: Path,
    trainable: ExportedBase,
    lm_source: Callable[..., AdapterSource],
    vendor: IdentityKey,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = lm_source(peft_config=LORA)
    small = [
        replace(
            source, name=name, tensors={key: np.float32(0.1 * size) * value for key, value in source.tensors.items()}
        )
        for size, name in enumerate(names, 1)
    ]
    bundle = tmp_path / "bundle"
    write_bundle(bundle, trainable, small, key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    lines = [
        "is it?",
        "/teach yes",
        "/adapter kitchen",
        "/undo",
        "/adapter personal",
        "/undo",
        "/reset",
        "is it?",
        "/undo",
    ]
    shown, errors = said(bundle, *lines, monkeypatch=monkeypatch, capsys=capsys, adapter="kitchen")
    rows = shown.splitlines()
    assert "adapter kitchen, version 3, rank 4, without what was learned last: 'is it?'" in rows
    assert rows[0] == rows[-1]  # its answers
    assert len(errors) == 2
    assert "choose personal instead of kitchen" in errors[0]
    assert "nothing to undo" in errors[1]
    assert adapter_names(bundle) == sorted(names)


@pytest.mark.usefixtures("one_thread")
def test_an_answer_that_a_system_prompt_would_hide_is_not_taught(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["is it?", "/teach yes"]
    _, errors = said(talker, *lines, monkeypatch=monkeypatch, capsys=capsys, system="Be kind.")
    assert len(errors) == 1
    assert "start without --system" in errors[0]
    assert adapter_names(talker) == ["global"]


def interrupted_after_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Learner._put_into_use

    def put(self: Learner, *arguments: Any) -> Any:
        real(self, *arguments)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Learner, "_put_into_use", put)


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_that_was_written_when_a_lesson_was_ended_can_be_used_and_undone(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["is it?", "/teach yes", "/reset", "is it?", "/adapter personal", "/reset", "is it?", "/undo"]
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after_writing(patch)
        shown, errors = said(talker, *lines, monkeypatch=monkeypatch, capsys=capsys)
    first, *_ = rows = [row for row in shown.splitlines() if row != " …"]
    assert rows[1:6] == [
        "conversation dropped",
        first,
        "adapter personal, version 4, rank 4",
        "conversation dropped",
        "yes",
    ]
    assert rows[6].startswith("adapter global, version 3")
    assert errors == []


class Terminal:
    def __init__(self, *arguments: str | Path) -> None:
        self._end, other = pty.openpty()
        whole = [sys.executable, "-m", "edgeadapt", "device", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(whole, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)

    def until(self, text: str) -> str:
        """What is shown from now on, up to ``text``."""
        end, found = time.monotonic() + PATIENCE, b""
        while text.encode() not in found:
            assert time.monotonic() < end, f"{text!r} is not in {found!r}"
            if select.select([self._end], [], [], 0.1)[0]:
                found += os.read(self._end, 1)
        return found.decode()

    def type(self, text: str) -> None:
        os.write(self._end, f"{text}\n".encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_ctrl_c_ends_a_lesson_on_a_terminal_whose_steps_are_shown_and_the_adapter_stays(talker: Path) -> None:
    """The answer that is interrupted takes all steps, since the model would never write it, and long ones, as much is
    rehearsed; on a machine that has other work they may have ended all the same, and it is taught again.
    """
    with Learner.open(talker) as learner:
        learner._save(LessonHistory(tuple(Correction(f"{number}?", "Zq%+7" * 20) for number in range(8))))
    terminal = Terminal("--bundle", talker, "--max-tokens", "8")
    try:
        terminal.until("> ")
        terminal.type("is it?")
        terminal.until("is it?")
        first = terminal.until("> ")
        for _ in range(20):
            terminal.type(f"/teach {'Zq%+7' * 20}")
            terminal.until("learning, step 2 of at most 30")
            terminal.interrupt()
            if "nothing was learned" not in (ended := terminal.until("> ")):
                break
        assert ended.endswith("\r\x1b[K …\r\n> ")
        assert adapter_names(talker) == ["global"]
        terminal.type("/reset")
        terminal.until("conversation dropped")
        terminal.until("> ")
        terminal.type("is it?")
        terminal.until("is it?")
        assert terminal.until("> ") == first
        (talker.parent / "learned" / "history.sealed").unlink()
        terminal.type("/teach yes")
        assert "\r\x1b[K" in terminal.until("1 of 1 learned")
        terminal.until("> ")
        terminal.type("/quit")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()
    assert adapter_names(talker) == ["global", "personal"]
