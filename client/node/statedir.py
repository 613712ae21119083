"""The device's home: the folder with its identity, whom it trusts, its settings, its examples and its sealed state.

Everything secret is readable by its owner only. The state of a protocol session is encrypted at rest and replaced
atomically *before* an answer leaves the device, so that a restarted device never answers a step twice. So are what the
device saw of the coordinator's log, and the newest revocation list that it was shown; neither of them is secret.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.storage import locked, replace
from aggregation import sealed, transcript
from aggregation.client import Device
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, ProtocolError, TrustError, of_file
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.sealed import ClientState
from aggregation.transcript import LogState
from client.node.policy import PolicySettings

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
LOG_STATE = "log.seen"
REVOKED = "revoked.crl"
LOCK = "session.lock"

Read = TypeVar("Read")


class DeviceSettings(BaseModel):
    """``device.toml``: the owner's own settings. The coordinator cannot change them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base: str = Field(description="frozen base: a folder, or an installed package that carries one")
    examples: str = Field(default=EXAMPLES, description="examples file, relative to this folder")
    policy: PolicySettings = PolicySettings()


@dataclass(frozen=True, slots=True)
class DeviceStateDir:
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
            unknown = first["type"] == "extra_forbidden"
            what = "there is no such key" if unknown else first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {what}") from error
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
            self._read_as(IdentityKey.from_pem, IDENTITY),
            self.certificate,
            self.root(),
            self._read_as(PublicKey.from_pem, COORDINATOR),
            self.settings.policy.policy(base_digest),
        )

    def root(self) -> Root:
        """The pinned authority, going by the newest revocation list that this device was shown.

        Raises:
            TrustError: A file is missing or damaged.
        """
        root = self._read_as(Root.from_pem, AUTHORITY)
        return self._read_as(root.with_revocations, REVOKED) if (self.folder / REVOKED).exists() else root

    def revoke(self, raw: bytes) -> None:
        """Go by a revocation list from now on, and keep it.

        Raises:
            TrustError: It is not the authority's, or older than the one at hand.
        """
        known = self.root()
        new = known.with_revocations(raw).revoked
        if new is not None and new != known.revoked:
            replace(self.folder / REVOKED, new.to_pem())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One message at a time: two processes that read the same state would both answer a step."""
        with locked(self.folder / LOCK):
            yield

    def load_state(self) -> ClientState | None:
        """The state of the running session, or nothing where there is none.

        Raises:
            TrustError: The sealed state was altered, or belongs to another device.
        """
        if not (self.folder / STATE).exists():
            return None
        return self._read_as(partial(sealed.unseal, key=self._read(SEALING_KEY)), STATE)

    def save_state(self, state: ClientState) -> None:
        """Seal the state and replace the old one atomically."""
        replace(self.folder / STATE, sealed.seal(state, self._read(SEALING_KEY)))

    def load_log_state(self) -> LogState | None:
        """What this device saw of the coordinator's log, or nothing before its first session.

        Raises:
            TrustError: The file is damaged.
        """
        path = self.folder / LOG_STATE
        try:
            return transcript.LOG_STATE.decode(path.read_bytes()) if path.exists() else None
        except ProtocolError:
            raise TrustError(f"{path} is damaged: 'edgeadapt device forget' starts this device's memory anew") from None

    def save_log_state(self, log_state: LogState | None) -> None:
        """Replace what was seen of the log atomically; nothing removes it."""
        if log_state is None:
            (self.folder / LOG_STATE).unlink(missing_ok=True)
        else:
            replace(self.folder / LOG_STATE, transcript.LOG_STATE.encode(log_state))

    def _read_as(self, read_as: Callable[[bytes], Read], name: str) -> Read:
        raw = self._read(name)
        with of_file(self.folder / name):
            return read_as(raw)

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise TrustError(f"{self.folder} has no {name}: enrol this device first") from error


def enrol(
    folder: Path, settings: DeviceSettings, identity: IdentityKey, trust: Mapping[str, bytes], entropy: Entropy
) -> DeviceStateDir:
    """Make a home.

    Args:
        folder: Created where it is missing.
        settings: The owner's; what is as by default is not written.
        identity: Made on the device; its public half is what the authority certifies.
        trust: ``AUTHORITY``, ``COORDINATOR``, and ``CERTIFICATE`` where there is one yet → their bytes.
        entropy: Draws the sealing key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = settings.model_dump(mode="json", exclude_defaults=True)
    files = {SETTINGS: _toml(whole).encode(), IDENTITY: identity.to_pem(), SEALING_KEY: entropy.bytes(32), **trust}
    for name, content in files.items():
        replace(folder / name, content)
    return DeviceStateDir.open(folder)


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    """A table and those within it. JSON's strings, lists and numbers are TOML's, but for one control character."""
    flat = {key: json.dumps(value, ensure_ascii=False) for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"[{name}]\n"] if name else []
    lines += [f"{key} = {value}\n".replace("\x7f", "\\u007f") for key, value in flat.items()]
    lines += [_toml(value, key) for key, value in table.items() if key not in flat]
    return "".join(lines)
