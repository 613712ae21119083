"""Fuzz target: bytes that claim to be a base or an adapter file are converted, or refused in one line, within bounds.

The first byte selects the format: GGUF, E5S1, an adapter's container or a PEFT file. A GGUF file is also made of random
settings and tensors, so that its metadata are tried beyond what its header admits. It is not part of the suite, which
runs ``one_input`` a few hundred times. Without atheris it changes the seeds at random:

    python tests/fuzz/fuzz_bases.py --seconds 600
    pip install atheris
    python tests/fuzz/fuzz_bases.py -max_total_time=600 corpus/

An input that takes more than ``SECONDS`` or raises anything but a ``DataError`` or ``ConfigError`` is written to
``crash-…``; pass that file as the only argument to reproduce it.
"""

import contextlib
import hashlib
import importlib
import io
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from aggregation.errors import ConfigError, DataError  # noqa: E402
from edgeadapt.bases import e5base, ggufbase  # noqa: E402
from edgeadapt.formats import container, files  # noqa: E402
from tests.support import gguf  # noqa: E402

SECONDS = 2.0  # of processor time; inputs have kilobytes
MEMORY = 2**29  # bytes beyond those that the process has at its start
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("", " ", "h e", "he", "h", "Ġ", "\x00", "\n", "z z", "llama", "qwen2", "qwen3", "gpt2", "gpt-2", "smollm", "{")


def convert(module: Any, suffix: str, raw: bytes) -> None:
    """Convert a base in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(raw)
        (out := Path(folder) / "out").mkdir()
        module.convert(path, out)


READ: tuple[Callable[[bytes], Any], ...] = (
    lambda raw: convert(ggufbase, ".gguf", raw),
    lambda raw: convert(e5base, ".bin", raw),
    container.unpack,
    files.decode,
)


def one_input(data: bytes) -> None:
    """The first byte selects the format of the rest."""
    if not data:
        return
    begin = time.process_time()
    try:
        READ[data[0] % len(READ)](data[1:])
    except (DataError, ConfigError) as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise AssertionError(f"a refusal is no short line: {str(error)[:2000]!r}") from error
    if (took := time.process_time() - begin) > SECONDS:
        raise AssertionError(f"an input of {len(data)} bytes took {took:.1f} s")


def seeds() -> list[bytes]:
    """A sound file of each format."""
    from tests.edgeadapt.bases.test_e5base import encoded

    tensors = {"w": np.arange(6, dtype=np.int8).reshape(2, 3), "e": np.zeros((5, 0), np.float32)}
    peft = files.encode({"a.lora_A.weight": np.ones((2, 3), np.float32), "b": np.zeros((1,), np.float32)})
    made = (gguf.model(), encoded(), container.pack(tensors), peft)
    return [bytes([number]) + raw for number, raw in enumerate(made)]


def some_gguf(rng: random.Random) -> bytes:
    """A GGUF file with settings and tensors that a model does not have."""
    changes: dict[str, Any] = {name: some_value(rng) for name in rng.sample(sorted(gguf.settings()), rng.randrange(3))}
    shapes: dict[str, Any] = {}
    for name in rng.sample(sorted(gguf.shapes()), rng.randrange(2)):
        shapes[name] = tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(6)))
    return b"\x00" + gguf.model(changes, shapes)


def some_value(rng: random.Random) -> gguf.Value | None:
    kind = rng.choice([*gguf.TYPES, "raw", "none"])
    if kind == "none":
        return None
    if kind == "raw":
        return kind, b"".join(rng.choice(NUMBERS).to_bytes(rng.choice((4, 8)) + 4, "little")[:8] for _ in range(9))

    def one() -> Any:
        if kind == "text":
            return rng.choice(TEXTS)
        if kind in ("f32", "f64"):
            return rng.choice((0.0, -1.0, 1e-5, float("nan"), float("inf")))
        bits = 8 * len(gguf.one(kind, 0))
        number = rng.choice(NUMBERS) % 2 ** (1 if kind == "bool" else bits)
        return number - 2**bits if kind[0] == "i" and number >= 2 ** (bits - 1) else number

    return kind, [one() for _ in range(rng.randrange(9))] if rng.random() < 0.5 else one()


def changed(rng: random.Random, raw: bytes) -> bytes:
    """``raw`` with changes: bits, numbers at any place, and parts that are copied, removed or cut off."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # Most of what decides is at the begin.
        at = 1 + int((len(out) - 1) * rng.random() ** rng.choice((1, 4, 8)))
        match rng.randrange(6):
            case 0:
                out[at:at] = rng.randbytes(rng.randrange(9))
            case 1:
                del out[at : at + rng.randrange(1, 20)]
            case 2:
                start = rng.randrange(1, len(out))
                out[at : at + 16] = out[start : start + 16]
            case 3:
                size = rng.choice((1, 2, 4, 8))
                out[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
            case 4 if rng.random() < 0.1:
                del out[at:]
            case _:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        if len(out) < 2:
            out += bytes(2)
    return bytes(out)


def some_input(rng: random.Random, known: list[bytes]) -> bytes:
    return some_gguf(rng) if rng.random() < 0.3 else changed(rng, rng.choice(known))


def at_random(seconds: float) -> None:
    """Try random inputs for so long, and print how many of each format were tried."""
    rng, known, tried = random.Random(), seeds(), [0] * len(READ)  # noqa: S311
    for data in known:  # whatever is imported with the first input
        one_input(data)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = some_input(rng, known)
        tried[data[0] % len(READ)] += 1
        try:
            one_input(data)
        except BaseException:
            name = f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            Path(name).write_bytes(data)
            print(f"wrote {name} after {tried}")
            raise
    print(f"tried {tried}")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--seconds"]:
        at_random(float(arguments[1]))
    elif len(arguments) == 1 and Path(arguments[0]).is_file():
        one_input(Path(arguments[0]).read_bytes())
    else:
        atheris: Any = importlib.import_module("atheris")
        atheris.instrument_all()
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
