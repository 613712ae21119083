"""A small fleet: authority, coordinator, devices, and the exchange of each step as one function."""

import datetime as dt
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import client, graph, server
from aggregation.client import Device
from aggregation.errors import ProtocolError
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.ring import Ring
from aggregation.server import Confirming, Coordinator, Established, RoundAborted, RoundResult
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec
from aggregation.vector import Segment, VectorSpec

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
END = dt.datetime(2036, 1, 1, tzinfo=dt.UTC)
BASE = hashlib.sha256(b"base").hexdigest()
LAYOUT = hashlib.sha256(b"layout").hexdigest()
ADAPTER = hashlib.sha256(b"adapter").hexdigest()


Dropouts = Mapping[str, Collection[str]]


class CountedEntropy:
    """Reproducible bytes, for tests only: SHA-256 of seed and counter."""

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
    threshold = graph.least_threshold(devices, CORRUPT_FRACTION)
    spec = SessionSpec(
        rounds=3,
        threshold=threshold,
        minimum_survivors=threshold,
        degree=devices - 1,
        vector=vector_spec(devices),
        clip_norm=4.0,
        weight_cap=100,
        privacy=None,
        base_digest=BASE,
        layout_digest=LAYOUT,
        adversary=Adversary.ACTIVE,
    )
    return replace(spec, **changes)


