"""Flower's SuperNodes with keys of their own: the command, the key, and its registration at a SuperLink."""

import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aggregation.errors import EdgeAdaptError
from benchmarks.faults.processes import HOST, free_port
from coordinator.launch import FLWR, connected


def write_key(private: Path) -> Path:
    """Write a new key of a SuperNode, and return the file of its public key."""
    key, public = ec.generate_private_key(ec.SECP384R1()), private.with_suffix(".pub")
    openssh, plain = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, plain))
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*ssh))
    return public


def command(address: str, root_certificates: Path, private: Path, device: Path) -> list[str]:
    """Return what starts the SuperNode of ``device``, a state directory, at the SuperLink ``HOST:PORT``."""
    options = {
        "--superlink": address,
        "--port": str(free_port()),
        "--host": HOST,
        "--root-certificates": str(root_certificates),
        "--auth-supernode-private-key": str(private),
        "--node-config": f'state="{device}"',
    }
    program = str(Path(sysconfig.get_path("scripts")) / "flower-supernode")
    return [program, *(part for option in options.items() for part in option)]


def environment(home: Path) -> Mapping[str, str]:
    """Of a SuperNode. ``home``: Flower's own folder, which also tells its processes from others."""
    path = os.pathsep.join(
        [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    )  # Flower finds its programs by it
    return {"FLWR_HOME": str(home), "PATH": path, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}


def register(public: Path, address: str, root_certificates: Path) -> None:
    """Let a SuperLink accept a node with this key. Raises EdgeAdaptError: it refuses."""
    with connected(address, root_certificates, insecure=False) as flower:
        done = subprocess.run(  # noqa: S603
            [*FLWR, "supernode", "register", str(public), flower.name],
            env=flower.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise EdgeAdaptError(" ".join((done.stderr or done.stdout).split()), about="superlink")
