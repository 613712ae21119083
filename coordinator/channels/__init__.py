"""Channels of releases for devices: a repository of The Update Framework, as static files, with a log."""

from coordinator.channels.actions import Action, ActionRecord, GateResult
from coordinator.channels.repository import ChannelRepository, Published, pinned_keys

__all__ = ["Action", "ActionRecord", "ChannelRepository", "GateResult", "Published", "pinned_keys"]
