"""The two releases of a rollout, as a round of evaluation names them (``edgeadapt.rounds.evaluation``)."""

from aggregation.errors import ConfigError
from edgeadapt.releases.repository import ChannelRepository


def compared(repository: ChannelRepository, channel: str, name: str) -> tuple[str, str]:
    """Return an adapter's ``AdapterManifest.content`` in the release that a channel rolls out, and in the previous one.
    Raises ConfigError: the channel rolls nothing out, or the adapter is not in both releases or is the same in both."""
    current, rollout = repository.release(channel), repository.rollout(channel)
    if current is None or rollout is None:
        reason = f"channel {channel} rolls nothing out: begin with 'edgeadapt adapters promote … --share'"
        raise ConfigError(reason, about="rollout", value=channel)
    both = [repository.release(channel, number) for number in (rollout.release, rollout.previous)]
    contents = [repository.manifest(channel, each, name).content for each in both if each and name in each.adapters]
    if len(contents) < len(both) or contents[0] == contents[1]:
        reason = f"the two releases of {channel} have no adapter {name!r} that can be compared: name one, --adapter"
        raise ConfigError(reason, about="adapter", value=name)
    return contents[0], contents[1]
