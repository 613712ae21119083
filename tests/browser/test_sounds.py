"""The page hears sounds as the native device does: samples, answers and lessons, from a file or the microphone."""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.inference.trust import Trust
from client.training.examples import Example
from edgeadapt.bases.base import find_base
from edgeadapt.bases.sounds import RATE, SoundReader, signal, sound
from tests.browser.conftest import IN_BROWSER, Serve
from tests.browser.test_page import shown
from tests.browser.test_pictures import READ, answers, assert_taught_alike, bundle_of
from tests.browser.test_training import PLAIN, contributes_as_natively
from tests.support.nodetab import NodeTab
from tests.support.sounds import WINDOWS, file_of, make_base, tone, tones, windows

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    return bundle_of(folder, make_base(folder / "model"), tones(12, 7))


@pytest.mark.parametrize(("reader", "moments"), [(SoundReader(RATE, 400, 1), 1000), (SoundReader(50, 52, 6), 61)])
def test_samples_are_those_of_python(page: Any, serve: Serve, bundle: Path, reader: SoundReader, moments: int) -> None:
    sizes = (1, reader.length - 1, reader.length, moments)
    asked = [signal(RNG.integers(-(2**15) + 1, 2**15, (size, reader.channels)), reader.rate) for size in sizes]
    asked += [f"{asked[-1]}#{number}" for number in (1, 2, 16)]
    asked.append(signal(np.tile(RNG.integers(-99, 99, (reader.length, reader.channels)), (3, 1)), reader.rate))
    page.goto(serve(bundle))
    page.evaluate(IN_BROWSER)
    found = page.evaluate(f"{READ}({json.dumps([reader.to_str(), asked])})")
    for ids, text in zip(found, asked, strict=True):
        assert ids == reader.encode(text).ids.tolist()


def test_what_is_no_sound_is_refused_as_natively(page: Any, serve: Serve, bundle: Path) -> None:
    def uri(content: bytes) -> str:
        return f"data:audio/wav;base64,{base64.b64encode(content).decode()}"

    odd = ["turn on the light", "data:audio/wav;base64,AAAA", "data:audio/wav;base64,?", "data:audio/ogg;base64,R0lGOD"]
    odd += ["data:audio/wav;base64," + "A" * 2**18, uri(file_of([1, 2], 8000)), uri(file_of([1, 2])[:-1])]
    odd += [uri(file_of([1, 2])) + end for end in ("#", "#0", "#17", "#1#2", "#01")]
    page.goto(serve(bundle))
    page.evaluate(IN_BROWSER)
    found = page.evaluate(f"{READ}({json.dumps([SoundReader(RATE, 400, 1).to_str(), odd])})")
    assert all(one.startswith("DataError sound: ") for one in found)
    assert ["above the limit" in one for one in found].index(True) == 4
    assert f"at {RATE} Hz" in found[5]


def test_a_tab_trains_variants_in_a_round_as_a_native_device(tab: NodeTab, bundle: Path) -> None:
    """All are in one batch; a variant counts as no example of its own."""
    manifest = Trust.open(bundle).bundle.adapter_manifest("global")
    assert manifest.peft_config is not None
    task = replace(PLAIN, peft_config=manifest.peft_config, labels=manifest.labels, batch_size=64, variants=3)
    made = [Example(text, label) for text, label in tones(5, 3)]
    tab.open(bundle)
    contributes_as_natively(tab, bundle, task, made, [text for text, _ in tones(3, 5)])


def test_a_chosen_file_is_answered_as_natively_and_teaches_the_same(
    page: Any, serve: Serve, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle.parent, tmp_path / "own")
    own, file = tmp_path / "own" / "bundle", tmp_path / "a.wav"
    file.write_bytes(tone(1, 99))
    page.goto(serve(own))
    assert page.state() == "good"
    assert page.evaluate("document.getElementById('said').hidden && document.getElementById('picture').hidden")
    page.pick("#sound-file", file)
    page.until("document.getElementById('answer-caption').textContent.startsWith('A sound with global')")
    assert page.evaluate("document.getElementById('heard').textContent") == "A sound of 0.8 s"
    text = page.evaluate("document.getElementById('phrase').value")
    there, here = (SoundReader(RATE, RATE, 1).encode(one).ids for one in (text, sound(file.read_bytes())))
    assert np.abs(there - here).max() <= 1  # a browser divides by 32768
    assert_taught_alike(page, own, text)


def test_a_file_of_a_window_of_sensors_is_answered_as_natively(page: Any, serve: Serve, tmp_path: Path) -> None:
    own = bundle_of(tmp_path, find_base(WINDOWS), windows(12, 7))
    ((text, _),), file = windows(1, 9), tmp_path / "a.wav"
    file.write_bytes(base64.b64decode(text.partition(",")[2]))
    page.goto(serve(own))
    page.pick("#sound-file", file)
    page.until("document.getElementById('answer-caption').textContent.startsWith('A window of sensors with global')")
    assert page.evaluate("document.getElementById('phrase').value") == text
    assert_taught_alike(page, own, text)
    (tmp_path / "b.wav").write_bytes(file_of(RNG.integers(-9, 9, (40, 3)), 51))
    page.pick("#sound-file", tmp_path / "b.wav")
    page.until("/3 channels at 50 Hz/.test(document.getElementById('phrase-error').textContent)")


def test_the_microphone_is_asked_what_it_hears(page: Any, serve: Serve, bundle: Path) -> None:
    page.goto(serve(bundle))
    page.evaluate("document.getElementById('microphone').click()")
    page.until("document.getElementById('microphone').textContent === 'Stop'")
    page.until("document.getElementById('heard').textContent.startsWith('Recording')")
    page.evaluate("document.getElementById('microphone').click()")
    page.until("document.getElementById('answer-caption').textContent.startsWith('A sound with global')")
    text = page.evaluate("document.getElementById('phrase').value")
    assert [label for label, _ in shown(page)] == [label for label, _ in answers(bundle, text)]
    assert page.evaluate("document.getElementById('microphone').textContent") == "Record"


def test_a_microphone_that_is_refused_and_a_file_that_is_no_sound_are_one_line(
    page: Any, serve: Serve, bundle: Path, tmp_path: Path
) -> None:
    page.goto(serve(bundle))
    page.evaluate("navigator.mediaDevices.getUserMedia = async () => { throw new Error('NotAllowedError') }")
    page.evaluate("document.getElementById('microphone').click()")
    page.until("document.getElementById('phrase-error').textContent !== ''")
    assert "allow it for this page, or choose a file" in page.alert("phrase-error")
    (tmp_path / "a.wav").write_text("no sound")
    page.pick("#sound-file", tmp_path / "a.wav")
    page.until("/choose a WAV/.test(document.getElementById('phrase-error').textContent)")
