"""How near masking is to the least that it can be: the keystream by the fastest route, and a wrapping addition."""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from aggregation import masks, ring
from aggregation.masks import Mask
from simulations.benchmarks.secagg import ours
from simulations.benchmarks.timing import Call, in_turns


def limit(elements: int, count: int, repeats: int) -> dict[str, float]:
    """``count`` masks on so many elements of 32 bits: their speed, that of the raw keystream, and fractions of both."""
    vector = ring.zeros(elements, ours.BITS)
    found = [Mask(hashlib.sha256(bytes([i])).digest(), add=True) for i in range(count)]
    times = max(1, vector.nbytes * len(found) // masks.BLOCK)
    kinds = [(route, add) for route in (_ctr, _gcm) for add in (False, True)]
    ran, *raw = in_turns(
        Call(lambda _: masks.apply(vector, found), lambda: None, repeats),
        *(Call(partial(_stream, times, *kind), lambda: None, repeats) for kind in kinds),
    )
    speed = vector.nbytes * len(found) / min(ran.cpu)
    ctr, ctr_add, gcm, gcm_add = (times * masks.BLOCK / min(timing.cpu) for timing in raw)
    return {
        "mask_fraction_of_limit": speed / max(ctr_add, gcm_add),
        "mask_fraction_of_ctr_mode": speed / ctr_add,
        "mask_gb_per_s": speed / 1e6,
        "aes_ctr_gb_per_s": ctr / 1e6,
        "aes_gcm_gb_per_s": gcm / 1e6,
    }


def _ctr() -> CipherContext:
    return Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor()


def _gcm() -> CipherContext:
    return Cipher(algorithms.AES256(bytes(32)), modes.GCM(bytes(12))).encryptor()


def _stream(times: int, route: Callable[[], CipherContext], add: bool, _: None) -> None:
    """Keystream into one block, time and again, and perhaps added to another."""
    stream, zeros = route(), bytes(masks.BLOCK)
    buffer, block = memoryview(bytearray(masks.BLOCK)), np.zeros(masks.BLOCK // 4, np.uint32)
    keystream = np.frombuffer(buffer, np.uint32)
    for _turn in range(times):
        stream.update_into(zeros, buffer)
        if add:
            np.add(block, keystream, out=block)
