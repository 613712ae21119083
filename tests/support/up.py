"""``edgeadapt coordinator up`` as a process."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordinator.services.deployment import running
from coordinator.settings import SERVICES, ServiceSettings
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from tests.support.gateway import HOST, authority_of, free_port, server_tls

ROOT = Path(__file__).parents[2]
LONG = 300.0  # seconds, on a machine that has other work


class Up:
    """The command as a process, and the events that it has written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.other = folder, list[dict[str, Any]](), list[str]()
        command = [sys.executable, "-m", "edgeadapt", "coordinator", "up", folder, "--json"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            if line.startswith("{"):
                self.events.append(json.loads(line))
            else:
                self.other.append(line)

    def count(self, event: str, service: str = "rounds") -> int:
        return sum((each["event"], each["service"]) == (event, service) for each in self.events)

    def wait(self) -> int:
        code = self.process.wait(LONG)
        self._reader.join(LONG)
        return code

    def pid(self, service: str = "rounds") -> int:
        found = running(self.folder)
        assert found is not None
        (pid,) = [each["pid"] for each in found["services"] if each["name"] == service]
        assert isinstance(pid, int)
        return pid


@contextmanager
def going_up(folder: Path) -> Iterator[Up]:
    up = Up(folder)
    try:
        yield up
    finally:
        up.process.kill()
        up.process.communicate()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex((HOST, port)) == 0


def coordinator_of(fleet: Any, *, superlink: bool = False) -> tuple[Path, int]:
    """The state directory of a fleet's coordinator with a gateway in its services, and the gateway's port."""
    folder, port, tls = fleet.out / "coordinator", free_port(), server_tls(authority_of(fleet))
    settings = ServiceSettings(gateway=f"{HOST}:{port}", superlink=f"{HOST}:{free_port()}" if superlink else "")
    (folder / TLS_KEY).write_bytes(tls.key)
    (folder / TLS_CERTIFICATE).write_bytes(tls.certificate)
    (folder / SERVICES).write_text(settings.to_toml())
    return folder, port
