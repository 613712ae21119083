"""Makes rotation.json: rotated vectors, bit for bit, from docs/reference/protocol.md alone. Shares no code with the
project, and sums in whole numbers.

    python tests/vectors/make_rotation.py

Run it again only if the protocol changes: the file is frozen.
"""

import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SIZES = (1, 2, 3, 8, 11, 12, 63, 100)
REPORTED = (1, 100, 4096, 84_864, 10**6, 2**27)  # sizes of which only the bound is in the file


def number(label: str, i: int) -> float:
    """An arbitrary number with full mantissa, about 1 in size."""
    (drawn,) = struct.unpack(">Q", hashlib.sha256(f"{label}/{i}".encode()).digest()[:8])
    return math.ldexp(drawn >> 11, -52) - 1.0


def order_of(size: int) -> int:
    order = 1
    while 2 * order <= size:
        order *= 2
    return order


def signs(seed: bytes, order: int) -> list[list[int]]:
    octets = -(-order // 8)
    raw = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(2 * octets))
    halves = (raw[:octets], raw[octets:])
    return [[-1 if half[i // 8] >> (i % 8) & 1 else 1 for i in range(order)] for half in halves]


def hadamard(x: list[float]) -> list[float]:
    """Row by row, in whole numbers."""
    exponent = 53 - math.frexp(max(abs(value) for value in x))[1] - (len(x).bit_length() - 1)
    whole = [round(Fraction(value) * Fraction(2) ** exponent) for value in x]  # to even
    sums = [sum(-v if (i & j).bit_count() % 2 else v for j, v in enumerate(whole)) for i in range(len(x))]
    return [float(Fraction(value) / Fraction(2) ** exponent) * math.sqrt(1 / len(x)) + 0.0 for value in sums]


def rotate(x: list[float], seed: bytes) -> list[float]:
    order = order_of(len(x))
    first, second = signs(seed, order)
    x = hadamard([a * s for a, s in zip(x[:order], first, strict=True)]) + x[order:]
    at = len(x) - order
    return x[:at] + hadamard([a * s for a, s in zip(x[at:], second, strict=True)])


def rotate_back(x: list[float], seed: bytes) -> list[float]:
    order = order_of(len(x))
    first, second = signs(seed, order)
    at = len(x) - order
    x = x[:at] + [a * s for a, s in zip(hadamard(x[at:]), second, strict=True)]
    return [a * s for a, s in zip(hadamard(x[:order]), first, strict=True)] + x[order:]


def peak(size: int) -> float:
    exponent = 41
    while 2 ** (exponent - 41) < size:
        exponent += 1
    return min(1.0, math.sqrt(2 * math.log(2) * exponent / order_of(size)))


def case(size: int) -> dict[str, Any]:
    adapter = hashlib.sha256(f"adapter/{size}".encode()).digest()
    seed = hashlib.sha256(b"edgeadapt/rotation/1\x00" + adapter).digest()
    vector = [number(f"vector/{size}", i) for i in range(size)]
    hexes = {
        "vector": [value.hex() for value in vector],
        "rotated": [value.hex() for value in rotate(vector, seed)],
        "rotated_back": [value.hex() for value in rotate_back(vector, seed)],
    }
    return {"adapter": adapter.hex(), "seed": seed.hex(), **hexes}


def main() -> None:
    made = {"cases": [case(size) for size in SIZES], "peaks": {str(size): peak(size).hex() for size in REPORTED}}
    Path(__file__).with_name("rotation.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
