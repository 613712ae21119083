"""``bundle add --calibrate`` finds the temperature of what devices run, and refuses phrases that give none."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import manifest_path
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support.bundles import stated

Run = Callable[..., Any]
LABELS = ("Light", "Lock", "Music", "Timer")
WORDS = ("turn", "on", "off", "the", "light", "door", "lock", "play", "music", "set", "a", "timer", "ten", "kitchen")


def phrases(count: int) -> list[str]:
    rng = random.Random(3)  # noqa: S311  # not a secret
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(count)]


@pytest.fixture
def shop(tmp_path: Path, exported_int8: ExportedBase, model: PeftModel) -> Path:
    """A bundle without adapters, its keys, and a folder that peft saved."""
    key = IdentityKey.generate(SystemEntropy())
    (tmp_path / "key.pem").write_bytes(key.to_pem())
    (tmp_path / "trust.pem").write_bytes(key.public.to_pem())
    write_bundle(tmp_path / "bundle", exported_int8, [], key=key)
    model.save_pretrained(str(tmp_path / "lora"))
    (tmp_path / "labels").write_text("\n".join(LABELS))
    return tmp_path


def add(shop: Path, *more: str | Path) -> list[str | Path]:
    source = ["add", "--peft", shop / "lora", "--labels", shop / "labels"]
    return [*source, "--bundle", shop / "bundle", "--key", shop / "key.pem", *more]


def write(shop: Path, rows: list[tuple[str, str]]) -> Path:
    path = shop / "held-out.tsv"
    path.write_text("".join(f"{label}\t{phrase}\n" for label, phrase in rows))
    return path


def as_at(shop: Path, temperature: float, count: int) -> list[tuple[str, str]]:
    """Phrases whose labels are as probable as the device's session would say at this temperature."""
    session, rng = ClassificationSession.open(shop / "bundle"), np.random.default_rng(0)
    rows = []
    for text, ranking in zip(texts := phrases(count), session.rank(texts, "global", 4), strict=True):
        powers = np.array([prediction.probability for prediction in ranking]) ** (1 / temperature)
        rows.append((ranking[rng.choice(4, p=powers / powers.sum())].label, text))
    return rows


def test_the_temperature_is_that_of_what_a_device_answers(export: Run, shop: Path) -> None:
    assert export(*add(shop, "--format", "int4")).code == 0
    before = ClassificationSession.open(shop / "bundle").rank(phrases(5), "global", 4)
    held_out = write(shop, as_at(shop, 2.5, 800))
    done = export(*add(shop, "--format", "int4", "--calibrate", held_out, "--json"))
    assert done.code == 0, done.err
    row = done.json()
    temperature = row["temperature"]
    assert temperature == row["calibration"]["temperature"] == stated(shop / "bundle").temperature
    assert temperature == pytest.approx(2.5, rel=0.25)
    assert row["version"] == 2  # another temperature is another content
    assert row["calibration"]["after"] < row["calibration"]["before"]
    after = ClassificationSession.open(shop / "bundle").rank(phrases(5), "global", 4)
    for one, other in zip(before, after, strict=True):
        assert [p.label for p in one] == [p.label for p in other]
        assert other[0].probability < one[0].probability


def test_a_whole_bundle_is_calibrated_in_one_command(export: Run, shop: Path, tiny_base: Base) -> None:
    held_out = write(shop, [(LABELS[number % 4], phrase) for number, phrase in enumerate(phrases(60))])
    command = [*add(shop, "--base", tiny_base.folder, "--calibrate", held_out, "--json")]
    command[command.index(shop / "bundle")] = shop / "new"
    done = export(*command)
    assert done.code == 0, done.err
    assert stated(shop / "new").temperature == done.json()["calibration"]["temperature"] != 1


def test_another_temperature_of_a_version_that_devices_may_have_is_warned_of(export: Run, shop: Path) -> None:
    assert export(*add(shop, "--version", "4")).code == 0
    held_out = write(shop, as_at(shop, 2.0, 60))
    assert "devices that accepted version 4" in export(*add(shop, "--version", "4", "--calibrate", held_out)).err
    assert "devices" not in export(*add(shop, "--version", "4", "--calibrate", held_out)).err


def test_answers_that_are_all_right_are_said_to_be(export: Run, shop: Path) -> None:
    assert export(*add(shop)).code == 0
    session = ClassificationSession.open(shop / "bundle")
    answers = session.classify(phrases(60), "global")
    held_out = write(shop, [(answer.label, text) for answer, text in zip(answers, phrases(60), strict=True)])
    done = export(*add(shop, "--calibrate", held_out))
    assert done.code == 0, done.err
    assert "60 answered right" in done.out
    assert (
        done.out.splitlines()[-1] == "all are answered right, so they do not show how sure to be: give harder phrases"
    )


@pytest.mark.parametrize(
    ("rows", "code", "about"),
    [
        ([("Light", "light on")] * 49, 5, "--calibrate"),
        ([("Light", "light on")] * 60 + [("Heating", "warmer")], 5, "label"),
        ([], 5, "held-out.tsv"),
    ],
    ids=["few", "label that the head lacks", "empty"],
)
def test_phrases_that_give_no_temperature_are_refused_and_nothing_is_written(
    export: Run, shop: Path, rows: list[tuple[str, str]], code: int, about: str
) -> None:
    export(*add(shop, "--calibrate", write(shop, rows))).refused(code, about)
    assert not (shop / "bundle" / manifest_path("global")).exists()


def test_labels_that_the_head_has_no_row_for_and_a_folder_without_a_bundle_are_refused(export: Run, shop: Path) -> None:
    held_out = write(shop, [("Fifth", phrase) for phrase in phrases(60)])
    (shop / "labels").write_text("\n".join([*LABELS, "Fifth"]))
    done = export(*add(shop, "--calibrate", held_out))
    assert (done.code, done.out, done.error.about) == (5, "", "labels")
    command = add(shop, "--calibrate", held_out)
    command[command.index(shop / "bundle")] = shop / "nothing"
    export(*command).refused(2, "manifest.json")
