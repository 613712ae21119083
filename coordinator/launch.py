"""Run a federation on a SuperLink, with Flower's own command line. It starts the coordinator's process, which opens the
state directory: the SuperLink's machine must have that, under the same path."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation.errors import EdgeAdaptError
from edgeadapt.formats.settings import toml_value

BUNDLE = Path(__file__).parent / "flower"
STATE = "coordinator-state"  # key of the run configuration: the coordinator's state directory
JSON = "coordinator-json"  # key of the run configuration: whether the run writes its log as objects
GATEWAY = "coordinator-gateway"  # key of the run configuration: where the coordinator listens for light devices, if so
OURS = "edgeadapt"  # the connection's name in a configuration that is made here
FLWR = (sys.executable, "-c", "from flwr.cli.app import app; app()")
COMPLETED = "finished:completed"


@dataclass(frozen=True, slots=True)
class Connection:
    """Flower's command line for one SuperLink: the connection's name, and the environment to call it in."""

    name: str
    environment: Mapping[str, str]

    def start(self, state_dir: Path, gateway: str | None = None, *, as_json: bool = False) -> str:
        """Submit a run for the coordinator's state directory. Returns Flower's id of it. ``gateway``: ``HOST:PORT`` at
        which the run listens for light devices as well. ``as_json``: it writes its log as objects. Raises
        EdgeAdaptError: the SuperLink cannot be reached, or refuses."""
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "run.toml"  # a file, because Flower's own parser takes no quotes in a value
            values: dict[str, str | bool] = {STATE: str(state_dir.resolve())}
            values |= ({GATEWAY: gateway} if gateway else {}) | ({JSON: True} if as_json else {})
            lines = (f"{key} = {toml_value(value)}\n" for key, value in values.items())
            config.write_text("".join(lines), encoding="utf-8")
            reply = self._json("run", str(BUNDLE), self.name, "--run-config", str(config))
        return str(reply["run-id"])

    def show_log(self, run_id: str, show: Callable[[str], None]) -> None:
        """Show the lines of the run's log until the run ends. An interruption ends the log, not the run."""
        command = [*FLWR, "log", run_id, self.name, "--stream"]
        with subprocess.Popen(  # noqa: S603
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in process.stdout or ():
                    show(line.rstrip("\n"))
            except BaseException:
                process.terminate()  # the end of the block waits for it
                raise

    def require_completed(self, run_id: str) -> None:
        """Check that the run completed. Raises EdgeAdaptError: it did not, or the SuperLink cannot be reached."""
        (run,) = self._json("list", self.name, "--run-id", run_id)["runs"]
        if run["status"] != COMPLETED:
            details = " ".join(run["status-details"].split()) or "see the log above"
            raise EdgeAdaptError(f"run {run_id} is {run['status']}: {details}", about="run")

    def _json(self, *arguments: str) -> dict[str, Any]:
        command = [*FLWR, *arguments, "--format", "json"]
        done = subprocess.run(  # noqa: S603
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        try:
            reply: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            reply = {"error-message": done.stderr or done.stdout}
        if done.returncode or not reply.get("success"):
            reason = " ".join(str(reply.get("error-message", "")).split())
            text = f"Flower's command '{arguments[0]}' failed: {reason or 'it gave no reason'}"
            raise EdgeAdaptError(text, about="superlink")
        return reply


@contextmanager
def connected(address: str, root_certificates: Path | None, *, insecure: bool) -> Iterator[Connection]:
    """Configure Flower's command line for the SuperLink's Control API at ``address`` (``HOST:PORT``), for the block.
    ``root_certificates``: PEM file of the authority that certified the SuperLink; None: those of the system."""
    table: dict[str, Any] = {"address": address}
    table |= {"insecure": True} if insecure else {}
    table |= {"root-certificates": str(root_certificates.resolve())} if root_certificates else {}
    lines = [f"[superlink.{OURS}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield Connection(OURS, {**os.environ, "FLWR_HOME": home})
