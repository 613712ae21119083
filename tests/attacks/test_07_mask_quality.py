"""An upload reveals nothing about its masks. Each check is shown to reject a generator that is in use elsewhere.

A good generator fails a bound once in millions of runs; inputs are fixed, so all runs give the same result.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import envelope, masks, ring
from aggregation.masks import Mask
from aggregation.vector import Segment, VectorSpec
from tests.support import FleetOf

ME = "device-000"
SIZE = 2**16
TWISTER = 19_937  # bits of the Mersenne Twister's state: no bit stream of it is more complex


def upload(fleet: Any) -> NDArray[np.uint32]:
    """A masked vector of zeros, as it travels."""
    _, plans = fleet.begin(fleet.establish())
    begun = fleet.states[ME].on_plan(fleet.devices[ME], plans[ME])
    spec = fleet.spec.vector
    _, body = begun.contribute(fleet.devices[ME], ring.zeros(spec.size, spec.ring_bits))
    return ring.unpack(body[: ring.packed_size(spec.size, spec.ring_bits)], spec.size, spec.ring_bits)


@pytest.fixture
def fleet(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> Any:
    return fleet_of(3, spec=spec_of(3, vector=VectorSpec((Segment("delta", SIZE, 1.0),), 24, 3)))


def twister(vector: NDArray[np.uint32], given: Sequence[Mask], threads: int) -> None:
    """Masks from a seeded Mersenne Twister, as in widely used implementations."""
    for mask in given:
        generator = random.Random(int.from_bytes(mask.key[:4], "big"))  # noqa: S311 - the weakness under test
        stream = np.frombuffer(generator.randbytes(vector.nbytes), np.uint32)
        (np.add if mask.add else np.subtract)(vector, stream, out=vector)


def complexity(bits: NDArray[np.uint8]) -> int:
    """Linear complexity over GF(2) by Berlekamp and Massey, in integers as bit vectors."""
    current, previous, length, since, seen = 1, 1, 0, 1, 0
    for n, bit in enumerate(bits.tolist()):
        seen = (seen << 1) | bit
        if (current & seen).bit_count() & 1:
            kept = current
            current ^= previous << since
            if 2 * length <= n:
                length, previous, since = n + 1 - length, kept, 0
        since += 1
    return length


def linear(bits: NDArray[np.uint8], state: int) -> bool:
    """Whether a linear register of so many bits can produce the stream; a random stream needs half its length."""
    assert bits.size > 2 * state + 64
    return complexity(bits) <= state


def uneven(vector: NDArray[np.uint32]) -> bool:
    """Whether the chi-square of a byte of the elements over its 256 values is beyond five standard deviations."""
    octets = vector.view(np.uint8).reshape(-1, 4)[:, :3]
    for column in octets.T:
        counts = np.bincount(column, minlength=256)
        chi = ((counts - vector.size / 256) ** 2).sum() / (vector.size / 256)
        if abs(chi - 255) > 5 * np.sqrt(2 * 255):
            return True
    return False


def narrow(keys: Sequence[bytes]) -> bool:
    """Whether a bit of the keys is constant or skewed, as most bits of a 32-bit seed in a 256-bit field are."""
    bits = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32), axis=1)
    return bool((np.abs(bits.mean(axis=0) - 0.5) > 6 * 0.5 / np.sqrt(len(keys))).any())


def test_complexity_is_that_of_a_register_of_known_length() -> None:
    bits = [1, 0, 0, 1, 1]
    while len(bits) < 200:
        bits.append(bits[-5] ^ bits[-3])  # x^5 + x^2 + 1
    assert complexity(np.array(bits, np.uint8)) == 5


def test_the_low_bits_of_an_upload_show_no_linear_generator(fleet: Any) -> None:
    low = (upload(fleet) & 1).astype(np.uint8)[: 2 * TWISTER + 2000]
    assert not linear(low, TWISTER)


def test_the_search_for_a_linear_generator_finds_one(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "apply", twister)
    low = (upload(fleet) & 1).astype(np.uint8)[: 2 * TWISTER + 2000]
    # Three twisters in one sum: no carry reaches the lowest bit, and all three have the same register.
    assert linear(low, TWISTER)


def test_an_upload_is_uniform_over_the_ring(fleet: Any) -> None:
    assert not uneven(upload(fleet))


@pytest.mark.parametrize("bits", [16, 23])
def test_the_search_for_uneven_masks_finds_masks_narrower_than_the_ring(
    fleet: Any, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = masks.apply

    def narrowed(vector: NDArray[np.uint32], given: Sequence[Mask], threads: int) -> None:
        genuine(vector, given, threads)
        vector &= np.uint32(2**bits - 1)

    monkeypatch.setattr(masks, "apply", narrowed)
    assert uneven(upload(fleet))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    used: list[list[bytes]] = []
    genuine = masks.apply

    def apply(vector: Any, given: Any, threads: int) -> None:
        given = list(given)
        used.append([mask.key for mask in given])
        genuine(vector, given, threads)

    monkeypatch.setattr(masks, "apply", apply)
    return used


def rounds(fleet: Any, sessions: int) -> None:
    for _ in range(sessions):
        session = fleet.establish()
        while session.rounds_left:
            state, plans = fleet.begin(session)
            for name in plans:
                fleet.contribute(name, plans[name])
            session = state.established


def times_used(used: list[list[bytes]]) -> dict[bytes, int]:
    counts: dict[bytes, int] = {}
    for key in (key for keys in used for key in keys):
        counts[key] = counts.get(key, 0) + 1
    return counts


def test_no_key_serves_two_rounds_two_sessions_or_two_pairs(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, used = fleet_of(4), spied(monkeypatch)
    rounds(fleet, sessions=2)
    counts = times_used(used)
    # In 6 rounds: a self mask for each of 4 devices, and a key for each of 6 pairs, applied once by either side.
    assert sorted(counts.values()) == [1] * (6 * 4) + [2] * (6 * 6)


def test_the_search_for_a_key_used_twice_finds_one(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, used = fleet_of(4), spied(monkeypatch)
    genuine = masks.derive
    monkeypatch.setattr(masks, "derive", lambda secret, *bound: genuine(b"one secret for all", bound[0]))
    _, plans = fleet.begin(fleet.establish())
    for name in plans:
        fleet.contribute(name, plans[name])
    assert max(times_used(used).values()) > 2


def test_every_bit_of_a_key_varies(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, used = fleet_of(12), spied(monkeypatch)
    rounds(fleet, sessions=2)
    keys = list(times_used(used))
    assert {len(key) for key in keys} == {32}
    assert len(keys) > 400
    assert not narrow(keys)
    assert narrow([bytes(28) + key[:4] for key in keys])  # 32-bit seeds


def test_secrets_of_the_devices_have_256_bits(fleet_of: FleetOf) -> None:
    fleet = fleet_of(12)
    for _ in range(8):
        fleet.establish()
        secrets = [secret for state in fleet.states.values() for secret in state.secrets.values()]
    assert {len(secret.seed) for secret in secrets} == {len(secret.mask_key) for secret in secrets} == {32}
    assert len({secret.seed for secret in secrets} | {secret.mask_key for secret in secrets}) == 2 * len(secrets)


def test_an_upload_of_ones_and_an_upload_of_zeros_look_alike(fleet: Any) -> None:
    _, plans = fleet.begin(fleet.establish())
    for name, value in ((ME, 0), ("device-001", 2**23 - 1)):
        begun = fleet.states[name].on_plan(fleet.devices[name], plans[name])
        vector = ring.zeros(SIZE, 24)
        vector += np.uint32(value)
        _, body = begun.contribute(fleet.devices[name], vector)
        header, packed = envelope.open_vector(
            body, ring.packed_size(SIZE, 24), fleet.devices[name].identity.public, name
        )
        assert not uneven(ring.unpack(packed, SIZE, 24))
        assert header.device == name
