"""Sounds as texts: short WAV files of 16 bits, whose tokens are their samples.

A microphone's has one channel; windows of other sensors are the same with a channel for each axis (``signal``).
"""

import base64
import io
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from edgeadapt.bases.media import MAX_MEDIUM, MAX_SOURCE, MediaReader, as_text, drawn_bits, library

RATE = 16_000  # samples a second of what a file becomes
SECONDS = 5  # of it; the loudest part of a longer one
FILE_RATES, MAX_FILE_SECONDS, MAX_FILE_SAMPLES = (4_000, 192_000), 900, 2**26  # of a file, all channels together
BEGINS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff")  # of the kinds of files that are opened
MAX_RATE, MAX_CHANNELS, MAX_LENGTH = 48_000, 64, 2**17  # that a model hears
LOUDEST = 2**15 - 1  # of a sample
OCTAVES, NOISE = 8, 256 * 53_510  # of the noise of a variant; 256 times its deviation
_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")  # of WAV


def sound(content: bytes) -> str:
    """Make a sound of the content of a file: one channel, ``RATE``, at most ``SECONDS`` long, without what else the
    file says; or a window of sensors, as it is. Raises as ``MediaReader.of_file``."""
    if _is_window(content):
        return as_text(SoundReader.begin, "wav", content)
    if len(content) > MAX_SOURCE:
        raise DataError(f"the sound has {len(content)} bytes, above the limit of {MAX_SOURCE}", about="sound")
    if not content.startswith(BEGINS):
        raise _damaged()
    files, rates = library("soundfile", SoundReader.noun), library("soxr", SoundReader.noun)
    try:
        with files.SoundFile(io.BytesIO(content)) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            within = FILE_RATES[0] <= rate <= FILE_RATES[1] and frames <= MAX_FILE_SECONDS * rate
            if not within or frames * channels > MAX_FILE_SAMPLES:
                reason = (
                    f"the sound has {channels} channels of {frames} samples at {rate} Hz: convert it, or cut a part out"
                )
                raise DataError(reason, about="sound")
            read = file.read(frames, dtype="float32", always_2d=True)
        samples = rates.resample(read.mean(1), rate, RATE)
    except DataError:
        raise
    except Exception:  # of many classes; a message may have bytes of the sound
        raise _damaged() from None
    return signal(loudest(_whole(samples)[:, None], SECONDS * RATE), RATE)


def _is_window(content: bytes) -> bool:
    """Check whether a file is what ``signal`` writes, below the rates of sounds."""
    if not _HEADER.size < len(content) <= MAX_MEDIUM:
        return False
    channels, rate = struct.unpack_from("<HI", content, 22)
    known = channels <= MAX_CHANNELS and rate < FILE_RATES[0]
    return known and content.startswith(_header(rate, channels, len(content) - _HEADER.size))


def _damaged() -> DataError:
    return DataError(f"the sound is damaged, or not {SoundReader.files}", about="sound")


def signal(samples: Any, rate: int) -> str:
    """Make a sound of samples, shape ``(samples, channels)``, whole numbers of 16 bits. Raises DataError: they are none
    or too many."""
    held = np.asarray(samples)
    if held.ndim != 2 or not held.size or held.dtype.kind != "i" or np.abs(held).max() > LOUDEST:
        raise DataError("a sound has at least one sample of each channel, of 16 bits", about="sound")
    content = _header(rate, held.shape[1], 2 * held.size) + held.astype("<i2").tobytes()
    return as_text(SoundReader.begin, "wav", content)


def is_window(text: str) -> bool:
    """Check whether the text of a file is a window of sensors: its header states less than the rates of sounds."""
    if not text.startswith(SoundReader.begin):
        return False
    try:
        (rate,) = struct.unpack_from("<I", base64.b64decode(text.partition(";base64,")[2][32:40], validate=True))
    except (ValueError, struct.error):
        return False
    return bool(rate < FILE_RATES[0])


