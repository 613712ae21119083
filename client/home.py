"""The device's home: the folder with its identity, whom it trusts, its settings, its examples and its sealed state.

Everything secret is readable by its owner only. The state of a protocol session is encrypted at rest and replaced
atomically *before* an answer leaves the device, so that a restarted device never answers a step twice.
"""

import fcntl
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aggregation import clientside
from aggregation.certificates import Root
from aggregation.clientside import ClientState, Device
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError
from aggregation.identity import IdentityKey, PublicKey
from aggregation.policy import Policy
from aggregation.spec import Adversary
from client.storage import replace

SETTINGS = "device.toml"
IDENTITY = "identity.pem"
CERTIFICATE = "certificate.der"
AUTHORITY = "authority.pem"
COORDINATOR = "coordinator.pem"
EXAMPLES = "examples.jsonl"
TRUST = "trust.pem"
PERSONAL = "personal.safetensors"
SEALING_KEY = "sealing.key"
STATE = "session.sealed"
LOCK = "session.lock"


class DeviceSettings(BaseModel):
    """``device.toml``: the owner's own settings. The coordinator cannot change them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base: str = Field(description="frozen base: a folder, or an installed package that carries one")
    minimum_cohort: int = Field(default=8, ge=3, description="smallest cohort this device joins, in devices")
    trust_coordinator_to_follow: bool = Field(
        default=False, description="also join sessions that only withstand a coordinator that follows the protocol"
    )
    examples: str = Field(default=EXAMPLES, description="examples file, relative to this folder")


@dataclass(frozen=True, slots=True)
class Home:
    """A device's folder, opened. Open it anew for every message: it holds no session state in memory."""

    folder: Path
    settings: DeviceSettings

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the settings.

        Raises:
            ConfigError: There is no such folder, or its settings are missing, ill-formed or have an unknown key.
        """
        path = folder / SETTINGS
        try:
            return cls(folder, DeviceSettings.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{folder} is not a device's home: it has no {SETTINGS}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def examples(self) -> Path:
        """The examples file."""
        return self.folder / self.settings.examples

    @property
    def certificate(self) -> bytes:
        """The device's certificate, DER."""
        return self._read(CERTIFICATE)

    def device(self, base_digest: str) -> Device:
        """Who this device is and whom it trusts, for the protocol core.

        Raises:
            TrustError: A key or certificate is missing or damaged.
        """
        return Device(
            IdentityKey.from_pem(self._read(IDENTITY)),
            self.certificate,
            Root.from_pem(self._read(AUTHORITY)),
            PublicKey.from_pem(self._read(COORDINATOR)),
            Policy(
                known_bases=frozenset({base_digest}),
                minimum_cohort=self.settings.minimum_cohort,
                adversaries=frozenset(Adversary if self.settings.trust_coordinator_to_follow else {Adversary.ACTIVE}),
            ),
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One message at a time: two processes that read the same state would both answer a step."""
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a kill
            yield

    def load_state(self) -> ClientState | None:
        """The state of the running session, or nothing where there is none.

        Raises:
            TrustError: The sealed state was altered, or belongs to another device.
        """
        path = self.folder / STATE
        return clientside.unseal(path.read_bytes(), self._read(SEALING_KEY)) if path.exists() else None

    def save_state(self, state: ClientState) -> None:
        """Seal the state and replace the old one atomically."""
        replace(self.folder / STATE, clientside.seal(state, self._read(SEALING_KEY)))

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise TrustError(f"{self.folder} has no {name}: enrol this device first") from error


def enrol(
    folder: Path, settings: Mapping[str, str | int], identity: IdentityKey, trust: Mapping[str, bytes], entropy: Entropy
) -> Home:
    """Make a home.

    Args:
        folder: Created where it is missing.
        settings: Keys of ``DeviceSettings``.
        identity: Made on the device; its public half is in the certificate.
        trust: ``CERTIFICATE``, ``AUTHORITY`` and ``COORDINATOR`` → their bytes.
        entropy: Draws the sealing key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} = {_toml(value)}\n" for key, value in settings.items()]
    files = {SETTINGS: "".join(lines).encode(), IDENTITY: identity.to_pem(), SEALING_KEY: entropy.bytes(32), **trust}
    for name, content in files.items():
        replace(folder / name, content)
    return Home.open(folder)


def _toml(value: str | int) -> str:
    # JSON's strings and numbers are TOML's, but for the one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
