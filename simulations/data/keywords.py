"""Spoken words, synthesized: each client is a voice of espeak-ng with its own accent, pitch and speed, in a noisy room.

The voices are formant synthesizers, more alike than people are, and none says a word twice in the same way by itself:
pitch, speed, loudness, moment and noise are drawn for each recording.
"""

import io
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError
from edgeadapt.bases.media import library
from edgeadapt.bases.sounds import LOUDEST, RATE, signal

WORDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    *("lights", "music", "timer", "alarm", "weather", "volume", "door", "heating", "louder", "quieter"),
)
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2", "klatt3"),
    *("Alex", "Andy", "Annie", "David", "Denis", "Diogo", "Gene", "Henrique", "Jacky", "Lee", "Linda", "Mario"),
    *("Michael", "Mike", "Pablo", "Reed", "steph", "adam", "anika", "antonio", "aunty", "boris", "edward", "grandma"),
)
TRAIN, TEST = 5, 3  # recordings of each word and voice
LENGTH = 20_480  # samples


def rows() -> Iterator[dict[str, str]]:
    """Yield the recordings, for ``data.function``. Raises ConfigError: espeak-ng or a library is not installed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for recordings in pool.map(_voice, range(len(VARIANTS))):
            yield from recordings


def _voice(voice: int) -> list[dict[str, str]]:
    rng, recordings = np.random.default_rng(voice), []
    name = f"{ACCENTS[rng.integers(len(ACCENTS))]}+{VARIANTS[voice]}"
    pitch, speed = rng.integers(25, 75), rng.integers(130, 200)
    for word in WORDS:
        for number in range(TRAIN + TEST):
            said = _say(word, name, int(pitch + rng.integers(-8, 9)), int(speed + rng.integers(-20, 21)))
            text = signal(_recorded(said, rng)[:, None], RATE)
            split = "train" if number < TRAIN else "test"
            recordings.append({"client": f"voice-{voice:02}", "text": text, "label": word, "split": split})
    return recordings


def _say(word: str, voice: str, pitch: int, speed: int) -> NDArray[np.float32]:
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    try:
        said = subprocess.run(command, capture_output=True, check=True).stdout  # noqa: S603  # all from above
    except (OSError, subprocess.CalledProcessError) as error:
        reason = "espeak-ng does not speak: install Debian's package espeak-ng"
        raise ConfigError(reason, about="data.function") from error
    samples, rate = library("soundfile", "sound").read(io.BytesIO(said), dtype="float32")
    spoken: NDArray[np.float32] = library("soxr", "sound").resample(samples, rate, RATE)[:LENGTH]
    return spoken


def _recorded(said: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Place a word somewhere in a recording, at some loudness, with pink noise of 10 to 30 dB below it."""
    recorded = np.zeros(LENGTH)
    begin = rng.integers(LENGTH - len(said) + 1)
    recorded[begin : begin + len(said)] = said * rng.uniform(0.3, 1)
    frequencies = np.maximum(np.arange(LENGTH // 2 + 1), 1)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(LENGTH)) / np.sqrt(frequencies), LENGTH)
    loudness = np.sqrt((said**2).mean()) * 10 ** (-rng.uniform(10, 30) / 20)
    recorded += noise * loudness / noise.std()
    return np.rint(np.clip(recorded, -1, 1) * LOUDEST).astype(np.int64)
