"""``edgeadapt authority``: who is a device of this fleet. Its folder belongs on a machine of its own, offline."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from aggregation.errors import ConfigError, of_file
from aggregation.pki import Authority, certificates, requests
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import Reason
from coordinator.authority.record import Issued
from coordinator.authority.store import REVOKED, SHORTEST, AuthorityStore

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
HEX = 16  # digits of a serial in a table
LONGEST = 2**16  # bytes: no request and no key is longer
LONGEST_PASSPHRASE = 1023  # bytes, for OpenSSL

folder = click.argument("folder", type=FOLDER, metavar="DIR")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
passphrase_file = click.option(
    "--passphrase-file", type=FILE, metavar="FILE", help="First line: the passphrase. Default: ask for it."
)
list_days = click.option(
    "--list-days",
    type=click.IntRange(1, 3650),
    default=30,
    show_default=True,
    help="Days until devices that have this revocation list demand a newer one.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def authority() -> None:
    """Enrol devices: certify their keys, revoke them, list them.

    Devices and coordinator pin authority.pem; the key stays in DIR. See docs/how-to/enrol-devices.md.
    """


@authority.command()
@folder
@click.option("--name", default="edgeadapt authority", show_default=True, help="Goes into its certificate.")
@click.option("--days", type=click.IntRange(1, 36_500), default=3650, show_default=True, help="How long it lasts.")
@list_days
@passphrase_file
@click.option("--unencrypted", is_flag=True, help="Keep the key without a passphrase: who reads it is the authority.")
def init(folder: Path, name: str, days: int, list_days: int, passphrase_file: Path | None, unencrypted: bool) -> None:
    """Make a new authority in DIR.

    \b
    Example:
      edgeadapt authority init authority
    """
    if unencrypted and passphrase_file:
        raise ConfigError("--unencrypted and --passphrase-file contradict each other")
    passphrase = None if unencrypted else _passphrase(passphrase_file, new=True)
    made = AuthorityStore.found(folder, name, days, list_days, passphrase)
    click.echo(f"authority {made.root.fingerprint}")
    click.echo(f"devices and coordinator pin {folder / 'authority.pem'}; {folder / 'authority.key'} stays here")


@authority.command()
@folder
@click.option("--name", metavar="DEVICE", help="Device id. Default: the one in the request.")
@click.option("--request", type=FILE, metavar="FILE", help="PKCS #10 request, as 'edgeadapt device enrol' makes it.")
@click.option("--public-key", type=FILE, metavar="FILE", help="Instead of a request: an Ed25519 public key in PEM.")
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it is valid.")
@click.option("--out", type=FILE, metavar="FILE", help="Write the certificate here. Default: print it.")
@passphrase_file
def issue(
    folder: Path,
    name: str | None,
    request: Path | None,
    public_key: Path | None,
    days: int,
    out: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Certify a device's key.

    Compare the key id that it prints with the one that the device shows: nothing else says whose request this is.

    \b
    Examples:
      edgeadapt authority issue authority --request kitchen.csr --days 365 --out kitchen.pem
      edgeadapt authority issue authority --name kitchen --public-key kitchen.pub
    """
    device, key = _asked(name, request, public_key)
    if out is not None and not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{out} cannot be written: choose another --out")
    office = AuthorityStore(folder)
    der = office.issue(_unlocked(office, passphrase_file), device, key, days)
    if out is None:
        click.echo(certificates.to_pem(der).decode(), nl=False)
    else:
        out.write_bytes(certificates.to_pem(der))
    click.echo(f"{device} has the key {key.key_id}, for {days} days", err=True)


@authority.command(short_help="Revoke a device's certificates, or one by its serial.")
@folder
@click.argument("which", metavar="NAME|SERIAL")
@click.option(
    "--reason",
    type=click.Choice([reason.value for reason in Reason]),
    default=Reason.UNSPECIFIED.value,
    show_default=True,
    help="Goes into the list.",
)
@list_days
@passphrase_file
def revoke(folder: Path, which: str, reason: str, list_days: int, passphrase_file: Path | None) -> None:
    """Revoke a device's certificates, or one by its serial, and sign a new revocation list.

    The list counts once the coordinator has it: copy revoked.crl from DIR to its home. Devices get it with an offer.

    \b
    Example:
      edgeadapt authority revoke authority kitchen --reason keyCompromise
    """
    office = AuthorityStore(folder)
    new = office.revoke(_unlocked(office, passphrase_file), which, Reason(reason), list_days)
    for each in new:
        click.echo(f"revoked {each.name}, serial {each.serial}")
    click.echo(f"{'' if new else 'revoked before; '}hand {folder / REVOKED} to the coordinator")


@authority.command()
@folder
@list_days
@passphrase_file
def crl(folder: Path, list_days: int, passphrase_file: Path | None) -> None:
    """Sign a fresh revocation list before the last one ends.

    \b
    Example:
      edgeadapt authority crl authority --list-days 30
    """
    office = AuthorityStore(folder)
    number = office.sign_list(_unlocked(office, passphrase_file), list_days)
    click.echo(f"revocation list {number}: hand {folder / REVOKED} to the coordinator")


@authority.command("list")
@folder
@as_json
def list_(folder: Path, as_json: bool) -> None:
    """Every certificate that was issued, and how it stands.

    \b
    Example:
      edgeadapt authority list authority
    """
    rows = AuthorityStore(folder).certificates()
    if as_json:
        certificates = [{**each.model_dump(mode="json", exclude={"event"}), "status": how} for each, how in rows]
        click.echo(json.dumps({"certificates": certificates}))
        return
    for each, how in rows:
        click.echo(_row(each, how))


def _row(each: Issued, how: str) -> str:
    return f"{each.name:20} {how:24} until {each.not_after:%Y-%m-%d}  key {each.key}  serial {each.serial}"


def _asked(name: str | None, request: Path | None, public_key: Path | None) -> tuple[str, PublicKey]:
    if (request is None) == (public_key is None):
        raise ConfigError("give either --request or --public-key")
    if request is not None:
        with of_file(request):
            asked, key = requests.read_request(_read(request))
        if name not in (None, asked):
            raise ConfigError(f"the request is for {asked}, not for {name}")
        return asked, key
    if name is None or public_key is None:
        raise ConfigError("--public-key needs --name")
    with of_file(public_key):
        return name, PublicKey.from_pem(_read(public_key))


def _read(path: Path) -> bytes:
    """A pipe is as good as a file here, and one that does not end is read as far as it could count."""
    with path.open("rb") as file:
        return file.read(LONGEST)


def _unlocked(office: AuthorityStore, passphrase_file: Path | None) -> Authority:
    return office.unlock(_passphrase(passphrase_file, new=False) if office.encrypted else None)


def _passphrase(file: Path | None, *, new: bool) -> bytes:
    found = _typed(new) if file is None else _read(file).split(b"\n", 1)[0].rstrip(b"\r")
    if len(found) > LONGEST_PASSPHRASE:
        raise ConfigError(f"the passphrase has more than {LONGEST_PASSPHRASE} bytes")
    return found


def _typed(new: bool) -> bytes:
    told = f"Passphrase for the authority's key{f', {SHORTEST} characters or more' if new else ''}"
    try:
        typed: str = click.prompt(told, hide_input=True, confirmation_prompt=new, err=True)
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            raise ConfigError("nobody is there to type the passphrase: give --passphrase-file") from None
        raise
    return typed.encode()
