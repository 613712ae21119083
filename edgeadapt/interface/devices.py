"""``edgeadapt.Device``: a device's state directory, and its part in a federation."""

from datetime import datetime
from pathlib import Path
from typing import Any, Self

from aggregation.entropy import SystemEntropy
from aggregation.pki.certificates import load, not_after, subject
from client.gateway.agent import Agent
from client.gateway.enrolment import enrol_with
from client.node.policy import PolicySettings
from client.node.statedir import DeviceSettings, DeviceStateDir
from edgeadapt.formats.gateway.invitation import read_invitation
from edgeadapt.formats.settings import overridden
from edgeadapt.formats.storage import File
from edgeadapt.interface.names import in_python, overrides


class Device:
    """A device, which its state directory holds: each call reads that."""

    def __init__(self, path: File) -> None:
        """Open a state directory. Raises ConfigError: it is not one."""
        self.path = Path(path)
        self._running: Agent | None = None
        self._open()

    @classmethod
    def enrol(cls, path: File, *, base: File, token: str, **settings: Any) -> Self:
        """Make a state directory by an invitation of the authority; if the connection broke, repeat the call.

        Args:
            path: A new or empty folder.
            base: The frozen model: a folder, a file, or a package that carries it.
            token: What ``edgeadapt authority invite`` prints. It is a secret.
            settings: Keys of ``device.toml``, as in ``policy__minimum_cohort=5``.

        Raises ConfigError, TrustError, EdgeAdaptError: as ``client.gateway.enrolment.enrol_with``."""
        with in_python():
            table = overridden({"base": str(base)}, overrides(settings))
            enrol_with(read_invitation(token), Path(path), DeviceSettings.parse(table, "settings"), SystemEntropy())
        return cls(path)

    @property
    def name(self) -> str:
        return subject(load(self._open().certificate))

    @property
    def valid_until(self) -> datetime:
        """Return the end of the certificate, which the device renews by itself while it runs."""
        return not_after(self._open().certificate)

    @property
    def policy(self) -> PolicySettings:
        """Return what the owner permits, from ``device.toml``."""
        return self._open().settings.policy

    def run(self, gateway: str | None = None) -> None:
        """Take part in rounds until ``stop``, which another thread calls. ``gateway``: ``HOST:PORT``, or several with
        commas; by default that of ``device.toml``. Raises as ``Agent.of`` and ``Agent.run``."""
        with in_python():
            self._running = Agent.of(self.path, gateway)
            self._running.run()

    def stop(self) -> None:
        """End ``run`` soon; a step that is under way is finished."""
        if self._running is not None:
            self._running.stop()

    def _open(self) -> DeviceStateDir:
        return DeviceStateDir.open(self.path)

    def __repr__(self) -> str:
        return f"<Device {str(self.path)!r}>"