@dataclass(slots=True)
class Fleet:
    """Devices with the state of each, and what each contributed in the current round: its entry in ``vectors``, or
    numbers by chance."""

    spec: SessionSpec
    entropy: CountedEntropy
    authority: Authority
    key: IdentityKey
    devices: dict[str, Device]
    states: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    vectors: Mapping[str, Ring] = field(default_factory=dict)
    seed: int = 0
    damage: Callable[[bytes], list[bytes]] | None = None

    @property
    def certificates(self) -> dict[str, bytes]:
        return {name: device.certificate for name, device in self.devices.items()}

    def hop(self, call: Callable[[bytes], Any], body: bytes) -> Any:
        """Deliver ``body``. With ``damage``, first deliver damaged copies, each of which must be refused."""
        for damaged in self.damage(body) if self.damage else ():
            with pytest.raises(ProtocolError):
                call(damaged)
        return call(body)

    def offer(self) -> tuple[Any, bytes]:
        return server.open_session(
            Coordinator(self.key), self.authority.root, self.spec, self.certificates, self.entropy
        )

    def join(self, name: str, offer: bytes) -> bytes:
        device = self.devices[name]
        self.states[name], advert = self.hop(lambda body: client.join(device, body, self.entropy), offer)
        return advert  # type: ignore[no-any-return]

    def share(self, name: str, roster: bytes) -> bytes:
        device, state = self.devices[name], self.states[name]
        self.states[name], shares = self.hop(lambda body: state.on_roster(device, body, self.entropy), roster)
        return shares  # type: ignore[no-any-return]

    def establish(self, dropouts: Dropouts | None = None) -> Any:
        """Steps 1–4. ``dropouts``: step → devices that do not answer it."""
        dropouts = dropouts or {}
        state, offer = self.offer()
        for name in sorted(set(self.devices) - set(dropouts.get("advert", ()))):
            state = self.accept(state, "on_advert", name, self.join(name, offer))
        closed = state.close()
        if isinstance(closed, RoundAborted):
            return closed
        sharing, roster = closed
        for name in sorted(set(sharing.session.peers) - set(dropouts.get("shares", ()))):
            sharing = self.accept(sharing, "on_shares", name, self.share(name, roster))
        return sharing.close()

    def accept(self, state: Any, method: str, name: str, body: bytes) -> Any:
        return self.hop(lambda raw: getattr(state, method)(name, raw), body)

    def begin(self, session: Established, cohort: Collection[str] | None = None) -> Any:
        return session.plan(adapter_version=1, adapter_digest=ADAPTER, training=b"settings", cohort=cohort)

    def values(self, name: str) -> dict[str, NDArray[np.float64]]:
        """Fresh numbers within their bounds; integers for the weight."""
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        self.plain[name] = {
            segment.name: rng.integers(0, 101, segment.size).astype(float)
            if segment.name == "weight"
            else rng.uniform(-segment.bound, segment.bound, segment.size)
            for segment in self.spec.vector.segments
        }
        return self.plain[name]

    def contribute(self, name: str, plan: bytes) -> bytes:
        device, state = self.devices[name], self.states[name]
        planned = self.hop(lambda body: state.on_plan(device, body), plan)
        if name in self.vectors:
            vector = self.vectors[name].copy()
        else:
            vector = self.spec.vector.encode(self.values(name), np.random.default_rng(self.seed))
        self.states[name], answer = planned.contribute(device, vector)
        return answer  # type: ignore[no-any-return]

    def answer(self, method: str, name: str, body: bytes) -> bytes:
        device, state = self.devices[name], self.states[name]
        self.states[name], answer = self.hop(lambda raw: getattr(state, method)(device, raw), body)
        return answer  # type: ignore[no-any-return]

    def collect(
        self, session: Established, dropouts: Dropouts | None = None, cohort: Collection[str] | None = None
    ) -> Any:
        """Steps 5 and 6."""
        begun = self.begin(session, cohort)
        if isinstance(begun, RoundAborted):
            return begun
        state, plans = begun
        for name in sorted(set(plans) - set((dropouts or {}).get("input", ()))):
            state = self.accept(state, "on_masked_input", name, self.contribute(name, plans[name]))
        return state.close()

    def confirm(self, state: Any, bodies: Mapping[str, bytes], dropouts: Dropouts | None = None) -> Any:
        """Step 7, if the session has it."""
        if not isinstance(state, Confirming):
            return state, bodies
        for name in sorted(set(bodies) - set((dropouts or {}).get("survivors", ()))):
            state = self.accept(
                state, "on_consistency_signature", name, self.answer("on_survivors", name, bodies[name])
            )
        return state.close()

    def open(self, state: Any, bodies: Mapping[str, bytes], dropouts: Dropouts | None = None) -> Any:
        """Step 8."""
        for name in sorted(set(bodies) - set((dropouts or {}).get("unmask", ()))):
            state = self.accept(state, "on_unmask_response", name, self.answer("on_unmask", name, bodies[name]))
        return state.close()

    def round(
        self, session: Established, dropouts: Dropouts | None = None, cohort: Collection[str] | None = None
    ) -> Any:
        """Steps 5–8. ``dropouts``: step → devices that do not answer it."""
        collected = self.collect(session, dropouts, cohort)
        if isinstance(collected, RoundAborted):
            return collected
        confirmed = self.confirm(*collected, dropouts)
        return confirmed if isinstance(confirmed, RoundAborted) else self.open(*confirmed, dropouts)

    def assert_sum(self, result: RoundResult) -> None:
        """The result is the plain sum of its survivors, to one step a survivor; counts are exact."""
        for segment in self.spec.vector.segments:
            plain = np.sum([self.plain[name][segment.name] for name in result.survivors], axis=0)
            error = np.abs(result.values[segment.name] - plain).max()
            # The plain sum has the precision of float64, which shows in rings of 50 bits and more.
            rounding = len(result.survivors) * (self.spec.vector.step(segment) + segment.bound * 2.0**-52)
            assert error == 0 if segment.name == "weight" else error < rounding


def make_fleet(devices: int, *, spec: SessionSpec | None = None, policy: Policy | None = None, seed: int = 1) -> Fleet:
    entropy = CountedEntropy(seed)
    spec = spec or session_spec(devices)
    policy = policy or Policy(
        known_bases=frozenset({BASE}),
        minimum_cohort=3,
        minimum_survivors=2,
        adversaries=frozenset(Adversary),
        minimum_ring_bits=8,
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


@pytest.fixture
def spec_of() -> Callable[..., SessionSpec]:
    """Make a spec for a fleet of so many devices, with changes by field."""
    return session_spec


@pytest.fixture
def vector_of() -> Callable[..., VectorSpec]:
    """Make a vector spec for so many clients."""
    return vector_spec


@pytest.fixture
def entropy() -> CountedEntropy:
    """Bytes that repeat from run to run."""
    return CountedEntropy(7)
