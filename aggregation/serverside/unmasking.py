"""Step 8 at the coordinator: shares come in, and the sum is opened, or nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aggregation import checks, masks, ring
from aggregation.errors import DataError, ProtocolError
from aggregation.masks import Mask
from aggregation.messages import Opening
from aggregation.once import Once
from aggregation.recovery import Recovery
from aggregation.serverside.outcomes import AbortReason, RoundAborted, RoundResult
from aggregation.serverside.settled import Settled

if TYPE_CHECKING:
    from aggregation.serverside.established import Established


@dataclass(frozen=True, slots=True)
class Unmasking:
    """The unmask request is out; openings come in. ``asked``: who may answer."""

    settled: Settled
    asked: tuple[str, ...]
    openings: Mapping[str, Opening] = field(default_factory=dict)
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_unmask(self, peer: str, body: bytes) -> "Unmasking":
        """Take one survivor's shares: step 8.

        Raises:
            ProtocolError: Not its signed opening of this survivor set, its second, or with a share that it does
                not owe.
        """
        checks.turn(peer, self.asked, self.openings, "opening")
        message = self.settled.hear(Opening, peer, body)
        if (message.survivors, message.device) != (self.settled.digest, peer):
            raise ProtocolError("opening is of another survivor set or device", peer)
        alive, dropped = checks.owed(self.settled.session, self.settled.plan, peer, self.settled.survivors)
        if not (set(message.seeds) <= set(alive) and set(message.keys) <= set(dropped)):
            raise ProtocolError("opening has a share that it does not owe", peer)
        return replace(self, openings={**self.openings, peer: message})  # with the same latch: one sum

    def close(self, threads: int = 1) -> "tuple[Established, RoundResult] | RoundAborted":
        """End step 8: open the sum, or nothing. ``threads`` are those of ``masks.apply``."""
        settled, least = self.settled, self.settled.session.spec.threshold
        if len(self.openings) < least:
            return settled.aborted(AbortReason.TOO_FEW, f"{len(self.openings)} openings, {least} are needed")
        recovery = Recovery(settled.session, settled.plan, settled.established.dealt, self.openings)
        seeds = {device: seed for device in settled.counted if (seed := recovery.seed(device))}
        keys = {device: key for device in settled.dropped if (key := recovery.mask_key(device))}
        closed = sorted({*settled.counted, *settled.dropped} - {*seeds, *keys})
        if closed:
            detail = f"too few good shares to open {', '.join(closed[:3])}{' …' if closed[3:] else ''}"
            reason = AbortReason.UNRECOVERABLE if recovery.blamed else AbortReason.TOO_FEW
            # Its secrets would not open in the next round either.
            return settled.aborted(reason, detail, recovery.blamed, recovery.blamed.intersection(closed))
        self.once.take("sum")
        masks.apply(settled.total, _masks_to_remove(settled, seeds, keys), threads)
        return _outcome(settled, tuple(sorted(recovery.blamed)))


def _masks_to_remove(settled: Settled, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> Iterator[Mask]:
    """Each survivor's self mask, and what survivors share with those who dropped: the opposite of what was added."""
    session, plan = settled.session, settled.plan.digest()
    for device, seed in seeds.items():
        yield Mask(masks.self_key(seed, session.context, plan, device), add=False)
    for device, private in keys.items():
        publics = session.mask_keys(session.neighbours(device, seeds), settled.plan.round)
        yield from masks.pair_masks(private, device, publics, session.context, plan)


def _outcome(settled: Settled, blamed: tuple[str, ...]) -> "tuple[Established, RoundResult] | RoundAborted":
    """The sum, now that no mask is on it; none where honest survivors cannot have it."""
    spec = settled.session.spec.vector
    try:
        values = spec.decode(settled.total, len(settled.counted))
    except DataError as error:
        return settled.aborted(AbortReason.OUT_OF_RANGE, str(error), blamed)
    digest = ring.digest(settled.total, spec.ring_bits)
    result = RoundResult(settled.plan.round, values, settled.counted, settled.dropped, blamed, digest)
    return settled.established, result
