"""A malicious coordinator: it has the small fleet, everything that its devices send, and its own arithmetic."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import envelope, masks, ring
from aggregation.masks import Mask
from aggregation.messages import Message, Plan, Survivors, UnmaskResponse
from aggregation.policy import Policy
from aggregation.recovery import Recovery
from aggregation.spec import Adversary
from client.node import sumhistory
from coordinator import lastsum
from tests.support import FleetOf
from tests.support.fleet import entropy, fleet_of, spec_of, vector_of

__all__ = ["entropy", "fleet_of", "spec_of", "vector_of"]
VICTIM = "device-002"


@pytest.fixture
def by_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices tell adapters apart by their bytes and not by the distance between them, which is another check; and the
    coordinator keeps no cohort because of it.
    """
    monkeypatch.setattr(sumhistory, "_separation", lambda *_: math.inf)
    monkeypatch.setattr(lastsum, "binding", lambda *_: None)


@dataclass(slots=True)
class Coordinator:
    """A coordinator that keeps every upload and signs whatever it likes.

    ``fleet`` are honest devices that run the code under test; ``session`` and ``state`` are what an honest
    coordinator would hold.
    """

    fleet: Any
    session: Any = None
    state: Any = None
    plan: Plan | None = None
    uploads: dict[str, bytes] = field(default_factory=dict)
    responses: dict[str, UnmaskResponse] = field(default_factory=dict)

    def collect(self, dropouts: tuple[str, ...] = ()) -> None:
        """Steps 1–6 of the protocol, but every upload is kept."""
        self.session = self.fleet.establish()
        self.state, plans = self.fleet.begin(self.session)
        self.plan = self.state.plan
        for name in plans:
            if name not in dropouts:
                self.uploads[name] = self.fleet.contribute(name, plans[name])
                self.state = self.state.on_masked_input(name, self.uploads[name])

    def digests(self) -> dict[str, bytes]:
        return dict(self.state.vectors)

    def sign(self, message: Message) -> bytes:
        return envelope.sign(self.fleet.key, message)

    def resign(self, raw: bytes, kind: Any, **changes: Any) -> bytes:
        message = envelope.open_verified(kind, raw, self.fleet.key.public, "coordinator")
        return self.sign(dataclasses.replace(message, **changes))

    def ask(self, name: str, method: str, message: Message) -> bytes:
        """Send a message to a device in its current state; returns the answer."""
        return self.fleet.answer(method, name, self.sign(message))  # type: ignore[no-any-return]

    def open_verified(self, name: str, kind: Any, raw: bytes) -> Any:
        return envelope.open_verified(kind, raw, self.fleet.devices[name].identity.public, name)

    def recover(self, seeds: Mapping[str, Mapping[str, bytes]], keys: Mapping[str, Mapping[str, bytes]]) -> Recovery:
        """Reconstruct secrets from shares, however obtained. ``seeds``, ``keys``: holder → dealer → share."""
        responses = {
            holder: UnmaskResponse(bytes(32), holder, seeds.get(holder, {}), keys.get(holder, {}))
            for holder in sorted({*seeds, *keys})
        }
        assert self.plan is not None
        return Recovery(self.session.session, self.plan, self.session.encrypted_shares, responses)

    def unmask_upload(self, name: str, seed: bytes, keys: Mapping[str, bytes]) -> dict[str, NDArray[np.float64]]:
        """A device's own numbers from its upload, its seed, and either private mask key of each of its pairs."""
        assert self.plan is not None
        session, spec, plan = self.session.session, self.fleet.spec.vector, self.plan.digest()
        found = [Mask(masks.self_key(seed, session.context, plan, name), add=False)]
        for peer in session.neighbors(name, self.plan.members):
            mine, theirs = (name, peer) if name in keys else (peer, name)
            public = session.peers[theirs].mask_keys[self.plan.round - 1]
            key = masks.pair_key(keys[mine], public, session.context, plan, (name, peer))
            found.append(Mask(key, add=not name < peer))
        packed = self.uploads[name][: ring.packed_size(spec.size, spec.ring_bits)]
        vector = ring.unpack(packed, spec.size, spec.ring_bits)
        masks.apply(vector, found)
        return spec.decode(vector, 1)

    def sum_over(self, part: Sequence[str], gone: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The sum over ``part`` from ``responses``: without its self masks, and its pair masks with ``gone``."""
        assert self.plan is not None
        session, spec, plan = self.session.session, self.fleet.spec.vector, self.plan.digest()
        recovery = Recovery(session, self.plan, self.session.encrypted_shares, self.responses)
        total, found = ring.zeros(spec.size, spec.ring_bits), []
        for name in part:
            packed = self.uploads[name][: ring.packed_size(spec.size, spec.ring_bits)]
            total += ring.unpack(packed, spec.size, spec.ring_bits)
            seed = recovery.seed(name)
            assert seed is not None
            found.append(Mask(masks.self_key(seed, session.context, plan, name), add=False))
            for other in session.neighbors(name, gone):
                private = recovery.mask_key(other)
                assert private is not None
                public = session.peers[name].mask_keys[self.plan.round - 1]
                key = masks.pair_key(private, public, session.context, plan, (name, other))
                found.append(Mask(key, add=not name < other))
        masks.apply(total, found)
        return spec.decode(total, len(part))

    def assert_sum(self, part: Sequence[str], values: Mapping[str, NDArray[np.float64]]) -> None:
        """The attack succeeded: this is the sum over ``part`` alone."""
        for segment in self.fleet.spec.vector.segments:
            plain = np.sum([self.fleet.plain[name][segment.name] for name in part], axis=0)
            assert np.abs(values[segment.name] - plain).max() < len(part) * self.fleet.spec.vector.step(segment)

    def consistency_signature(self, name: str, survivors: Survivors) -> bytes:
        """The signature of a device on a survivor set."""
        raw = self.ask(name, "on_survivors", survivors)
        return envelope.signature(raw)

    def assert_exposed(self, name: str, values: Mapping[str, NDArray[np.float64]]) -> None:
        """The attack succeeded: these are the device's own numbers."""
        for segment in self.fleet.spec.vector.segments:
            error = np.abs(values[segment.name] - self.fleet.plain[name][segment.name]).max()
            assert error < self.fleet.spec.vector.step(segment)


@pytest.fixture
def malicious(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> Callable[..., Coordinator]:
    """Make a malicious coordinator over five honest devices."""

    def make(adversary: Adversary = Adversary.HONEST_BUT_CURIOUS, **changes: Any) -> Coordinator:
        return Coordinator(fleet_of(5, spec=spec_of(5, adversary=adversary, **changes)))

    return make


@pytest.fixture
def sparse(fleet_of: FleetOf, spec_of: Callable[..., Any]) -> Callable[..., Coordinator]:
    """Make a malicious coordinator over honest devices that allow a small sparse graph."""

    def make(devices: int, *, degree: int, threshold: int, minimum_survivors: int) -> Coordinator:
        spec = spec_of(devices, degree=degree, threshold=threshold, minimum_survivors=minimum_survivors)
        known = frozenset({spec.base_digest})
        policy = Policy(known_bases=known, minimum_survivors=2, corrupt_fraction=0, complete_up_to=3)
        return Coordinator(fleet_of(devices, spec=spec, policy=policy))

    return make