def samples_of(text: str) -> NDArray[np.int64]:
    """Return the samples of a sound of any rate, shape ``(samples, channels)``. Raises DataError: it is damaged."""
    try:
        content = base64.b64decode(text.partition(";base64,")[2], validate=True)
        *_, channels, rate, _, _, _, _, size = _HEADER.unpack_from(content)
        whole = SoundReader(rate, size // (2 * channels), channels)
    except (ValueError, struct.error, ZeroDivisionError):
        raise DataError("the sound is damaged: make it again from its file", about="sound") from None
    return whole.decode(content).reshape(-1, channels)


def _whole(samples: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    if not np.isfinite(samples).all():
        raise DataError("the sound has samples that are not finite", about="sound")
    whole: NDArray[np.int64] = np.rint(np.clip(samples, -1, 1) * LOUDEST).astype(np.int64)
    return whole


def loudest(samples: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return the first of the loudest parts of ``length`` samples, or all if they are no more."""
    if len(samples) <= length:
        return samples
    ends = np.concatenate([[0], np.cumsum((samples * samples).sum(1))])
    begin = int(np.argmax(ends[length:] - ends[:-length]))
    return samples[begin : begin + length]


@dataclass(frozen=True, slots=True)
class SoundReader(MediaReader):
    """Reads the loudest part of sounds, with silence on both sides of shorter ones. Tokens are samples, the channels of
    one moment beside each other."""

    kind: ClassVar[str] = "Samples"
    noun: ClassVar[str] = "sound"
    begin: ClassVar[str] = "data:audio/"
    files: ClassVar[str] = "WAV, FLAC, Ogg or MP3"
    example: ClassVar[str] = "SOUND.wav"
    of_file = staticmethod(sound)

    rate: int
    length: int  # samples of each channel
    channels: int

    def check(self) -> None:
        limits = (self.rate, MAX_RATE), (self.length, MAX_LENGTH), (self.channels, MAX_CHANNELS)
        if not all(1 <= number <= most for number, most in limits):
            raise ValueError

    @property
    def size(self) -> int:
        return self.length * self.channels

    def drawn(self) -> NDArray[np.int64]:
        return np.random.default_rng(0).integers(-LOUDEST // 4, LOUDEST // 4, self.size)

    def decode(self, content: bytes) -> NDArray[np.int64]:
        size, rest = divmod(len(content) - _HEADER.size, 2 * self.channels)
        if size < 1 or rest or content[:4] != b"RIFF":
            raise DataError("the sound is damaged: make it again from its file", about="sound")
        if content[: _HEADER.size] != _header(self.rate, self.channels, len(content) - _HEADER.size):
            reason = f"this base hears {self.channels} channels at {self.rate} Hz with 16 bits: convert the sound"
            raise DataError(reason, about="sound")
        held = np.frombuffer(content, "<i2", offset=_HEADER.size).reshape(-1, self.channels).astype(np.int64)
        part = loudest(held, self.length)
        before = (self.length - len(part)) // 2
        return np.pad(part, ((before, self.length - len(part) - before), (0, 0))).reshape(-1)

    def varied(self, tokens: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Move a sound by up to a tenth of its length, and add noise, 5 to 25 dB below its mean loudness, of which all
        octaves are equally loud (Voss: Gardner 1978, "White and brown music"). One channel is also made louder or
        quieter, by up to half; the axes of a sensor mean what they are."""
        (moved, gain, level), far = drawn_bits(seed, range(3)), self.length // 10
        samples = np.roll(tokens.reshape(-1, self.channels), moved % (2 * far + 1) - far, axis=0)
        if self.channels == 1:
            samples = samples * (128 + gain % 257) >> 8
        places, noise = np.arange(self.length)[:, None], np.zeros_like(samples)
        for octave in range(OCTAVES):
            held = (places >> octave) * self.channels + np.arange(self.channels)
            noise += (drawn_bits(seed + octave + 1, held + 3) & 0xFFFF) - 2**15
        loud = np.abs(samples).sum(0) // self.length * (14 + level % 131)
        heard: NDArray[np.int64] = np.clip(samples + noise * loud // NOISE, -LOUDEST, LOUDEST)
        return heard.reshape(-1)


def _header(rate: int, channels: int, size: int) -> bytes:
    """Write the one header that a sound has: PCM of ``size`` bytes."""
    each = 2 * channels
    return _HEADER.pack(
        *(b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * each, each, 16, b"data", size)
    )
