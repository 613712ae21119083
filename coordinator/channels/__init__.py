"""Channels of releases for devices: a repository of The Update Framework, as static files."""

from coordinator.channels.repository import ChannelRepository, Published, pinned_keys

__all__ = ["ChannelRepository", "Published", "pinned_keys"]
