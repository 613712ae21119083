"""A small fleet under test: authority, coordinator, devices, and the hops between them, one function a step."""

import datetime as dt
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import clientside, serverside
from aggregation.certificates import Authority
from aggregation.clientside import Device
from aggregation.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.serverside import Collecting, Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.spec import Adversary, SessionSpec, default_threshold
from aggregation.vector import Segment, VectorSpec

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
END = dt.datetime(2036, 1, 1, tzinfo=dt.UTC)
BASE = hashlib.sha256(b"base").hexdigest()
LAYOUT = hashlib.sha256(b"layout").hexdigest()
ADAPTER = hashlib.sha256(b"adapter").hexdigest()


class CountedEntropy:
    """Bytes that repeat from run to run, for tests only: SHA-256 of seed and counter."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def bytes(self, n: int) -> bytes:
        out = b""
        while len(out) < n:
            self._count += 1
            out += hashlib.sha256(f"{self._seed}/{self._count}".encode()).digest()
        return out[:n]


def vector_spec(clients: int, *, size: int = 7, bits: int = 24) -> VectorSpec:
    segments = (Segment("delta", size, 4.0), Segment("weight", 1, 100.0))
    return VectorSpec(segments, ring_bits=bits, max_clients=clients)


def session_spec(devices: int, **changes: Any) -> SessionSpec:
    threshold = default_threshold(devices)
    spec = SessionSpec(
        rounds=3,
        threshold=threshold,
        minimum_survivors=threshold,
        degree=devices - 1,
        vector=vector_spec(devices),
        clip_norm=4.0,
        weight_cap=100,
        privacy="none",
        base_digest=BASE,
        layout_digest=LAYOUT,
        adversary=Adversary.ACTIVE,
    )
    return replace(spec, **changes)


@dataclass(slots=True)
class Fleet:
    """Devices with the state of each, and what each contributed in the round under way."""

    spec: SessionSpec
    entropy: CountedEntropy
    authority: Authority
    key: IdentityKey
    devices: dict[str, Device]
    states: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    seed: int = 0

    @property
    def certificates(self) -> dict[str, bytes]:
        return {name: device.certificate for name, device in self.devices.items()}

    def offer(self) -> tuple[Any, bytes]:
        return serverside.open_session(self.key, self.authority.root, self.spec, self.certificates, self.entropy)

    def establish(self, lost: Mapping[str, Collection[str]] | None = None) -> Established | RoundAborted:
        """Steps 1–4. ``lost``: step → devices lost there."""
        lost = lost or {}
        state, offer = self.offer()
        for name in set(self.devices) - set(lost.get("advert", ())):
            self.states[name], advert = clientside.join(self.devices[name], offer, self.entropy)
            state = state.on_advert(name, advert)
        closed = state.close()
        if isinstance(closed, RoundAborted):
            return closed
        sharing, roster = closed
        for name in set(sharing.session.peers) - set(lost.get("shares", ())):
            self.states[name], shares = self.states[name].on_roster(self.devices[name], roster, self.entropy)
            sharing = sharing.on_shares(name, shares)
        return sharing.close()

    def begin(self, session: Established, cohort: Collection[str] | None = None) -> Any:
        return session.plan(adapter_version=1, adapter_digest=ADAPTER, training=b"settings", cohort=cohort)

    def values(self, name: str) -> dict[str, NDArray[np.float64]]:
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        self.plain[name] = {
            segment.name: (
                rng.integers(0, int(segment.bound) + 1, segment.size).astype(float)
                if segment.name == "weight"
                else rng.uniform(-segment.bound, segment.bound, segment.size)
            )
            for segment in self.spec.vector.segments
        }
        return self.plain[name]

    def contribute(self, name: str, plan: bytes) -> bytes:
        planned = self.states[name].on_plan(self.devices[name], plan)
        rng = np.random.default_rng(self.seed)
        vector = self.spec.vector.encode(self.values(name), rng)
        self.states[name], body = planned.contribute(self.devices[name], vector)
        return body

    def survivors(self, name: str, body: bytes) -> bytes:
        self.states[name], answer = self.states[name].on_survivors(self.devices[name], body)
        return answer

    def unmask(self, name: str, body: bytes) -> bytes:
        self.states[name], answer = self.states[name].on_unmask(self.devices[name], body)
        return answer

    def round(
        self,
        session: Established,
        lost: Mapping[str, Collection[str]] | None = None,
        cohort: Collection[str] | None = None,
    ) -> tuple[Established, RoundResult] | RoundAborted:
        """Steps 5–8. ``lost``: step → devices that do not answer it."""
        lost = lost or {}
        begun = self.begin(session, cohort)
        steps: list[tuple[str, Callable[[str, bytes], bytes], Any]] = [
            ("input", self.contribute, Collecting.on_masked_input),
            ("survivors", self.survivors, Confirming.on_signature),
            ("unmask", self.unmask, Unmasking.on_unmask),
        ]
        for step, answer, accept in steps:
            if isinstance(begun, RoundAborted):
                return begun
            state, bodies = begun
            if step == "survivors" and isinstance(state, Unmasking):
                continue
            for name in sorted(set(bodies) - set(lost.get(step, ()))):
                state = accept(state, name, answer(name, bodies[name]))
            begun = state.close()
        return begun  # type: ignore[no-any-return]

    def expected(self, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
        return {
            segment.name: np.sum([self.plain[name][segment.name] for name in names], axis=0)
            for segment in self.spec.vector.segments
        }

    def tolerance(self, segment: Segment) -> float:
        return self.spec.vector.step(segment) * len(self.devices)


def make_fleet(devices: int, *, spec: SessionSpec | None = None, policy: Policy | None = None, seed: int = 1) -> Fleet:
    entropy = CountedEntropy(seed)
    spec = spec or session_spec(devices)
    policy = policy or Policy(
        known_bases=frozenset({BASE}), minimum_cohort=3, adversaries=frozenset(Adversary), minimum_ring_bits=8
    )
    authority = Authority.create("test authority", entropy, BEGIN, END)
    key = IdentityKey.generate(entropy)
    members = {}
    for number in range(devices):
        identity = IdentityKey.generate(entropy)
        name = f"device-{number:03d}"
        certificate = authority.issue(name, identity.public, not_before=BEGIN, not_after=END)
        members[name] = Device(identity, certificate, authority.root, key.public, policy)
    return Fleet(spec, entropy, authority, key, members)


@pytest.fixture
def fleet_of() -> Callable[..., Fleet]:
    """Make a fleet of so many devices."""
    return make_fleet
