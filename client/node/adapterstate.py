"""What a device remembers, across sessions, of the adapter that it trained from last.

Two sums from one adapter, with and without a device, differ by that device's update and by what training in another
order changes in the others; so does a sum from an old adapter from one of its successor. A device therefore trains from
no adapter older than the last one, and from one adapter of each version. It reveals shares for one sum from an adapter,
and then for a few more at most, each over the same devices, or over so many others that the difference hides each. All
of them are trained with the same settings and bounds: a clip norm or weight cap that only one device reaches would
single out its update in two sums over the same devices.

An honest coordinator repeats a round from the same adapter if too few devices answered the unmask request, if the sum
was out of range, or if it was stopped before it logged the result. Rounds that end before the unmask request do not
count. Equal adapters are recognized by their bytes. Whether the adapter of a plan is the one that the log leads to is a
question to the log (``aggregation.transcript``).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from aggregation import wire
from aggregation.errors import ProtocolError
from aggregation.messages import DEVICES, MAX_COHORT, Digest, HexDigest, Plan, Uint64
from aggregation.policy import MAX_REPEATS
from aggregation.session import COORDINATOR
from aggregation.spec import SessionSpec
from aggregation.wire import Codec

_SETS = wire.sequence(wire.sequence(DEVICES, MAX_COHORT), 1 + MAX_REPEATS)


@dataclass(frozen=True, slots=True)
class AdapterState:
    """The adapter that a device trained from last.

    Args:
        version: Its number.
        digest: SHA-256 of its file, hex.
        terms: See ``terms``.
        unmasked: The survivors, sorted, of each sum from it for which the device revealed shares.
    """

    version: Uint64
    digest: HexDigest
    terms: Digest
    unmasked: Annotated[tuple[tuple[str, ...], ...], _SETS] = ()


ADAPTER_STATE: Codec[AdapterState] = wire.record(AdapterState)


def terms(plan: Plan, spec: SessionSpec) -> bytes:
    """Digest of what the coordinator chose of an update besides the adapter: settings, clip norm and weight cap."""
    return hashlib.sha256(f"{spec.clip_norm!r}/{spec.weight_cap}/".encode() + plan.training).digest()


def on_plan(known: AdapterState | None, plan: Plan, spec: SessionSpec, maximum_repeats: int) -> AdapterState:
    """The state after the device trained for ``plan``.

    Args:
        known: Its state; None before the first plan.
        plan: As accepted.
        spec: Of the session.
        maximum_repeats: The policy's.

    Raises:
        ProtocolError: The adapter is older than the last one, another one of its version, or used up; or it was trained
            on other terms before.
    """
    version, digest, now = plan.adapter_version, plan.adapter_digest, terms(plan, spec)
    if known is None:
        return AdapterState(version, digest, now)
    if version < known.version:
        text = f"adapter {version} of the plan is older than adapter {known.version}, which this device trained from"
        raise ProtocolError(text, COORDINATOR, about="plan.adapter_version", value=version)
    if version == known.version and digest != known.digest:
        text = f"this device trained from another adapter {version} than that of the plan"
        raise ProtocolError(text, COORDINATOR, about="plan.adapter_version", value=version)
    if digest != known.digest:
        return AdapterState(version, digest, now)
    if (count := len(known.unmasked)) > maximum_repeats:
        text = f"this device revealed shares for {count} sums from adapter {version}, and its policy permits no other"
        raise ProtocolError(text, COORDINATOR, about="plan.repeats", value=count)
    if known.unmasked and now != known.terms:
        text = f"adapter {version} was trained with other settings, clip norm or weight cap before its sum was unmasked"
        raise ProtocolError(text, COORDINATOR, about="plan.terms")
    return replace(known, version=version, terms=now)


def on_survivors(
    known: AdapterState | None, plan: Plan, spec: SessionSpec, survivors: Iterable[str], least: int
) -> AdapterState:
    """The state after the device reveals shares for a sum.

    Args:
        known: Its state.
        plan: Of the round.
        spec: Of the session.
        survivors: Whose updates are in the sum.
        least: Fewest devices by which two sums from one adapter may differ, unless they are over the same devices.

    Raises:
        ProtocolError: Another sum from this adapter differs by fewer devices.
    """
    if known is None or known.digest != plan.adapter_digest:
        known = AdapterState(plan.adapter_version, plan.adapter_digest, terms(plan, spec))
    for earlier in known.unmasked:
        if 0 < (count := len({*earlier} ^ {*survivors})) < least:
            text = f"the sum differs by {count} devices from an earlier one of the same adapter, fewer than {least}"
            raise ProtocolError(text, COORDINATOR, about="survivors.repeat", value=count)
    return replace(known, unmasked=(*known.unmasked, tuple(sorted(survivors))))
