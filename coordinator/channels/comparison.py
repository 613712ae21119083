"""The two releases of a rollout, as a round of evaluation names them (``adapters.evaluation``)."""

from adapters.rollout import ALL, Rollout
from aggregation import graph
from aggregation.errors import ConfigError
from coordinator.channels.repository import ChannelRepository


def compared(repository: ChannelRepository, channel: str, name: str) -> tuple[str, str]:
    """``AdapterManifest.content`` of an adapter in the release that a channel rolls out, and in the one before.

    Raises:
        ConfigError: The channel rolls nothing out, or the adapter is not in both releases or is the same in both.
        DataError, TrustError: The repository is damaged.
    """
    rollout = repository.rollout(channel) if channel in repository.channels else None
    if rollout is None:
        reason = f"channel {channel} rolls nothing out: begin with 'edgeadapt adapters promote … --share'"
        raise ConfigError(reason, about="rollout", value=channel)
    both = [repository.release(channel, number) for number in (rollout.release, rollout.previous)]
    found = [repository.manifest(channel, each, name).content for each in both if each and name in each.adapters]
    if len(found) < len(both) or found[0] == found[1]:
        reason = f"the two releases of {channel} have no adapter {name!r} that can be compared: name one, --adapter"
        raise ConfigError(reason, about="adapter", value=name)
    return found[0], found[1]


def require_both_likely(rollout: Rollout, devices: int) -> None:
    """Return if each release is expected on as many devices as a sum must have, so that no count is that of a few.

    Devices draw by themselves whether they are in, so the coordinator cannot count them. Of a rollout by language it
    is not known how many have the language, and the newest release is expected on the whole share at most.

    Args:
        rollout: Under way.
        devices: Of a round.

    Raises:
        ConfigError: One release is expected on fewer devices.
    """
    needed, newest = graph.demanded(devices), devices * rollout.share / ALL
    for what, expected, change in (("newest", newest, "raise"), ("previous", devices - newest, "lower")):
        if expected < needed and not (what == "previous" and rollout.languages):
            reason = f"at a share of {rollout.share} % about {expected:g} of {devices} devices have the {what} release"
            remedy = f"{needed} are needed, so that its counts are not those of a few: {change} the share"
            raise ConfigError(f"{reason}, and {remedy}", about="share", value=rollout.share)
