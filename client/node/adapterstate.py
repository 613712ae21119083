"""What a device remembers, across sessions, of the adapter that it trained from last.

Sums from one adapter, or from an old one and its successor, can be added and subtracted so that only a few devices are
left. So a device trains from no adapter older than the last one, from one adapter of each version, and from none to
whose sums it helped before it trained from another one: with new numbers, two could alternate (``EARLIER`` are
remembered). It reveals shares for sums from an adapter over one set of survivors, for a few of them at most, and all
trained with the same settings and bounds: a clip norm or weight cap that only one device reaches would single out its
update. How many devices are left in any combination then follows from the threshold.

With groups, a device is bound once it signed a survivor set: it counts on the signatures of its group, each of which
stands for a device that is in no sum with others (``aggregation.groups``). Later sums have the same groups, and lack
only devices whose certificates the authority revoked since, which would otherwise stop the training of all others.

An honest coordinator repeats a round from the same adapter if too few devices answered the unmask request, or if it was
stopped before it logged the result. Rounds that end before the unmask request do not count. Equal adapters are
recognized by their bytes. Whether a plan's adapter is the one that the log leads to is a question to the log
(``aggregation.transcript``)."""

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

from aggregation import wire
from aggregation.messages import DIGESTS, SERIALS, Digest, HexDigest, Plan, Uint32, Uint64
from aggregation.session import refused
from aggregation.spec import SessionSpec
from aggregation.wire import Codec

EARLIER = 1024  # adapters: 32 KiB


@dataclass(frozen=True, slots=True)
class AdapterState:
    version: Uint64
    digest: HexDigest  # SHA-256 of its file, hex
    terms: Digest
    sums: Uint32 = 0  # sums from it for which the device revealed shares or, with groups, signed the survivor set
    # Whose updates are in the last of them: device id → serial of the certificate it had then.
    survivors: Annotated[Mapping[str, int], SERIALS] = field(default_factory=dict)
    dealt: Digest = bytes(32)  # ``dealt`` of the last of them
    # SHA-256 of the files of the last ``EARLIER`` adapters before it for whose sums the device revealed shares, the
    # oldest first.
    earlier: Annotated[tuple[bytes, ...], wire.sequence(DIGESTS, EARLIER)] = field(default=(), repr=False)


ADAPTER_STATE: Codec[AdapterState] = wire.record(AdapterState)


def terms(plan: Plan, spec: SessionSpec) -> bytes:
    """Digest of what the coordinator chose of an update besides the adapter: settings, clip norm and weight cap."""
    return hashlib.sha256(f"{spec.clip_norm!r}/{spec.weight_cap}/".encode() + plan.training).digest()


def dealt(plan: Plan, spec: SessionSpec) -> bytes:
    """Digest of what the groups of a plan follow from, besides the adapter; zeros without groups."""
    if spec.grouping is None:
        return bytes(32)
    named = ",".join(sorted({*plan.members, *plan.former}))
    return hashlib.sha256(f"{spec.groups}/{named}".encode()).digest()


def on_plan(known: AdapterState | None, plan: Plan, spec: SessionSpec, maximum_repeats: int) -> AdapterState:
    """Make the state after the device trained for ``plan``; ``known`` is None before the first plan. Raises
    ProtocolError: the adapter is older than the last one, another one of its version, one that the device left after it
    revealed shares, or used up; or it was trained on other terms before."""
    version, digest, now = plan.adapter_version, plan.adapter_digest, terms(plan, spec)
    if known is None:
        return AdapterState(version, digest, now)
    if version < known.version:
        text = f"adapter {version} of the plan is older than adapter {known.version}, which this device trained from"
        raise refused(text, "plan.adapter_version")
    if version == known.version and digest != known.digest:
        text = f"this device trained from another adapter {version} than that of the plan"
        raise refused(text, "plan.adapter_version")
    if digest != known.digest:
        if bytes.fromhex(digest) in (before := earlier(known)):
            text = f"adapter {version} of the plan is an earlier one again, from which this device revealed shares"
            raise refused(text, "plan.adapter_digest")
        return AdapterState(version, digest, now, earlier=before)
    if known.sums > maximum_repeats:
        text = f"this device revealed shares for {known.sums} sums from adapter {version}; its policy permits no other"
        raise refused(text, "plan.repeats")
    if known.sums and now != known.terms:
        text = f"adapter {version} was trained with other settings, clip norm or weight cap before its sum was unmasked"
        raise refused(text, "plan.terms")
    if known.sums and dealt(plan, spec) != known.dealt:
        text = f"the last sum from adapter {version} had other groups: this device helps to no sum with others"
        raise refused(text, "plan.groups")
    return replace(known, version=version, terms=now)


def earlier(known: AdapterState) -> tuple[bytes, ...]:
    return (*known.earlier, bytes.fromhex(known.digest))[-EARLIER:] if known.sums else known.earlier


def on_survivors(
    known: AdapterState | None, plan: Plan, spec: SessionSpec, survivors: Mapping[str, int], revoked: Container[int]
) -> AdapterState:
    """Make the state after the device reveals shares for a sum or, with groups, signs its survivor set.

    ``survivors``: whose updates are in the sum, device id → serial of its certificate; ``revoked``: serials in the
    authority's revocation list. Raises ProtocolError: the device trained from another adapter since, or the last sum
    from this one has other devices."""
    if known is None or known.digest != plan.adapter_digest:
        text = f"adapter {plan.adapter_version} of the sum is not the one that this device trained from last"
        raise refused(text, "survivors.adapter")
    if known.sums:
        added, lacking = differing(known.survivors, survivors, revoked)
        if added or lacking:
            text = (
                f"the last sum from adapter {plan.adapter_version} was over other devices: this one has {added} "
                f"more, and lacks {lacking} whose certificates are not revoked"
            )
            raise refused(text, "survivors.repeat")
    return replace(known, sums=known.sums + 1, survivors=survivors, dealt=dealt(plan, spec))


def differing(before: Mapping[str, int], survivors: Mapping[str, int], revoked: Container[int]) -> tuple[int, int]:
    """Count the devices that a sum has more than the previous one, and those it lacks that were not revoked since."""
    lacking = [name for name in before.keys() - survivors.keys() if before[name] not in revoked]
    return len(survivors.keys() - before.keys()), len(lacking)
