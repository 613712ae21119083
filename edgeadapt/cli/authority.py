"""``edgeadapt authority``: certify the devices of a fleet. Its folder belongs on a separate machine, offline."""

import csv
import json
import os
from pathlib import Path

import click

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, of_file
from aggregation.pki import Authority, certificates, requests
from aggregation.pki.certificates import require_device_id
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import Reason
from aggregation.pki.tls import read_tls_request
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.store import CERTIFICATE, KEY, REVOKED, SHORTEST_PASSPHRASE
from edgeadapt.commandline import FILE, FOLDER, FiniteRange, as_json, number_option, option, path_option, print_result
from edgeadapt.formats import storage
from edgeadapt.formats.gateway.invitation import Invitation, new_secret

LONGEST = 2**16  # bytes of a request or a key, and that are read of a passphrase
LONGEST_LIST = 2**24  # bytes of a list of devices
LONGEST_PASSPHRASE = 1023  # bytes, for OpenSSL
DEVICE_DAYS, TLS_DAYS = 365, 90

folder = click.argument("folder", type=FOLDER, metavar="DIR")
passphrase_file = path_option(
    "--passphrase-file", "File whose first line is the passphrase. Default: ask for it.", type=FILE
)
list_days = number_option(
    "--list-days", "Days for which the revocation list is valid; devices then demand a newer one.", 1, 3650, default=30
)


@click.command()
@folder
@click.option("--name", default="edgeadapt authority", show_default=True, help="Name in its certificate.")
@number_option("--days", "Days for which its certificate is valid.", 1, 36_500, default=3650)
@list_days
@passphrase_file
@option(
    "--unencrypted", "Write the key without a passphrase. Anyone who reads the file can enrol devices.", is_flag=True
)
@as_json
def init(
    folder: Path, name: str, days: int, list_days: int, passphrase_file: Path | None, unencrypted: bool, as_json: bool
) -> None:
    """Create an authority in DIR.

    \b
    Example:
      edgeadapt authority init authority
    """
    if unencrypted and passphrase_file:
        raise ConfigError("--unencrypted and --passphrase-file exclude each other: give one", about="--unencrypted")
    passphrase = None if unencrypted else _passphrase(passphrase_file, new=True)
    store = AuthorityStore.create(folder, name, days, list_days, passphrase)
    certificate, key = folder / CERTIFICATE, folder / KEY
    row = {"authority": store.root.fingerprint, "certificate": str(certificate), "key": str(key)}
    line = f"pin {certificate} on the devices and the coordinator; keep {key} here"
    print_result(row, f"authority {store.root.fingerprint}\n{line}", as_json)


