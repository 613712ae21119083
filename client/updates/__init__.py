"""A bundle that follows a channel: fetched by The Update Framework, verified, replaced whole."""

from client.updates.channel import ChannelSource, Updated, follow, update

__all__ = ["ChannelSource", "Updated", "follow", "update"]
