"""A server of S3's protocol as a process of its own: moto's, over HTTP."""

import http.client
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.support.gateway import HOST, free_port

ROOT = Path(__file__).parents[2]
DEADLINE = 120.0  # seconds
NAMES = count(1)
SECRET = "not-shown-anywhere"  # noqa: S105


@dataclass
class Server:
    port: int
    process: "subprocess.Popen[bytes]"

    @classmethod
    def create(cls) -> "Server":
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "--host", HOST, "--port", str(port)]
        quiet = subprocess.DEVNULL
        server = cls(port, subprocess.Popen(command, cwd=ROOT, stdin=quiet, stdout=quiet, stderr=quiet))
        end = time.monotonic() + DEADLINE
        while True:
            try:
                server.request("GET", "/")
            except OSError:
                assert server.process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            else:
                return server

    @property
    def environment(self) -> Mapping[str, str]:
        """Where boto finds the server and its keys."""
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_ACCESS_KEY_ID": "fleet",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """What the server answers, without a signature: moto checks none."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=DEADLINE)
        service = "AWS4-HMAC-SHA256 Credential=fleet/20260101/us-east-1/s3/aws4_request"
        try:
            connection.request(method, path, body, {"Authorization": service})
            answer = connection.getresponse()
            found = answer.read()
            assert answer.status < 300, found
            return found
        finally:
            connection.close()

    def bucket(self) -> str:
        """The address of a folder in a new bucket."""
        name = f"bucket{next(NAMES)}"
        self.request("PUT", f"/{name}")
        return f"s3://{name}/fleet"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)
