"""What a device counts of its own answers: nothing by default, no text, and only past days are handed out."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import edgeadapt
from aggregation.errors import TrustError
from client.inference import usage
from client.inference.usage import KEPT, LEARNED, USAGE, Usage, UsageDay, today
from edgeadapt.formats import storage
from edgeadapt.program import cli
from tests.client.learning.test_learner import drawn, phone, trainable
from tests.support import refused

__all__ = ["drawn", "phone", "trainable"]  # fixtures

TEXTS = ("turn on the lights", "which door is open")


def run(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def shown(bundle: Path) -> dict[str, int]:
    days = json.loads(run("device", "usage", "--bundle", bundle, "--json"))["days"]
    return {key: count for day in days for key, count in day["counts"].items()}


def test_answers_and_lessons_are_counted_once_the_owner_wants_it_and_no_text_is_kept(phone: Path) -> None:
    bundle = phone
    ask = ("device", "infer", "--bundle", bundle, "--json")
    adapters = json.loads(run(*ask, *TEXTS))["adapters"]
    assert "counts none" in run("device", "usage", "--bundle", bundle)
    run("device", "usage", "--bundle", bundle, "--on")
    assert shown(bundle) == {}
    run(*ask, *TEXTS, "   ")
    counts = shown(bundle)
    assert counts["lessons/answered"] == 3
    assert counts["labels/"] == 1
    named = [intent["intent"] for answer in adapters[0]["answers"] for intent in answer["intents"]]
    assert all(counts[f"labels/{label}"] == named.count(label) for label in named)
    for kind in ("unknown", "latency", "adapter", "labels"):
        assert sum(count for key, count in counts.items() if key.startswith(f"{kind}/")) == 3
    raw = (storage.real(bundle).parent / LEARNED / USAGE).read_bytes()
    assert all(text.encode() not in raw for text in (*TEXTS, *named, "answered"))
    run("device", "infer", "--bundle", bundle, "--teach", named[0], TEXTS[1])
    run("device", "learn", "--bundle", bundle, "--undo")
    model = edgeadapt.load(bundle)
    model([*TEXTS])
    model.teach(TEXTS[1], named[0])
    counts = shown(bundle)
    assert [counts[f"lessons/{kind}"] for kind in ("answered", "corrected", "undone")] == [5, 2, 1]
    assert "answers" in run("device", "usage", "--bundle", bundle)
    run("device", "usage", "--bundle", bundle, "--erase")
    run(*ask, *TEXTS)
    assert "counts none" in run("device", "usage", "--bundle", bundle)


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["a/1", "b/2", "lessons/answered"])), max_size=40))
def test_counts_of_days_add_up_and_old_days_go(asked: list[tuple[int, str]]) -> None:
    found = Usage()
    for day, key in sorted(asked):
        found = found.plus(day, [key])
    assert Usage.open(found.seal(bytes(32)), bytes(32)) == found
    last = max((day for day, _ in asked), default=0)
    kept = [(day, key) for day, key in asked if day > last - KEPT]
    assert found.counts(last - KEPT + 1, KEPT).total() == len(kept)
    assert found.before(last).counts(0, last + 1).total() == sum(day < last for day, _ in kept)


def test_what_is_damaged_is_named_and_can_be_begun_again(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    usage.Usage.begin(bundle)
    usage.count(bundle, ["labels/on"])
    found = Usage.read(bundle)
    assert found is not None
    assert found.days == (UsageDay(today(), {"labels/on": 1}),)
    file = tmp_path / LEARNED / USAGE
    for damage in (b"", b"x", file.read_bytes()[:-1]):
        file.write_bytes(damage)
        with refused(TrustError, USAGE):
            Usage.read(bundle)
    usage.Usage.erase(bundle)
    usage.Usage.begin(bundle)
    assert Usage.read(bundle) == Usage()


def test_an_answer_is_given_although_it_cannot_be_counted(phone: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("device", "usage", "--bundle", phone, "--on")
    (storage.real(phone).parent / LEARNED / USAGE).write_bytes(b"damaged")
    done = CliRunner().invoke(cli, ["device", "infer", "--bundle", str(phone), *TEXTS])
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, len(TEXTS))
    assert "not counted" in caplog.text
    assert "--erase" in caplog.text


def test_nothing_is_written_where_nothing_is_counted(tmp_path: Path) -> None:
    usage.count(tmp_path / "bundle", ["labels/on"])
    assert not list(tmp_path.iterdir())
