"""A real PostgreSQL server of the test's own, from Debian's package: a temporary cluster behind a Unix socket.

The server refuses to run as root, so there it runs as Debian's user ``postgres``.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import quote

from tests.support.programs import need

REQUIRED = os.environ.get("EDGEADAPT_REQUIRE_POSTGRESQL") == "1"
PROGRAMS = Path("/usr/lib/postgresql")
USER = "fleet"
DEADLINE = 120.0  # seconds in which a server starts or stops
NAMES = count(1)


def programs() -> Path:
    """The folder of the newest server's programs."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    need(found, "no PostgreSQL server: apt install postgresql", required=REQUIRED)
    return found[-1].parent


@dataclass
class Server:
    """A cluster in ``folder``. ``password``: of the user ``fleet``, who owns it."""

    bin: Path
    folder: Path
    password: str = field(repr=False)
    process: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def create(cls) -> "Server":
        """A new cluster, started."""
        server = cls(programs(), Path(tempfile.mkdtemp(prefix="pg-")), secrets.token_hex(16))
        shutil.chown(server.folder, server.owner, server.owner)
        secret = server.folder / "password"
        secret.write_text(server.password)
        options = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}", "--no-sync", "--encoding=UTF8"]
        command = [str(server.bin / "initdb"), f"--pgdata={server.data}", "--locale=C", *options]
        shutil.chown(secret, server.owner, server.owner)
        subprocess.run(command, check=True, capture_output=True, user=server.owner, group=server.owner, cwd="/")
        server.start()
        return server

    @property
    def owner(self) -> str | int:
        return "postgres" if os.getuid() == 0 else os.getuid()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Run the server, and wait until it takes connections."""
        # No sync to the disk: these tests kill processes, not the machine.
        settings = ["listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=off", "max_connections=40"]
        command = [str(self.bin / "postgres"), "-D", str(self.data), *(each for s in settings for each in ("-c", s))]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, user=self.owner, group=self.owner, cwd="/")
        ready, end = [str(self.bin / "pg_isready"), "-h", str(self.folder)], time.monotonic() + DEADLINE
        while subprocess.run(ready, check=False, capture_output=True).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End the server: its sessions at once, or with ``SIGQUIT`` as a crash would."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(DEADLINE)

    def url(self, database: str) -> str:
        """The address of a database, without the password."""
        return f"postgresql://{USER}@/{database}?host={quote(str(self.folder), safe='')}"

    def run(self, database: str, statement: str) -> str:
        """What a statement returns, as ``psql`` prints it."""
        command = [str(self.bin / "psql"), "-h", str(self.folder), "-U", USER, "-d", database, "-Atqc", statement]
        environment = {**os.environ, "PGPASSWORD": self.password}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    def database(self) -> str:
        """The name of a new database."""
        name = f"registry{next(NAMES)}"
        self.run("postgres", f"CREATE DATABASE {name}")
        return name

    def remove(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)
