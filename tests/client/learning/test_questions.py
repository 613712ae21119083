"""What a device was asked is kept if its owner wants it, without personal data, and chosen by what a label teaches."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeadapt
from aggregation.errors import ConfigError, DataError, TrustError
from client.cli import options, sources
from client.inference.session import ClassificationSession
from client.inference.usage import LEARNED, Usage
from client.learning import Learner, questions
from client.learning.questions import MOST, AskedTexts, worth_asking
from client.training import hygiene
from edgeadapt.formats.policy import Policy
from tests.client.learning.test_data import kitchen
from tests.client.learning.test_learner import drawn, phone, run, trainable
from tests.support import refused
from tests.support.models import LABELS

__all__ = ["drawn", "kitchen", "phone", "trainable"]  # fixtures

TEXTS = ("turn on the lights", "which door is open", "play music")
MAIL, TOKEN = "turn on anna@home.example", "turn on ghp_0123456789abcdefghij"


def ask(bundle: Path, *texts: str) -> None:
    done = run("infer", "--bundle", bundle, "--json", *texts)
    assert done.exit_code == 0, done.output


def kept(bundle: Path) -> AskedTexts:
    found = AskedTexts.read(bundle)
    assert found is not None
    return found


@pytest.fixture
def curious(phone: Path) -> Path:
    """A bundle whose device keeps what it is asked, and was asked ``TEXTS``."""
    assert run("usage", "--bundle", phone, "--on", "--texts").exit_code == 0
    ask(phone, *TEXTS)
    return phone


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | BaseException]]:
    """What a person types on a terminal, in turn."""
    lines = list[str | BaseException]()

    def prompt(*_: object, **__: object) -> str:
        if isinstance(line := lines.pop(0), BaseException):
            raise line
        return line

    monkeypatch.setattr(options, "standard_input", lambda: SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sources.click, "prompt", prompt)
    yield lines
    assert lines == []


def test_texts_are_kept_once_the_owner_wants_it_each_once_and_encrypted(phone: Path) -> None:
    ask(phone, *TEXTS)
    assert run("usage", "--bundle", phone, "--on").exit_code == 0
    ask(phone, *TEXTS)
    assert not AskedTexts.is_on(phone)
    assert run("usage", "--bundle", phone, "--on", "--texts").exit_code == 0
    ask(phone, TEXTS[0], TEXTS[1], "\N{SNOWMAN}", "   ")
    edgeadapt.load(phone)([TEXTS[0].upper() + "!", TEXTS[2]])
    assert kept(phone) == AskedTexts(TEXTS)
    assert all(text.encode() not in (phone.parent / LEARNED / "asked.sealed").read_bytes() for text in TEXTS)
    assert json.loads(run("usage", "--bundle", phone, "--json").output)["texts"] == 3
    assert run("usage", "--bundle", phone, "--erase").exit_code == 0
    assert (AskedTexts.is_on(phone), Usage.is_on(phone)) == (False, False)


def test_a_text_with_personal_data_or_a_secret_or_that_the_policy_blocks_is_not_kept(
    curious: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask(curious, MAIL, TOKEN, "call +49 30 901820", "turn on the light")
    assert kept(curious).texts == (*TEXTS, "turn on the light")
    session = ClassificationSession.open(curious)
    session.policy = Policy(input=("unlock",))
    questions.remember(curious, [("unlock the door", session.ranking("unlock the door", "global", 1))])
    assert kept(curious).texts == (*TEXTS, "turn on the light")

    def broken(*_: object) -> Iterator[str]:
        raise RuntimeError(MAIL)

    monkeypatch.setattr(questions, "reasons", broken)
    ask(curious, "lock the door")
    assert "not kept: RuntimeError" in caplog.text
    assert MAIL not in caplog.text


def test_without_the_packages_that_find_personal_data_no_text_is_kept(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hygiene, "find_spec", lambda name: None if name == "phonenumbers" else find_spec(name))
    done = run("usage", "--bundle", phone, "--on", "--texts")
    assert isinstance(done.exception, ConfigError)
    assert "edgeadapt[data]" in str(done.exception)
    assert not AskedTexts.is_on(phone)


@given(st.lists(st.text("ab ", min_size=1), max_size=12), st.lists(st.text("ab", min_size=1), max_size=4))
def test_the_record_holds_each_text_once_and_is_read_as_it_was_written(asked: list[str], done: list[str]) -> None:
    found = AskedTexts().plus(asked).settling(done).plus([*asked, *done])
    assert AskedTexts.open(found.seal(bytes(32)), bytes(32)) == found
    every = [hygiene.words(text) for text in found.texts]
    assert len(every) == len(set(every))
    assert not set(every) & set(map(hygiene.words, found.settled))
    assert found.without(lambda text: "a" in text).texts == tuple(text for text in found.texts if "a" not in text)


def test_the_oldest_texts_are_dropped() -> None:
    found = AskedTexts().plus(map(str, range(MOST + 2)))
    assert (len(found.texts), found.texts[0]) == (MOST, "2")
    assert found.settling(found.texts).settling(["x"]).settled[-2:] == (str(MOST + 1), "x")
    assert len(found.settling(found.texts).settling(["x"]).settled) == MOST


def test_what_is_damaged_is_named_never_stops_an_answer_and_can_be_erased(
    curious: Path, kitchen: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = curious.parent / LEARNED / "asked.sealed"
    for damage in (b"", b"x", file.read_bytes()[:-1], b"edgeadapt/usage/1\0" + file.read_bytes()[18:]):
        file.write_bytes(damage)
        with refused(TrustError, "asked.sealed"):
            AskedTexts.read(curious)
    ask(curious, "lock the door")
    assert "not kept" in caplog.text
    assert run("data", "erase", "--state", kitchen, "--all", "--yes").exit_code == 0
    assert kept(curious) == AskedTexts()


def test_erasing_a_text_of_a_device_erases_what_was_asked(curious: Path, kitchen: Path) -> None:
    assert run("data", "erase", "--state", kitchen, "--text", "Which door is open?", "--yes").exit_code == 0
    assert kept(curious).texts == (TEXTS[0], TEXTS[2])


def test_the_texts_are_shown_with_todays_guess_and_a_pipe_teaches_nothing(curious: Path) -> None:
    row = json.loads(run("ask", "--bundle", curious, "--next", "2", "--json").output)
    assert len({one["text"] for one in row["questions"]} & {*TEXTS}) == 2
    session = ClassificationSession.open(curious)
    for one in row["questions"]:
        (ranked,) = session.rank([one["text"]], "global", 3)
        assert [guess["label"] for guess in one["guesses"]] == [guess.label for guess in ranked]
    shown = run("ask", "--bundle", curious, "--next", "5").output
    assert all(text in shown for text in TEXTS)
    assert kept(curious) == AskedTexts(TEXTS)


def test_a_person_gives_labels_by_number_and_name_and_is_not_asked_again(
    curious: Path, typed: list[str | BaseException]
) -> None:
    first, second, third = json.loads(run("ask", "--bundle", curious, "--next", "3", "--json").output)["questions"]
    typed += ["2", "nonsense", LABELS[3], ""]
    done = run("ask", "--bundle", curious, "--next", "3", "--adapter", "global")
    assert done.exit_code == 0, done.output
    assert "'nonsense' is not a label" in done.output
    with Learner.open(curious) as learner:
        taught = {one.text: one.label for one in learner.history.corrections}
    assert taught == {first["text"]: first["guesses"][1]["label"], second["text"]: LABELS[3]}
    assert kept(curious) == AskedTexts((), (first["text"], second["text"], third["text"]))
    ask(curious, *TEXTS)
    assert "nothing that was asked" in run("ask", "--bundle", curious, "--next", "3").output


def test_ctrl_c_and_a_lesson_that_fails_leave_all_as_it_was(
    curious: Path, typed: list[str | BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in curious.parent.rglob("*") if path.is_file()}
    typed += ["1", click.Abort()]
    assert run("ask", "--bundle", curious, "--next", "3").exit_code == 1

    def fails(*_: object, **__: object) -> None:
        raise DataError("nothing was learned", about="corrections")

    monkeypatch.setattr(sources, "teach", fails)
    typed += ["1", ""]
    assert isinstance(run("ask", "--bundle", curious, "--next", "2").exception, DataError)
    assert {path: path.read_bytes() for path in curious.parent.rglob("*") if path.is_file()} == before


def test_a_text_that_was_taught_otherwise_is_not_asked_about(curious: Path) -> None:
    assert run("infer", "--bundle", curious, "--teach", LABELS[1], TEXTS[0].upper()).exit_code == 0
    row = json.loads(run("ask", "--bundle", curious, "--next", "5", "--json").output)
    assert {one["text"] for one in row["questions"]} == {*TEXTS[1:]}


def test_texts_below_a_policys_threshold_are_asked_about_and_denied_labels_are_not_shown(curious: Path) -> None:
    session = ClassificationSession.open(curious)
    best = session.classify([TEXTS[0]], "global")[0].label
    session.policy = Policy(least=1.0, deny=(best,))
    found = questions.questions(session, "global", TEXTS, 3, lambda _: None)
    assert 0 < len(found) < 3
    assert all(guess.label != best for one in found for guess in one.guesses)


@pytest.mark.parametrize(
    ("arguments", "about"),
    [(("ask", "--next", "3"), "--next"), (("usage", "--texts"), "--texts")],
)
def test_nothing_kept_and_an_option_alone_are_named(phone: Path, arguments: tuple[str, ...], about: str) -> None:
    with refused(ConfigError, about):
        raise run(*arguments, "--bundle", phone).exception or AssertionError


@pytest.mark.parametrize("arguments", [(), ("why", "--next", "3"), ("--next", "0"), ("--next", "65")])
def test_a_call_that_means_nothing_is_refused(phone: Path, arguments: tuple[str, ...]) -> None:
    assert run("ask", "--bundle", phone, *arguments).exit_code == 2


def test_doubt_likeness_to_others_and_distance_from_what_is_known_choose() -> None:
    east, north, up = np.eye(3, dtype=np.float32)
    nothing = np.zeros((0, 3), np.float32)
    meaning = np.stack([east, east, north, up])
    assert worth_asking(np.array([0.5, 0.4, 0.8, 0.7]), meaning, nothing, 9) == [0, 2, 3, 1]  # 0.9 of two alike, 0.8
    assert worth_asking(np.array([0.0, 0.0, 0.1, 0.2]), meaning, nothing, 2) == [3, 2]
    assert worth_asking(np.array([0.5, 0.4, 0.8, 0.7]), meaning, north[None], 2) == [0, 3]
    assert worth_asking(np.zeros(0), meaning[:0], nothing, 2) == []


def test_no_label_is_asked_for_that_the_bundle_cannot_learn(bundle: Path, typed: list[str | BaseException]) -> None:
    assert run("usage", "--bundle", bundle, "--on", "--texts").exit_code == 0
    ask(bundle, *TEXTS)
    assert typed == []  # nothing may be asked
    refusal = run("ask", "--next", "1", "--bundle", bundle)
    assert isinstance(refusal.exception, ConfigError)
    assert refusal.exception.about == "training.onnx"
    assert kept(bundle).texts == TEXTS