@click.command()
@folder
@click.option("--name", metavar="DEVICE", help="Device id. Default: the one in the request.")
@path_option(
    "--request",
    "PKCS #10 request from 'edgeadapt device enrol', or of a gateway from 'edgeadapt coordinator tls-request'.",
    type=FILE,
)
@path_option("--public-key", "Ed25519 public key in PEM, instead of a request.", type=FILE)
@option("--host HOST", "Of a gateway: name or IP of its TLS key; may be repeated.", name="hosts", multiple=True)
@number_option("--days", f"Days for which it is valid.  [default: {DEVICE_DAYS}, of a gateway {TLS_DAYS}]", 1, 3650)
@path_option("--out", "Write the certificate here. Default: print it.", type=FILE)
@passphrase_file
@as_json
def issue(
    folder: Path,
    name: str | None,
    request: Path | None,
    public_key: Path | None,
    hosts: tuple[str, ...],
    days: int | None,
    out: Path | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Certify a device's key; with --host, a gateway's TLS key for the names at which devices reach it.

    Compare the printed key id with the one that the device shows: nothing else proves which device sent the request.

    \b
    Examples:
      edgeadapt authority issue authority --request kitchen.csr --days 365 --out kitchen.pem
      edgeadapt authority issue authority --name kitchen --public-key kitchen.pub
      edgeadapt authority issue authority --request fleet/tls.csr --host fleet.example --out fleet/tls.pem
    """
    if hosts and (name or public_key or request is None):
        raise ConfigError("--host goes with --request alone, from 'edgeadapt coordinator tls-request'", about="--host")
    if out is not None and not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{out} cannot be written: choose another --out", about="--out")
    store = AuthorityStore(folder)
    if hosts and request:
        with of_file(request):
            subject, tls = read_tls_request(storage.read(request, LONGEST))
        key_id, days = tls.key_id, days or TLS_DAYS
        der = store.issue_tls(unlock(store, passphrase_file), subject, tls, hosts, days)
    else:
        subject, key = _requested(name, request, public_key)
        key_id, days = key.key_id, days or DEVICE_DAYS
        der = store.issue(unlock(store, passphrase_file), subject, key, days)
    pem = certificates.to_pem(der)
    if out is not None:
        storage.replace(out, pem, storage.PUBLIC)
    if as_json:
        row = {"name": subject, "hosts": hosts} if hosts else {"device": subject}
        about = {"key": key_id, "days": days, "file": out and str(out), "certificate": pem.decode()}
        click.echo(json.dumps(row | about))
        return
    if out is None:
        click.echo(pem.decode(), nl=False)
    what = f"TLS key {key_id} for {', '.join(hosts)}," if hosts else f"key {key_id} for"
    click.echo(f"certified {subject} with the {what} {days} days", err=True)


@click.command()
@folder
@click.option("--name", metavar="DEVICE", help="Device id, which the certificates will have.")
@path_option("--names", "Instead: a device id a line, or a CSV file's first column.", type=FILE)
@path_option("--out", "With --names: a token goes to FOLDER/DEVICE.token.", metavar="FOLDER")
@path_option("--coordinator", "Its public key, which the device pins.", required=True, type=FILE)
@click.option("--enrolment", required=True, metavar="HOST:PORT", help="Where 'edgeadapt authority serve' listens.")
@click.option("--gateway", required=True, metavar="HOST:PORT", help="The coordinator's gateway; several with commas.")
@option("--hours", "For which it is valid.", type=FiniteRange(0.01, 24 * 90), default=24.0, show_default=True)
@as_json
def invite(
    folder: Path,
    name: str | None,
    names: Path | None,
    out: Path | None,
    coordinator: Path,
    enrolment: str,
    gateway: str,
    hours: float,
    as_json: bool,
) -> None:
    """Print an invitation: a token with which one device can enrol over a network, once. Or write those of many.

    Give it to the device's owner only: whoever has it can enrol in the device's place. It needs no passphrase, because
    nothing is certified until the token is used. With --names, a repeat goes on: tokens that are in FOLDER stay.

    \b
    Examples:
      edgeadapt authority invite authority --name kitchen --coordinator fleet/coordinator.pem \\
        --enrolment authority.example:9444 --gateway fleet.example:9443
      edgeadapt authority invite authority --names devices.csv --out tokens --coordinator fleet/coordinator.pem \\
        --enrolment authority.example:9444 --gateway fleet.example:9443
    """
    if (name is None) == (names is None) or (names is None) != (out is None):
        raise ConfigError("name one device with --name, or many with --names and --out", about="--names")
    store = AuthorityStore(folder)
    with of_file(coordinator):
        key = PublicKey.from_pem(storage.read(coordinator, LONGEST))

    def made(device: str) -> tuple[str, str]:
        invitation = Invitation(new_secret(SystemEntropy()), device, enrolment, gateway, store.root.der, key.raw)
        token = invitation.to_text()
        return token, f"{store.invite(device, invitation.key.public, hours).isoformat(timespec='seconds')}"

    if name is not None:
        token, until = made(name)
        if not as_json:
            click.echo(f"for {name}, once, until {until}:", err=True)
        print_result({"device": name, "token": token, "until": until}, token, as_json)
    elif names is not None and out is not None:
        listed = _listed(names)
        out.mkdir(mode=0o700, exist_ok=True)
        missing = [device for device in listed if not (out / f"{device}.token").exists()]
        for device in missing:
            storage.create(out / f"{device}.token", f"{made(device)[0]}\n".encode(), storage.PRIVATE)
        row = {"devices": listed, "invited": missing, "folder": str(out)}
        print_result(row, f"{len(missing)} of {len(listed)} devices invited, for {hours:g} hours: {out}", as_json)


def _listed(path: Path) -> list[str]:
    """Read device ids, each once whatever its case. Raises DataError: names the line of one that no device can have."""
    try:
        lines = csv.reader(storage.read(path, LONGEST_LIST).decode("utf-8-sig").splitlines(), strict=True)
        found, seen = list[str](), set[str]()
        for cells in lines:
            device = cells[0].strip() if cells else ""
            if not device or (not found and device.casefold() in ("name", "device")):
                continue
            if device.casefold() in seen:
                raise ConfigError(f"{device!r} is there twice", about="device.id")
            seen.add(device.casefold())
            found.append(require_device_id(device))
    except (ConfigError, csv.Error, UnicodeDecodeError) as error:
        at = "" if isinstance(error, UnicodeDecodeError) else f":{lines.line_num}"
        raise DataError(f"{path}{at}: {error}", about=path.name) from error
    if not found:
        raise DataError(f"{path} names no device", about=path.name)
    return found


@click.command()
@folder
@click.argument("which", metavar="[NAME|SERIAL]", required=False)
@option(
    "--reason",
    "Reason in the list.",
    type=click.Choice([reason.value for reason in Reason]),
    default=Reason.UNSPECIFIED.value,
    show_default=True,
)
@list_days
@passphrase_file
@as_json
def revoke(
    folder: Path, which: str | None, reason: str, list_days: int, passphrase_file: Path | None, as_json: bool
) -> None:
    """Revoke a device's certificates, or one by its serial, and sign a new revocation list.

    Without NAME or SERIAL, sign the list again: do so before the last one expires. Copy revoked.crl from DIR to the
    coordinator's state directory; it sends the list to devices with its next offer.

    \b
    Examples:
      edgeadapt authority revoke authority kitchen --reason keyCompromise
      edgeadapt authority revoke authority --list-days 30
    """
    store = AuthorityStore(folder)
    authority = unlock(store, passphrase_file)
    if which is None:
        number = store.sign_list(authority, list_days)
        line = f"revocation list {number}: copy {folder / REVOKED} to the coordinator"
        print_result({"number": number, "list": str(folder / REVOKED)}, line, as_json)
        return
    new = store.revoke(authority, which, Reason(reason), list_days)
    lines = [f"revoked {certificate.name}, serial {certificate.serial}" for certificate in new]
    lines.append(f"{'' if new else 'already revoked; '}copy {folder / REVOKED} to the coordinator")
    revoked = [{"device": certificate.name, "serial": certificate.serial} for certificate in new]
    print_result({"revoked": revoked, "list": str(folder / REVOKED)}, "\n".join(lines), as_json)


@click.command("list")
@folder
@as_json
def list_(folder: Path, as_json: bool) -> None:
    """List every certificate that was issued, with its status.

    \b
    Example:
      edgeadapt authority list authority
    """
    rows = AuthorityStore(folder).certificates()
    if as_json:
        certificates = [{**row.model_dump(mode="json", exclude={"event"}), "status": status} for row, status in rows]
        click.echo(json.dumps({"certificates": certificates}))
        return
    for row, status in rows:
        click.echo(f"{row.name:20} {status:24} until {row.not_after:%Y-%m-%d}  key {row.key}  serial {row.serial}")


def _requested(name: str | None, request: Path | None, public_key: Path | None) -> tuple[str, PublicKey]:
    if (request is None) == (public_key is None):
        raise ConfigError("give either --request or --public-key", about="--request")
    if request is not None:
        with of_file(request):
            requested, key = requests.read_request(storage.read(request, LONGEST))
        if name not in (None, requested):
            text = f"the request is for {requested}, not for {name}: leave out --name, or name the right request"
            raise ConfigError(text, about="--name")
        return requested, key
    if name is None or public_key is None:
        raise ConfigError("--public-key needs --name, the device's id", about="--name")
    with of_file(public_key):
        return name, PublicKey.from_pem(storage.read(public_key, LONGEST))


def unlock(store: AuthorityStore, passphrase_file: Path | None) -> Authority:
    return store.unlock(_passphrase(passphrase_file, new=False) if store.encrypted else None)


def _passphrase(file: Path | None, *, new: bool) -> bytes:
    passphrase = _typed(new) if file is None else _first_line(file)
    if len(passphrase) > LONGEST_PASSPHRASE:
        text = f"the passphrase has more than {LONGEST_PASSPHRASE} bytes: choose a shorter one"
        raise ConfigError(text, about="passphrase")
    return passphrase


def _first_line(path: Path) -> bytes:
    """Read the first line of a file, or of a pipe from a password manager, which need not end."""
    with path.open("rb") as file:
        return file.read(LONGEST).split(b"\n", 1)[0].rstrip(b"\r")


def _typed(new: bool) -> bytes:
    prompt = f"Passphrase of the authority's key{f', {SHORTEST_PASSPHRASE} characters or more' if new else ''}"
    try:
        typed: str = click.prompt(prompt, hide_input=True, confirmation_prompt=new, err=True)
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            raise ConfigError("no passphrase was typed: give --passphrase-file", about="--passphrase-file") from None
        raise
    return typed.encode()
