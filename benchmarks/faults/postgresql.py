"""A PostgreSQL server of one's own, from Debian's package: a temporary cluster behind a Unix socket.

The server refuses to run as root, so there it runs as Debian's user ``postgres``.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Self
from urllib.parse import quote

from aggregation.errors import EdgeAdaptError
from benchmarks.faults.processes import children

PROGRAMS = Path("/usr/lib/postgresql")
USER = "fleet"
DEADLINE = 120.0  # seconds in which a server starts or stops
NAMES = count(1)


def programs() -> Path | None:
    """The folder of the newest server's programs; None: this machine has no server."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def missing() -> str:
    """Why no registry can be in PostgreSQL on this machine; empty if one can."""
    if programs() is None:
        return "no PostgreSQL server on this machine (apt install postgresql)"
    return "" if find_spec("psycopg") else "no psycopg (pip install 'edgeadapt[postgresql]')"


@dataclass
class PostgresServer:
    """A cluster in ``folder``. ``password``: of the user ``fleet``, who owns it."""

    bin: Path
    folder: Path
    password: str = field(repr=False)
    process: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def create(cls) -> Self:
        """A new cluster, started. Raises EdgeAdaptError: there is no server's program, or it does not start."""
        found = programs()
        if found is None:
            raise EdgeAdaptError(missing(), about="postgresql")
        server = cls(found, Path(tempfile.mkdtemp(prefix="pg-")), secrets.token_hex(16))
        try:
            server.initialize()
            server.start()
        except BaseException:
            server.remove()
            raise
        return server

    def initialize(self) -> None:
        """Make the cluster. Raises EdgeAdaptError: ``initdb`` fails."""
        shutil.chown(self.folder, self.owner, self.owner)
        secret = self.folder / "password"
        secret.write_text(self.password, encoding="ascii")
        shutil.chown(secret, self.owner, self.owner)
        options = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}", "--no-sync", "--encoding=UTF8"]
        command = [*self._as_owner, str(self.bin / "initdb"), f"--pgdata={self.data}", "--locale=C", *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")  # noqa: S603
        secret.unlink()
        if done.returncode:
            raise EdgeAdaptError(f"initdb fails: {_last_line(done.stderr)}", about="postgresql")

    @property
    def owner(self) -> str | int:
        """The user as whom the server runs."""
        return "postgres" if os.getuid() == 0 else os.getuid()

    @property
    def _as_owner(self) -> list[str]:
        """What a command begins with that runs as the owner. With ``user`` and ``group``, ``subprocess`` would fork,
        and a fork runs handlers of gRPC, which can end it."""
        who = [f"--reuid={self.owner}", f"--regid={self.owner}", "--init-groups"]
        return ["setpriv", *who] if os.getuid() == 0 else []

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Run the server, and wait until it takes connections. Raises EdgeAdaptError: it does not."""
        # No sync to the disk: processes are killed here, not the machine.
        settings = ["listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=off", "max_connections=40"]
        command = [*self._as_owner, str(self.bin / "postgres"), "-D", str(self.data)]
        command += [each for setting in settings for each in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")  # noqa: S603
        ready, end = [str(self.bin / "pg_isready"), "-h", str(self.folder)], time.monotonic() + DEADLINE
        while subprocess.run(ready, check=False, capture_output=True).returncode:  # noqa: S603
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                last = _last_line((self.folder / "log").read_text(errors="replace"))
                raise EdgeAdaptError(f"the server does not start: {last}", about="postgresql")
            time.sleep(0.05)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End the server: its sessions at once, or with ``SIGQUIT`` as a crash would."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(DEADLINE)

    def kill(self) -> None:
        """End every process of the server by ``kill -9``."""
        if self.process is not None and self.process.poll() is None:
            sessions = children(self.process.pid)
            self.process.kill()
            for each in sessions:
                with suppress(ProcessLookupError):  # it noticed that the first one is gone
                    os.kill(each, signal.SIGKILL)
            self.process.wait()

    def url(self, database: str) -> str:
        """The address of a database, without the password."""
        return f"postgresql://{USER}@/{database}?host={quote(str(self.folder), safe='')}"

    def run(self, database: str, statement: str) -> str:
        """What a statement returns, as ``psql`` prints it."""
        command = [str(self.bin / "psql"), "-h", str(self.folder), "-U", USER, "-d", database, "-Atqc", statement]
        environment = {**os.environ, "PGPASSWORD": self.password}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
        return done.stdout.strip()

    def database(self) -> str:
        name = f"registry{next(NAMES)}"
        self.run("postgres", f"CREATE DATABASE {name}")
        return name

    def remove(self) -> None:
        """End the server, and delete the cluster."""
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
